"""A language model with what is trained on it, and no value head.

Legend: B batch, R longest response, N response tokens picked.
"""

import mlx.core as mx
import mlx.nn as nn

from models.packing import Packed, packed_hidden
from models.trunk import token_logprobs
from models.tuning import Tuning


class Policy(nn.Module):
    """What group methods train: log-probabilities and entropies of responses."""

    def __init__(self, model: nn.Module, tuning: Tuning):
        super().__init__()
        self.model = model
        self._tuning = tuning

    @property
    def tuning(self) -> Tuning:
        return self._tuning

    def __call__(
        self, packed: Packed, *, temperature: float = 1.0, gradient: bool = False
    ) -> tuple[mx.array, mx.array]:
        """-> logprobs (B, R) and entropy (B, R), nats; 0 where nothing is.

        `gradient`: that of logprobs alone will be asked for; entropy has none then.
        """
        hidden = packed_hidden(self.model, packed)  # (N, D)
        logprobs, entropy = token_logprobs(
            self.model,
            hidden,
            packed.targets,
            temperature=temperature,
            extras=("entropy",),
            gradient=gradient,
        )
        return packed.spread(logprobs), packed.spread(entropy)
