"""Hidden states of some positions: the last block is run for those alone.

Its attention needs the keys and values of every position. All that comes after attention (MLP,
norms, head) treats each position by itself, so prompt and padding need not be paid for there.

Legend: B batch, L padded length, D width, N positions picked from B x L.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from models.gradients import is_checkpointed
from models.trunk import find_trunk, hidden_states

ATTENTION_NAMES = ("self_attn", "attention", "attn")
MARK = "_last_block_can_be_short"  # set on a model by `allow_short_last_block`
# Above this share of picked positions the detour costs more than it saves.
MAX_SHARE = 0.9


def picked_hidden(model: nn.Module, tokens: mx.array, index: mx.array, cache=None) -> mx.array:
    """tokens (B, L), index (N,) into the flattened B x L -> hidden states after the norm (N, D).

    Short where `allow_short_last_block` was called before and found that it may be.
    """
    if (
        model.__dict__.get(MARK)
        and index.size <= MAX_SHARE * tokens.size
        and not is_checkpointed(model.layers[-1])  # its recomputation would lose a gradient
    ):
        return _short(model, tokens, index, cache)
    return _pick(hidden_states(model, tokens, cache), index)[0]


def allow_short_last_block(model: nn.Module) -> bool:
    """Find out, by trying, whether `model` gives the same with a short last block; remember it.

    To be called outside of gradients and compiled code, for it looks at numbers.
    """
    if MARK not in model.__dict__:
        tokens = mx.array([[0, 1, 2, 3, 4, 2], [4, 2, 0, 1, 3, 3]])
        index = mx.array([2, 5, 6, 9])
        with _no_dropout(model):
            try:
                short = _short(model, tokens, index, None).astype(mx.float32)
                whole = _pick(hidden_states(model, tokens), index)[0].astype(mx.float32)
                found = short.shape == whole.shape and _close(short, whole)
            except Exception:  # an architecture of another build: any kind of error may come
                found = False
        model.__dict__[MARK] = found
    return model.__dict__[MARK]


def _close(short: mx.array, whole: mx.array) -> bool:
    """Equal up to the rounding of bfloat16; another position or mask is off by far more."""
    return (mx.abs(short - whole).max() <= 0.03 * mx.abs(whole).max()).item()


def _pick(states: mx.array, index: mx.array) -> mx.array:
    return states.reshape(-1, states.shape[-1])[index][None]  # (1, N, D)


def _short(model: nn.Module, tokens: mx.array, index: mx.array, cache) -> mx.array:
    owner, name = find_trunk(model)
    block = model.layers[-1]
    # The list itself: some models' `layers` is a part of it, made anew at each call.
    (blocks,) = (v for v in owner[name].values() if isinstance(v, list) and v and v[-1] is block)
    blocks[-1] = _ShortBlock(block, index)
    try:
        hidden = hidden_states(model, tokens, cache)  # (1, N, D)
    finally:
        blocks[-1] = block
    if hidden.shape[:2] != (1, index.size):
        raise ValueError(f"hidden states of {index.size} positions have shape {hidden.shape}")
    return hidden[0]


class _ShortBlock:
    """Stands in for the last block (B, L, D) -> (1, N, D), through the block's own code.

    The block runs twice: once to see what it hands to its attention (nothing else of that is ever
    evaluated), and once on the picked positions, with what attention gave at these.
    """

    def __init__(self, block: nn.Module, index: mx.array):
        self._block, self._index = block, index

    def __getattr__(self, name):
        return getattr(self._block, name)

    def __call__(self, x: mx.array, *args, **kwargs) -> mx.array:
        block = self._block
        (name,) = (name for name in ATTENTION_NAMES if name in block)
        handed = []

        def look(states, *args, **kwargs):
            handed.append((states, args, kwargs))
            return states

        with _hidden_behind(block, name, look):
            block(x, *args, **kwargs)
        ((states, attention_args, attention_kwargs),) = handed
        attended = block[name](states, *attention_args, **attention_kwargs)  # (B, L, D)
        attended = _pick(attended, self._index)
        with _hidden_behind(block, name, lambda *args, **kwargs: attended):
            return block(_pick(x, self._index), *args, **kwargs)


@contextmanager
def _hidden_behind(block: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """`block.name` is `function`; an instance attribute leaves the module's tree alone."""
    block.__dict__[name] = function
    try:
        yield
    finally:
        del block.__dict__[name]


@contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module._training = training
