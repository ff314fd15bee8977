"""Adapters from and for Hugging Face PEFT: LoRA, DoRA, rsLoRA and prompt tuning.

PEFT's ``lora_A`` (r, in) and ``lora_B`` (out, r) are the transposes of mlx-lm's ``lora_a`` and
``lora_b``; its ``lora_alpha / r`` (or ``/ sqrt(r)``, rsLoRA) is mlx-lm's ``scale``; DoRA's
``lora_magnitude_vector`` is ``m``. Its ``prompt_embeddings`` are a soft prompt's rows, in front of
the whole sequence in both.
"""

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from errors import UserError
from models.adapter_description import CONFIG_FILE as CONFIG
from models.adapter_description import PEFT_FILES, path_in_block, read_json
from models.array_files import read_arrays, save_arrays, write_json
from models.file_checks import safetensors_header
from models.lora import Adapter, LoraConfig, add_lora
from models.soft_prompt import SoftPrompt
from models.tuning import Tuning
from safe_files import check_inside

WEIGHTS, PICKLED = PEFT_FILES
ROOT = "base_model.model."
LEAVES = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}
NAME = re.compile(rf"(.*)\.({'|'.join(LEAVES)})(\.default)?(\.weight)?")
# Settings that are understood, or change nothing of what a trained adapter computes (peft 0.21).
ANY_VALUE = set(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern "
    "rank_pattern alpha_pattern use_rslora use_dora megatron_core qalora_group_size eva_config "
    "runtime_config num_virtual_tokens token_dim num_attention_heads num_layers prompt_tuning_init "
    "prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs _custom_modules".split()
)
OFF = (None, False, [], {}, "")
ONE_OF = {
    "bias": ("none", None),
    # Other starting points subtract from the base weights, which stay behind in the program that
    # did (pissa, olora, corda, loftq, lora_ga).
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "num_transformer_submodules": (1, None),
}

# ---------------------------------------------------------------------------- in


def load_peft_adapter(model: nn.Module, path: str | Path) -> Tuning:
    """Put a PEFT adapter (a folder) on `model` and switch it on.

    Layers may have ranks and alphas of their own, and the adapter may leave layers out. Raises
    UserError for what has no counterpart here and for arrays that do not fit.
    """
    path = Path(path)
    if not (path / WEIGHTS).is_file():
        raise UserError(
            f"{path / PICKLED}: pickled weights can run code and are not read; save "
            "the adapter with safe_serialization=True"
        )
    for name in (CONFIG, WEIGHTS):
        check_inside(path / name, path)
    config = read_json(path / CONFIG)
    arrays, _ = read_arrays(path / WEIGHTS)
    try:
        _check_settings(config, path)
        if config["peft_type"] == "PROMPT_TUNING":
            return _soft_prompt(model, arrays, path)
        return _lora(model, config, arrays, path)
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(f"{path / CONFIG}: not usable: {error!r}") from error


def _check_settings(config: dict, path: Path) -> None:
    """Raise UserError for every setting that is not known to mean what is computed here."""
    kind = config.get("peft_type")
    if kind not in ("LORA", "PROMPT_TUNING"):
        raise UserError(f"{path}: PEFT type {kind}; only LORA and PROMPT_TUNING can be read")
    refused = [
        f"{name} {value!r}"
        for name, value in config.items()
        if name not in ANY_VALUE and value not in ONE_OF.get(name, OFF)
    ]
    if refused:
        raise UserError(
            f"{path}: its {', '.join(refused)} has no counterpart here; merge the "
            "adapter with PEFT (merge_and_unload) and give the model"
        )


def _soft_prompt(model: nn.Module, arrays: dict[str, mx.array], path: Path) -> SoftPrompt:
    rows = arrays["prompt_embeddings"].astype(mx.float32)
    prompt = SoftPrompt(model, rows.shape[0])
    prompt.load_arrays({"soft_prompt": rows}, str(path))
    return prompt


def _lora(model: nn.Module, config: dict, arrays: dict[str, mx.array], path: Path) -> Adapter:
    layers = _by_layer(arrays, path)
    for layer, found in layers.items():
        _check_arrays(config, layer, found, path)
    scales = {layer: _scale(config, layer, found) for layer, found in layers.items()}
    rank = max(found["lora_a"].shape[-1] for found in layers.values())
    scale = scales[next(iter(layers))]
    blocks = [int(number) for layer in layers for number in re.findall(r"\.(\d+)\.", layer)[:1]]
    if len(blocks) != len(layers):
        outside = [layer for layer in layers if not re.search(r"\.\d+\.", layer)]
        raise UserError(f"{path}: adapts {', '.join(outside)}; only layers in blocks can be")
    settings = LoraConfig(
        rank=rank,
        scale=scale,
        dropout=float(config.get("lora_dropout") or 0.0),
        keys=sorted({path_in_block(layer) for layer in layers}),
        num_layers=len(model.layers) - min(blocks),
        use_dora=bool(config.get("use_dora")),
    )
    adapter = add_lora(model, settings)
    # Layers that the file leaves out keep their fresh arrays, which change nothing.
    named = adapter.arrays()
    for layer, found in layers.items():
        found["lora_b"] = found["lora_b"] * (scales[layer] / scale)
        found = {**found, **_padded(found, rank)}
        named.update({f"{layer}.{leaf}": array for leaf, array in found.items()})
    adapter.load_arrays(named, str(path))
    return adapter


