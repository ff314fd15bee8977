"""Adapters added to the weights that they adapt, so that a model of its own is left.

A LoRA layer computes x W^T + s x A B, which is x (W + s B^T A^T)^T. So adapters i with weights w_i
add up exactly: W + sum_i w_i dW_i. DoRA rescales rows as well; its dW is the difference between the
weight it ends with and W, which makes it add up with others in the same way.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from models.load import in_parts
from models.lora import Adapter, base_layer
from waiting import watched


class Blend(nn.Module):
    """base(x) + sum_i w_i (layer_i(x) - base(x)): what adapters with weights compute, unfused."""

    def __init__(self, layers: Sequence[nn.Module], weights: Sequence[float]):
        super().__init__()
        self.layers = list(layers)
        self._weights = list(weights)

    def __call__(self, *args, **kwargs) -> mx.array:
        base = base_layer(self.layers[0])(*args, **kwargs)
        result = base
        for layer, weight in zip(self.layers, self._weights, strict=True):
            result = result + weight * (layer(*args, **kwargs) - base)
        return result


def adapted_layers(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> dict[str, list[tuple[nn.Module, float]]]:
    """For each path that some adapter wraps: the adapters' layers there, with their weights."""
    found: dict[str, list[tuple[nn.Module, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, layer in adapter.layers.items():
            found.setdefault(path, []).append((layer, weight))
    return found


@contextmanager
def blended(
    model: nn.Module, adapters: Sequence[Adapter], weights: Sequence[float]
) -> Iterator[None]:
    """Within this context `model` computes with all `adapters` at once, without being changed."""
    model.eval()  # no dropout
    found = adapted_layers(adapters, weights)
    if not found:
        yield
        return
    base = {path: base_layer(layers[0][0]) for path, layers in found.items()}
    blends = [(path, Blend(*zip(*layers, strict=True))) for path, layers in found.items()]
    model.update_modules(tree_unflatten(blends))
    model.eval()
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(base.items())))


def fuse_adapters(
    model: nn.Module,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    dequantize: bool = False,
    dtype: mx.Dtype | None = None,
) -> int:
    """Add switched-off `adapters` to the weights of `model`, in place; returns how many layers.

    Each sum is made in float32 and rounded once, to `dtype` (default: that of the base weight). A
    quantised layer is quantised again, unless `dequantize` is set.
    """
    found = adapted_layers(adapters, weights)
    fused = [(path, fused_layer(layers, dequantize, dtype)) for path, layers in found.items()]
    model.update_modules(tree_unflatten(fused))
    for part in watched(in_parts(model), "fusing"):
        mx.eval(part)
    return len(fused)


def dequantize_model(model: nn.Module) -> None:
    """Turn every quantised layer of `model` into a plain one."""
    from mlx_lm.utils import dequantize_model as mlx_lm_dequantize_model

    mlx_lm_dequantize_model(model)


def fused_layer(
    layers: Sequence[tuple[nn.Module, float]], dequantize: bool, dtype: mx.Dtype | None = None
) -> nn.Module:
    """The base layer inside `layers` (adapted layer, weight) with every adapter added to it."""
    base = base_layer(layers[0][0])
    original = plain_weight(base)
    weight = original.astype(mx.float32)  # (out, in), or (experts, out, in)
    total = weight + sum(w * weight_change(layer, weight) for layer, w in layers)
    if dequantize or not is_quantized(base):
        return _with_weight(base, total.astype(dtype or original.dtype))
    plain = _with_weight(base, total.astype(original.dtype))
    return plain.to_quantized(group_size=base.group_size, bits=base.bits, mode=base.mode)


def is_quantized(layer: nn.Module) -> bool:
    return hasattr(layer, "bits")


def plain_weight(layer: nn.Module) -> mx.array:
    """The weight of a layer, dequantised where need be."""
    if not is_quantized(layer):
        return layer.weight
    biases = layer.get("biases")
    return mx.dequantize(
        layer.weight, layer.scales, biases, layer.group_size, layer.bits, layer.mode
    )


def weight_change(layer: nn.Module, weight: mx.array) -> mx.array:
    """What a LoRA or DoRA layer adds to the base `weight` (float32), float32."""
    a, b = layer.lora_a.astype(mx.float32), layer.lora_b.astype(mx.float32)
    if weight.ndim == 3:  # experts: a (E, r, in), b (E, out, r)
        return layer.scale * (b @ a)
    change = layer.scale * (b.T @ a.T)  # a (in, r), b (r, out)
    if "m" not in layer:
        return change
    direction = weight + change
    length = mx.linalg.norm(direction, axis=1, keepdims=True)
    return layer.m.astype(mx.float32)[:, None] / length * direction - weight


def _with_weight(base: nn.Module, weight: mx.array) -> nn.Module:
    """A plain layer of the same kind as `base` with another weight and the same bias."""
    from mlx_lm.models.switch_layers import SwitchLinear

    has_bias = "bias" in base
    make = SwitchLinear(1, 1, 1, bias=has_bias) if weight.ndim == 3 else nn.Linear(1, 1, has_bias)
    make.weight = weight
    if has_bias:
        make.bias = base.bias
    return make
