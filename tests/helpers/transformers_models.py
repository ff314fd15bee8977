"""Tiny random models of every architecture in docs/architectures.md, as transformers 5 writes them.

`write(case, folder)` saves the model of one of CASES and returns the logits (40, V) that
transformers computes for TOKENS after loading it again. Four architectures are no part of
transformers; a sibling of theirs that computes the same is saved under their names (SIBLINGS).
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizers import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = list(range(20, 60))
SIZES = {
    "vocab_size": 302,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
PLAIN = {"rope_type": "default", "rope_theta": 5e4}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 8.0],
    "rope_theta": 5e4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}


def rope(rule: str = "default", **more) -> dict:
    return {"rope_parameters": {**PLAIN, **SCALED.get(rule, {}), **more}}


def by_type(rule: str) -> dict:
    sliding = {"rope_type": "default", "rope_theta": 3e3}
    return {
        "rope_parameters": {
            "full_attention": rope(rule)["rope_parameters"],
            "sliding_attention": sliding,
        }
    }


def gemma3(rule: str) -> dict:
    text = {**SIZES, **GEMMA, "num_hidden_layers": 7, "model_type": "gemma3_text", **by_type(rule)}
    return {"text_config": text, "vision_config": VISION, "mm_tokens_per_image": 4}


ANY = {  # architecture -> settings; those that take any rule of scaling
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": GEMMA,
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {**WINDOWS, "tie_word_embeddings": True},
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    "helium": {"head_dim": 8},
    "olmoe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "smollm3": {},
    "starcoder2": {"sliding_window": None},
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **WINDOWS},
}
PARTIAL = {
    "glm4": (0.5, {"head_dim": 8}),
    "nemotron": (0.5, {}),
    "phi": (0.5, {}),
    "stablelm": (0.25, {}),
    "gpt_neox": (0.25, {"intermediate_size": 128}),
}
CASES: dict[str, tuple[str, dict]] = {}  # name -> (architecture, settings)
CASES |= {kind: (kind, {**more, **rope()}) for kind, more in ANY.items()}
CASES |= {
    kind: (kind, {**more, **rope(partial_rotary_factor=share)})
    for kind, (share, more) in PARTIAL.items()
}
CASES |= {
    "gemma3_text": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7, **by_type("linear")}),
    "gemma3": ("gemma3", gemma3("linear")),
    "olmo3": ("olmo3", {**WINDOWS, **by_type("yarn")}),
    "phi3": ("phi3", {"rope_parameters": {**LONG, "original_max_position_embeddings": 128}}),
    "gpt2": (
        "gpt2",
        {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 128, "tie_word_embeddings": True},
    ),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": True}),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16},
    ),
}
# The same again where positions, windows and layers are scaled, mixed or switched otherwise.
MORE: dict[str, tuple[str, dict]] = {
    f"{kind}-{rule}": (kind, {**more, **rope(rule)})
    for kind, more in ANY.items()
    for rule in SCALED
    if (kind, rule) not in (("mixtral", "yarn"), ("mixtral", "dynamic"))  # torch's own errors
}
MORE |= {
    f"{kind}-linear": (kind, {**more, **rope("linear", partial_rotary_factor=share)})
    for kind, (share, more) in PARTIAL.items()
}
MORE |= {
    "gemma3_text-plain": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7, **by_type("default")}),
    "gemma3_text-yarn": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7, **by_type("yarn")}),
    "gemma3_text-types": ("gemma3_text", {**GEMMA, **WINDOWS, **by_type("linear")}),
    "gemma3_text-all_sliding": (
        "gemma3_text",
        {**GEMMA, "num_hidden_layers": 2, **by_type("linear")},
    ),
    "gemma3-yarn": ("gemma3", gemma3("yarn")),
    "olmo3-plain": ("olmo3", {**WINDOWS, **by_type("default")}),
    "olmo3-linear": ("olmo3", {**WINDOWS, **by_type("linear")}),
    "phi3-long": ("phi3", {"rope_parameters": {**LONG, "original_max_position_embeddings": 16}}),
    "phi3-partial": ("phi3", rope(partial_rotary_factor=0.5)),
    "phi3-window": ("phi3", {**rope(), "sliding_window": 8}),
    "mistral-window": ("mistral", {**rope(), "sliding_window": 8}),
    "starcoder2-window": ("starcoder2", {**rope(), "sliding_window": 8}),
    "mixtral-window": ("mixtral", {**ANY["mixtral"], **rope(), "sliding_window": 8}),
    "qwen2-window": (
        "qwen2",
        {**rope(), "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen2_moe-normalised": ("qwen2_moe", {**ANY["qwen2_moe"], **rope(), "norm_topk_prob": True}),
    "qwen2_moe-dense": ("qwen2_moe", {**ANY["qwen2_moe"], **rope(), "mlp_only_layers": [0, 2]}),
    "qwen2_moe-every_other": (
        "qwen2_moe",
        {**ANY["qwen2_moe"], **rope(), "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "qwen3_moe-first_dense": ("qwen3_moe", {**ANY["qwen3_moe"], **rope(), "mlp_only_layers": [0]}),
    "qwen3_moe-dense": (
        "qwen3_moe",
        {**ANY["qwen3_moe"], **rope(), "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
    "llama-biases": ("llama", {**rope(), "attention_bias": True, "mlp_bias": True}),
    "cohere2-odd": (
        "cohere2",
        {
            "sliding_window": 8,
            "tie_word_embeddings": True,
            "layer_types": [
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
        },
    ),
    "cohere-norms": ("cohere", {**ANY["cohere"], **rope(), "use_qk_norm": True}),
    "gpt_oss-untruncated": ("gpt_oss", {**ANY["gpt_oss"], **rope("yarn", truncate=False)}),
    "mamba2-one_group": ("mamba2", {**CASES["mamba2"][1], "n_groups": 1}),
    "gpt_neox-tanh": (
        "gpt_neox",
        {**PARTIAL["gpt_neox"][1], **rope(partial_rotary_factor=0.25), "hidden_act": "gelu_new"},
    ),
}


def write(case: str, folder: Path) -> np.ndarray:
    """Save the model of `case` with a tokenizer; transformers' logits (40, V) for TOKENS."""
    if case in SIBLINGS:
        kind, more = SIBLINGS[case]["of"]
    else:
        kind, more = {**CASES, **MORE}[case]
    torch.manual_seed(0)
    settings = copy.deepcopy({**({} if kind == "gemma3" else SIZES), **more})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "A_log" not in name:
                weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    found = logits(folder)
    if case in SIBLINGS:
        SIBLINGS[case]["rename"](folder, json.loads((folder / "config.json").read_text()))
    return found


