"""Configurations as transformers 5 writes them, in the words that mlx-lm reads.

mlx-lm takes its default for what it does not find under a name it knows, and computes something
else in silence. What its models cannot compute at all is put right in positions.py and repairs.py.
"""

SLIDING, FULL = "sliding_attention", "full_attention"
# Rules of scaled positions that these models of mlx-lm accept in a configuration; the others take
# any, or none. positions.py gives them all their positions.
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