def _by_layer(arrays: dict[str, mx.array], path: Path) -> dict[str, dict[str, mx.array]]:
    """PEFT's arrays as layer path -> {"lora_a", "lora_b"[, "m"]}, in our orientation."""
    layers: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        match = NAME.fullmatch(name.removeprefix(ROOT))
        if match is None:
            raise UserError(f"{path}: {name} is no part of a LoRA or DoRA adapter of layers")
        array = array.astype(mx.float32)
        leaf = LEAVES[match[2]]
        if leaf != "m":
            array = mx.contiguous(array.T)
        layers.setdefault(match[1], {})[leaf] = array.reshape(-1) if leaf == "m" else array
    for layer, found in layers.items():
        if not {"lora_a", "lora_b"} <= found.keys():
            raise UserError(f"{path}: {layer} has not both lora_A and lora_B")
    return layers


def _check_arrays(config: dict, layer: str, found: dict[str, mx.array], path: Path) -> None:
    """Raise UserError where the arrays of a layer are not what the settings say of them."""
    rank, wanted = found["lora_a"].shape[-1], _of_layer(config, "r", "rank_pattern", layer)
    if rank != wanted:
        raise UserError(
            f"{path}: {layer} has rank {rank}, and {CONFIG} says {wanted}, so by which "
            "factor it counts is not known"
        )
    if config.get("use_dora") and "m" not in found:
        raise UserError(f"{path}: {layer} has no lora_magnitude_vector, and {CONFIG} says use_dora")


def _of_layer(config: dict, name: str, patterns: str, layer: str) -> int | float:
    """A setting of one layer; patterns match the end of its path, as in peft's get_pattern_key."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return config[name]


def _scale(config: dict, layer: str, found: dict[str, mx.array]) -> float:
    """alpha / r of one layer."""
    rank = found["lora_a"].shape[-1]
    alpha = _of_layer(config, "lora_alpha", "alpha_pattern", layer)
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _padded(found: dict[str, mx.array], rank: int) -> dict[str, mx.array]:
    """The two factors with zeros up to `rank`, which add nothing to their product."""
    missing = rank - found["lora_a"].shape[-1]
    return {
        "lora_a": mx.pad(found["lora_a"], [(0, 0), (0, missing)]),
        "lora_b": mx.pad(found["lora_b"], [(0, missing), (0, 0)]),
    }


# ---------------------------------------------------------------------------- out


def save_peft_adapter(folder: Path, tuning: Tuning, base: str, base_folder: Path) -> None:
    """Write `tuning` as a PEFT adapter of the transformers model `base` into `folder`.

    Raises UserError where transformers has no layer of that name, and for full fine-tuning.
    """
    if tuning.kind == "full":
        raise UserError("every weight was trained: PEFT has no form for that; use --format model")
    if tuning.kind == "prompt":
        rows = tuning.arrays()["soft_prompt"]
        config = _prompt_config(rows, read_json(base_folder / "config.json"))
        arrays = {"prompt_embeddings": rows}
    else:
        _check_layers(tuning, base_folder)
        config = _lora_config(tuning)
        arrays = {_peft_name(name): _theirs(name, a) for name, a in tuning.arrays().items()}
    config["base_model_name_or_path"] = base
    save_arrays(folder / WEIGHTS, arrays, {"format": "pt"})
    write_json(folder / CONFIG, config)


def _check_layers(adapter: Adapter, base_folder: Path) -> None:
    names = set()
    for file in base_folder.glob("model*.safetensors"):
        names |= safetensors_header(file).keys()
    unknown = [layer for layer in adapter.layers if f"{layer}.weight" not in names]
    if unknown:
        raise UserError(
            f"{base_folder}: keeps {unknown[0]} under another name or in parts, so an "
            "adapter of it has no PEFT form"
        )


def _lora_config(adapter: Adapter) -> dict:
    settings = adapter.config
    keys = sorted({path_in_block(layer) for layer in adapter.layers})
    every_block = adapter.num_blocks * len(keys) == len(adapter.layers)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": settings.rank,
        "lora_alpha": settings.scale * settings.rank,
        "lora_dropout": settings.dropout,
        "use_dora": settings.use_dora,
        "use_rslora": False,
        # A short name adapts that layer in every block; otherwise each place is named in full.
        "target_modules": keys if every_block else sorted(adapter.layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _prompt_config(rows: mx.array, base: dict) -> dict:
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": rows.shape[0],
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": base.get("num_attention_heads"),
        "num_layers": base.get("num_hidden_layers"),
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }


def _peft_name(name: str) -> str:
    layer, leaf = name.rsplit(".", 1)
    theirs = next(key for key, ours in LEAVES.items() if ours == leaf)
    return f"{ROOT}{layer}.{theirs}" + (".weight" if leaf != "m" else "")


def _theirs(name: str, array: mx.array) -> mx.array:
    array = array.astype(mx.float32)
    return array if name.endswith(".m") else mx.contiguous(array.T)
