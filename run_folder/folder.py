"""The folder of a run: its default name, its lock, what goes and what is told of the machine."""

import fcntl
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from errors import UserError
from run_folder.run_config import OF_ONE_START
from run_folder.secrets import redact
from safe_files import plain, writing

RUNS = "runs"  # where runs lie that are given no folder
LIBRARIES = ("mlx", "mlx-lm", "transformers", "numpy")


def default_folder(script: str, base: str | Path = RUNS) -> Path:
    """Make and return a folder ``runs/<script>-<time>`` that did not exist before."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with writing(base):
        for number in range(1, 1000):
            folder = Path(base) / (f"{script}-{stamp}" + (f"-{number}" if number > 1 else ""))
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
    raise UserError(f"{base}: a thousand runs of this second are there already")


def lock_folder(folder: Path) -> BinaryIO:
    """An open file that holds the folder's lock; raises ``UserError`` when another process does."""
    file = open(folder / ".lock", "a+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(32).decode("ascii", "replace").strip()
        file.close()
        raise UserError(f"{folder}: a run is being written here by process {owner}") from None
    except BaseException:
        file.close()
        raise
    file.truncate(0)
    file.write(f"{os.getpid()}\n".encode())
    return file


def remove(path: Path) -> None:
    """Delete a file or a folder that may not be there; links are deleted, never followed."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def describe(
    script: str, options: Mapping[str, Any], blas: str | None, created: str | None
) -> dict[str, Any]:
    """What ``config.json`` holds; secrets are redacted."""
    kept = {name: value for name, value in options.items() if name not in OF_ONE_START}
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "script": script,
        "created": created or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "options": redact(plain(kept)),
        "versions": versions,
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cpu_count": os.cpu_count(),
            "blas": blas,
        },
    }
