"""Operations that MLX's CPU backend does slowly on Linux, in terms of others that it does fast.

There an exponential takes 9 ns an element, and with it a sigmoid 14 ns and a softmax 10 ns; `where`
takes 4 ns, a power 3 ns (libm's own) and a product 0.1 ns. A step of PPO on a small model spends a
third of its time in them. So the gated activation of Llama's kin, attention and the rotary embedding
are written with powers and products, and with gradients of their own. Results are those of MLX up
to rounding. On Metal and CUDA, on macOS and in half precision everything stays as it is.
"""

import math
import platform
import sys
from functools import cache, lru_cache

import mlx.core as mx

E = mx.array(math.e, dtype=mx.float32)
FAR_BELOW = -1e9  # added to the score of a key that may not be seen: its weight becomes 0


_plain: dict = {}  # what was replaced, by name


@cache
def is_slow() -> bool:
    """Whether this is the CPU backend with operations that are worth replacing."""
    return platform.system() == "Linux" and mx.default_device().type == mx.DeviceType.cpu


def install() -> None:
    """Put the operations of this module in the place of MLX's and mlx-lm's, where they are slow."""
    if _plain or not is_slow():
        return
    from mlx_lm.models import activations

    _plain["swiglu"] = activations.swiglu
    _plain["attention"], _plain["rope"] = mx.fast.scaled_dot_product_attention, mx.fast.rope
    for name, module in list(sys.modules.items()):  # models that are imported later find it, too
        if name.startswith("mlx_lm.models.") and hasattr(module, "swiglu"):
            module.swiglu = swiglu
    mx.fast.scaled_dot_product_attention, mx.fast.rope = attention, rope


# ---- exponentials ------------------------------------------------------------------------------


@mx.custom_function
def _power_of_e(x: mx.array) -> mx.array:
    return mx.power(E, x)


@_power_of_e.vjp
def _(x, cotangent, output):
    return cotangent * output


def exp(x: mx.array) -> mx.array:
    """e to the x, float32; any shape."""
    return _power_of_e(x) if is_slow() else mx.exp(x)


# ---- gated activation --------------------------------------------------------------------------


@mx.custom_function
def _gated(gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = 1 / (1 + mx.power(E, -gate))
    return gate * sigmoid * x, sigmoid


@_gated.vjp
def _(primals, cotangents, outputs):
    (gate, x), cotangent, sigmoid = primals, cotangents[0], outputs[1]
    silu = gate * sigmoid
    return cotangent * x * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x; any shape."""
    if gate.dtype == x.dtype == mx.float32:
        return _gated(gate, x)[0]
    return _plain["swiglu"](gate, x)


# ---- attention ---------------------------------------------------------------------------------
# Legend: B batch, H heads, G groups of heads that share keys, L queries, M keys, D width of a head.


@mx.custom_function
def _attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """q (..., L, D), k and v (..., M, D), mask added to the scores -> (..., L, D) and weights."""
    scores = q @ k.swapaxes(-1, -2) + mask
    weights = mx.power(E, scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights @ v, weights


@_attend.vjp
def _(primals, cotangents, outputs):
    (q, k, v, mask), cotangent, (out, weights) = primals, cotangents[0], outputs
    dscores = cotangent @ v.swapaxes(-1, -2)
    dscores = weights * (dscores - (cotangent * out).sum(axis=-1, keepdims=True))
    dk, dv = dscores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ cotangent
    if q.ndim == 5:  # heads of a group share their keys
        dk, dv = dk.sum(axis=2, keepdims=True), dv.sum(axis=2, keepdims=True)
    return dscores @ k, dk, dv, mx.zeros_like(mask)


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask=None, sinks=None, **kwargs
) -> mx.array:
    """q (B, H, L, D), k and v (B, G, M, D) -> (B, H, L, D), as MLX's attention.

    One query at a time (decoding) stays with MLX's: there the number of operations counts.
    """
    usual = not isinstance(mask, mx.array) or (mask.dtype == mx.bool_ and mask.ndim in (2, 4))
    if not usual or q.dtype != mx.float32 or q.shape[2] == 1 or sinks is not None:
        return _plain["attention"](q, k, v, scale=scale, mask=mask, sinks=sinks, **kwargs)
    (batch, heads, length, _), groups = q.shape, k.shape[1]
    mask = _added_mask(mask, length, k.shape[2])
    q = q * scale
    if heads != groups:
        q = q.reshape(batch, groups, heads // groups, length, -1)
        k, v = k[:, :, None], v[:, :, None]  # (B, G, 1, M, D)
        if mask.ndim == 4:
            mask = mask.reshape(mask.shape[0], *_split(mask.shape[1], groups), *mask.shape[2:])
    return _attend(q, k, v, mask)[0].reshape(batch, heads, length, -1)


def _split(heads: int, groups: int) -> tuple[int, int]:
    return (1, 1) if heads == 1 else (groups, heads // groups)


def _added_mask(mask: mx.array | str | None, length: int, keys: int) -> mx.array:
    """What is added to scores (..., L, M) for a mask that is True where a key may be seen."""
    if mask is None:
        return mx.zeros((1, 1))
    if isinstance(mask, str):
        return _causal(length, keys)
    return (1 - mask.astype(mx.float32)) * FAR_BELOW


@lru_cache(maxsize=16)
def _causal(length: int, keys: int) -> mx.array:
    """The last query sees every key, the one before it all but the last, and so on; (L, M)."""
    future = mx.arange(keys)[None] > mx.arange(keys - length, keys)[:, None]
    added = future.astype(mx.float32) * FAR_BELOW
    mx.eval(added)
    return added


# ---- rotary embedding --------------------------------------------------------------------------


def _turned(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    half = x.shape[-1] // 2
    return x * cos + mx.concatenate([x[..., half:], x[..., :half]], axis=-1) * sin


@mx.custom_function
def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return _turned(x, cos, sin)


@_rotate.vjp
def _(primals, cotangent, output):
    _, cos, sin = primals
    return _turned(cotangent, cos, -sin), mx.zeros_like(cos), mx.zeros_like(sin)


def rope(
    x: mx.array, dims: int, *, traditional: bool, base=None, scale=1.0, offset=0, freqs=None,
    **kwargs,
) -> mx.array:  # fmt: skip
    """x (..., L, D) turned by its positions, as MLX's rope; sines are made once, not each time."""
    plain = not traditional and freqs is None and dims == x.shape[-1] and x.dtype == mx.float32
    if not plain or not isinstance(offset, int):
        return _plain["rope"](x, dims, traditional=traditional, base=base, scale=scale,
                              offset=offset, freqs=freqs, **kwargs)  # fmt: skip
    return _rotate(x, *_turns(dims, base, scale, offset, x.shape[-2]))


@lru_cache(maxsize=64)
def _turns(dims: int, base: float, scale: float, offset: int, length: int):
    """Cosines and signed sines (L, D) of positions offset, offset + 1, ..."""
    half = dims // 2
    frequencies = mx.exp(mx.arange(half) * (-math.log(base) / half))
    angles = mx.arange(offset, offset + length)[:, None] * scale * frequencies  # (L, D/2)
    cos, sin = mx.cos(angles), mx.sin(angles)
    turns = mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)
    mx.eval(turns)  # inside a traced function, too: they depend on numbers alone
    return turns
