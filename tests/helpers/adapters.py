"""Adapters with random numbers in them, in our files and in PEFT's."""

import json

import mlx.core as mx

from models.adapter_files import attach, save_adapter
from models.load import load_model

TOKENS = mx.array([[5, 9, 60, 3, 17], [8, 8, 2, 33, 40]])


def shake(adapter, seed: int = 0, size: float = 0.3) -> None:
    """Random numbers into an adapter, so that it has an effect."""
    for i, layer in enumerate(adapter.layers.values()):
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(seed + i)) * size


LORA = {
    "fine_tune_type": "lora",
    "num_layers": -1,
    "lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.0},
}


PROMPT = {"fine_tune_type": "prompt", "num_prompt_tokens": 3}


def randomised(tuning, scale: float = 0.15):
    """A fresh LoRA changes nothing, so every array gets random numbers."""
    arrays = tuning.arrays()
    keys = mx.random.split(mx.random.key(5), len(arrays))
    tuning.load_arrays(
        {
            n: mx.random.normal(a.shape, scale=scale, key=k)
            for (n, a), k in zip(arrays.items(), keys, strict=True)
        },
        "test",
    )
    return tuning


def write_adapter(path, description):
    loaded = load_model()
    save_adapter(path, randomised(attach(loaded.model, description)), loaded)


def write_peft(folder, arrays, **config):
    """A PEFT adapter folder as another program would write it."""
    folder.mkdir()
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **config}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    mx.save_safetensors(
        str(folder / "adapter_model.safetensors"), arrays, metadata={"format": "pt"}
    )
    return folder


def peft_arrays(shapes, seed=0):
    """{layer: (rank, in, out)} -> random lora_A and lora_B under PEFT's names."""
    mx.random.seed(seed)
    found = {}
    for layer, (rank, width, height) in shapes.items():
        name = f"base_model.model.model.layers.{layer}"
        found[f"{name}.lora_A.weight"] = 0.1 * mx.random.normal((rank, width))
        found[f"{name}.lora_B.weight"] = 0.1 * mx.random.normal((height, rank))
    return found
