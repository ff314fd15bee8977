"""A run of MLX in a checkpoint, and back to the bit.

    step-00000100/adapters.safetensors ...   one file per group of arrays
                  adapter_config.json        what the adapter is, for a loader
                  state.json                 counters, RNG states, anything JSON has
                  manifest.json              see checkpoint_folder.py

Nothing is ever pickled.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from errors import UserError
from models.adapter_description import CONFIG_FILE, CONFIG_KEY
from models.array_files import save_arrays
from run_folder.checkpoint_folder import (
    disk_refused,
    write_checkpoint,
)
from run_folder.manifest import Metric, problem, whole_manifest
from safe_files import plain, write_checked
from training.backend import Checkpoint


def save_checkpoint(
    folder: str | Path,
    step: int,
    arrays: Mapping[str, Mapping[str, mx.array]],
    state: Mapping[str, Any],
    *,
    described: Mapping[str, Mapping[str, Any]] | None = None,
    keep: int = 2,
    metric: Metric | None = None,
    unfinished: bool = False,
    options: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of ``step`` and return its folder; then delete those no longer kept.

    ``described[group]`` goes into the file of that group as JSON metadata. With the description of
    an adapter among it, the checkpoint is also an adapter folder that every script reads.

    Raises what ``write_checkpoint`` raises, and ``FloatingPointError`` for arrays with NaN or
    infinity in them.
    """
    refuse_non_finite(arrays)

    def write(temporary: Path) -> None:
        write_files(temporary, step, arrays, state, described or {})

    return write_checkpoint(
        folder, step, write, keep=keep, metric=metric, unfinished=unfinished, options=options
    )


def refuse_non_finite(arrays: Mapping[str, Mapping[str, mx.array]]) -> None:
    """Raise ``FloatingPointError`` naming the first array that is not finite everywhere."""
    for group, members in arrays.items():
        for name, array in members.items():
            if mx.issubdtype(array.dtype, mx.inexact) and not mx.isfinite(array).all().item():
                raise FloatingPointError(f"{group}/{name} holds NaN or infinity; nothing was saved")


def write_files(
    folder: Path,
    step: int,
    arrays: Mapping[str, Mapping[str, mx.array]],
    state: Mapping[str, Any],
    described: Mapping[str, Mapping[str, Any]],
) -> None:
    """Every file of a checkpoint but its manifest."""
    for group, members in arrays.items():
        about = {key: json.dumps(value) for key, value in described.get(group, {}).items()}
        about["format"] = "mlx"
        try:
            save_arrays(folder / f"{group}.safetensors", members, about)
        except RuntimeError as wrong:
            raise disk_refused(wrong, folder) from None
    text = json.dumps({"step": step, **plain(dict(state))}, allow_nan=False)
    write_checked(folder / "state.json", text)
    if adapter := described.get("adapters", {}).get(CONFIG_KEY):
        text = json.dumps(adapter, indent=2) + "\n"
        write_checked(folder / CONFIG_FILE, text)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint; raises ``UserError`` when it is missing, torn or altered."""
    path = Path(path)
    wrong = problem(path)
    if wrong:
        raise UserError(f"{path}: {wrong}; this checkpoint cannot be used")
    manifest = whole_manifest(path)
    arrays = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            try:
                group = arrays[name.removesuffix(".safetensors")] = mx.load(str(path / name))
                mx.eval(group)  # MLX reads lazily, and the file may be deleted before that
            except RuntimeError as wrong:
                raise UserError(f"{path / name}: cannot be read: {wrong}") from None
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(path, manifest["step"], arrays, state)
