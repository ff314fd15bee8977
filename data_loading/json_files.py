"""Rows of JSON Lines and of JSON arrays, each with the line where it stands."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_loading.values import MAX_DEPTH, RawRow, shape_problem, shorten, value_problem
from errors import UserError

MAX_LINE_BYTES = 64 * 1024 * 1024  # a longer line is not a row but a file of another kind


def decode_json(text: str) -> Any:
    """The one value in `text`; ValueError says what is wrong with it, also for repeated keys."""
    value, end, problem = _Decoder().value_at(text.strip(" \t\r\n"), 0)
    if problem is None and end < len(text.strip(" \t\r\n")):
        problem = "more text after the value"
    if problem is not None:
        raise ValueError(problem)
    return value


class _Decoder(json.JSONDecoder):
    """json's decoder that remembers a repeated key, which json itself drops in silence."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.repeated: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            keys = [key for key, _ in pairs]
            self.repeated = next(key for key in keys if keys.count(key) > 1)
        return fields

    def value_at(self, text: str, index: int) -> tuple[Any, int, str | None]:
        """The value that starts at `index`, where it ends, and what is wrong with it if anything.

        Raises ValueError with a readable message where the JSON itself is broken.
        """
        self.repeated = None
        try:
            value, end = self.raw_decode(text, index)
        except json.JSONDecodeError as error:
            raise ValueError(f"broken JSON at column {error.colno} ({error.msg})") from error
        except RecursionError as error:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
        except ValueError as error:  # an integer of thousands of digits
            raise ValueError(f"a number that cannot be read ({error})") from error
        if self.repeated is not None:
            return value, end, f"the field {shorten(self.repeated)} stands twice in one object"
        return value, end, value_problem(value, MAX_DEPTH)


def line_rows(path: Path) -> Iterator[RawRow]:
    decoder = _Decoder()
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if line is None:
            size = MAX_LINE_BYTES // 2**20
            yield RawRow(where, None, f"line longer than {size} MiB; one JSON object a line")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r\n")
            if not text:
                continue
            fields, end, problem = decoder.value_at(text, 0)
            problem = problem or shape_problem(fields)
            if problem is None and end < len(text):
                problem = f"more text after the object: {shorten(text[end:])}; one object a line"
        except UnicodeDecodeError as error:
            fields, problem = None, _not_utf8(line, error)
        except ValueError as error:
            fields, problem = None, f"{error}; one whole JSON object a line was expected"
        yield RawRow(where, None if problem else fields, problem)


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number, line), the line None where it is longer than MAX_LINE_BYTES."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            too_long = len(line) > MAX_LINE_BYTES
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES + 1)
            yield number, None if too_long else line


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"


def array_rows(path: Path) -> Iterator[RawRow]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: {_not_utf8(data, error)}") from error
    decoder, index, line, counted = _Decoder(), text.index("[") + 1, 1, 0
    first = True
    while True:
        index = _skip_space(text, index)
        line, counted = line + text.count("\n", counted, index), index
        where = f"{path}:{line}"
        if text[index : index + 1] == "]" and first:
            break
        try:
            fields, index, problem = decoder.value_at(text, index)
        except ValueError as error:
            cause = error.__cause__
            at = cause.lineno if isinstance(cause, json.JSONDecodeError) else line
            raise UserError(f"{path}:{at}: {error}; a JSON array was expected") from error
        problem = problem or shape_problem(fields)
        yield RawRow(where, None if problem else fields, problem)
        first, index = False, _skip_space(text, index)
        mark = text[index : index + 1]
        if mark == "]":
            break
        if mark != ",":
            line += text.count("\n", counted, index)
            raise UserError(f"{path}:{line}: broken JSON: ',' or ']' expected after a row")
        index += 1
    if (rest := _skip_space(text, index + 1)) < len(text):
        line += text.count("\n", counted, rest)
        raise UserError(f"{path}:{line}: more text after the closing ']' of the JSON array")


def _skip_space(text: str, index: int) -> int:
    while text[index : index + 1] in (" ", "\t", "\r", "\n"):
        index += 1
    return index
