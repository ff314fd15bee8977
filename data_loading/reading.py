"""Reading: a file or data set in, checked records out."""

from collections.abc import Callable, Iterable
from pathlib import Path

from data_loading.files import read_rows
from data_loading.formats import ALIASES, FORMATS, KINDS, KNOWN_FORMATS, recognise, to_record
from data_loading.messages import BadRow
from data_loading.records import Records
from data_loading.tables import dataset_rows, refuse_options
from data_loading.values import RawRow
from errors import UserError

Refusal = Callable[[str], str | None]


def read_records(
    path: str | Path,
    *,
    format: str | None = None,
    skip_bad_rows: bool = False,
    max_rows: int | None = None,
    refuse: Refusal | None = None,
) -> Records:
    """All rows of a JSONL, JSON, CSV or Parquet file.

    Args:
        format: one of FORMATS or ALIASES; recognised from the fields where it is None.
        skip_bad_rows: put bad rows into `refused` instead of raising on the first.
        max_rows: read no further than this many good rows.
        refuse: says of a kind of rows why the caller cannot use it; asked before rows are read.

    Raises:
        UserError: `FILE:LINE: what is wrong`, also where not one good row is left.
    """
    return collect_records(read_rows(path), str(path), format, skip_bad_rows, max_rows, refuse)


def read_dataset(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    format: str | None = None,
    skip_bad_rows: bool = False,
    max_rows: int | None = None,
    refuse: Refusal | None = None,
) -> Records:
    """All rows of what the `datasets` library opens: a hub name, a folder, a saved data set.

    With `streaming` nothing is downloaded beyond the `max_rows` rows that are read. A file is one
    split, train, as it is in the library.

    Raises:
        UserError: as read_records; also for a split that is not there, and for options that have
            no effect on what stands at `name`.
    """
    if Path(name).is_file():
        refuse_options(name, "a file", config, streaming)
        if split != "train":
            raise UserError(
                f"{name}: is a file, which has no split {split!r}: all its rows are train; "
                "--max-rows reads the first of them"
            )
        rows = read_rows(name)
    else:
        rows = dataset_rows(name, split, config=config, streaming=streaming)
    return collect_records(rows, name, format, skip_bad_rows, max_rows, refuse)


def collect_records(
    rows: Iterable[RawRow],
    name: str,
    format: str | None,
    skip_bad_rows: bool,
    max_rows: int | None,
    refuse: Refusal | None = None,
) -> Records:
    """Converts raw rows to records; see read_records."""
    if format is not None:
        format = format.replace("-", "_")
        format = ALIASES.get(format, format)
        if format not in FORMATS:
            raise UserError(f"format {format}: no such format; known: {', '.join(KNOWN_FORMATS)}")
    records = Records([], name=name)
    if max_rows is not None and max_rows < 1:
        raise UserError(f"max_rows {max_rows}: must be at least 1")
    try:
        for row in rows:
            try:
                if row.fields is None:
                    raise BadRow(row.problem)
                format = format or recognise(row.fields)
                if refuse is not None and not records.rows:
                    if problem := refuse(KINDS.get(format, format)):
                        raise UserError(f"{row.where}: {problem}")
                records.rows.append(to_record(row.fields, format, row.where))
            except BadRow as error:
                if not skip_bad_rows:
                    raise UserError(f"{row.where}: {error}") from error
                records.refused.append((row.where, str(error)))
            if max_rows is not None and len(records.rows) == max_rows:
                break
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error})") from error
    if not records.rows:
        bad = len(records.refused)
        why = f"all {bad} rows are bad; the first: {records.refused[0][1]}" if bad else "no rows"
        raise UserError(f"{name}: {why}")
    return records
