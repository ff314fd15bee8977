"""Sequences laid out for one forward pass, with the tokens that count picked out of it.

`pick_targets` is the one place where logits[t] is matched with token t+1.

Legend: B batch, L padded length, R longest response, N tokens picked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from models.trunk import entered, picked_hidden
from padding import lay_out as lay_out_rows
from padding import round_up


def pick_targets(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The shift: which hidden states predict the tokens that `mask` marks.

    tokens (B, L), mask (B, L) -> inputs (B, L-1), the tokens that go through the model; index (N,),
    places in the flattened B x (L-1) hidden states; targets (N,), the tokens these predict. The
    first token of a row is predicted by nothing and never counts.
    """
    rows, places = np.nonzero(mask[:, 1:])  # place t here is token t+1
    width = tokens.shape[1] - 1
    index = rows * width + places
    return tokens[:, :-1], index.astype(np.int32), tokens[rows, places + 1]


@dataclass
class Packed:
    """Queries with responses. Arrays that come back from them are (B, R): the counted response
    tokens of each row, moved together to the left, so that tokens which a response mask leaves
    out leave no hole.
    """

    tokens: mx.array  # (B, L) right-padded
    index: mx.array  # (N,) place in B*L of the hidden state that predicts each picked token
    targets: mx.array  # (N,) the picked tokens
    slot: mx.array  # (B, R) which of the N belongs here; 0 where nothing does
    mask: mx.array  # (B, R) float32, 1 where a token belongs
    # (k, states (B, L, D)): a pass begins at block k with these (models/trunk.py)
    below: tuple[int, mx.array] | None = None

    def arrays(self) -> list:
        """The fields, for a compiled function that makes a `Packed` of them again."""
        known = [self.tokens, self.index, self.targets, self.slot, self.mask]
        return known if self.below is None else [*known, self.below]

    def without_prefix(self, count: int) -> "Packed":
        """The same picked tokens with the first `count` tokens of every row taken away."""
        if not count:
            return self
        length = self.tokens.shape[1]
        row, place = self.index // length, self.index % length
        index = row * (length - count) + mx.maximum(place - count, 0)
        return replace(self, tokens=self.tokens[:, count:], index=index)

    def spread(self, column: mx.array) -> mx.array:
        """(N,) -> (B, R) with 0 at padded places."""
        return mx.where(self.mask > 0, column[self.slot], 0.0)


def pack(
    queries: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    prefix: Sequence[int] = (),
    masks: Sequence[Sequence[int]] | None = None,
    pad_to_multiple: int = 1,
    width: int = 1,
) -> Packed:
    """Lay out `prefix + query + response` for each row; `masks` marks the tokens that count.

    R is at least `width`. With `pad_to_multiple` > 1, L, R and N are rounded up, so that few shapes
    occur.
    """
    rows = [[*prefix, *q, *r] for q, r in zip(queries, responses, strict=True)]
    tokens, counted, mask = lay_out_rows(rows, responses, masks, pad_to_multiple)
    more = max(round_up(width, pad_to_multiple) - mask.shape[1], 0)
    mask = np.pad(mask, ((0, 0), (0, more)))
    inputs, index, targets = pick_targets(tokens, counted)
    slot = np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, 0)
    # At least one, which belongs nowhere: MLX's sums over nothing can take minutes.
    multiple = 8 * pad_to_multiple if pad_to_multiple > 1 else 1
    spare = round_up(max(len(index), 1), multiple) - len(index)
    return Packed(
        mx.array(inputs),
        mx.array(np.pad(index, (0, spare))),
        mx.array(np.pad(targets, (0, spare))),
        mx.array(slot.astype(np.int32)),
        mx.array(mask.astype(np.float32)),
    )


@dataclass
class Layout:
    """Rows in one or more forward passes, each a group of rows of like lengths, and picked tokens.

    Arrays that come back from the tokens are (B, R): those of each row together on the left.
    """

    passes: list[list[mx.array]]  # [inputs (b, l), index (n,)] of each, and a prompt (1, k) or none
    targets: mx.array  # (N,) the picked tokens of all passes
    slot: mx.array  # (B, R) which of the N belongs here; 0 where nothing does
    mask: mx.array  # (B, R) float32, 1 where a token belongs

    def arrays(self) -> list:
        return [self.passes, self.targets, self.slot, self.mask]


