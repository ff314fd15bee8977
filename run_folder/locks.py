"""Locks on what a run writes: its folder, and the file that its trained weights go to.

A lock belongs to the process, so a dead one leaves none behind.
"""

import fcntl
import os
from pathlib import Path
from typing import BinaryIO

from errors import UserError
from safe_files import check_place, refuse_links, sweep, writing


def lock_folder(folder: Path) -> BinaryIO:
    """An open file that holds the folder's lock; raises ``UserError`` when another process does."""
    return _lock(folder / ".lock", f"{folder}: a run is being written here by process")


class OutputLock:
    """Keeps a second run from writing the same ``--save-file``: an adapter of one and a head of the
    other would lie side by side. ``close`` frees it; None locks nothing."""

    def __init__(self, path: Path | None, flag: str = "--save-file") -> None:
        """Raises ``UserError`` where another run has it, or no file can be made there."""
        self._file = None
        if path is None:
            return
        sweep(path, heads=True)
        check_place(path, f"{path.stem}.value_head.safetensors")
        # out.npz and out.safetensors have the same heads beside them.
        name = f"{path.stem}.weights" if path.suffix in (".npz", ".safetensors") else path.name
        self._place = path.with_name(f".{name}.lock")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            taken = f"{flag} {path}: is going to be written by process"
            while self._file is None:
                file = _lock(self._place, taken)
                if _is_at(file, self._place):
                    self._file = file
                else:  # its last owner has just deleted it
                    file.close()

    def close(self) -> None:
        if self._file is not None:
            self._place.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _lock(place: Path, taken: str) -> BinaryIO:
    refuse_links(place)
    handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    file = open(handle, "a+b", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(32).decode("ascii", "replace").strip()
        file.close()
        raise UserError(f"{taken} {owner}") from None
    except BaseException:
        file.close()
        raise
    file.truncate(0)
    file.write(f"{os.getpid()}\n".encode())
    return file


def _is_at(file: BinaryIO, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(place))
    except FileNotFoundError:
        return False
