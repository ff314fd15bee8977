"""The last block of a model, worked out only for the positions that are asked for.

What a text's prompt is turned into by the last block predicts prompt tokens, and nobody asks for
those. Its keys and values alone are needed, by the response. So the block runs twice: on the
prompt, with a cache that takes its keys and values, while the output is dropped (MLX evaluates
nothing that is not asked for); and on the rest, as in decoding. Gradients flow through both.

Legend: B batch, L padded length, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

# Architectures (mlx-lm's model_type) whose blocks are called as block(x, mask, cache) and ask no
# more of a cache than `offset` and `update_and_fetch`; tests/test_late_block.py tries each.
ARCHITECTURES = {
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_oss", "granite", "helium",
    "internlm2", "llama", "minicpm", "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe",
    "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip


def works_for(owner: nn.Module) -> bool:
    """Whether the last block of this model (as `find_trunk` names it) can be split."""
    return getattr(owner, "model_type", None) in ARCHITECTURES


class _Kept:
    """A cache of one block within one forward pass: the keys and values of all calls in a row."""

    def __init__(self):
        self.keys = self.values = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys and values (B, heads, length, width) -> with those of the calls before."""
        if self.keys is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.keys, self.values, self.offset = keys, values, keys.shape[2]
        return keys, values


class _LateBlock:
    """Stands in for `block`: (B, L, D) -> (B, L - first, D)."""

    def __init__(self, block: nn.Module, first: int):
        self._block, self._first = block, first

    def __getattr__(self, name):
        return getattr(self._block, name)

    def __call__(self, x: mx.array, mask=None, cache=None) -> mx.array:
        first, kept, rest_mask = self._first, _Kept(), mask
        if isinstance(mask, mx.array):  # (..., L, L)
            mask, rest_mask = mask[..., :first, :first], mask[..., first:, :]
        self._block(x[:, :first], mask, kept)
        return self._block(x[:, first:], rest_mask, kept)


@contextmanager
def late_block(trunk: nn.Module, first: int) -> Iterator[None]:
    """Within this context `trunk` leaves out the first positions of what it returns."""
    block = trunk.layers[-1]
    trunk.layers[-1] = _LateBlock(block, first)
    try:
        yield
    finally:
        trunk.layers[-1] = block
