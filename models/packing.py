"""Sequences laid out for one forward pass, with the tokens that count picked out of it.

`pick_targets` is the one place where logits[t] is matched with token t+1.

Legend: B batch, L padded length, R longest response, N tokens picked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np


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

    def arrays(self) -> list[mx.array]:
        return [self.tokens, self.index, self.targets, self.slot, self.mask]

    def without_prefix(self, count: int) -> "Packed":
        """The same picked tokens with the first `count` tokens of every row taken away."""
        length = self.tokens.shape[1]
        row, place = self.index // length, self.index % length
        index = row * (length - count) + mx.maximum(place - count, 0)
        return Packed(self.tokens[:, count:], index, self.targets, self.slot, self.mask)

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
) -> Packed:
    """Lay out `prefix + query + response` for each row; `masks` marks the tokens that count.

    With `pad_to_multiple` > 1, L, R and N are rounded up, so that few shapes occur.
    """
    rows = [[*prefix, *q, *r] for q, r in zip(queries, responses, strict=True)]
    length = 1 + round_up(max(map(len, rows)) - 1, pad_to_multiple)
    tokens = np.zeros((len(rows), length), dtype=np.int32)
    counted = np.zeros((len(rows), length), dtype=bool)
    for i, (row, response) in enumerate(zip(rows, responses, strict=True)):
        tokens[i, : len(row)] = row
        counted[i, len(row) - len(response) : len(row)] = True if masks is None else masks[i]
    inputs, index, targets = pick_targets(tokens, counted)
    counts = counted.sum(axis=1)
    width = round_up(int(counts.max()), pad_to_multiple)
    mask = np.arange(width) < counts[:, None]  # (B, R)
    slot = np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, 0)
    spare = round_up(len(index), 8 * pad_to_multiple) - len(index) if pad_to_multiple > 1 else 0
    return Packed(
        mx.array(inputs),
        mx.array(np.pad(index, (0, spare))),
        mx.array(np.pad(targets, (0, spare))),
        mx.array(slot.astype(np.int32)),
        mx.array(mask.astype(np.float32)),
    )


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
