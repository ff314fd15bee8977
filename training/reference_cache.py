"""The reference's log-probabilities of all rows, computed once and kept in the run folder.

A file holds one flat float32 array, the tokens of all responses in the order of the rows. Its name
is made from what they depend on, so that a resumed run finds them and a changed one does not.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from data_utils import BatchPlan, make_batch
from safe_files import write_atomically, writing

NAME = "reference"  # of the folder in the run folder


def key_of(rows: Sequence, model: str) -> str:
    """What tells rows and model from others; `model` describes the reference."""
    found = hashlib.sha256(model.encode())
    for row in rows:
        for tokens, mask in responses_of(row):
            found.update(np.asarray([len(tokens), *tokens, *mask], np.int64).tobytes())
    return found.hexdigest()[:16]


def describe_arrays(arrays: dict[str, mx.array]) -> str:
    """A hash of the arrays of an adapter that is the reference."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(name.encode() + np.array(array.astype(mx.float32)).tobytes())
    return found.hexdigest()


def responses_of(row) -> list[tuple[list[int], list[int]]]:
    """(tokens, mask) of each response of a preference row or an unpaired one."""
    if hasattr(row, "responses"):
        return list(zip(row.responses, row.masks, strict=True))
    return [(row.tokens, row.mask)]


def fill_in_split(
    rows: Sequence,
    plan: BatchPlan,
    score: Callable[[object], np.ndarray],
    folder: Path,
    model: str,
) -> str:
    """`fill_in` for all rows of a split, in the batches of `plan`; says where they come from.

    `folder` is the run's; `model` describes the reference.
    """
    batches = ((numbers, make_batch([rows[i] for i in numbers])) for numbers in plan.epoch(0))
    file = folder / NAME / f"{key_of(rows, model)}.npy"
    known = fill_in(rows, batches, score, file)
    return f"{'read from' if known else 'kept in'} {file}"


def fill_in(
    rows: Sequence,
    batches: Iterable[tuple[np.ndarray, object]],
    score: Callable[[object], np.ndarray],
    file: Path,
) -> bool:
    """Put the reference's log-probabilities into `rows`: those of `file`, or else computed ones.

    Computed ones are kept in `file`.

    `batches`: (row numbers, batch) of all rows; `score(batch)` gives (N, L) of a batch's responses
    in order. Returns whether the file was there.
    """
    known = file.is_file()
    if known:
        flat = np.load(file, allow_pickle=False)
        start = 0
        for row in rows:
            parts = []
            for tokens, _ in responses_of(row):
                parts.append(flat[start : start + len(tokens)])
                start += len(tokens)
            _give(row, parts)
        return True
    for numbers, batch in batches:
        found, at = score(batch), 0
        for number in numbers:
            parts = []
            for tokens, _ in responses_of(rows[number]):
                parts.append(found[at, : len(tokens)].copy())
                at += 1
            _give(rows[number], parts)
    every = [part for row in rows for part in _given(row)]
    content = io.BytesIO()
    np.save(content, np.concatenate(every), allow_pickle=False)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content.getvalue())
    return False


def _give(row, parts: list[np.ndarray]) -> None:
    row.reference = parts if hasattr(row, "responses") else parts[0]


def _given(row) -> list[np.ndarray]:
    return row.reference if hasattr(row, "responses") else [row.reference]
