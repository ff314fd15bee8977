"""Policy and value function on one trunk: a single forward pass gives both.

Legend: B batch, L padded length, R longest response, D width, N response tokens picked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from models.heads import ValueHead
from models.trunk import hidden_states, logits_from_hidden, token_logprobs
from models.tuning import Tuning


@dataclass
class Packed:
    """Sequences laid out for one forward pass, with the response tokens that count picked out.

    Arrays that come back are (B, R): the counted response tokens of each row, moved together to
    the left, so tokens that a response mask leaves out leave no hole.
    """

    tokens: mx.array  # (B, L) right-padded; the last token of the longest row is not needed
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
        # A padded place of the index points at 0, and stays there.
        index = row * (length - count) + mx.maximum(place - count, 0)
        return Packed(self.tokens[:, count:], index, self.targets, self.slot, self.mask)


def pack(
    queries: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    prefix: Sequence[int] = (),
    masks: Sequence[Sequence[int]] | None = None,
    pad_to_multiple: int = 1,
) -> Packed:
    """Lay out `prefix + query + response` for each row; `masks` marks the tokens that count.

    This is the one place where logits[t] is matched with token t+1. With `pad_to_multiple` > 1, L
    and R are rounded up and N is B*R, so that few shapes occur (for mx.compile).
    """
    rows = [[*prefix, *q, *r] for q, r in zip(queries, responses, strict=True)]
    length = round_up(max(len(row) for row in rows) - 1, pad_to_multiple)
    tokens = np.zeros((len(rows), length), dtype=np.int32)
    picked: list[np.ndarray] = []  # for each row, positions of its counted tokens
    for i, (row, response) in enumerate(zip(rows, responses, strict=True)):
        kept = row[:length]
        tokens[i, : len(kept)] = kept
        first = len(row) - len(response)
        counted = np.arange(first, len(row))
        picked.append(counted if masks is None else counted[np.asarray(masks[i], dtype=bool)])
    width = round_up(max(len(p) for p in picked), pad_to_multiple)
    mask = np.zeros((len(rows), width), dtype=np.float32)
    index = np.zeros((len(rows), width), dtype=np.int32)
    targets = np.zeros((len(rows), width), dtype=np.int32)
    for i, positions in enumerate(picked):
        mask[i, : len(positions)] = 1
        index[i, : len(positions)] = i * length + positions - 1  # logits[t] predicts token t+1
        targets[i, : len(positions)] = np.asarray(rows[i])[positions]
    if pad_to_multiple > 1:
        slot = np.arange(mask.size, dtype=np.int32).reshape(mask.shape)
        index, targets = index.reshape(-1), targets.reshape(-1)
    else:
        counted = mask.astype(bool)
        slot = np.where(counted, np.cumsum(counted.reshape(-1)).reshape(mask.shape) - 1, 0)
        index, targets = index[counted], targets[counted]
    return Packed(*map(mx.array, (tokens, index, targets, slot.astype(np.int32), mask)))


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


class ActorCritic(nn.Module):
    """A language model with what is trained on it, and a value head on the same hidden states."""

    def __init__(self, model: nn.Module, value_head: ValueHead, tuning: Tuning):
        super().__init__()
        self.model = model
        self.value_head = value_head
        self._tuning = tuning

    @property
    def tuning(self) -> Tuning:
        return self._tuning

    def __call__(
        self, packed: Packed, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[mx.array, ...]:
        """-> logprobs (B, R), values (B, R) and, if asked, entropy (B, R); 0 where nothing is."""
        hidden = picked_hidden(self.model, packed)  # (N, D)
        scored = token_logprobs(
            self.model, hidden, packed.targets, temperature=temperature, with_entropy=with_entropy
        )
        values = self.value_head(hidden)  # (N,)
        columns = (scored[0], values, *scored[1:])
        return tuple(spread(column, packed) for column in columns)


def picked_hidden(model: nn.Module, packed: Packed) -> mx.array:
    """The hidden states that predict the picked tokens, (N, D)."""
    hidden = hidden_states(model, packed.tokens)  # (B, L, D)
    return hidden.reshape(-1, hidden.shape[-1])[packed.index]


def picked_logits(model: nn.Module, packed: Packed, temperature: float = 1.0) -> mx.array:
    """All logits of the picked tokens, (N, V) float32; for the "full" KL only."""
    logits = logits_from_hidden(model, picked_hidden(model, packed)).astype(mx.float32)
    return logits / temperature if temperature != 1.0 else logits


def reference_logprobs(model: nn.Module, packed: Packed, temperature: float = 1.0) -> mx.array:
    """Log-probabilities of the picked tokens under `model`, (B, R)."""
    hidden = picked_hidden(model, packed)
    (logprobs,) = token_logprobs(model, hidden, packed.targets, temperature=temperature)
    return spread(logprobs, packed)


def spread(column: mx.array, packed: Packed) -> mx.array:
    """(N,) -> (B, R) with 0 at padded places."""
    return mx.where(packed.mask > 0, column[packed.slot], 0.0)
