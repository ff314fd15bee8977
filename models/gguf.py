"""GGUF files for llama.cpp: Llama and Mistral, refused where the form would not be right.

Names and the order of rotary dimensions are mlx-lm's. What its converter says of the model and the
tokenizer, today's llama.cpp does not open (types of tokens) or reads wrongly, so that is said here
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, gguf-py/gguf/constants.py).
"""

import json
import re
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from errors import UserError
from models.load import LoadedModel

FAMILIES = ("llama", "mistral")
KNOWN = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_(q|k|v|output|norm)|ffn_(gate|up|down|norm)))"
    r"\.weight"
)
# How text is split before byte-level BPE, by llama.cpp's name (llama-vocab.cpp).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def check_gguf(loaded: LoadedModel) -> None:
    """Raise UserError for a model that has no right GGUF form here, with the reason."""
    config, kind = loaded.config, loaded.config["model_type"]
    if kind not in FAMILIES:
        raise UserError(
            f"GGUF: models of type {kind} are not converted, only "
            f"{' and '.join(FAMILIES)}; llama.cpp's convert_hf_to_gguf.py reads the "
            "fused folder"
        )
    if "quantization" in config:
        raise UserError("GGUF: MLX's quantised weights are not converted; add --dequantize")
    if any(re.fullmatch(r".*\.bias", name) for name, _ in tree_flatten(loaded.model.parameters())):
        raise UserError("GGUF: layers with a bias are not converted")
    width = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") not in (None, width):
        raise UserError(
            f"GGUF: heads {config['head_dim']} wide are not converted, only {width} "
            "(hidden_size / num_attention_heads)"
        )
    scaling = config.get("rope_scaling") or {}
    rope = scaling.get("rope_type", scaling.get("type", "default"))
    if rope not in ("default", "linear"):
        raise UserError(f"GGUF: positions scaled by the rule {rope} are not converted")


def write_gguf(file: Path, folder: Path, loaded: LoadedModel) -> float:
    """Write the model that `folder` holds to `file`; returns the largest change of a weight.

    float32 and float16 weights stay what they are, bfloat16 becomes float16.
    """
    check_gguf(loaded)
    config = {"num_key_value_heads": loaded.config["num_attention_heads"], **loaded.config}
    weights = {name: a for name, a in tree_flatten(loaded.model.parameters())}
    arrays = {_gguf_name(n): _stored(_permuted(n, a, config), n) for n, a in weights.items()}
    metadata = {
        **_model_metadata(config, Path(loaded.name).name),
        "general.file_type": _number(_file_type(arrays)),
        **tokenizer_metadata(folder, loaded, config["vocab_size"]),
    }
    mx.save_gguf(str(file), arrays, metadata)
    written = mx.load(str(file))
    return max(_change(_permuted(n, a, config), written[_gguf_name(n)]) for n, a in weights.items())


def _number(value: int) -> mx.array:
    return mx.array(value, dtype=mx.uint32)


def _model_metadata(config: dict, name: str) -> dict:
    """What llama.cpp has to know of the network; keys of the "llama" architecture."""
    width = config["hidden_size"] // config["num_attention_heads"]
    length = config.get("max_position_embeddings") or 2048
    numbers = {
        # llama.cpp's "llama" has no sliding window: up to its length it computes the same.
        "context_length": min(length, config.get("sliding_window") or length),
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "rope.dimension_count": width,
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
    }
    reals = {
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps", 1e-6),
        "rope.freq_base": config.get("rope_theta") or 10000.0,
    }
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        reals["rope.scaling.factor"] = scaling["factor"]
    return {
        "general.architecture": "llama",
        "general.name": name,
        "general.alignment": _number(32),
        **{f"llama.{key}": _number(value) for key, value in numbers.items()},
        **{f"llama.{key}": mx.array(float(v), dtype=mx.float32) for key, v in reals.items()},
        **({"llama.rope.scaling.type": "linear"} if "rope.scaling.factor" in reals else {}),
    }


def _file_type(arrays: dict[str, mx.array]) -> int:
    """LLAMA_FTYPE: 0 where every weight is float32, 1 where most are float16."""
    halves = sum(a.size for a in arrays.values() if a.dtype == mx.float16)
    return int(halves > sum(a.size for a in arrays.values()) / 2)


def _gguf_name(name: str) -> str:
    from mlx_lm.gguf import translate_weight_names

    translated = translate_weight_names(name)
    if not KNOWN.fullmatch(translated):
        raise UserError(f"GGUF: {name} has no place in a llama model of llama.cpp")
    return translated


def _permuted(name: str, weight: mx.array, config: dict) -> mx.array:
    """llama.cpp pairs neighbouring dimensions in its rotary embedding, MLX the two halves."""
    from mlx_lm.gguf import permute_weights

    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if name.endswith(f"self_attn.{part}.weight"):
            return permute_weights(weight, config[heads], config[heads])
    return weight


