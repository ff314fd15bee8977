"""Tiny random models in Hugging Face's format, made in a second, for tests of whole scripts."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tiny_tokenizers import SPECIAL, tiny_tokenizer


def tiny_model_folder(
    folder: Path, *, template: str | None = None, bos: bool = True, seed: int = 0
) -> Path:
    """A random Llama with a byte-level tokenizer, written to `folder`.

    `template` names one of tiny_tokenizers.TEMPLATES. Special tokens are never the likeliest, so a
    greedy reply never ends by itself.
    """
    tokenizer = tiny_tokenizer(bos=bos, template=template)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    weights = random_weights(Model(ModelArgs.from_dict(config)), seed)
    head = weights["lm_head.weight"]  # (V, D)
    special = mx.arange(len(head)) < len(SPECIAL)
    weights["lm_head.weight"] = mx.where(special[:, None], 0, head)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder


def random_weights(model: nn.Module, seed: int) -> dict[str, mx.array]:
    """Matrices wide enough that replies differ from prompt to prompt; norms are 1."""
    key = mx.random.key(seed)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        key, sub = mx.random.split(key)
        is_matrix = array.ndim > 1
        weights[name] = mx.random.normal(array.shape, scale=0.3, key=sub) if is_matrix else array
    return weights
