"""Files that both sides read: adapters and heads as the MLX side writes them, transformers folders.

A path ending in ``.npz`` or ``.safetensors`` is an adapter file with its description inside
(models/adapter_files.py); any other path is a transformers folder with the adapter merged into the
weights, which every script loads with --model. Heads lie beside either, in files of their own.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from pytorch_models import LoadedModel, Tuned, mlx_layout, model_folder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errors import UserError
from models.adapter_description import (
    CONFIG_KEY,
    head_path,
    is_single_file,
    read_description,
    read_head_description,
    recorded_run,
    remove_old_heads,
)
from models.base_fingerprint import (
    QUANTIZATION,
    check_base,
    check_quantization,
    described_base,
)
from models.tokenizer_files import copy_tokenizer
from run_folder.checkpoint_folder import disk_refused
from safe_files import replacing, synced_sum, whole_folder, write_atomically


def is_adapter(path: str | Path, model: Tuned) -> bool:
    """Whether `save_trained` writes an adapter there, and not a model of its own."""
    return is_single_file(path) or model.kind == "prompt"


# ---- adapters ----------------------------------------------------------------------------------


def save_trained(
    path: str | Path,
    model: Tuned,
    loaded: LoadedModel,
    tokenizer: str | None,
    head: str | None = None,
    *,
    run: Path | None = None,
) -> list[Path]:
    """Write what was trained: an adapter file, or a merged folder; returns what was written.

    A soft prompt has no weights to be merged into: a folder then is an adapter of the MLX side.
    `head`: name of the head that the caller saves beside it; those of an older adapter go. `run`:
    the folder of the run, for its model card.
    """
    path = Path(path)
    if not is_adapter(path, model):
        save_merged(path, model, loaded, tokenizer)
        return [path]
    file = path if is_single_file(path) else path / "soft_prompt.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    described = {**description(model, loaded), **recorded_run(path, run)}
    arrays = {name: mlx_layout(name, a.detach()) for name, a in model.arrays().items()}
    write_arrays(file, arrays, {CONFIG_KEY: described}, lambda: remove_old_heads(path, head))
    if file != path:
        write_atomically(path / "adapter_config.json", json.dumps(described, indent=2) + "\n")
    return [path]


def description(model: Tuned, loaded: LoadedModel) -> dict:
    """What an adapter file says of itself, in the form of mlx-lm's adapter_config.json."""
    # No base is rounded here.
    described = {**model.description, **described_base(loaded), QUANTIZATION: None}
    if model.kind == "full":
        described.pop("lora_parameters", None)  # of the flags, which ask for LoRA alone
        described["num_layers"] = loaded.model.config.num_hidden_layers
    elif model.kind != "prompt":
        inside = {name.rsplit(".", 1)[0].split(".", 3)[3] for name in model.arrays()}
        described["lora_parameters"] = {**described["lora_parameters"], "keys": sorted(inside)}
        blocks = {int(name.split(".")[2]) for name in model.arrays()}
        described["num_layers"] = len(blocks)
    return described


def read_adapter(path: str) -> tuple[dict[str, Tensor], dict]:
    """(arrays, description) of an adapter file or folder. Raises UserError where it is not one."""
    path, file = Path(path), Path(path)
    described = read_description(path)
    if path.is_dir():
        files = [path / f"{name}.safetensors" for name in ("adapters", "soft_prompt")]
        file = next((each for each in files if each.exists()), files[0])
    return read_arrays(file), described


def load_adapter(loaded: LoadedModel, path: str, *, any_base: bool = False) -> Tuned:
    """The model with the adapter in `path` on it; UserError for one of other weights than these."""
    arrays, described = read_adapter(path)
    check_base(path, described, loaded, any_base=any_base)
    check_quantization(path, described, None)
    check_finite(arrays, path)
    described.setdefault("num_layers", -1)
    model = Tuned(loaded.model, described).to(loaded.device)
    model.load_arrays(arrays, str(path))
    return model


# ---- heads -------------------------------------------------------------------------------------


def save_head(path: str | Path, name: str, arrays: dict[str, Tensor], described: dict) -> Path:
    file = head_path(path, name)
    write_arrays(file, {k: a.detach().float() for k, a in arrays.items()}, {name: described})
    return file


def read_head(path: str | Path, name: str) -> tuple[dict[str, Tensor], dict] | None:
    """(arrays, description) of a head beside an adapter or in a model folder; None without one."""
    file = head_path(path, name)
    if not file.exists():
        return None
    arrays = read_arrays(file)
    check_finite(arrays, str(file))
    return arrays, read_head_description(path, name)


def check_finite(arrays: dict[str, Tensor], source: str) -> None:
    """UserError for NaN and infinite values, as in models/tuning.py."""
    for name, array in arrays.items():
        if broken := int((~torch.isfinite(array)).sum()):
            raise UserError(
                f"{source}: {broken} of the {array.numel()} values of {name} are NaN "
                "or infinite, so nothing can be computed with it"
            )


# ---- merged folders ----------------------------------------------------------------------------


def save_merged(path: Path, model: Tuned, loaded: LoadedModel, tokenizer: str | None) -> None:
    """A transformers folder: weights, the base's own config.json, its tokenizer.

    config.json is the base's and not one that transformers writes: version 5 moves rope_theta to
    where mlx-lm does not look for it, and would silently get the default.
    """
    whole = model.base
    if model.peft is not None:
        whole = copy.deepcopy(model.peft).merge_and_unload()
    config = {**loaded.config, "dtype": str(model.base.dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    with weights_folder(path, whole) as aside:
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(model_folder(tokenizer or loaded.name), aside)


@contextmanager
def weights_folder(path: Path, model: nn.Module) -> Iterator[Path]:
    """A folder that transformers has written, to put more into: whole in the end or not there."""
    with whole_folder(path.resolve()) as aside:
        with asking_the_disk(path.parent):
            model.save_pretrained(aside)
        yield aside


# ---- arrays on disk ----------------------------------------------------------------------------


def write_arrays(
    path: Path,
    arrays: dict[str, Tensor],
    described: dict,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Write tensors and JSON-able descriptions to .safetensors or .npz: whole or not at all.

    `before`: called once they are on the disk, before they take the name of what was there.
    """
    arrays = {name: a.cpu().contiguous() for name, a in sorted(arrays.items())}
    texts = {name: json.dumps(value) for name, value in described.items()}
    with replacing(path) as aside:
        if path.suffix == ".npz":
            arrays = {name: a.float() for name, a in arrays.items()}
            encoded = {k: np.frombuffer(v.encode(), np.uint8) for k, v in texts.items()}
            np.savez(aside, **{name: a.numpy() for name, a in arrays.items()}, **encoded)
        else:
            with asking_the_disk(path.parent):
                save_file(arrays, aside, metadata=texts)  # one: several would be ordered by chance
        synced_sum(aside)
        before()


@contextmanager
def asking_the_disk(folder: Path) -> Iterator[None]:
    """What safetensors could not write, as the OSError that it was."""
    try:
        yield
    except SafetensorError as wrong:
        raise disk_refused(wrong, folder) from None


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .npz file. No pickle is ever read."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {n: torch.from_numpy(file[n]) for n in file.files if n != CONFIG_KEY}
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
