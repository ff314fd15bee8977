"""Rows of CSV and Parquet files and of what the `datasets` library opens."""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_loading.json_files import MAX_LINE_BYTES
from data_loading.values import RawRow, row_problem, shorten
from errors import UserError


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
