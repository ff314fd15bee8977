"""The reference's log-probabilities of all rows, computed once and kept in the run folder.

A file holds one flat float32 array, the tokens of all responses in the order of the rows. Its name
is made from what they depend on, so that a resumed run finds them and a changed one does not, and
from its own bytes, so that damage is noticed.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from data_utils import BatchPlan, make_batch
from distributed.group import here
from run_folder.secrets import tell
from safe_files import write_atomically, writing
from waiting import watched

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


def describe_model(model: nn.Module) -> str:
    """The same of a model's weights."""
    return describe_arrays(dict(tree_flatten(model.parameters())))


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
    known, file = fill_in(rows, batches, score, folder / NAME, key_of(rows, model))
    return f"{'read from' if known else 'kept in'} {file}"


def fill_in(
    rows: Sequence,
    batches: Iterable[tuple[np.ndarray, object]],
    score: Callable[[object], np.ndarray],
    folder: Path,
    key: str,
) -> tuple[bool, Path]:
    """Put the reference's log-probabilities into `rows`: those in `folder`, or else computed ones.

    Computed ones are kept there under a name that begins with `key`.

    `batches`: (row numbers, batch) of all rows; `score(batch)` gives (N, L) of a batch's responses
    in order. Returns whether the file was there, and the file.
    """
    workers = here()
    kept, file = find_kept(folder, key) if workers.rank == 0 else (None, None)
    if workers.once(lambda: kept is not None, "the reference's log-probabilities"):
        flat = workers.arrays({"flat": mx.array(kept)} if workers.rank == 0 else None, NAME)["flat"]
        give(rows, np.array(flat))
        return True, file
    flat = computed(rows, batches, score)
    give(rows, flat)
    if workers.rank == 0:
        content = io.BytesIO()
        np.save(content, flat, allow_pickle=False)
        file = folder / f"{key}-{sum_of(content.getvalue())}.npy"
        with writing(file):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content.getvalue())
    return False, file


def find_kept(folder: Path, key: str) -> tuple[np.ndarray | None, Path | None]:
    """(the flat array, its file) that was kept under a name that begins with `key`."""
    for file in folder.glob(f"{key}-*.npy"):
        content = file.read_bytes()
        if file.stem == f"{key}-{sum_of(content)}":
            return np.load(io.BytesIO(content), allow_pickle=False), file
        tell(f"warning: {file}: is torn or was altered; it is computed anew")
        file.unlink()
    return None, None


def computed(
    rows: Sequence,
    batches: Iterable[tuple[np.ndarray, object]],
    score: Callable[[object], np.ndarray],
) -> np.ndarray:
    """The flat array; each of several workers scores every so many batches."""
    lengths = [[len(tokens) for tokens, _ in responses_of(row)] for row in rows]
    starts = np.cumsum([0, *map(sum, lengths)])
    flat = np.zeros(starts[-1], dtype=np.float32)
    workers = here()
    for place, (numbers, batch) in enumerate(watched(batches, "reference")):
        if place % workers.size != workers.rank:
            continue
        found, at = score(batch), 0
        for number in numbers:
            start = starts[number]
            for length in lengths[number]:
                flat[start : start + length] = found[at, :length]
                start, at = start + length, at + 1
    return np.array(workers.sum(mx.array(flat), "the reference's log-probabilities"))


def give(rows: Sequence, flat: np.ndarray) -> None:
    """Put the flat array's numbers into the rows."""
    start = 0
    for row in rows:
        parts = []
        for tokens, _ in responses_of(row):
            parts.append(flat[start : start + len(tokens)])
            start += len(tokens)
        row.reference = parts if hasattr(row, "responses") else parts[0]


def sum_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
