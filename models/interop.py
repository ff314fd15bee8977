"""Adapters from and for Hugging Face PEFT.

PEFT's ``lora_A`` (r, in) and ``lora_B`` (out, r) are the transposes of mlx-lm's ``lora_a`` and
``lora_b``; its ``lora_alpha / r`` (or ``/ sqrt(r)``, rsLoRA) is mlx-lm's ``scale``; DoRA's
``lora_magnitude_vector`` is ``m``.
"""

import json
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from errors import UserError
from models.adapter_files import read_arrays
from models.lora import Adapter, LoraConfig, add_lora

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_LEAVES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b",
               "lora_magnitude_vector": "m", "lora_magnitude_vector.weight": "m"}  # fmt: skip


def is_peft_adapter(path: str | Path) -> bool:
    return (Path(path) / PEFT_WEIGHTS).is_file()


def load_peft_adapter(model: nn.Module, path: str | Path) -> Adapter:
    """Put a PEFT LoRA or DoRA adapter (a folder) on `model`.

    Raises UserError for what has no counterpart here (other kinds, per-layer ranks, biases) and
    for arrays that do not fit.
    """
    path = Path(path)
    try:
        config = json.loads((path / PEFT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / PEFT_CONFIG}: cannot be read: {error}") from None
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: PEFT type {config.get('peft_type')}; only LORA can be read")
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"):
        if config.get(name):
            raise UserError(f"{path}: {name} has no counterpart here")
    arrays, _ = read_arrays(path / PEFT_WEIGHTS)
    named = {_our_name(name, path): _ours(name, array) for name, array in arrays.items()}
    rank = int(config["r"])
    divisor = rank**0.5 if config.get("use_rslora") else rank
    blocks = {int(i) for name in named for i in re.findall(r"\.(\d+)\.", name)[:1]}
    keys = sorted({re.sub(r"^.*?\.\d+\.", "", name.rsplit(".", 1)[0]) for name in named})
    adapter = add_lora(
        model,
        LoraConfig(
            rank=rank,
            scale=config["lora_alpha"] / divisor,
            dropout=float(config.get("lora_dropout") or 0.0),
            keys=keys,
            num_layers=len(model.layers) - min(blocks),
            use_dora=bool(config.get("use_dora")),
        ),
    )
    adapter.load_arrays(named, str(path))
    return adapter


def _our_name(name: str, path: Path) -> str:
    for theirs, ours in PEFT_LEAVES.items():
        if name.endswith("." + theirs):
            return name.removeprefix("base_model.model.").removesuffix(theirs) + ours
    raise UserError(f"{path}: {name} is no part of a LoRA or DoRA adapter")


def _ours(name: str, array: mx.array) -> mx.array:
    array = array.astype(mx.float32)
    return mx.contiguous(array.T) if "lora_magnitude_vector" not in name else array
