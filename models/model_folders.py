"""Model folders in Hugging Face format, written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from errors import UserError
from models.array_files import save_weights
from models.family_names import family_weights
from models.load import LoadedModel
from models.tokenizer_files import TOKENIZER_FILES, copy_tokenizer
from safe_files import (
    refuse_links,
    sweep,
    sync_folder,
    synced_sum,
    temporary_name,
    whole_folder,
)
from waiting import busy

MODEL_SIGNS = ("config.json", "adapter_config.json", "model.gguf")  # a folder that may be replaced
RUN_SIGNS = ("metrics.jsonl", "checkpoints")  # a run has a config.json too


@contextmanager
def new_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A folder beside `path` to write into; it becomes `path` when the block ends well.

    Raises UserError where something is at `path` already. With `force` a model or adapter folder
    there is replaced, in one step where the file system has it; nothing else is.
    """
    path = Path(path).expanduser().resolve()
    sweep(path)
    check_free(path, force)
    try:
        with whole_folder(path) as aside:
            yield aside
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot write: {error}") from error


def check_free(path: Path, force: bool, *, suffix: str | None = None) -> None:
    """Raise UserError unless a folder, or a file of that `suffix`, may be written at `path`."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise UserError(f"{path}: exists already; give another name, or --force to replace it")
    if suffix is not None:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, so --force does not replace it by a file")
    elif not any((path / name).is_file() for name in MODEL_SIGNS):
        raise UserError(f"{path}: is no model or adapter folder, so --force does not replace it")
    elif any((path / name).exists() for name in RUN_SIGNS):
        raise UserError(f"{path}: is the folder of a run, so --force does not replace it")


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder beside `path` in which a file of that name is made, and moved to `path` at the end.

    Raises UserError where something is at `path` already; with `force` a file there is replaced.
    """
    path = Path(path).expanduser().absolute()
    sweep(path)
    refuse_links(path)
    check_free(path, force, suffix=path.suffix)
    aside = temporary_name(path)
    try:
        aside.mkdir(parents=True)
        yield aside
        synced_sum(aside / path.name)
        os.replace(aside / path.name, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot write: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_model(folder: Path, loaded: LoadedModel) -> None:
    """Write weights, config.json, tokenizer and generation settings of `loaded` into `folder`."""
    from mlx_lm.utils import save_config

    weights = family_weights(loaded)
    with busy("writing"):
        save_weights(folder, loaded.model if "quantization" in loaded.config else _Weights(weights))
    config = {**loaded.config, "dtype": stored_dtype(loaded)}
    config.pop("torch_dtype", None)
    sees = any(name.startswith("vision_tower") or ".vision_tower" in name for name in weights)
    save_config(config, folder / "config.json", keep_vision_config=sees)
    # Only a model whose code was trusted gets as far as this with these entries.
    has_code = "model_file" in config or "auto_map" in config
    copy_tokenizer(loaded.path, folder, with_code=has_code)
    if loaded.tokenizer_path is not None:
        for pattern in TOKENIZER_FILES:
            for file in folder.glob(pattern):
                file.unlink()
        copy_tokenizer(loaded.tokenizer_path, folder, of_model=False)


class _Weights:
    """Arrays by their full names, as what mlx-lm's `save_model` takes for a model."""

    def __init__(self, weights: dict[str, mx.array]):
        self._weights = weights

    def parameters(self) -> dict[str, mx.array]:
        return self._weights

    def leaf_modules(self) -> dict[str, nn.Module]:
        whole = nn.Module()
        dict.update(whole, self._weights)
        return {"all": whole}


def stored_dtype(loaded: LoadedModel) -> str:
    """The floating type of most weights, as config.json names it."""
    sizes: dict[str, int] = {}
    for _, array in tree_flatten(loaded.model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            name = str(array.dtype).removeprefix("mlx.core.")
            sizes[name] = sizes.get(name, 0) + array.size
    return max(sizes, key=sizes.get)


def tokenizer_of(folder: Path) -> Any:
    """transformers' own tokenizer of a model folder, as others will load it. UserError for none."""
    from mlx_lm.utils import load_tokenizer

    try:
        return load_tokenizer(folder)._tokenizer
    except Exception as error:  # transformers has dozens of kinds for a broken folder
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
