"""Rows of one kind to padded arrays, and packing."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_loading.rows import PreferenceRow, ScalarRow, TextRow, UnpairedRow, ranked_pairs
from errors import UserError
from padding import pad_rows, round_up


@dataclass
class TextBatch:
    """B rows, right-padded to L tokens."""

    tokens: np.ndarray  # (B, L) int32
    mask: np.ndarray  # (B, L) float32, 1 on targets
    lengths: np.ndarray  # (B,) int32
    labels: np.ndarray | None = None  # (B,) int32 for a contrastive loss, -1: none
    weights: np.ndarray | None = None  # (B,) float32 of each row's targets, where not all are 1


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
    mask: np.ndarray  # (N, L) float32, 1 on tokens of the response, 0 on those of the prompt
    lengths: np.ndarray  # (N,) int32
    better: np.ndarray  # (P,) int32, row of `tokens` that wins
    worse: np.ndarray  # (P,) int32, row of `tokens` that loses
    margins: np.ndarray  # (P,) float32, 0 where the data gives none
    weights: np.ndarray  # (P,) float32, 1 / pairs of the same prompt, so that prompts count alike
    reference: np.ndarray | None = None  # (N, L) float32, log p under a reference, 0 off the mask
    # (P,) float32 that the winner is the better one; None: certainly
    probabilities: np.ndarray | None = None
    row: np.ndarray | None = None  # (N,) int32, the place of the data row of each response


@dataclass
class UnpairedBatch:
    """N rows with labels, and N mismatched ones: each prompt with the response of the row before.

    Arrays of the mismatched rows are `tokens`, `mask` and `lengths` from row N on.
    """

    tokens: np.ndarray  # (2N, L) int32
    mask: np.ndarray  # (2N, L) float32, 1 on tokens of the response
    lengths: np.ndarray  # (2N,) int32
    label: np.ndarray  # (N,) float32, 1 where the response is wanted
    reference: np.ndarray | None = None  # (N, L) as in `PreferenceBatch`


Batch = TextBatch | ScalarBatch | PreferenceBatch | UnpairedBatch
Rows = Sequence[TextRow] | Sequence[ScalarRow] | Sequence[PreferenceRow] | Sequence[UnpairedRow]


def make_batch(
    rows: Rows,
    *,
    pad_id: int = 0,
    pad_to_multiple: int = 1,
) -> Batch:
    """Pads rows of one kind to arrays; the kind of batch follows from the kind of row."""
    if isinstance(rows[0], PreferenceRow):
        return _preference_batch(rows, pad_id, pad_to_multiple)
    if isinstance(rows[0], UnpairedRow):
        return _unpaired_batch(rows, pad_id, pad_to_multiple)
    tokens, lengths = pad_rows([row.tokens for row in rows], pad_id, pad_to_multiple)
    if isinstance(rows[0], ScalarRow):
        return ScalarBatch(tokens, lengths, np.array([row.reward for row in rows], np.float32))
    mask, _ = pad_rows([row.mask for row in rows], 0, pad_to_multiple, np.float32)
    labels = [-1 if row.label is None else row.label for row in rows]
    weights = [row.weight for row in rows]
    return TextBatch(
        tokens,
        mask,
        lengths,
        np.array(labels, np.int32) if max(labels) >= 0 else None,
        None if set(weights) == {1.0} else np.array(weights, np.float32),
    )


def _preference_batch(
    rows: Sequence[PreferenceRow], pad_id: int, pad_to_multiple: int
) -> PreferenceBatch:
    flat = [tokens for row in rows for tokens in row.responses]
    tokens, lengths = pad_rows(flat, pad_id, pad_to_multiple)
    masks = [mask for row in rows for mask in row.masks]
    mask, _ = pad_rows(masks, 0, pad_to_multiple, np.float32)
    pairs = ranked_pairs([row.ranks for row in rows])
    better, worse, weights, places = zip(*pairs, strict=True)
    return PreferenceBatch(
        tokens,
        mask,
        lengths,
        np.array(better, np.int32),
        np.array(worse, np.int32),
        np.array([rows[place].margin or 0.0 for place in places], np.float32),
        np.array(weights, np.float32),
        _reference([r for row in rows for r in row.reference or [None]], tokens.shape[1]),
        _probabilities([rows[place].probability for place in places]),
        np.repeat(np.arange(len(rows), dtype=np.int32), [len(row.responses) for row in rows]),
    )


def _probabilities(found: list[float | None]) -> np.ndarray | None:
    return None if found[0] is None else np.array(found, np.float32)


def _unpaired_batch(
    rows: Sequence[UnpairedRow], pad_id: int, pad_to_multiple: int
) -> UnpairedBatch:
    pairs = [(row.tokens, row.mask) for row in rows]
    for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        start, after, longest = row.prompt_length, other.prompt_length, row.max_length
        tokens = row.tokens[:start] + other.tokens[after:]
        pairs.append((tokens[:longest], (row.mask[:start] + other.mask[after:])[:longest]))
    tokens, lengths = pad_rows([tokens for tokens, _ in pairs], pad_id, pad_to_multiple)
    mask, _ = pad_rows([mask for _, mask in pairs], 0, pad_to_multiple, np.float32)
    label = np.array([row.label for row in rows], np.float32)
    reference = _reference([row.reference for row in rows], tokens.shape[1])
    return UnpairedBatch(tokens, mask, lengths, label, reference)


def _reference(rows: Sequence[np.ndarray | None], width: int) -> np.ndarray | None:
    """(N, width), or None where it was not computed before."""
    if rows[0] is None:
        return None
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


# A worker's share ---------------------------------------------------------------------------


def count_rows(batch: Batch) -> int:
    """Rows of the data in a batch."""
    if isinstance(batch, PreferenceBatch):
        return int(batch.row[-1]) + 1
    return len(batch.label) if isinstance(batch, UnpairedBatch) else len(batch.tokens)


def share_of(batch: Batch, rank: int, size: int) -> Batch:
    """Rows rank, rank + size, ... of a batch; the first one where there is none of those.

    What depends on other rows, such as mismatched ones, is that of the whole batch.
    """
    rows = np.arange(count_rows(batch))[rank::size]
    rows = rows if len(rows) else np.zeros(1, dtype=np.int64)
    if isinstance(batch, PreferenceBatch):
        return _preference_share(batch, rows)
    taken = rows
    if isinstance(batch, UnpairedBatch):
        taken = np.concatenate([rows, rows + len(batch.label)])
    width = _share_width(batch, taken)
    found = {}
    for name, array in vars(batch).items():
        if array is None:
            found[name] = None
        else:
            part = array[taken if name in ("tokens", "mask", "lengths") else rows]
            found[name] = part[:, :width] if part.ndim == 2 else part
    return type(batch)(**found)


def _preference_share(batch: PreferenceBatch, rows: np.ndarray) -> PreferenceBatch:
    (taken,) = np.nonzero(np.isin(batch.row, rows))
    place = np.full(len(batch.row), -1, dtype=np.int32)  # of a response in the share
    place[taken] = np.arange(len(taken))
    pairs = place[batch.better] >= 0
    width = _share_width(batch, taken)
    return PreferenceBatch(
        batch.tokens[taken, :width],
        batch.mask[taken, :width],
        batch.lengths[taken],
        place[batch.better[pairs]],
        place[batch.worse[pairs]],
        batch.margins[pairs],
        batch.weights[pairs],
        None if batch.reference is None else batch.reference[taken, :width],
        None if batch.probabilities is None else batch.probabilities[pairs],
        np.unique(batch.row[taken], return_inverse=True)[1].astype(np.int32),
    )


def _share_width(batch: Batch, taken: np.ndarray) -> int:
    """Padded length that the rows `taken` need, in steps of 16 for compiled code."""
    return min(batch.tokens.shape[1], round_up(int(batch.lengths[taken].max()), 16))


# Packing ------------------------------------------------------------------------------------


def pack_rows(rows: Sequence[TextRow], length: int) -> list[TextRow]:
    """Puts whole rows together into rows of at most `length` tokens, with little left over.

    The longest first, each into the fullest pack that has room (best fit decreasing, the default of
    TRL's SFTTrainer). None is split: that would fill every pack, and part answers from prompts. The
    first token of each document is no target. Positions go on and attention does cross from a
    document to those before it in the same pack, as in other trainers' packing without a block
    mask: use it where rows are alike, not where that would matter.

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


def wrap_rows(rows: Sequence[TextRow], length: int, eos: int) -> list[TextRow]:
    """All rows as one text, in their order, cut into rows of exactly `length` tokens.

    `eos` parts them where a row does not end with it. Every token stands in one row; the last one
    is shorter. As in `pack_rows`, attention crosses rows, and neither the first token of a document
    nor that of a cut row is a target. Rows in which nothing is a target are left out. TRL's
    SFTTrainer calls this packing "wrapped".
    """
    tokens: list[int] = []
    mask: list[int] = []
    starts: list[tuple[int, str]] = []  # where each document begins
    for row in rows:
        starts.append((len(tokens), row.where))
        tokens += row.tokens
        mask += (0, *row.mask[1:])
        if row.tokens[-1] != eos:
            tokens.append(eos)
            mask.append(0)
    made = []
    for at in range(0, len(tokens), length):
        targets = [0, *mask[at + 1 : at + length]]
        if any(targets):
            _, where = starts[bisect_right(starts, at, key=lambda start: start[0]) - 1]
            made.append(TextRow(tokens[at : at + length], targets, where))
    return made


def _packed(rows: list[TextRow]) -> TextRow:
    tokens = [token for row in rows for token in row.tokens]
    mask = [bit for row in rows for bit in (0, *row.mask[1:])]
    return TextRow(tokens, mask, rows[0].where)
