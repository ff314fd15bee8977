"""Rows out of files: JSON Lines, a JSON array, CSV, Parquet.

Every reader yields `RawRow`s. A row that cannot be read carries its problem, so that the caller
may stop or count it; a file that cannot be read on raises UserError. Nothing else is raised.
"""

from collections.abc import Iterator
from pathlib import Path

from data_loading.json_files import array_rows, line_rows
from data_loading.tables import csv_rows, parquet_rows
from data_loading.values import RawRow
from errors import UserError

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
