"""Small heads on a language model's hidden states: the value head and the reward head."""

import mlx.core as mx
import mlx.nn as nn


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
