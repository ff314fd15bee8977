"""LoRA and DoRA adapters that can be taken out of the model and put back at no cost.

mlx-lm makes the layers. An `Adapter` remembers, for each adapted place, the base layer and the
adapted layer around it, and swaps them in the model's tree. So one copy of the base weights serves
the policy (its adapter in), the reference (no adapter) and a reward model (another adapter in).
"""

from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn

from errors import UserError
from models.adapter_description import match_keys, path_in_block
from models.tuning import Tuning, check_arrays

ADAPTER_ARRAYS = ("lora_a", "lora_b", "m")


@dataclass
class LoraConfig:
    """`scale` multiplies B A x directly (mlx-lm's convention; alpha / rank in PEFT's).

    `keys` are paths inside a block ("self_attn.q_proj") or their last parts ("q_proj"); None means
    every linear layer of a block. `num_layers` counts blocks from the last one; -1 means all.
    """

    rank: int = 8
    scale: float = 4.0
    dropout: float = 0.0
    keys: list[str] | None = None
    num_layers: int = -1
    use_dora: bool = False

    @property
    def kind(self) -> str:
        return "dora" if self.use_dora else "lora"


class Adapter(Tuning):
    """The adapted layers of one adapter, by their path in the model."""

    def __init__(self, model: nn.Module, config: LoraConfig, layers: dict[str, nn.Module]):
        self.config, self.kind = config, config.kind
        self.num_blocks = len(model.layers)
        self._places = {path: _parent(model, path) for path in layers}
        self._adapted = layers
        self._base = {path: base_layer(layer) for path, layer in layers.items()}
        self.active = True

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The adapted layers by their path in the model, whether switched on or not."""
        return dict(self._adapted)

    def activate(self) -> None:
        """Put the adapted layers into the model."""
        self._swap(self._adapted)
        self.active = True

    def deactivate(self) -> None:
        """Put the base layers back; the model computes what it did without the adapter."""
        self._swap(self._base)
        self.active = False

    def _swap(self, layers: dict[str, nn.Module]) -> None:
        for path, (parent, name) in self._places.items():
            parent[name] = layers[path]

    def arrays(self) -> dict[str, mx.array]:
        """The adapter's own arrays under mlx-lm's names (``model.layers.0….lora_a``)."""
        return {
            f"{path}.{name}": layer[name]
            for path, layer in self._adapted.items()
            for name in ADAPTER_ARRAYS
            if name in layer
        }

    def load_arrays(self, arrays: dict[str, mx.array], source: str = "adapter") -> None:
        """Take over `arrays`. Raises UserError that lists every mismatch with both shapes."""
        expected = self.arrays()
        check_arrays(arrays, expected, source)
        for name, array in arrays.items():
            path, leaf = name.rsplit(".", 1)
            # Other programs write half precision, in which Adam would lose small updates.
            self._adapted[path][leaf] = array.astype(expected[name].dtype)

    def description(self, num_blocks: int) -> dict:
        """What an adapter file records, in the form of mlx-lm's adapter_config.json."""
        settings = asdict(self.config)
        num_layers = settings.pop("num_layers")
        settings.pop("use_dora")
        settings["keys"] = sorted({path_in_block(path) for path in self._adapted})
        return {
            "fine_tune_type": self.kind,
            "num_layers": num_blocks if num_layers <= 0 else min(num_layers, num_blocks),
            "lora_parameters": settings,
        }


def add_lora(model: nn.Module, config: LoraConfig) -> Adapter:
    """Wrap the chosen layers of `model`; only the adapter's arrays are trainable afterwards.

    Raises UserError for keys that match no layer, and where a layer is adapted already.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    if any("lora_a" in module for module in model.modules()):
        raise UserError("the model has an adapter in it already; fuse it first (fuse.py)")
    settings = {
        "rank": config.rank,
        "scale": float(config.scale),
        "dropout": config.dropout,
        "keys": set(_match_keys(model, config)),
    }
    model.freeze()
    linear_to_lora_layers(model, max(config.num_layers, 0), settings, use_dora=config.use_dora)
    layers = {path: module for path, module in model.named_modules() if "lora_a" in module}
    for layer in layers.values():
        layer.unfreeze(recurse=False, keys=list(ADAPTER_ARRAYS), strict=False)
        layer.train(model.training)  # a loaded model is in evaluation mode: no dropout
    return Adapter(model, config, layers)


def linear_keys(model: nn.Module, with_experts: bool = True) -> list[str]:
    """Paths inside a block of every layer that LoRA can wrap."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (nn.Linear, nn.QuantizedLinear)
    if with_experts:
        kinds += (SwitchLinear, QuantizedSwitchLinear)
    found = {k for block in model.layers for k, m in block.named_modules() if isinstance(m, kinds)}
    return sorted(found)


def _match_keys(model: nn.Module, config: LoraConfig) -> list[str]:
    return match_keys(linear_keys(model, with_experts=not config.use_dora), config.keys)


def base_layer(layer: nn.Module) -> nn.Module:
    """The base layer inside a LoRA or DoRA layer."""
    for name in ("linear", "embedding"):
        if name in layer:
            return layer[name]
    raise TypeError(f"{type(layer).__name__} wraps nothing that is known here")


def _parent(model: nn.Module, path: str):
    """(container, key) of the place that `path` names, through modules and lists of modules."""
    parts = path.split(".")
    here = model
    for part in parts[:-1]:
        here = here[int(part)] if isinstance(here, list) else here[part]
    return here, parts[-1]
