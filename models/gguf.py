"""GGUF files for llama.cpp, by mlx-lm's converter where it is right, refused where it is not.

mlx-lm converts plain Llama and Mistral weights and calls every tokenizer SentencePiece. Byte-level
BPE tokenizers get their own description here (merges, and the name of the splitting rule that
llama.cpp knows).
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
        raise UserError(f"GGUF: models of type {kind} are not converted, only "
                        f"{' and '.join(FAMILIES)}; llama.cpp's convert_hf_to_gguf.py reads the "
                        "fused folder")  # fmt: skip
    if "quantization" in config:
        raise UserError("GGUF: MLX's quantised weights are not converted; add --dequantize")
    if any(re.fullmatch(r".*\.bias", name) for name, _ in tree_flatten(loaded.model.parameters())):
        raise UserError("GGUF: layers with a bias are not converted")
    width = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") not in (None, width):
        raise UserError(f"GGUF: heads {config['head_dim']} wide are not converted, only {width} "
                        "(hidden_size / num_attention_heads)")  # fmt: skip
    scaling = config.get("rope_scaling") or {}
    rope = scaling.get("rope_type", scaling.get("type", "default"))
    if rope not in ("default", "linear"):
        raise UserError(f"GGUF: positions scaled by the rule {rope} are not converted")


def write_gguf(file: Path, folder: Path, loaded: LoadedModel) -> float:
    """Write the model that `folder` holds to `file`; returns the largest change of a weight.

    float32 and float16 weights stay what they are, bfloat16 becomes float16.
    """
    from mlx_lm.gguf import HfVocab, prepare_metadata

    check_gguf(loaded)
    config = {"num_key_value_heads": loaded.config["num_attention_heads"], **loaded.config}
    vocabulary = HfVocab.load(folder)
    if vocabulary.vocab_size != config["vocab_size"]:
        raise UserError(f"GGUF: the tokenizer has {vocabulary.vocab_size} tokens and the model "
                        f"{config['vocab_size']}; they have to agree")  # fmt: skip
    metadata = prepare_metadata(config, vocabulary)
    metadata["general.name"] = Path(loaded.name).name
    metadata.update(_tokenizer_metadata(folder, vocabulary.vocab_size))
    weights = {name: a for name, a in tree_flatten(loaded.model.parameters())}
    arrays = {_gguf_name(n): _stored(_permuted(n, a, config), n) for n, a in weights.items()}
    mx.save_gguf(str(file), arrays, metadata)
    written = mx.load(str(file))
    return max(_change(_permuted(n, a, config), written[_gguf_name(n)]) for n, a in weights.items())


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


def _tokenizer_metadata(folder: Path, size: int) -> dict:
    """What llama.cpp has to know of the tokenizer beside its tokens."""
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = described["model"]
    starts_with_bos = _writes_bos(described.get("post_processor"))
    metadata = {"tokenizer.ggml.add_bos_token": mx.array(starts_with_bos)}
    if model["type"] == "BPE" and _is_byte_level(described):
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        metadata.update({
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _splitting_rule(described),
            "tokenizer.ggml.merges": merges,
        })  # fmt: skip
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        metadata["tokenizer.ggml.scores"] = mx.array(_merge_scores(model, size))
    else:
        raise UserError(f"GGUF: a tokenizer of type {model['type']} is not converted")
    return metadata


def _merge_scores(model: dict, size: int) -> list[float]:
    """What llama.cpp merges by: a token that an earlier merge makes has the higher score."""
    scores = [0.0] * size
    for rank, merge in enumerate(model["merges"]):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        scores[model["vocab"]["".join(parts)]] = -float(rank + 1)
    return scores


def _writes_bos(processor: dict | None) -> bool:
    text = json.dumps(processor or {})
    if "<|soft_prompt|>" in text:
        raise UserError("GGUF: has no way to put a soft prompt in front of every text")
    return '"SpecialToken"' in text


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
    raise UserError("GGUF: how this tokenizer splits text has no name in llama.cpp that is known "
                    "here")  # fmt: skip
