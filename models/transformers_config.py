"""Configurations as transformers 5 writes them, in the words that mlx-lm reads; rotary positions.

mlx-lm takes its default for what it does not find under a name it knows, and computes something
else in silence. What its models cannot compute at all is put right in repairs.py. Many of them know
one rule of positions for all layers, or none but the plain one: where what mlx-lm built turns by
other angles than transformers' `modeling_rope_utils`, it is replaced; where by the same, it stays.
"""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# ------------------------------------------------------------------------------ configurations


SLIDING, FULL = "sliding_attention", "full_attention"
# Rules of scaled positions that these models of mlx-lm accept in a configuration; the others take
# any, or none. They are given all their positions below.
ACCEPTED_RULES = {
    "phi3": ("linear",),
    "qwen2_moe": ("linear",),
    "nemotron": ("linear",),
    "internlm2": ("linear", "dynamic"),
    "gpt_oss": ("linear", "llama3", "yarn"),
}
BY_PATTERN = ("gemma3_text", "cohere2")  # full attention in every n-th layer, and in no others
ALTERNATING = ("gemma2",)  # older files do not say that every other layer has a window
WINDOW_IN_ALL = ("mistral", "mixtral", "phi3", "starcoder2")  # where a window is given


def unnested(config: dict) -> dict:
    """Entries to put over those of a config.json for mlx-lm to build the model that it means."""
    if isinstance(config.get("text_config"), dict):
        text = config["text_config"]
        vocabulary = {"vocab_size": text["vocab_size"]} if "vocab_size" in text else {}
        return {**vocabulary, "text_config": {**text, **unnested(text)}}
    kind = config.get("model_type")
    found = {**_positions(config, kind), **_pattern(config, kind), **_renamed(config, kind)}
    return {name: value for name, value in found.items() if config.get(name) != value}


def layer_types(config: dict) -> list[str]:
    """The kind of attention in each layer of a text model, as transformers has it."""
    count, kind = config.get("num_hidden_layers") or 0, config.get("model_type")
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) >= count:
        return types
    window = config.get("sliding_window")
    if not window:
        return [FULL] * count
    if kind in BY_PATTERN:
        default = 6 if kind == "gemma3_text" else 4
        pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
        return [FULL if (i + 1) % (pattern or default) == 0 else SLIDING for i in range(count)]
    if kind in ALTERNATING:
        return [FULL if i % 2 else SLIDING for i in range(count)]
    if kind in WINDOW_IN_ALL or config.get("use_sliding_window"):
        first = config.get("max_window_layers", 0) if kind not in WINDOW_IN_ALL else 0
        return [SLIDING if i >= (first or 0) else FULL for i in range(count)]
    return [FULL] * count


def position_rules(config: dict) -> list[dict] | None:
    """For each layer ``{"rope_theta", "rope_type", ...}``; None where the configuration is silent.

    Beside transformers 5's ``rope_parameters``, by layer type or for all, the older names are read.
    """
    types, rope = layer_types(config), config.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        if is_by_type(rope):
            common = {k: v for k, v in rope.items() if not isinstance(v, dict)}
            return [{**common, **(rope.get(kind) or {})} for kind in types]
        return [rope] * len(types)
    if config.get("rope_theta") is None:
        return None
    scaled = {**(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    scaled.setdefault("rope_type", scaled.get("type", "default"))
    if config.get("model_type") not in ("gemma3_text", "olmo3"):
        return [scaled] * len(types)
    base = config.get("rope_local_base_freq", config["rope_theta"])
    plain = {"rope_type": "default", "rope_theta": base}
    return [scaled if kind == FULL else plain for kind in types]


def is_by_type(rope: dict) -> bool:
    """Whether ``rope_parameters`` holds a dictionary for each type of layer."""
    return any(key.endswith("_attention") and isinstance(rope[key], dict) for key in rope)


def _positions(config: dict, kind: str | None) -> dict:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return {}
    full, found = rope, {}
    if is_by_type(rope):
        full = rope.get(FULL) or next(v for v in rope.values() if isinstance(v, dict))
        if "rope_theta" in (rope.get(SLIDING) or {}):
            found["rope_local_base_freq"] = rope[SLIDING]["rope_theta"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in full:
            found[name] = full[name]
    if kind == "gpt_neox":
        found["rotary_emb_base"] = full.get("rope_theta", 10000)
        found["rotary_pct"] = full.get("partial_rotary_factor", 0.25)
    rule = full.get("rope_type", "default")
    if rule != "default" and rule in ACCEPTED_RULES.get(kind, (rule,)):
        found["rope_scaling"] = {**full, "type": rule}
    return found


def _pattern(config: dict, kind: str | None) -> dict:
    """Which layers have a window, for models that mlx-lm describes by a pattern.

    A pattern of 1 means no window at all; repairs.py gives the layers theirs.
    """
    if kind not in BY_PATTERN:
        return {}
    types = layer_types(config)
    for pattern in range(1, len(types) + 1):
        if all((i + 1) % pattern == 0 for i, t in enumerate(types) if t == FULL) and all(
            (i + 1) % pattern for i, t in enumerate(types) if t != FULL
        ):
            return {"sliding_window_pattern": pattern}
    return {"sliding_window_pattern": 1}


def _renamed(config: dict, kind: str | None) -> dict:
    if kind == "lfm2":
        return {"block_dim": config.get("block_dim", config.get("hidden_size"))}
    if kind == "gpt2":
        return {"n_ctx": config.get("n_ctx", config.get("n_positions"))}
    if kind in ("qwen3_moe", "qwen2_moe", "olmoe") and "num_local_experts" in config:
        return {"num_experts": config["num_local_experts"]}
    return {}


# ------------------------------------------------------------------------------ positions


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
