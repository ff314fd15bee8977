"""Exponentials for x86 processors, where MLX's CPU backend takes 14 ns for one and 5 for a power.

MLX has no vector instructions there, and its own exponential costs three times libm's power; a
sigmoid costs 20 ns. In a small model's PPO step they are a fifth of all time (docs/LOG.md). On any
other device or processor, and for any type but float32, these functions are MLX's own.
"""

import math
import platform
import sys

import mlx.core as mx
import mlx.nn as nn

X86 = platform.machine() in ("x86_64", "AMD64")


def _slow_here(x: mx.array) -> bool:
    # In bfloat16 the base of the power would be rounded too.
    return X86 and x.dtype == mx.float32 and mx.default_device().type == mx.DeviceType.cpu


def exp(x: mx.array) -> mx.array:
    """e to the power of x."""
    return _power(x) if _slow_here(x) else mx.exp(x)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, the gated activation of Llama's family."""
    if _slow_here(gate):
        return gate * _sigmoid(gate) * x
    from mlx_lm.models.activations import swiglu as own

    return own(gate, x)


# Their gradients are written out: that of a power takes logarithms of its base.


@mx.custom_function
def _power(x: mx.array) -> mx.array:
    return mx.power(math.e, x)


@_power.vjp
def _(x, cotangent, output):
    return cotangent * output


@mx.custom_function
def _sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + mx.power(math.e, -x))


@_sigmoid.vjp
def _(x, cotangent, output):
    return cotangent * (output - output * output)


def use_in(model: nn.Module) -> None:
    """Let the blocks of `model`'s architecture use `swiglu` of this file.

    mlx-lm's modules import theirs by name, so the name is what changes; not in mlx_lm.activations.
    """
    from mlx_lm.models.activations import swiglu as own

    names = {type(module).__module__ for module in model.modules()} if X86 else set()
    for name in names - {own.__module__}:  # GPT OSS has a module of that file
        if getattr(sys.modules[name], "swiglu", None) is own:
            sys.modules[name].swiglu = swiglu
