"""Batches: which rows, in what order, padded to arrays.

The order of an epoch depends on (seed, epoch) alone, so (epoch, index) is all that a resumed run
needs to know.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_loading.tokenise import PreferenceRow, ScalarRow, TextRow
from errors import UserError

SORT_WINDOW = 64  # batches sorted together: padding stays near 1/64 of the range of lengths


@dataclass
class TextBatch:
    """B rows, right-padded to L tokens."""

    tokens: np.ndarray  # (B, L) int32
    mask: np.ndarray  # (B, L) float32, 1 on targets
    lengths: np.ndarray  # (B,) int32


@dataclass
class ScalarBatch:
    """B rows with their rewards."""

    tokens: np.ndarray  # (B, L) int32
    lengths: np.ndarray  # (B,) int32
    rewards: np.ndarray  # (B,) float32


@dataclass
class PreferenceBatch:
    """All N responses of some preference rows, for one forward pass, and the pairs among them."""

    tokens: np.ndarray  # (N, L) int32
    lengths: np.ndarray  # (N,) int32
    better: np.ndarray  # (P,) int32, row of `tokens` that wins
    worse: np.ndarray  # (P,) int32, row of `tokens` that loses
    margins: np.ndarray  # (P,) float32, 0 where the data gives none
    weights: np.ndarray  # (P,) float32, 1 / pairs of the same prompt, so that prompts count alike


Batch = TextBatch | ScalarBatch | PreferenceBatch


class BatchPlan:
    """Which rows stand in which batch of which epoch.

    Every epoch holds every row once, the tail as a smaller batch. Rows are shuffled, sorted by
    length within windows of SORT_WINDOW batches, cut into batches, and the batches shuffled.

    Args:
        lengths: tokens of each row.
        shuffle: False keeps the rows' own order (for evaluation), without sorting.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        pad_to_multiple: int = 1,
        shuffle: bool = True,
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

    def __len__(self) -> int:
        """Batches of one epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, each an array of row numbers."""
        rows = np.arange(len(self.lengths))
        cuts = range(self.batch_size, len(rows), self.batch_size)
        if not self.shuffle:
            return np.split(rows, cuts)
        random = np.random.default_rng([self.seed, epoch])
        rows = random.permutation(rows)
        window = self.batch_size * SORT_WINDOW
        for start in range(0, len(rows), window):
            part = rows[start : start + window]
            rows[start : start + window] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = np.split(rows, cuts)
        return [batches[i] for i in random.permutation(len(batches))]

    def padding_efficiency(self, epoch: int = 0) -> float:
        """Real tokens / tokens of the padded arrays, in one epoch."""
        width, wide = self.pad_to_multiple, 0
        for rows in self.epoch(epoch):
            wide += len(rows) * -(-int(self.lengths[rows].max()) // width) * width
        return float(self.lengths.sum() / wide)


class BatchIterator:
    """Batches without end, epoch after epoch, from any position.

    `epoch` and `index` say which batch comes next; a run resumed at them sees the same batches.
    """

    def __init__(
        self,
        rows: Sequence[TextRow] | Sequence[ScalarRow] | Sequence[PreferenceRow],
        plan: BatchPlan,
        *,
        pad_id: int = 0,
        epoch: int = 0,
        index: int = 0,
    ) -> None:
        self.rows, self.plan, self.pad_id = rows, plan, pad_id
        self.epoch, self.index = epoch, index
        self._order: tuple[int, list[np.ndarray]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, self.plan.epoch(self.epoch)
        rows = [self.rows[i] for i in self._order[1][self.index]]
        self.index += 1
        if self.index == len(self.plan):
            self.epoch, self.index = self.epoch + 1, 0
        return make_batch(rows, pad_id=self.pad_id, pad_to_multiple=self.plan.pad_to_multiple)

    def state_dict(self) -> dict[str, int]:
        """The position: which batch comes next."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a position."""
        self.epoch, self.index = state["epoch"], state["index"]


def epoch_batches(
    rows: Sequence[TextRow] | Sequence[ScalarRow] | Sequence[PreferenceRow],
    plan: BatchPlan,
    epoch: int = 0,
    *,
    pad_id: int = 0,
) -> Iterator[Batch]:
    """The batches of one epoch, for evaluation."""
    for indices in plan.epoch(epoch):
        batch = [rows[i] for i in indices]
        yield make_batch(batch, pad_id=pad_id, pad_to_multiple=plan.pad_to_multiple)


def make_batch(
    rows: Sequence[TextRow] | Sequence[ScalarRow] | Sequence[PreferenceRow],
    *,
    pad_id: int = 0,
    pad_to_multiple: int = 1,
) -> Batch:
    """Pads rows of one kind to arrays; the kind of batch follows from the kind of row."""
    if isinstance(rows[0], PreferenceRow):
        return _preference_batch(rows, pad_id, pad_to_multiple)
    tokens, lengths = pad_rows([row.tokens for row in rows], pad_id, pad_to_multiple)
    if isinstance(rows[0], ScalarRow):
        return ScalarBatch(tokens, lengths, np.array([row.reward for row in rows], np.float32))
    mask, _ = pad_rows([row.mask for row in rows], 0, pad_to_multiple)
    return TextBatch(tokens, mask.astype(np.float32), lengths)


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int = 0, pad_to_multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (B, L) int32, padded on the right to a multiple; lengths (B,) int32)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    width = -(-int(lengths.max()) // pad_to_multiple) * pad_to_multiple
    tokens = np.full((len(rows), width), pad_id, np.int32)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    return tokens, lengths


def _preference_batch(
    rows: Sequence[PreferenceRow], pad_id: int, pad_to_multiple: int
) -> PreferenceBatch:
    flat = [tokens for row in rows for tokens in row.responses]
    tokens, lengths = pad_rows(flat, pad_id, pad_to_multiple)
    pairs: list[tuple[int, int, float, float]] = []
    start = 0
    for row in rows:
        n = len(row.responses)
        own = [(i, j) for i in range(n) for j in range(n) if row.ranks[i] < row.ranks[j]]
        margin = row.margin or 0.0
        pairs += [(start + i, start + j, margin, 1 / len(own)) for i, j in own]
        start += n
    better, worse, margins, weights = zip(*pairs, strict=True)
    return PreferenceBatch(
        tokens,
        lengths,
        np.array(better, np.int32),
        np.array(worse, np.int32),
        np.array(margins, np.float32),
        np.array(weights, np.float32),
    )


def prompt_batch(count: int, batch_size: int, step: int, seed: int = 0) -> list[int]:
    """Which prompts step number `step` takes, always `batch_size` of them.

    Epoch after epoch of seeded permutations in one row, cut into batches that may span two
    epochs: every prompt comes once an epoch, and the step number is the whole position.
    """
    start = step * batch_size
    chosen: list[int] = []
    while len(chosen) < batch_size:
        epoch, offset = divmod(start + len(chosen), count)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        chosen += order[offset : offset + batch_size - len(chosen)].tolist()
    return chosen


# Packing ------------------------------------------------------------------------------------


def pack_rows(rows: Sequence[TextRow], length: int) -> list[TextRow]:
    """Puts whole rows together into rows of at most `length` tokens, with little left over.

    The longest first, each into the fullest pack that has room. The first token of each document
    is no target. Attention does cross from a document to those before it in the same pack, as
    in other trainers' packing without a block mask: use it where rows are alike, not where that
    would matter.

    Raises:
        UserError: a row longer than `length`.
    """
    packs: list[list[int]] = []  # row numbers
    room: list[tuple[int, int]] = []  # (tokens left, number of the pack), sorted
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens)):
        need = len(rows[i].tokens)
        if need > length:
            raise UserError(f"{rows[i].where}: {need} tokens do not fit into packs of {length}")
        at = bisect_left(room, (need, -1))
        left, pack = room.pop(at) if at < len(room) else (length, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(i)
        if left > need:
            insort(room, (left - need, pack))
    return [_packed([rows[i] for i in sorted(pack)]) for pack in packs]


def _packed(rows: list[TextRow]) -> TextRow:
    tokens = [token for row in rows for token in row.tokens]
    mask = [bit for row in rows for bit in (0, *row.mask[1:])]
    return TextRow(tokens, mask, rows[0].where)
