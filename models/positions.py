"""Rotary positions of every layer as the model's configuration asks for them.

Many models of mlx-lm 0.32 know one rule for all layers, or none but the plain one, and say nothing
of it. Where what mlx-lm built turns by other angles than transformers' `modeling_rope_utils`, it is
replaced. Where it turns by the same, it stays.
"""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from models.transformers_config import position_rules

ATTENTION_NAMES = ("self_attn", "attention", "attn")
ROPE_NAMES = ("rope", "rotary_emb")
ANGLES_AGREE = 1e-5  # relative difference of frequencies in float32


def give_positions(model: nn.Module, config: dict) -> None:
    """Replace the position modules of `model` that do not do what `config` (config.json) says."""
    config = config.get("text_config") or config
    rules = position_rules(config)
    if rules is None:
        return
    length = config.get("max_position_embeddings") or 0
    for block, rule in zip(model.layers, rules, strict=False):
        attention = next((block[name] for name in ATTENTION_NAMES if name in block), {})
        name = next((name for name in ROPE_NAMES if name in attention), None)
        if name is None or (angles := _angles(attention[name])) is None:
            continue
        traditional = getattr(attention[name], "traditional", False)
        wanted = make_positions(rule, 2 * len(angles[0]), traditional, length)
        if wanted is not None and not _same(attention[name], wanted):
            attention[name] = wanted


def make_positions(rule: dict, dims: int, traditional: bool, length: int) -> nn.Module | None:
    """The module for `rule` over `dims` dimensions of a head; None for a rule unknown here.

    `length` is the model's max_position_embeddings. mlx-lm has the linear, llama3 and dynamic
    rules; its yarn knows neither `truncate` nor `attention_factor`, its longrope the long half.
    """
    from mlx_lm.models.rope_utils import initialize_rope

    kind, base = rule.get("rope_type", "default"), rule.get("rope_theta", 10000.0)
    if kind in ("default", "linear", "llama3", "dynamic"):
        scaling = None if kind == "default" else {**rule, "type": kind}
        return initialize_rope(dims, base, traditional, scaling, length)
    if kind == "yarn":
        return Turned([_yarn(rule, dims, base, length)], dims, traditional, _yarn_gain(rule))
    if kind in ("longrope", "su"):
        return _longrope(rule, dims, traditional, base, length)
    return None


class Turned(nn.Module):
    """(B, heads, L, head width) turned by frequencies of its own, and multiplied by `gain`.

    With two sets of wavelengths the second is for texts longer than `limit` positions.
    """

    def __init__(self, wavelengths, dims: int, traditional: bool, gain: float, limit: int = 0):
        super().__init__()
        self.dims, self.traditional = dims, traditional
        self._freqs, self._long = (
            mx.array(w, dtype=mx.float32) for w in (*wavelengths[:2], *wavelengths[-1:])[:2]
        )
        self._scale, self._limit = gain, limit

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        freqs = self._freqs
        if self._limit:
            last = mx.max(mx.array(offset)) + x.shape[-2]
            freqs = mx.where(last > self._limit, self._long, self._freqs)
        if self._scale != 1.0:
            x = mx.concatenate([x[..., : self.dims] * self._scale, x[..., self.dims :]], axis=-1)
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=freqs,
        )


def _yarn(rule: dict, dims: int, base: float, length: int) -> np.ndarray:
    """Wavelengths (dims / 2,) of YaRN (arXiv 2309.00071), as transformers' _compute_yarn_parameters
    blends them."""
    original = rule["original_max_position_embeddings"]
    factor = rule.get("factor") or length / original

    def dimension(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rule.get("beta_fast") or 32), dimension(rule.get("beta_slow") or 1)
    if rule.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
    plain = base ** (np.arange(0, dims, 2) / dims)
    return 1 / (ramp / (factor * plain) + (1 - ramp) / plain)


def _yarn_gain(rule: dict) -> float:
    if rule.get("attention_factor") is not None:
        return rule["attention_factor"]

    def gain(scale: float) -> float:
        return 1.0 if rule["factor"] <= 1 else 0.1 * scale * math.log(rule["factor"]) + 1.0

    both = rule.get("mscale"), rule.get("mscale_all_dim")
    return gain(both[0]) / gain(both[1]) if all(both) else gain(1)


def _longrope(rule: dict, dims: int, traditional: bool, base: float, length: int) -> Turned:
    """LongRoPE (arXiv 2402.13753) as transformers' _compute_longrope_parameters has it."""
    original = rule.get("original_max_position_embeddings") or length
    factor = length / original if "original_max_position_embeddings" in rule else rule.get("factor")
    gain = rule.get("attention_factor")
    if gain is None:
        large = factor is not None and factor > 1
        gain = math.sqrt(1 + math.log(factor) / math.log(original)) if large else 1.0
    plain = base ** (np.arange(0, dims, 2) / dims)
    both = [np.array(rule[name]) * plain for name in ("short_factor", "long_factor")]
    return Turned(both, dims, traditional, gain, limit=original)


def _angles(module) -> tuple[np.ndarray, float] | None:
    """(wavelengths (dims / 2,), gain) of a position module; None where it turns nothing."""
    if type(module) is nn.RoPE or hasattr(module, "factor"):  # plain, linear, dynamic
        plain = module.base ** (np.arange(0, module.dims, 2) / module.dims)
        return plain / getattr(module, "scale", 1.0), 1.0
    freqs = module.__dict__.get("_freqs", module.get("_freqs")) if hasattr(module, "get") else None
    if freqs is None:
        return None
    gain = getattr(module, "mscale", getattr(module, "_scale", 1.0))
    return np.array(freqs), float(gain)


def _same(here, wanted) -> bool:
    from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

    (freqs, gain), (other, other_gain) = _angles(here), _angles(wanted)
    if isinstance(wanted, DynamicNTKScalingRoPE) or getattr(wanted, "_limit", 0):
        return type(here) is type(wanted)
    if isinstance(here, DynamicNTKScalingRoPE):
        return False
    close = np.abs(freqs - other) <= ANGLES_AGREE * np.abs(other)
    return bool(close.all()) and abs(gain - other_gain) <= ANGLES_AGREE