def logits(folder: Path) -> np.ndarray:
    """What transformers computes for TOKENS with the model in `folder`, (40, V) float32."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([TOKENS])).logits[0].numpy()


# ------------------------------------------------------------------------------ siblings


def _rewrite(folder: Path, arrays: dict, config: dict) -> None:
    arrays = {name: array.contiguous() for name, array in arrays.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _replaced(arrays: dict, names: dict[str, str]) -> dict:
    found = {}
    for name, array in arrays.items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = array
    return found


def _exaone(folder: Path, config: dict) -> None:
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.attention.out_proj",
        "self_attn": "attn.attention",
        "mlp.gate_proj": "mlp.c_fc_0",
        "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
    }
    config.update(model_type="exaone", num_layers=4, layer_norm_epsilon=config["rms_norm_eps"])
    _rewrite(folder, _replaced(load_file(folder / "model.safetensors"), names), config)


def _internlm2(folder: Path, config: dict) -> None:
    arrays = load_file(folder / "model.safetensors")
    for layer in range(4):
        root = f"model.layers.{layer}.self_attn."
        q, k, v = (arrays.pop(f"{root}{x}_proj.weight") for x in "qkv")
        heads = [part.view(2, -1, 8, 32) for part in (q, k, v)]  # two groups of 2 + 1 + 1 heads
        arrays[f"{root}wqkv.weight"] = torch.cat(heads, dim=1).reshape(-1, 32)
    names = {
        "embed_tokens": "tok_embeddings",
        "self_attn.o_proj": "attention.wo",
        "self_attn": "attention",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "lm_head": "output",
    }
    config.update(model_type="internlm2", bias=False)
    _rewrite(folder, _replaced(arrays, names), config)


def _minicpm(folder: Path, config: dict) -> None:
    config.update(model_type="minicpm", scale_emb=3.0, scale_depth=1.4, dim_model_base=16)
    _rewrite(folder, load_file(folder / "model.safetensors"), config)


def _qwen(folder: Path, config: dict) -> None:
    arrays = load_file(folder / "model.safetensors")
    for layer in range(4):
        for leaf in ("weight", "bias"):
            parts = [arrays.pop(f"model.layers.{layer}.self_attn.{x}_proj.{leaf}") for x in "qkv"]
            arrays[f"model.layers.{layer}.attn.c_attn.{leaf}"] = torch.cat(parts)
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1",
        "mlp.down_proj": "mlp.c_proj",
    }
    config.update(
        model_type="qwen",
        layer_norm_epsilon=config["rms_norm_eps"],
        kv_channels=8,
        intermediate_size=2 * config["intermediate_size"],
    )
    _rewrite(folder, _replaced(arrays, names), config)


SIBLINGS = {
    "exaone": {"of": ("llama", rope("linear")), "rename": _exaone},
    "internlm2": {"of": ("llama", rope("dynamic")), "rename": _internlm2},
    "minicpm": {
        "of": (
            "granite",
            {
                **rope("linear"),
                "embedding_multiplier": 3.0,
                "residual_multiplier": 1.4 / 2,
                "logits_scaling": 2.0,
                "attention_multiplier": 8**-0.5,
            },
        ),
        "rename": _minicpm,
    },
    "qwen": {
        "of": ("qwen2", {**rope(rope_theta=10000.0), "num_key_value_heads": 4}),
        "rename": _qwen,
    },
}
