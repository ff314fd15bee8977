"""Policy and value function on one trunk: a single forward pass gives both.

Legend: B batch, R longest response, D width, V vocabulary, N response tokens picked.
"""

import mlx.core as mx
import mlx.nn as nn

from models.packing import Packed, packed_hidden
from models.trunk import logits_from_hidden, token_logprobs
from models.tuning import Tuning


class ValueHead(nn.Module):
    """Hidden states (..., D) -> values (...,), in float32.

    Starts at zero, as in lm-human-preference-details; `init_std` > 0 draws the weight from
    normal(0, init_std), TRL's ``v_head_init_strategy="normal"`` (there 0.2).
    """

    def __init__(self, width: int, init_std: float = 0.0):
        super().__init__()
        shape = (1, width)
        self.weight = mx.random.normal(shape, scale=init_std) if init_std else mx.zeros(shape)
        self.bias = mx.zeros((1,))

    def __call__(self, hidden: mx.array) -> mx.array:
        hidden = hidden.astype(mx.float32)
        return (hidden @ self.weight.T).squeeze(-1) + self.bias

    def arrays(self) -> dict[str, mx.array]:
        return {"weight": self.weight, "bias": self.bias}


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
        self,
        packed: Packed,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        gradient: bool = False,
    ) -> tuple[mx.array, ...]:
        """-> logprobs (B, R), values (B, R) and, if asked, entropy (B, R); 0 where nothing is.

        `gradient`: that of logprobs and values will be asked for; entropy has none then.
        """
        hidden = packed_hidden(self.model, packed)  # (N, D)
        scored = token_logprobs(
            self.model,
            hidden,
            packed.targets,
            temperature=temperature,
            extras=("entropy",) if with_entropy else (),
            gradient=gradient,
        )
        values = self.value_head(hidden)  # (N,)
        columns = (scored[0], values, *scored[1:])
        return tuple(packed.spread(column) for column in columns)


def picked_logits(model: nn.Module, packed: Packed, temperature: float = 1.0) -> mx.array:
    """All logits of the picked tokens, (N, V) float32; for the "full" KL only."""
    hidden = packed_hidden(model, packed)  # (N, D)
    logits = logits_from_hidden(model, hidden).astype(mx.float32)
    return logits / temperature if temperature != 1.0 else logits


def reference_logprobs(model: nn.Module, packed: Packed, temperature: float = 1.0) -> mx.array:
    """Log-probabilities of the picked tokens under `model`, (B, R)."""
    hidden = packed_hidden(model, packed)  # (N, D)
    (logprobs,) = token_logprobs(model, hidden, packed.targets, temperature=temperature)
    return packed.spread(logprobs)
