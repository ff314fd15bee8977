"""Files of trained arrays that describe themselves: adapters, soft prompts, heads.

A path ending in ``.npz`` or ``.safetensors`` is one file with its description inside; any other
path is a folder in mlx-lm's layout (``adapters.safetensors`` + ``adapter_config.json``), which
``mlx_lm.generate --adapter-path`` reads. Heads sit beside the adapter in files of their own,
because mlx-lm's loaders take no array they do not know.
"""

import json
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from errors import UserError
from models.adapter_description import (
    CONFIG_FILE,
    CONFIG_KEY,
    describe_peft_adapter,
    guess_description,
    head_path,
    is_peft_adapter,
    is_single_file,
    read_json,
    recorded_run,
    remove_old_heads,
)
from models.array_files import fill, read_arrays, write_arrays, write_text
from models.base_fingerprint import QUANTIZATION, check_base, check_quantization, described_base
from models.interop import load_peft_adapter
from models.load import LoadedModel
from models.lora import LoraConfig, add_lora
from models.soft_prompt import SoftPrompt
from models.tuning import FullTuning, Tuning, check_finite
from safe_files import check_inside, refuse_links, replacing

SCORES = "score_conditioning"  # of a model trained on scores: how they are written, the target
SOFT_PROMPT_FILE = "soft_prompt.safetensors"


def describe(tuning: Tuning, base: LoadedModel) -> dict:
    """What an adapter file says of itself: what is trained, and on which weights."""
    described = {**tuning.description(len(base.model.layers)), **described_base(base)}
    if SCORES in base.config:
        described[SCORES] = base.config[SCORES]
    return {**described, QUANTIZATION: base.quantized}


def save_adapter(
    path: str | Path,
    tuning: Tuning,
    base: LoadedModel,
    *,
    head: str | None = None,
    run: str | Path | None = None,
) -> list[Path]:
    """Write the arrays of `tuning` with their description; returns the files written.

    `head`: name of the head that the caller saves beside it; those of an older adapter go. `run`:
    the folder of the run that trained it, for its model card.
    """
    path = Path(path)
    config, arrays = {**describe(tuning, base), **recorded_run(path, run)}, tuning.arrays()
    if is_single_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        written = [path]
    else:
        path.mkdir(parents=True, exist_ok=True)
        name = SOFT_PROMPT_FILE if tuning.kind == "prompt" else "adapters.safetensors"
        written = [path / name, path / CONFIG_FILE]
    refuse_links(written[-1])
    with replacing(written[0]) as aside:
        fill(aside, arrays, {CONFIG_KEY: config})
        remove_old_heads(path, head)  # a stop from here on leaves no head of another adapter
    for file in written[1:]:
        write_text(file, json.dumps(config, indent=2) + "\n")
    return written


def read_adapter(path: str | Path) -> tuple[dict[str, mx.array], dict]:
    """(arrays, description) of an adapter file or folder. Raises UserError where it is not one.

    Of a PEFT adapter only the description: its arrays have other names (see interop.py).
    """
    path = Path(path)
    if is_peft_adapter(path):
        return {}, describe_peft_adapter(path)
    if path.is_dir():
        config_file = path / "adapter_config.json"
        if not config_file.exists():
            raise UserError(f"{path}: not an adapter: adapter_config.json is missing")
        config = read_json(config_file)
        file = path / SOFT_PROMPT_FILE
        if config.get("fine_tune_type") != "prompt" or not file.exists():
            file = path / "adapters.safetensors"  # of a soft prompt: in a checkpoint
        check_inside(config_file, path)
        check_inside(file, path)
        arrays, described = read_arrays(file)
        if described.get(CONFIG_KEY, config) != config:
            said = f"{config_file}: is not what {file.name} says of itself; the former counts"
            warnings.warn(said, stacklevel=2)
        return arrays, config
    if not is_single_file(path) and path.exists():
        raise UserError(f"{path}: an adapter is a .npz or .safetensors file, or a folder")
    arrays, described = read_arrays(path)
    if (config := described.get(CONFIG_KEY)) is None:
        config = guess_description({name: tuple(a.shape) for name, a in arrays.items()}, path)
    return arrays, config


def load_adapter(base: LoadedModel, path: str | Path, *, any_base: bool = False) -> Tuning:
    """Put the adapter in `path` (ours, mlx-lm's or PEFT's) on a model and switch it on.

    Raises UserError with every array that does not fit, with both shapes; and for an adapter of
    other weights than these, unless `any_base`.
    """
    if is_peft_adapter(path):
        return load_peft_adapter(base.model, path)
    arrays, config = read_adapter(path)
    check_base(path, config, base, any_base=any_base)
    check_quantization(path, config, base.quantized)
    if SCORES in config:
        base.config[SCORES] = config[SCORES]
    try:
        tuning = attach(base.model, config)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: its adapter configuration is not usable: {error!r}") from error
    if tuning.kind == "full":
        expected = tuning.arrays()
        arrays = {k: a.astype(expected[k].dtype) if k in expected else a for k, a in arrays.items()}
    try:
        tuning.load_arrays(arrays, str(path))
    except UserError:
        if tuning.kind != "full":
            tuning.deactivate()  # the model is left as it was
        raise
    return tuning


def attach(model: nn.Module, config: dict) -> Tuning:
    """A fresh `Tuning` as an adapter's description asks for it."""
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        return FullTuning(model)
    if kind == "prompt":
        return SoftPrompt(model, int(config["num_prompt_tokens"]))
    if kind not in ("lora", "dora"):
        raise ValueError(f'fine_tune_type "{kind}" is none of lora, dora, full, prompt')
    settings = config["lora_parameters"]
    return add_lora(
        model,
        LoraConfig(
            rank=int(settings["rank"]),
            scale=float(settings["scale"]),
            dropout=float(settings.get("dropout", 0.0)),
            keys=settings.get("keys"),
            num_layers=int(config.get("num_layers", -1)),
            use_dora=kind == "dora",
        ),
    )


# ---------------------------------------------------------------------------- heads


def save_head(adapter_path: str | Path, name: str, arrays: dict, description: dict) -> Path:
    path = head_path(adapter_path, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, arrays, {name: description})
    return path


def read_head(adapter_path: str | Path, name: str) -> tuple[dict[str, mx.array], dict] | None:
    """(arrays, description) of a head beside an adapter or in a model folder; None without one.

    Raises UserError for a head with NaN or infinite values.
    """
    path = head_path(adapter_path, name)
    if not path.exists():
        return None
    arrays, described = read_arrays(path)
    check_finite(arrays, str(path))
    return arrays, described.get(name, {})
