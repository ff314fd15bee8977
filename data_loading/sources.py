"""From command-line choices to training, validation and test rows."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_loading.files import DATA_SUFFIXES
from data_loading.reading import Refusal, read_dataset, read_records
from data_loading.records import Records
from errors import UserError


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
    return Records(train, records.refused, records.name), Records(valid, [], records.name)


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
        if len(sets) > 1:
            mixed.notes.append(
                f"{rows.name}: {count / sum(counts):.0%} of an epoch, each of its {len(rows)} rows "
                f"{count / len(rows):.3g} times"
            )
    return mixed
