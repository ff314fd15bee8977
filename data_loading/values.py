"""What is common to all readers: a raw row, and what makes a value unusable in any of them."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

MAX_DEPTH = 64  # nested lists and objects; records need 4


class RawRow(NamedTuple):
    """One row: where it stands (`FILE:LINE`), its fields, or what is wrong with it."""

    where: str
    fields: dict[str, Any] | None
    problem: str | None = None


class BadRow(Exception):
    """What is wrong with one row; the reader adds the file and the line."""


def given(fields: Mapping[str, Any], name: str) -> bool:
    """Whether an optional field is there and filled in (a CSV has an empty cell instead)."""
    value = fields.get(name)
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, (list, tuple, dict)) and not value)


def agreed(
    fields: Mapping[str, Any],
    names: Sequence[str],
    read: Callable[[Any, str], Any],
    where: str = "",
) -> tuple[str, Any] | None:
    """(name, what `read` makes of its value) of the first of several names for one thing.

    None where none is filled in; BadRow where two of them say different things.
    """
    found = [(name, read(fields[name], name)) for name in names if given(fields, name)]
    for name, value in found[1:]:
        if value != found[0][1]:
            begin = f"{where}: " if where else ""
            raise BadRow(f"{begin}{found[0][0]} and {name} say different things; remove one")
    return found[0] if found else None


def shorten(value: Any, limit: int = 60) -> str:
    """`value` for an error message: one line, printable, at most `limit` characters."""
    short = reprlib.Repr()  # repr itself fails on deep nesting and is slow on what is huge
    short.maxstring = short.maxother = limit
    text = short.repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def row_problem(value: Any) -> str | None:
    """What makes a decoded value unusable as a row, whatever its format; None if nothing."""
    return shape_problem(value) or value_problem(value, MAX_DEPTH)


def shape_problem(value: Any) -> str | None:
    if isinstance(value, dict):
        return None
    return f"an object {{...}} was expected, found {shorten(value)}"


def value_problem(value: Any, depth: int) -> str | None:
    if isinstance(value, str):
        return None if value.isprintable() else _string_problem(value)
    if isinstance(value, (dict, list, tuple)):
        if depth == 0:
            return f"nested deeper than {MAX_DEPTH} levels"
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        for part in parts:
            if problem := value_problem(part, depth - 1):
                return problem
    return None


def _string_problem(text: str) -> str | None:
    if "\0" in text:
        return f"a NUL character in {shorten(text)}; remove it"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        char = text[error.start]
        if "\udc80" <= char <= "\udcff":  # what surrogateescape makes of a stray byte
            return f"not UTF-8 (byte 0x{ord(char) - 0xDC00:02x}); save the file as UTF-8"
        return f"half of a surrogate pair (\\u{ord(char):04x}), which is no character; remove it"
    return None
