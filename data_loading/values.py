"""What is common to all readers: a raw row, and what makes a value unusable in any of them."""

import reprlib
from typing import Any, NamedTuple

MAX_DEPTH = 64  # nested lists and objects; records need 4


class RawRow(NamedTuple):
    """One row: where it stands (`FILE:LINE`), its fields, or what is wrong with it."""

    where: str
    fields: dict[str, Any] | None
    problem: str | None = None


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
