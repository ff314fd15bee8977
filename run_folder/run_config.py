"""``config.json`` of a run: where it is, what it holds, which script made it. Loads no MLX."""

import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError

REDACTED = "<redacted>"
SUM = "sha256"  # of all that config.json, manifest.json or best.json holds beside it

# The script that makes, and goes on with, what config.json calls a run of this.
MADE_BY = {
    "sft": "sft.py",
    "reward_model": "sft.py",
    "preference": "preference_training.py",
    "ppo": "ppo_training.py",
    "group": "group_training.py",
    "rest": "rest.py",
    "pytorch_sft": "pytorch_baseline/pytorch_sft.py",
    "pytorch_reward_model": "pytorch_baseline/pytorch_sft.py",
    "pytorch_ppo": "pytorch_baseline/pytorch_ppo_training.py",
}

LIBRARIES = ("mlx", "mlx-lm", "transformers", "numpy")
IF_LOADED = ("torch", "peft", "trl")  # what only some runs compute with

# Belong to one start of the program and are not taken over from the run that is resumed.
OF_ONE_START = frozenset(
    "changed config defaults explicit force_resume may_change output_dir overwrite resume "
    "typed".split()
)


def run_folder_of(path: str | Path) -> Path:
    """The run folder, given it or one of its checkpoints (``RUN/checkpoints/step-...``)."""
    path = Path(path)
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path}: no run to resume here: it holds no config.json")


def checkpoint_asked_for(path: str | Path) -> Path | None:
    """The checkpoint that ``--resume`` names itself, or None where it names the run folder."""
    path = Path(path)
    return path if path.parent.name == "checkpoints" else None


def config_of_run(folder: Path) -> dict[str, Any] | None:
    """The parsed ``config.json`` of a folder, or None where it is missing or not a run's.

    A model folder has a ``config.json`` too, without a script and options in it.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(config["script"], str) and isinstance(config["options"], dict):
            return config
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def read_run_config(path: str | Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a run; raises ``UserError`` when it cannot be used."""
    folder = run_folder_of(path)
    if (config := config_of_run(folder)) is not None:
        return config
    copies = sorted(folder.glob("checkpoints/step-*/options.json"))
    cure = f"; {copies[-1]} holds a copy to put in its place" if copies else ""
    raise UserError(
        f"{folder / 'config.json'}: not the config.json of a run: it has no script or no options"
        f"{cure}"
    )


# ------------------------------------------------------------------------------ contents


def own_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's config.json decides what it computes; a checkpoint holds it as well."""
    return {name: config[name] for name in ("script", "options")}


def with_sum(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the sum of all of it, by which a changed bit is noticed."""
    rest = {name: value for name, value in contents.items() if name != SUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, SUM: hashlib.sha256(text.encode("utf-8")).hexdigest()}


def was_changed(contents: Mapping[str, Any]) -> bool:
    """Whether contents with a sum are not those that it was taken of."""
    return with_sum(contents)[SUM] != contents.get(SUM)


def versions() -> dict[str, str | None]:
    """Of Python and of what a run computes with; None for a library that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for library in (*LIBRARIES, *(name for name in IF_LOADED if name in sys.modules)):
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found
