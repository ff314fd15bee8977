"""Rows out of files: JSON Lines, a JSON array, CSV, Parquet.

Every reader yields `RawRow`s. A row that cannot be read carries its problem, so that the caller
may stop or count it; a file that cannot be read on raises UserError. Nothing else is raised.
"""

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_loading.values import (
    MAX_DEPTH,
    RawRow,
    row_problem,
    shape_problem,
    shorten,
    value_problem,
)
from errors import UserError

# ------------------------------------------------------------------------------ JSON


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


# ------------------------------------------------------------------------------ tables


def csv_rows(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    # surrogateescape lets a stray byte through to the check of its own row, which knows the line.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(where, None, f"broken CSV ({error})")
                continue
            if not cells:
                continue
            if header is None:
                header = [name.strip() for name in cells]
                if twice := {name for name in header if header.count(name) > 1}:
                    raise UserError(f"{where}: the column {shorten(min(twice))} stands twice")
                continue
            if len(cells) != len(header):
                problem = f"{len(cells)} cells, but the header names {len(header)} columns"
                yield RawRow(where, None, problem)
                continue
            fields = dict(zip(header, cells, strict=True))
            problem = row_problem(fields)
            yield RawRow(where, None if problem else fields, problem)


def parquet_rows(path: Path) -> Iterator[RawRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = f"{path}: reading Parquet needs pyarrow: pip install pyarrow"
        raise UserError(message) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    problem = row_problem(fields)
                    yield RawRow(f"{path}:row {number}", None if problem else fields, problem)
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as error:
        reason = shorten(str(error).partition("\n")[0], 120)
        raise UserError(f"{path}:row {number + 1}: broken Parquet file ({reason})") from error


def dataset_rows(
    name: str, split: str = "train", *, config: str | None = None, streaming: bool = False
) -> Iterator[RawRow]:
    """Rows of anything the `datasets` library opens: a hub name, a folder, a saved data set."""
    try:
        import datasets
    except ImportError as error:
        message = f"{name}: reading this data set needs datasets: pip install datasets"
        raise UserError(message) from error
    where = f"{name}[{split}]"
    number = 0
    try:
        if any((Path(name) / mark).exists() for mark in ("state.json", "dataset_dict.json")):
            refuse_options(name, "a saved data set", config, streaming)
            opened = saved_rows(datasets, name, split)
        else:
            opened = datasets.load_dataset(name, config, split=split, streaming=streaming)
        for fields in opened:
            number += 1
            problem = row_problem(fields)
            yield RawRow(f"{where}:row {number}", None if problem else fields, problem)
    except (GeneratorExit, UserError):
        raise
    except Exception as error:  # the library raises dozens of types for user mistakes
        reason = shorten(f"{type(error).__name__}: {error}".partition("\n")[0], 160)
        raise UserError(f"{where}:row {number + 1}: datasets cannot read it ({reason})") from error


def refuse_options(name: str, what: str, config: str | None, streaming: bool) -> None:
    """UserError where an option was given that has no effect on `what` stands at `name`."""
    if config is not None:
        raise UserError(f"{name}: is {what}, which has no configurations (--dataset-config)")
    if streaming:
        raise UserError(f"{name}: is {what} on the disk, where --streaming has no effect")


def saved_rows(datasets: Any, name: str, split: str) -> Iterable[dict[str, Any]]:
    """Rows of a folder that `save_to_disk` wrote; `split` as in `load_dataset`: train[:50%]+test.

    A saved `DatasetDict` names its splits. A saved `Dataset` is one split: the one it was taken
    from, where the library noted that, or else train.
    """
    opened = datasets.load_from_disk(name)
    if not isinstance(opened, dict):
        noted = re.match(r"\w+", str(opened.split or ""))  # a part may be noted as test[:50%]
        opened = {noted.group() if noted else "train": opened}
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({key: len(rows) for key, rows in opened.items()})
    except (AssertionError, ValueError) as error:
        reason, there = str(error).partition(". Should")[0], ", ".join(map(str, opened))
        raise UserError(
            f"{name}: --split {shorten(split)}: {shorten(reason, 160)}; there is {there}, and "
            "parts of it as in train[:50%]"
        ) from error
    return itertools.chain.from_iterable(
        opened[part.splitname].select(range(part.from_, part.to)) for part in parts
    )


# ------------------------------------------------------------------------------ any file


DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_rows(path: str | Path) -> Iterator[RawRow]:
    """Rows of a data file; the kind is told from the suffix, else from the first bytes.

    Raises:
        UserError: no such file, not a regular file, not readable, not UTF-8.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file")
        if path.is_dir():
            raise UserError(f"{path}: is a folder; a data file was expected")
        if not path.is_file():
            raise UserError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            head = file.read(4096)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    unnamed = path.suffix not in DATA_SUFFIXES
    if path.suffix == ".parquet" or (unnamed and head[:4] == b"PAR1"):
        return parquet_rows(path)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}:1: the file is UTF-16; save it as UTF-8")
    if path.suffix in (".csv", ".tsv"):
        return csv_rows(path)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        return array_rows(path)
    return line_rows(path)
