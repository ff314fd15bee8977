"""Hidden states of several continuations of one prompt, which goes through the model once.

Gradients go through the prompt's keys and values too.

Legend: K tokens of the prompt, B continuations, L their padded length, D width, N positions picked.
"""

import mlx.core as mx
import mlx.nn as nn

from models.decoding import keep_rows, make_cache
from models.trunk import hidden_states, picked_hidden


def can_share_prompts(model: nn.Module) -> bool:
    """Whether every layer of `model` keeps all keys and values, and nothing else."""
    from mlx_lm.models.cache import KVCache

    return all(type(layer) is KVCache for layer in make_cache(model))


def hidden_after(model: nn.Module, prompt: mx.array, tokens: mx.array, index: mx.array) -> mx.array:
    """prompt (1, K), tokens (B, L) behind it, index (N,) into B x L -> hidden states (N, D)."""
    cache = make_cache(model)
    hidden_states(model, prompt, cache)
    rows = mx.zeros(tokens.shape[0], dtype=mx.int32)
    for layer in cache:
        keep_rows(layer, rows)
    return picked_hidden(model, tokens, index, cache)
