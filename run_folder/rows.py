"""Rows of a run on the disk: one JSON object a line, handed to the system at once."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import UserError
from run_folder.secrets import tell
from safe_files import plain, refuse_links, writing

ROW_FILES = ("metrics.jsonl", "samples.jsonl", "bad_rows.jsonl")


class RowFile:
    """A file that rows are appended to; a checkpoint holds its length and the sum of its bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_links(path)
        with writing(path):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            self._read(None)

    def _read(self, length: int | None) -> None:
        """Take the sum of the first `length` bytes on the disk (None: of all)."""
        self._sum, self._length = hashlib.sha256(), 0
        self._file.seek(0)
        while length is None or self._length < length:
            room = 1 << 20 if length is None else min(1 << 20, length - self._length)
            if not (data := self._file.read(room)):
                break
            self._sum.update(data)
            self._length += len(data)

    def append(self, row: Mapping[str, Any]) -> None:
        try:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair: legal in Python, not in UTF-8
            line = json.dumps(row, ensure_ascii=True, allow_nan=False).encode("ascii")
        line += b"\n"
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise UserError(f"{self.path}: was deleted while the run was writing to it")
        with writing(self.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:  # no half of a row stays, which later ones would be glued to
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), self._length)
                raise
        self._sum.update(line)
        self._length += len(line)

    def state(self) -> dict[str, Any]:
        return {"bytes": self._length, "sha256": self._sum.hexdigest()}

    def cut_back(self, state: Mapping[str, Any] | int) -> None:
        """Take back what is beyond `state` (of older versions: the length alone), and sync."""
        wanted = state if isinstance(state, int) else state["bytes"]
        there = os.fstat(self._file.fileno()).st_size
        with writing(self.path):
            if there != wanted or there != self._length:
                os.ftruncate(self._file.fileno(), min(wanted, there))
                self._read(wanted)
            os.fsync(self._file.fileno())
        if self._length < wanted:
            tell(f"warning: {self.path}: rows before the checkpoint are gone")
        elif not isinstance(state, int) and self._sum.hexdigest() != state["sha256"]:
            tell(f"warning: {self.path}: rows before the checkpoint are not as they were written")

    def close(self) -> None:
        self._file.close()


NO_ROWS = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}


def numbered(step: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it is written: the step, then values that JSON has (NaN and infinity: null)."""
    return {"step": int(step), **plain(dict(row))}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` or ``samples.jsonl``; a torn last line is left out."""
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as wrong:
        raise UserError(f"{path}: cannot read: {wrong.strerror}") from None
    rows = []
    for at, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}:{at}: not a JSON object") from None
    return rows
