"""Folders whose texts stay on this machine: a person's messages, and what was trained on them.

A file marks one, and everything below it counts; beside a single file it has that one's name.
Loads no MLX.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_files import write_atomically, writing

MARKER = ".private"
WRITTEN = ("save_file", "fused_dir")
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


def keep_private(path: Path) -> None:
    """Mark what a private run wrote elsewhere: the folder of a model, the file of an adapter.

    Files are for their owner alone.
    """
    path = path.expanduser()
    if marked_above(path) is None:
        if path.is_dir():
            mark_private(path)
        else:
            write_atomically(beside(path), SAID)
    files = path.rglob("*") if path.is_dir() else (path, beside(path))
    for file in files:
        if file.is_file() and not file.is_symlink():
            with writing(file):
                file.chmod(0o600)


def forget_private(path: Path) -> None:
    """Take the mark of a file that was replaced by one which knows nobody's texts."""
    mark = beside(path.expanduser())
    with writing(mark):
        mark.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """The mark of a single file."""
    return path.with_name(path.name + MARKER)


def private_folder(options: Mapping[str, Any]) -> Path | None:
    """The first marked folder, or file, of the paths among the options; None without one."""
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            # What stood where a run is going to write has no part in it.
            where = Path(one).parent if one and name in WRITTEN else one
            if isinstance(one, str | Path) and (found := marked_above(where)) is not None:
                return found
    return None


def marked_above(path: str | Path) -> Path | None:
    """The marked folder that a path is, or lies in; the path itself, where it is a marked file."""
    try:
        path = Path(path).expanduser()
        if not path.exists() and not path.parent.exists():
            return None
        whole = path.resolve()
        if whole.name and beside(whole).is_file():
            return whole
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
