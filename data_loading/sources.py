"""From command-line choices to training, validation and test rows."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_loading.files import DATA_SUFFIXES, dataset_rows, read_rows, refuse_options
from data_loading.formats import ALIASES, FORMATS, KINDS, KNOWN_FORMATS, recognise, to_record
from data_loading.messages import BadRow
from data_loading.preferences import set_aside
from data_loading.records import Records
from data_loading.values import RawRow
from errors import UserError
from waiting import watched

# ------------------------------------------------------------------------------ one data set


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


def raw_rows(
    path: str | Path | None, dataset: str | None, *, split: str = "train", config: str | None = None
) -> Iterator[RawRow]:
    """Rows as they are, of a file or else of a data set. UserError where it cannot be read."""
    name = path if path is not None else dataset
    try:
        yield from read_rows(path) if path else dataset_rows(dataset, split, config=config)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error})") from error


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
    records, aside = Records([], name=name), Counter()
    if max_rows is not None and max_rows < 1:
        raise UserError(f"max_rows {max_rows}: must be at least 1")
    try:
        for row in watched(rows, "reading"):
            try:
                if row.fields is None:
                    raise BadRow(row.problem)
                if why := set_aside(row.fields):
                    aside[why] += 1
                    continue
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
    records.notes += [f"{name}: {n:,} left out: {why}" for why, n in aside.items()]
    if not records.rows:
        bad = len(records.refused)
        why = f"all {bad} rows are bad; the first: {records.refused[0][1]}" if bad else "no rows"
        if aside and not bad:
            why = "nothing to use: " + "; ".join(f"{n:,} rows: {w}" for w, n in aside.items())
        raise UserError(f"{name}: {why}")
    return records


# ------------------------------------------------------------------------------ all of a run


def load_data(
    *,
    splits: Sequence[str] = ("train", "valid"),
    data: str | Path = "data",
    data_base: str = "",
    train_files: Sequence[str | Path] = (),
    datasets: Sequence[str] = (),
    dataset_config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    weights: Sequence[float] | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    validation_split_percentage: float | None = None,
    format: str | None = None,
    skip_bad_rows: bool = False,
    max_rows: int | None = None,
    seed: int = 0,
    refuse: Refusal | None = None,
) -> dict[str, Records]:
    """The rows of each split that was asked for and is there.

    Training rows come from `train_files` and `datasets`, mixed by `weights`, or, where neither
    is given, from `{data}/{data_base}train.jsonl` (or .json, .csv, .tsv, .parquet). Validation
    rows: `validation_file`, or a percentage of the training rows, or `{data}/{data_base}valid`;
    test rows: `test_file` or `{data}/{data_base}test`. Validation may be missing, the others not.
    `max_rows` counts for each file or data set on its own; `refuse` is that of `read_records`.

    Raises:
        UserError: a file that is missing or bad, or choices that contradict each other.
    """
    reading: dict[str, Any] = {
        "format": format,
        "skip_bad_rows": skip_bad_rows,
        "max_rows": max_rows,
        "refuse": refuse,
    }
    if validation_file and validation_split_percentage:
        raise UserError("give --validation-file or --validation-split-percentage, not both")
    own = not train_files and not datasets
    if weights is not None and own:
        raise UserError("weights are for several training files or data sets; none is given")
    found: dict[str, Records] = {}
    if "train" in splits or ("valid" in splits and validation_split_percentage):
        if own:
            sets = [read_records(folder_file(data, data_base, "train"), **reading)]
        else:
            sets = [read_records(path, **reading) for path in train_files]
            opening = {"split": split, "config": dataset_config, "streaming": streaming}
            sets += [read_dataset(name, **opening, **reading) for name in datasets]
        if validation_split_percentage:
            # Before mixing, so that no repeated row stands on both sides.
            pairs = [split_records(rows, validation_split_percentage, seed) for rows in sets]
            sets = [pair[0] for pair in pairs]
            found["valid"] = mix_records([pair[1] for pair in pairs])
        found["train"] = mix_records(sets, weights, seed)
    if "valid" in splits and "valid" not in found:
        path = validation_file
        if path is None and own:
            path = folder_file(data, data_base, "valid", required=False)
        if path is not None:
            found["valid"] = read_records(path, **reading)
    if "test" in splits:
        path = folder_file(data, data_base, "test") if test_file is None else test_file
        found["test"] = read_records(path, **reading)
    return {name: found[name] for name in splits if name in found}


def folder_file(
    data: str | Path, data_base: str, split: str, *, required: bool = True
) -> Path | None:
    """`{data}/{data_base}{split}.jsonl`, or the same with another known suffix."""
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --data takes the folder with the data files")
    for suffix in DATA_SUFFIXES:
        path = folder / f"{data_base}{split}{suffix}"
        if path.exists():
            return path
    if not required:
        return None
    there = sorted(p.stem.removesuffix(split) for p in folder.glob(f"*{split}.*"))
    there = [base for base in there if base != data_base]
    names = [base or "''" for base in there[:4]]  # as a shell takes an empty one
    hint = f"--data-base could be {' or '.join(names)}" if names else "no such files there"
    raise UserError(f"{folder / (data_base + split + '.jsonl')}: no such file; {hint}")


def split_records(records: Records, percentage: float, seed: int = 0) -> tuple[Records, Records]:
    """(training rows, validation rows); the latter drawn by seed, at least one, order kept."""
    if not 0 < percentage < 100:
        raise UserError(f"validation split of {percentage:g}%: must lie between 0 and 100")
    count = max(1, round(len(records) * percentage / 100))
    if count >= len(records):
        raise UserError(
            f"{records.name}: a validation split of {percentage:g}% of {len(records)} rows "
            "leaves nothing to train on"
        )
    drawn = set(np.random.default_rng(seed % 2**64).permutation(len(records))[:count].tolist())
    train = [row for i, row in enumerate(records) if i not in drawn]
    valid = [row for i, row in enumerate(records) if i in drawn]
    return (
        Records(train, records.refused, records.name, records.notes),
        Records(valid, [], records.name),
    )


def mix_records(
    sets: Sequence[Records], weights: Sequence[float] | None = None, seed: int = 0
) -> Records:
    """Several data sets as one.

    Without weights: all rows, each once. With weights: each set makes up its share of an epoch.
    No row is left out: the set that is largest for its weight comes once, the others are
    repeated, whole and then in part by seed, until their share is met.
    """
    if weights is None:
        weights = [len(rows) for rows in sets]
    if len(weights) != len(sets):
        raise UserError(f"{len(sets)} data sets but {len(weights)} weights")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"weights {list(weights)}: each must be greater than 0")
    per_weight = max(len(rows) / weight for rows, weight in zip(sets, weights, strict=True))
    random = np.random.default_rng(seed % 2**64)
    counts = [
        max(len(rows), round(weight * per_weight))
        for rows, weight in zip(sets, weights, strict=True)
    ]
    mixed = Records([], name=" + ".join(rows.name for rows in sets))
    for rows, count in zip(sets, counts, strict=True):
        whole, part = divmod(count, len(rows))
        mixed.rows += rows.rows * whole
        mixed.rows += [rows[i] for i in sorted(random.permutation(len(rows))[:part])]
        mixed.refused += rows.refused
        mixed.notes += rows.notes
        if len(sets) > 1:
            mixed.notes.append(
                f"{rows.name}: {count / sum(counts):.0%} of an epoch, each of its {len(rows)} rows "
                f"{count / len(rows):.3g} times"
            )
    return mixed
