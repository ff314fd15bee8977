"""What an adapter file says of itself, read without MLX: on the command line, and in PyTorch."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from errors import UserError
from models.file_checks import check_npz, safetensors_header
from safe_files import check_inside

CONFIG_KEY = "adapter_config"  # safetensors metadata entry; in .npz an array of UTF-8 bytes
FILE_SUFFIXES = (".npz", ".safetensors")
RUN = "run"  # entry of a description: the run's folder, from where the adapter lies
HEADS = REWARD_HEAD, VALUE_HEAD = "reward_head", "value_head"
CONFIG_FILE = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
GUESSED_SCALE = 4.0  # of files that record none: the default of this project's LoRA
Shapes = dict[str, tuple[int, ...]]


def is_single_file(path: str | Path) -> bool:
    return Path(path).suffix in FILE_SUFFIXES


def is_peft_adapter(path: str | Path) -> bool:
    return any((Path(path) / name).is_file() for name in PEFT_FILES)


def recorded_run(path: str | Path, run: str | Path | None) -> dict[str, str]:
    """The entry of a description that says which run made the adapter at `path`; {} for None."""
    if run is None:
        return {}
    beside = Path(path).parent if is_single_file(path) else Path(path)
    return {RUN: os.path.relpath(Path(run).resolve(), beside.resolve())}


def head_path(adapter_path: str | Path, name: str) -> Path:
    """Where the head `name` (of HEADS) of an adapter or model folder lies."""
    path = Path(adapter_path)
    if is_single_file(path):
        return path.with_name(f"{path.stem}.{name}.safetensors")
    return path / f"{name}.safetensors"


def remove_old_heads(adapter_path: str | Path, head: str | None) -> None:
    """Before an adapter is given its name: delete the heads of the one whose place it takes.

    `head` names the one that is saved next; of another that goes, the user is told. A fused model's
    head stays, and one that may be of the other file of this name (``a.npz``, ``a.safetensors``).
    """
    path = Path(adapter_path)
    others = [path.with_suffix(s) for s in FILE_SUFFIXES if s != path.suffix]
    shared = is_single_file(path) and any(other.exists() for other in others)
    if shared or (path / "config.json").exists():
        return
    for name in HEADS:
        file = head_path(path, name)
        if file.exists():
            file.unlink()
            if name != head:
                said = f"{file} was removed: it belonged to the adapter that {path} replaces"
                warnings.warn(said, stacklevel=2)


def path_in_block(path: str) -> str:
    """``model.layers.3.self_attn.q_proj`` -> ``self_attn.q_proj``."""
    parts = path.split(".")
    first_number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[first_number + 1 :])


def match_keys(possible: list[str], keys: list[str] | None) -> list[str]:
    """Of the paths inside a block those that `keys` (None: all) name, whole or by their ends.

    Raises UserError for a key that names none.
    """
    if keys is None:
        return possible
    matched = []
    for key in keys:
        hits = [path for path in possible if path == key or path.endswith(f".{key}")]
        if not hits:
            have = ", ".join(possible)
            raise UserError(f"--lora-keys {key}: no such layer; this model has {have}")
        matched += hits
    return matched


def check_shapes(given: Mapping, expected: Mapping, source: str) -> None:
    """Raise one UserError that lists every array too many, too few or of another shape."""
    problems = []
    for name in sorted(given.keys() | expected.keys()):
        if name not in expected:
            problems.append(f"{name} {tuple(given[name].shape)} has no place in this model")
        elif name not in given:
            problems.append(f"{name} {tuple(expected[name].shape)} is missing")
        elif tuple(given[name].shape) != tuple(expected[name].shape):
            there, here = tuple(given[name].shape), tuple(expected[name].shape)
            problems.append(f"{name} is {there} in the file and {here} in the model")
    if problems:
        raise UserError(f"{source}: does not fit the model: " + "; ".join(problems))


def read_json(path: Path) -> dict:
    """The JSON object in a file; UserError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object")
    return value


def read_description(path: str | Path) -> dict:
    """The description of an adapter file or folder: ours, mlx-lm's, or PEFT's in our words.

    Raises UserError where there is no adapter.
    """
    path = Path(path)
    if is_peft_adapter(path):
        return describe_peft_adapter(path)
    if path.is_dir():
        file = path / CONFIG_FILE
        if not file.exists():
            raise UserError(f"{path}: not an adapter: {CONFIG_FILE} is missing")
        check_inside(file, path)
        return read_json(file)
    if not is_single_file(path) and path.exists():
        raise UserError(f"{path}: an adapter is a .npz or .safetensors file, or a folder")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    shapes, config = (_read_npz if path.suffix == ".npz" else _read_safetensors)(path)
    return guess_description(shapes, path) if config is None else config


def _read_npz(path: Path) -> tuple[Shapes, dict | None]:
    shapes = check_npz(path)
    if shapes.pop(CONFIG_KEY, None) is None:
        return shapes, None
    with np.load(path, allow_pickle=False) as file:
        return shapes, _parsed(file[CONFIG_KEY].tobytes(), path)


def _read_safetensors(path: Path) -> tuple[Shapes, dict | None]:
    shapes = {name: tuple(entry["shape"]) for name, entry in safetensors_header(path).items()}
    with open(path, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    described = (header.get("__metadata__") or {}).get(CONFIG_KEY)
    return shapes, None if described is None else _parsed(described, path)


def read_head_description(adapter_path: str | Path, name: str) -> dict:
    """What a head beside an adapter says of itself; {} without a head, or where it says nothing."""
    path = head_path(adapter_path, name)
    if not path.exists():
        return {}
    safetensors_header(path)  # raises for a header that lies
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    text = (header.get("__metadata__") or {}).get(name)
    return {} if text is None else _parsed(text, path)


def _parsed(text: str | bytes, path: Path) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its adapter configuration is not usable: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: its adapter configuration is not usable: no JSON object")
    return found


def describe_peft_adapter(path: str | Path) -> dict:
    """The description of a PEFT adapter in the words of our own adapter files."""
    config = read_json(Path(path) / CONFIG_FILE)
    kind = "dora" if config.get("use_dora") else "lora"
    if config.get("peft_type") == "PROMPT_TUNING":
        kind = "prompt"
    return {"fine_tune_type": kind, "model": config.get("base_model_name_or_path")}


def guess_description(shapes: Shapes, path: Path) -> dict:
    """The description of a file that has none (older tools): read off names and shapes."""
    if not any(name.endswith("lora_a") for name in shapes):
        raise UserError(f"{path}: holds no adapter: it has no description and no lora_a arrays")
    blocks = {int(part) for name in shapes for part in name.split(".") if part.isdigit()}
    keys = sorted({path_in_block(n.rsplit(".", 1)[0]) for n in shapes if n.endswith("lora_a")})
    rank = next(shape[-1] for name, shape in shapes.items() if name.endswith("lora_a"))
    settings = {"rank": rank, "scale": GUESSED_SCALE, "dropout": 0.0, "keys": keys}
    kind = "dora" if any(name.endswith(".m") for name in shapes) else "lora"
    return {"fine_tune_type": kind, "num_layers": len(blocks), "lora_parameters": settings}
