"""Batches: which rows, in what order, padded to arrays.

The order of an epoch depends on (seed, epoch) alone, so (epoch, index) is all that a resumed run
needs to know.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_loading.collate import Batch, Rows, make_batch
from errors import UserError

SORT_WINDOW = 64  # batches sorted together: padding stays near 1/64 of the range of lengths

# (lengths of a batch's sequences, padded length) -> [(which of them, padded length) of each array]
Passes = Callable[[np.ndarray, int], list[tuple[np.ndarray, int]]]


def _random(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, epoch])  # numpy takes no negative seed


class BatchPlan:
    """Which rows stand in which batch of which epoch.

    Every epoch holds every row once, the tail as a smaller batch. Rows are shuffled, sorted by
    length within windows of SORT_WINDOW batches, cut into batches, and the batches shuffled.

    Args:
        lengths: tokens of each row.
        shuffle: False keeps the rows' own order (for evaluation), without sorting.
        least: a tail of fewer rows joins the batch before it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        pad_to_multiple: int = 1,
        shuffle: bool = True,
        least: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: must be at least 1")
        if pad_to_multiple < 1:
            raise UserError(f"pad to multiple {pad_to_multiple}: must be at least 1")
        if not len(lengths):
            raise UserError("there are no rows to make batches of")
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.pad_to_multiple = pad_to_multiple
        self.cuts = [
            at for at in range(batch_size, len(lengths), batch_size) if len(lengths) - at >= least
        ]

    def __len__(self) -> int:
        """Batches of one epoch."""
        return len(self.cuts) + 1

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, each an array of row numbers."""
        rows = np.arange(len(self.lengths))
        if not self.shuffle:
            return np.split(rows, self.cuts)
        random = _random(self.seed, epoch)
        rows = random.permutation(rows)
        window = self.batch_size * SORT_WINDOW
        for start in range(0, len(rows), window):
            part = rows[start : start + window]
            rows[start : start + window] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = np.split(rows, self.cuts)
        return [batches[i] for i in random.permutation(len(batches))]

    def notes(self, update: int, rows: Sequence[int]) -> dict[str, float]:
        """What is logged of an update that was made from these rows."""
        return {}

    def padding_efficiency(
        self,
        sequences: Sequence[Sequence[int]] | None = None,
        passes: Passes | None = None,
        epoch: int = 0,
    ) -> float:
        """Real tokens / tokens of the padded arrays, in one epoch.

        Args:
            sequences: `Tokenised.sequences`, where a row may bring several into a batch.
            passes: how a batch's sequences are cut into arrays, where it is not one array.
        """
        multiple, real, wide = self.pad_to_multiple, 0, 0
        for rows in self.epoch(epoch):
            lengths = self.lengths[rows]
            if sequences is not None:
                lengths = np.array([length for row in rows for length in sequences[row]])
            width = -(-int(lengths.max()) // multiple) * multiple
            arrays = passes(lengths, width) if passes else [(lengths, width)]
            real += int(lengths.sum())
            wide += sum(len(members) * int(width) for members, width in arrays)
        return real / wide


class BatchIterator:
    """Batches without end, epoch after epoch, from any position.

    `epoch` and `index` say which batch comes next; a run resumed at them sees the same batches.
    `taken` are the row numbers of the last one.
    """

    def __init__(
        self,
        rows: Rows,
        plan: BatchPlan,
        *,
        pad_id: int = 0,
        epoch: int = 0,
        index: int = 0,
    ) -> None:
        self.rows, self.plan, self.pad_id = rows, plan, pad_id
        self.epoch, self.index = epoch, index
        self.taken = np.array([], dtype=np.int64)
        self._order: tuple[int, list[np.ndarray]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, self.plan.epoch(self.epoch)
        self.taken = self._order[1][self.index]
        rows = [self.rows[i] for i in self.taken]
        self.index += 1
        if self.index == len(self.plan):
            self.epoch, self.index = self.epoch + 1, 0
        return make_batch(rows, pad_id=self.pad_id, pad_to_multiple=self.plan.pad_to_multiple)

    @property
    def position(self) -> int:
        """Batches before the one that comes next."""
        return self.epoch * len(self.plan) + self.index

    def state_dict(self) -> dict[str, int]:
        """The position: which batch comes next."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position."""
        self.epoch, self.index = state["epoch"], state["index"]


def epoch_batches(
    rows: Rows,
    plan: BatchPlan,
    epoch: int = 0,
    *,
    pad_id: int = 0,
) -> Iterator[Batch]:
    """The batches of one epoch, for evaluation."""
    for indices in plan.epoch(epoch):
        batch = [rows[i] for i in indices]
        yield make_batch(batch, pad_id=pad_id, pad_to_multiple=plan.pad_to_multiple)


def prompt_batch(count: int, batch_size: int, step: int, seed: int = 0) -> list[int]:
    """Which prompts step number `step` takes, always `batch_size` of them.

    Epoch after epoch of seeded permutations in one row, cut into batches that may span two
    epochs: every prompt comes once an epoch, and the step number is the whole position.
    """
    start = step * batch_size
    chosen: list[int] = []
    while len(chosen) < batch_size:
        epoch, offset = divmod(start + len(chosen), count)
        order = _random(seed, epoch).permutation(count)
        chosen += order[offset : offset + batch_size - len(chosen)].tolist()
    return chosen
