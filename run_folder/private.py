"""Folders whose texts stay on this machine: a person's messages, and what was trained on them.

A file marks one, and everything below it counts. Loads no MLX.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_files import write_atomically, writing

MARKER = ".private"
SAID = (
    "Texts in this folder are somebody's own. Scripts send none of them to W&B or TensorBoard, nor "
    "to a reward service on another machine; so too from runs that were trained on them.\n"
)


def mark_private(folder: Path) -> None:
    """Mark a folder, and keep others on the machine out of it."""
    with writing(folder):
        folder.chmod(0o700)
    if not (folder / MARKER).exists():
        write_atomically(folder / MARKER, SAID)
        with writing(folder):
            (folder / MARKER).chmod(0o600)


def private_folder(options: Mapping[str, Any]) -> Path | None:
    """The first marked folder that a path among the options lies in; None where there is none."""
    for value in options.values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str | Path) and (found := marked_above(one)) is not None:
                return found
    return None


def marked_above(path: str | Path) -> Path | None:
    """The marked folder that a path is, or lies in."""
    try:
        path = Path(path).expanduser()
        if not path.exists() and not path.parent.exists():
            return None
        whole = path.resolve()
        return next((p for p in (whole, *whole.parents) if (p / MARKER).is_file()), None)
    except (OSError, ValueError, RuntimeError):  # no name that a file can have
        return None


def without_texts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a logger may be told of a private run's config.json: numbers, switches, versions."""
    options = {k: v for k, v in config["options"].items() if is_number(v)}
    return {**config, "options": options, "machine": {}}


def is_number(value: Any) -> bool:
    many = value if isinstance(value, list) else [value]
    return all(one is None or isinstance(one, bool | int | float) for one in many)
