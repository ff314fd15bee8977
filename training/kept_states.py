"""What enters the first trained block, computed once for each row of a rollout.

Reference, policy and every epoch pass the same frozen blocks with the same tokens. A row that is
asked for a second time has its hidden states in memory. Rows stand in other batches then, and are
padded to other lengths, so that numbers are those of a whole pass up to rounding.

Legend: b rows of one pass, L its padded length, l that of an earlier one, D width.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from models.frozen_blocks import entering_states


class KeptStates:
    """Of `count` rows, those of `model` at block `first`."""

    def __init__(self, model: nn.Module, first: int, count: int):
        self.model, self.first = model, first
        self._rows: list[mx.array | None] = [None] * count  # (l, D)

    def below(self, rows: Sequence[int], tokens: mx.array) -> tuple[int, mx.array]:
        """(first, states (b, L, D)) of these rows, whose tokens are (b, L)."""
        new = [place for place, row in enumerate(rows) if self._rows[row] is None]
        if new:
            found = entering_states(self.model, self.first, tokens[mx.array(new)])
            mx.eval(found)
            for place, states in zip(new, found, strict=True):
                self._rows[rows[place]] = states
            if len(new) == len(rows):
                return self.first, found
        states = mx.stack([_fit(self._rows[row], tokens.shape[1]) for row in rows])
        mx.eval(states)
        return self.first, states


def _fit(states: mx.array, length: int) -> mx.array:
    """(l, D) cut to (L, D), or padded with the last one: causal blocks heed no padding, but NaN."""
    if len(states) >= length:
        return states[:length]
    return mx.pad(states, [(0, length - len(states)), (0, 0)], mode="edge")
