"""Key-value caches for prompts of different lengths, which are padded on the left.

mlx-lm has batched forms of its caches that know the padding; not every architecture of its
heeds them. So each model is tried once, on six tokens, before anything is sampled from it.
"""

from collections.abc import Sequence
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from errors import UserError
from models.trunk import find_trunk, hidden_states

# Relative error of a hidden state beyond which padding has been read as text. Models that heed
# padding were seen below 1e-6 in float32, Mamba, which does not, above 1.2.
READS_PADDING = 0.25


def make_cache(model: nn.Module) -> list:
    """An empty cache, one part for each layer, for prompts of one length."""
    from mlx_lm.models.cache import make_prompt_cache

    owner, _ = find_trunk(model)
    return make_prompt_cache(owner if hasattr(owner, "layers") else model)


def padded_cache(model: nn.Module, padding: Sequence[int]) -> list:
    """An empty cache for rows with `padding` tokens in front.

    Raises UserError where the model cannot tell padding from text.
    """
    if not getattr(model, "_heeds_padding", False):
        _check_padding(model)
        model._heeds_padding = True
    return _padded_cache(model, padding)


def _padded_cache(model: nn.Module, padding: Sequence[int]) -> list:
    return [_padded(model, layer, list(padding)) for layer in make_cache(model)]


def _padded(model: nn.Module, layer, padding: list[int]):
    """The batched form of one layer's cache."""
    from mlx_lm.models import cache as kinds

    if type(layer) is kinds.KVCache:
        kind = _grouped_cache() if _has_grouped_scores(model) else kinds.BatchKVCache
        return kind(padding)
    if type(layer) is kinds.RotatingKVCache and layer.keep == 0:
        return kinds.BatchRotatingKVCache(layer.max_size, padding)
    if type(layer) is kinds.ArraysCache:
        layer.left_padding = mx.array(padding)
        return layer
    if type(layer) is kinds.CacheList:
        return kinds.CacheList(*(_padded(model, part, padding) for part in layer.caches))
    raise UserError(f"this model keeps a {type(layer).__name__}, which cannot be batched with "
                    "prompts of different lengths")  # fmt: skip


def _has_grouped_scores(model: nn.Module) -> bool:
    """Whether attention scores are (B, groups, heads, L, L): Gemma 2, where heads share keys."""
    owner, _ = find_trunk(model)
    if getattr(owner, "model_type", None) != "gemma2":
        return False
    return owner.args.num_attention_heads > owner.args.num_key_value_heads


@cache
def _grouped_cache() -> type:
    """A BatchKVCache whose mask fits grouped scores; mlx-lm's (B, 1, L, L) does not."""
    from mlx_lm.models.cache import BatchKVCache

    class GroupedBatchKVCache(BatchKVCache):
        def make_mask(self, *args, **kwargs) -> mx.array:
            return super().make_mask(*args, **kwargs)[:, None]  # (B, 1, 1, L, L)

    return GroupedBatchKVCache


def _check_padding(model: nn.Module) -> None:
    """Compare a text behind padding, in a batch, with the same text alone."""
    text, other = [3, 1], [2, 4, 1, 3]  # any tokens will do
    kind = getattr(model, "model_type", type(model).__name__)
    try:
        alone = hidden_states(model, mx.array([text]))[0, -1].astype(mx.float32)  # (D,)
        batch = mx.array([[2, 4, *text], other])
        padded = hidden_states(model, batch, cache=_padded_cache(model, [2, 0]))
        padded = padded[0, -1].astype(mx.float32)
        error = (mx.linalg.norm(padded - alone) / mx.linalg.norm(alone)).item()
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as problem:
        raise UserError(f"model type {kind}: cannot be batched with prompts of different lengths "
                        f"({problem})") from problem  # fmt: skip
    if not error < READS_PADDING:
        raise UserError(f"model type {kind}: reads the padding in front of a prompt as text, so "
                        "prompts of different lengths cannot be batched; give prompts of one "
                        "length")  # fmt: skip