def lay_out(
    tokens: np.ndarray,
    picked: np.ndarray,
    groups: Sequence[tuple[np.ndarray, int, int]],
    *,
    prefix: Sequence[int] = (),
    pad_to_multiple: int = 1,
) -> Layout:
    """tokens (B, L), picked (B, L), of which column 0 never counts, -> a `Layout`.

    `groups`: (row numbers, padded length, shared tokens) of each pass, every row in one of them.
    Tokens that the rows of a pass share are its prompt; none of them, nor the one after them, is
    picked. `prefix` goes in front of every row. With `pad_to_multiple` > 1, R
    and N are rounded up, so that shapes repeat.
    """
    picked = picked[:, 1:] > 0
    counts = picked.sum(axis=1)
    order = np.concatenate([rows for rows, *_ in groups])
    starts = np.zeros(len(tokens), dtype=np.int64)
    starts[order] = np.cumsum(counts[order]) - counts[order]
    mask = np.arange(round_up(int(counts.max()), pad_to_multiple)) < counts[:, None]  # (B, R)
    slot = np.where(mask, starts[:, None] + np.arange(mask.shape[1]), 0)
    passes, targets = [], []
    front = np.array(prefix, dtype=tokens.dtype)
    for rows, width, shared in groups:
        shape = (len(rows), len(front))
        whole = np.concatenate([np.broadcast_to(front, shape), tokens[rows, :width]], axis=1)
        # The first token of a row follows a prefix, if there is one, and still does not count.
        marks = np.zeros(whole.shape, dtype=bool)
        marks[:, len(front) + 1 :] = picked[rows, : width - 1]
        inputs, index, found = pick_targets(whole, marks)
        passes.append([inputs, index])
        if shared:
            passes[-1] = split_prompt(inputs, index, len(front) + shared)
        targets.append(found)
    spare = 0
    if pad_to_multiple > 1:
        count = sum(map(len, targets))
        spare = round_up(count, 8 * pad_to_multiple) - count
        passes[-1][1] = np.pad(passes[-1][1], (0, spare))
    return Layout(
        [[mx.array(array) for array in arrays] for arrays in passes],
        mx.array(np.pad(np.concatenate(targets), (0, spare))),
        mx.array(slot.astype(np.int32)),
        mx.array(mask.astype(np.float32)),
    )


def split_prompt(inputs: np.ndarray, index: np.ndarray, count: int) -> list[np.ndarray]:
    """[inputs (B, L - count), index into them, the first `count` tokens of all rows (1, count)]."""
    width = inputs.shape[1]
    row, place = index // width, index % width
    index = (row * (width - count) + place - count).astype(np.int32)
    return [inputs[:, count:], index, inputs[:1, :count]]


def least_padding(lengths: np.ndarray, most: int, a_pass: int) -> list[np.ndarray]:
    """Row numbers in groups of like lengths, so that passes over them cost least.

    A pass costs its rows times the longest of them, and `a_pass` tokens more; it has at most `most`
    tokens, or one row. Every row is in one group, shortest first.
    """
    order = np.argsort(lengths, kind="stable")
    ordered = np.asarray(lengths)[order].astype(np.int64)
    best, start = np.zeros(len(order) + 1), [0] * (len(order) + 1)
    for end, longest in enumerate(ordered, 1):
        first = max(0, min(end - 1, end - int(most // longest)))  # of the largest group that fits
        costs = best[first:end] + np.arange(end - first, 0, -1) * longest + a_pass
        start[end] = first + int(costs.argmin())
        best[end] = costs.min()
    groups, end = [], len(order)
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]


def left_justified(values: np.ndarray, picked: np.ndarray, width: int) -> np.ndarray:
    """values (B, L) at the picked places as (B, width) float32, as `Layout` arranges them."""
    picked = picked[:, 1:] > 0
    out = np.zeros((len(values), width), dtype=np.float32)
    out[np.arange(width) < picked.sum(axis=1)[:, None]] = values[:, 1:][picked]
    return out


def packed_hidden(model: nn.Module, packed: Packed) -> mx.array:
    """The hidden states that predict the picked tokens, (N, D), after the final norm."""
    if packed.below is None:
        return picked_hidden(model, packed.tokens, packed.index)
    with entered(model, *packed.below):
        return picked_hidden(model, packed.tokens, packed.index)
