"""Files that both sides read: adapters and heads as the MLX side writes them, transformers folders.

A path ending in ``.npz`` or ``.safetensors`` is an adapter file with its description inside
(models/adapter_files.py); any other path is a transformers folder with the adapter merged into the
weights, which every script loads with --model. Heads lie beside either, in files of their own.
"""

import copy
import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from pytorch_models import LoadedModel, Tuned, mlx_layout, model_folder
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError
from models.adapter_description import (
    CONFIG_KEY,
    head_path,
    is_single_file,
    read_json,
    remove_old_heads,
)
from models.base_fingerprint import (
    QUANTIZATION,
    check_base,
    check_quantization,
    described_base,
)
from run_folder.checkpoint_folder import disk_refused
from run_folder.run import OWN_NAMES, RUNS
from safe_files import (
    NOT_WHOLE,
    copy_file,
    put_folder_in_place,
    replacing,
    sweep,
    sync_tree,
    synced_sum,
    temporary_name,
    write_atomically,
    write_json,
)

# Copied as they are; weights and config.json are written anew.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "chat_template.*",
    "generation_config.json",
)
# All that is in a folder that was written here.
OUTPUTS = (
    *TOKENIZER_FILES,
    "config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    ".DS_Store",
)
WRITTEN = "written.json"  # in a run's folder: where it has written its model


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
) -> list[Path]:
    """Write what was trained: an adapter file, or a merged folder; returns what was written.

    A soft prompt has no weights to be merged into: a folder then is an adapter of the MLX side.
    `head`: name of the head that the caller saves beside it; those of an older adapter go.
    """
    path = Path(path)

    def old_heads() -> None:
        remove_old_heads(path, head)

    if is_single_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        described = description(model, loaded)
        write_arrays(path, stored_arrays(model), {CONFIG_KEY: described}, old_heads)
    elif model.kind == "prompt":
        path.mkdir(parents=True, exist_ok=True)
        described = description(model, loaded)
        file = path / "soft_prompt.safetensors"
        write_arrays(file, stored_arrays(model), {CONFIG_KEY: described}, old_heads)
        write_atomically(path / "adapter_config.json", json.dumps(described, indent=2) + "\n")
    else:
        save_merged(path, model, loaded, tokenizer)
    return [path]


def stored_arrays(model: Tuned) -> dict[str, Tensor]:
    return {name: mlx_layout(name, a.detach()) for name, a in model.arrays().items()}


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
    path = Path(path)
    if path.is_dir():
        for name in ("adapters.safetensors", "soft_prompt.safetensors"):
            if (path / name).exists():
                arrays, _ = read_arrays(path / name)
                return arrays, json.loads((path / "adapter_config.json").read_text())
        raise UserError(f"{path}: no adapter there; a merged folder is given as --model")
    if not is_single_file(path):
        raise UserError(f"{path}: an adapter is a .npz or .safetensors file, or a folder")
    arrays, described = read_arrays(path)
    if CONFIG_KEY not in described:
        raise UserError(f"{path}: does not say what kind of adapter it is")
    return arrays, described[CONFIG_KEY]


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
    arrays, described = read_arrays(file)
    check_finite(arrays, str(file))
    return arrays, described.get(name, {})


def check_finite(arrays: dict[str, Tensor], source: str) -> None:
    """UserError for NaN and infinite values, as in models/tuning.py."""
    for name, array in arrays.items():
        if broken := int((~torch.isfinite(array)).sum()):
            raise UserError(
                f"{source}: {broken} of the {array.numel()} values of {name} are NaN "
                "or infinite, so nothing can be computed with it"
            )


# ---- merged folders ----------------------------------------------------------------------------


def merged_weights(model: Tuned) -> dict[str, Tensor]:
    """Weights of the base under its own names, the adapter added; the model stays as it is."""
    weights = {
        name.replace(".base_layer.", "."): weight
        for name, weight in model.base.state_dict().items()
        if ".lora_" not in name
    }
    for path, layer in model.base.named_modules():
        if hasattr(layer, "lora_A"):
            layer = copy.deepcopy(layer)
            layer.merge()
            weights[f"{path}.weight"] = layer.get_base_layer().weight.data
    return weights


def check_free(args) -> None:
    """Raise UserError unless --save-file may be written: before the work, not after it.

    A folder that is there is replaced where the run that is resumed has written it itself, or where
    --overwrite deletes it with its run.
    """
    if args.save_file is None or is_single_file(args.save_file):
        return
    path, refused = Path(args.save_file).resolve(), f"--save-file {args.save_file}: "
    run = (Path(args.output_dir) if args.output_dir else Path(RUNS, "new")).resolve()
    inside = path.relative_to(run).parts if path.is_relative_to(run) else ()
    if path in (run, *run.parents) or (inside and inside[0] in OWN_NAMES):
        raise UserError(f"{refused}is where the run is kept; give another name")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if args.overwrite and inside == ("model",):
        return
    written = run / WRITTEN
    own = args.resume is not None and written.exists() and read_json(written)["path"] == str(path)
    if not own or not is_output(path):
        raise UserError(f"{refused}is there already; give another name, or move it away")


def place_of_model(args, run: Path) -> Path:
    """Where the model of a run goes; noted there, so that the same run may replace it."""
    path = Path(args.save_file or run / "model")
    write_json(run / WRITTEN, {"path": str(path.resolve())})
    return path


def is_output(path: Path) -> bool:
    """Whether a folder holds nothing but what is written here, and what a Mac adds."""
    return path.is_dir() and all(
        any(file.match(pattern) for pattern in OUTPUTS) for file in path.iterdir()
    )


def save_merged(path: Path, model: Tuned, loaded: LoadedModel, tokenizer: str | None) -> None:
    """A transformers folder: weights, the base's own config.json, its tokenizer.

    config.json is the base's and not one that transformers writes: version 5 moves rope_theta to
    where mlx-lm does not look for it, and would silently get the default.
    """
    path = path.resolve()
    sweep(path)
    aside = temporary_name(path)
    try:
        with asking_the_disk(path.parent):
            model.base.save_pretrained(aside, state_dict=merged_weights(model))
        config = {**loaded.config, "dtype": str(model.base.dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for pattern in TOKENIZER_FILES:
            for file in model_folder(tokenizer or loaded.name).glob(pattern):
                copy_file(file, aside / file.name)
        sync_tree(aside)
        put_folder_in_place(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
        there, _ = read_arrays(aside)
        if there.keys() != arrays.keys() or not all(
            torch.equal(there[n], arrays[n]) for n in there
        ):
            raise OSError(errno.EIO, NOT_WHOLE, str(path))
        synced_sum(aside)
        before()


@contextmanager
def asking_the_disk(folder: Path) -> Iterator[None]:
    """What safetensors could not write, as the OSError that it was."""
    try:
        yield
    except SafetensorError as wrong:
        raise disk_refused(wrong, folder) from None


def read_arrays(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, descriptions) of a .safetensors or .npz file. No pickle is ever read."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            texts = {k: arrays.pop(k).tobytes().decode() for k in [CONFIG_KEY] if k in arrays}
            return {k: torch.from_numpy(a) for k, a in arrays.items()}, decoded(texts)
        with safe_open(path, framework="pt") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            return arrays, decoded(file.metadata() or {})
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def decoded(texts: dict[str, str]) -> dict:
    return {name: json.loads(text) for name, text in texts.items() if name != "format"}
