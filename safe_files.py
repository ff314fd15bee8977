"""Writing so that a stop at any moment leaves the old file or the new one, never half of one."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content``: written to a temporary name beside it, synced, renamed."""
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; NaN and infinity become null."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=True, allow_nan=False)
    write_atomically(path, text + "\n")


def plain(value: Any) -> Any:
    """The same value in types that JSON has; NaN and infinity become None.

    Array scalars of MLX and NumPy count as numbers, arrays as lists, paths as text.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def sync_folder(folder: str | Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the disk answers (full, read-only, gone) into a ``UserError`` naming ``path``."""
    try:
        yield
    except OSError as wrong:
        raise UserError(f"{path}: cannot write: {wrong.strerror or wrong}") from wrong
