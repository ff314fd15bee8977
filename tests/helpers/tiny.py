"""Tiny random models, in memory or in Hugging Face's format, made in a second."""

import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tiny_tokenizers import SPECIAL, tiny_tokenizer

from models import opt
from models.load import LoadedModel

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# Windows of 8 tokens, so that short tests run over their edge.
GEMMA_3 = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
}
# model_type -> what its config.json has besides SIZES. Of these, everything is tested; of OTHERS,
# the main things.
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "gemma3_text": {**GEMMA_3, "tie_word_embeddings": True},
    "gemma3": {
        "text_config": {**SIZES, "model_type": "gemma3_text", **GEMMA_3},
        "tie_word_embeddings": True,
    },
    "phi3": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# Two experts of four for each token.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OTHERS: dict[str, dict] = {
    "cohere": {"logit_scale": 1.0, "tie_word_embeddings": True},
    "cohere2": {
        "logit_scale": 1.0,
        "tie_word_embeddings": True,
        "head_dim": 8,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "layer_norm_eps": 1e-5,
        "layer_norm_bias": False,
        "attention_bias": False,
    },
    "exaone": {"layer_norm_epsilon": 1e-5, "num_layers": 2},
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "glm4": {"attention_bias": False, "head_dim": 8, "partial_rotary_factor": 0.5},
    "gpt2": {
        "n_ctx": 128,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 128,
        "layer_norm_epsilon": 1e-5,
    },
    "gpt_neox": {
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "helium": {"head_dim": 8, "attention_bias": False, "mlp_bias": False},
    "internlm2": {"bias": False},
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 64,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
        "tie_word_embeddings": True,
    },
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": [0.0, 1e9],
        "time_step_rank": 4,
    },
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.0, "scale_emb": 2.0},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5},
    "olmo3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 64, "tie_word_embeddings": True},
    "phi": {
        "num_key_value_heads": 4,
        "hidden_size": 64,
        "partial_rotary_factor": 0.5,
        "layer_norm_eps": 1e-5,
    },
    "qwen": {"layer_norm_epsilon": 1e-6, "kv_channels": 8, "intermediate_size": 128},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {
        **EXPERTS,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "head_dim": 8,
    },
    "smollm3": {},
    "stablelm": {"use_qkv_bias": False, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
    "starcoder2": {},
}


def tiny_config(architecture: str = "llama", **changes) -> dict:
    """What stands in config.json; `changes` come last."""
    special = {**ARCHITECTURES, **OTHERS}[architecture]
    config = {"model_type": architecture, **SIZES, **special, **changes}
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "vocab_size": config["vocab_size"]}
    return config


def tiny_model(architecture: str = "llama", *, seed: int = 0, **changes) -> nn.Module:
    """A random model in memory, frozen, in evaluation mode, as load_model gives it.

    Seeds MLX's random numbers too, so that what is put on the model is the same in each test.
    """
    mx.random.seed(seed)
    config = tiny_config(architecture, **changes)
    model = _empty_model(config)
    weights = _stored_weights(config, model, seed)
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.load_weights(list(weights.items()))
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return model


def _stored_weights(config: dict, model: nn.Module, seed: int) -> dict[str, mx.array]:
    """The weights that a file holds: no output layer where it is tied."""
    weights = random_weights(model, seed)
    tied = config["tie_word_embeddings"]
    return {k: v for k, v in weights.items() if not (tied and k.endswith("lm_head.weight"))}


def _empty_model(config: dict) -> nn.Module:
    kind = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    module = opt if kind == "opt" else importlib.import_module(f"mlx_lm.models.{kind}")
    return module.Model(module.ModelArgs.from_dict(config))


def tiny_model_folder(
    folder: Path,
    *,
    template: str | None = None,
    bos: bool = True,
    seed: int = 0,
    architecture: str = "llama",
    **changes,
) -> Path:
    """A random model with a byte-level tokenizer, written to `folder`.

    `template` names one of tiny_tokenizers.TEMPLATES; `changes` go into config.json. Special tokens
    are never the likeliest where the output layer is not tied, so a greedy reply never ends by
    itself.
    """
    tokenizer = tiny_tokenizer(bos=bos, template=template)
    special = {
        "architectures": [f"{architecture.title()}ForCausalLM"],
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = tiny_config(architecture, **{**special, **changes})
    weights = _stored_weights(config, _empty_model(config), seed)
    if (head := weights.get("lm_head.weight")) is not None:  # (V, D)
        ids = mx.arange(len(head)) < len(SPECIAL)
        weights["lm_head.weight"] = mx.where(ids[:, None], 0, head)
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


def bare(model: nn.Module, name: str = "base") -> LoadedModel:
    """A model in memory as what is trained on it takes it: without a tokenizer or a folder."""
    return LoadedModel(model, None, {}, Path(name), name)


def flat(tree) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))