def _stored(weight: mx.array, name: str) -> mx.array:
    if "norm" in name:
        return weight.astype(mx.float32)
    return weight.astype(mx.float16) if weight.dtype == mx.bfloat16 else weight


def _change(before: mx.array, after: mx.array) -> float:
    return float(mx.abs(before.astype(mx.float32) - after.astype(mx.float32)).max())


# ---------------------------------------------------------------------------- tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # LLAMA_TOKEN_TYPE


def tokenizer_metadata(folder: Path, loaded: LoadedModel, size: int) -> dict:
    """What llama.cpp has to know of the tokenizer in `folder`, for a model of `size` tokens.

    Rows of the model without a token get one that is never used. Raises UserError for tokenizers
    that have no form here.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(f"GGUF: {loaded.name} has no tokenizer.json")
    described = json.loads(file.read_text(encoding="utf-8"))
    tokenizer, model = loaded.tokenizer, described["model"]
    if not isinstance(model.get("vocab"), dict):
        raise UserError(f"GGUF: a tokenizer of type {model['type']} is not converted")
    tokens, types = _tokens(described, size)
    starts, ends = _written_around(tokenizer)
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": mx.array(types, dtype=mx.int32),
        "tokenizer.ggml.add_bos_token": mx.array(starts),
        "tokenizer.ggml.add_eos_token": mx.array(ends),
    }
    if '"<|soft_prompt|>"' in json.dumps(described.get("post_processor") or {}):
        raise UserError("GGUF: has no way to put a soft prompt in front of every text")
    named = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    others = sorted(loaded.eos_ids - {tokenizer.eos_token_id})
    named["eot"] = others[0] if others else None  # llama.cpp knows one more token to stop at
    metadata.update(
        {
            f"tokenizer.ggml.{name}_token_id": _number(token)
            for name, token in named.items()
            if token is not None
        }
    )
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    if model["type"] == "BPE" and _is_byte_level(described):
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        metadata |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _splitting_rule(described),
            "tokenizer.ggml.merges": merges,
        }
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        metadata |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": mx.array(_merge_scores(model, size)),
            "tokenizer.ggml.add_space_prefix": mx.array(_puts_space_first(tokenizer)),
        }
    else:
        raise UserError(f"GGUF: a tokenizer of type {model['type']} is not converted")
    return metadata


def _tokens(described: dict, size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all `size` tokens in the order of their ids."""
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    added = {entry["id"]: entry for entry in described.get("added_tokens", ())}
    last = max([*described["model"]["vocab"].values(), *added], default=-1)
    if last >= size:
        raise UserError(
            f"GGUF: the tokenizer counts to {last}, and the model has {size} tokens; "
            "they have to agree"
        )
    for text, i in described["model"]["vocab"].items():
        is_byte = re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text) is not None
        tokens[i], types[i] = text, BYTE if is_byte else NORMAL
    for i, entry in added.items():
        tokens[i], types[i] = entry["content"], CONTROL if entry["special"] else USER_DEFINED
    unknown = described["model"]["vocab"].get(described["model"].get("unk_token"))
    if unknown is not None:
        types[unknown] = UNKNOWN
    return tokens, types


def _written_around(tokenizer) -> tuple[bool, bool]:
    """Whether BOS stands in front of every text, and EOS behind it."""
    plain = tokenizer.encode("8", add_special_tokens=False)
    whole = tokenizer.encode("8")
    place = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:place], whole[place + len(plain) :]
    known = before in ([], [tokenizer.bos_token_id]) and after in ([], [tokenizer.eos_token_id])
    if not known:
        raise UserError(
            "GGUF: this tokenizer writes more around a text than one BOS and one EOS, "
            "such as a fused soft prompt, and the file has no place for it"
        )
    return bool(before), bool(after)


def _puts_space_first(tokenizer) -> bool:
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("8", add_special_tokens=False))[0]
    return first.startswith("\u2581")


def _merge_scores(model: dict, size: int) -> list[float]:
    """What llama.cpp merges by: a token that an earlier merge makes has the higher score."""
    scores = [0.0] * size
    for rank, merge in enumerate(model["merges"]):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        scores[model["vocab"]["".join(parts)]] = -float(rank + 1)
    return scores


def _pre_tokenizers(described: dict) -> list[dict]:
    found = described.get("pre_tokenizer") or {}
    return found["pretokenizers"] if found.get("type") == "Sequence" else [found]


def _is_byte_level(described: dict) -> bool:
    return any(part.get("type") == "ByteLevel" for part in _pre_tokenizers(described))


def _splitting_rule(described: dict) -> str:
    parts = _pre_tokenizers(described)
    if len(parts) == 1 and parts[0].get("use_regex", True):
        return "gpt-2"
    if len(parts) == 2 and parts[0].get("pattern", {}).get("Regex") == LLAMA3_SPLIT:
        return "llama-bpe"
    raise UserError(
        "GGUF: how this tokenizer splits text has no name in llama.cpp that is known here"
    )
