"""A file of JSON lines to which rows are added one by one, each on the disk before the next."""

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from safe_files import plain, refuse_links, sync_folder, write_atomically, writing


class Appended:
    """The rows of an earlier start, and those that `append` puts behind them.

    A last line that a kill has torn is taken off. The file is made with its first row. Raises
    UserError for a link, a line that is no JSON object, or a file that another process has open.
    """

    def __init__(self, path: Path, *, anew: bool = False):
        """`anew`: rows that are there do not count, and `begin` drops them."""
        self.path, self._file = path, None
        self._drops = anew
        self.rows: list[dict[str, Any]] = []
        if os.path.lexists(path):
            self._open()
            with writing(path):
                self._file.seek(0)
                data = b"" if anew else self._file.read()
                if not anew:
                    os.ftruncate(self._file.fileno(), data.rfind(b"\n") + 1)
            for number, line in enumerate(data.split(b"\n")[:-1], 1):
                self.rows.append(self._read(line, number))

    def begin(self) -> None:
        """With `anew`: drop the rows of earlier starts, now that something takes their place."""
        if self._drops and self._file is not None:
            with writing(self.path):
                os.ftruncate(self._file.fileno(), 0)
        self._drops = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, which is on the disk when this returns; a disk that refuses leaves no half."""
        row = plain(dict(row))
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        self._open()
        self.begin()
        end = os.fstat(self._file.fileno())
        if not end.st_nlink:
            raise UserError(f"{self.path}: was deleted by another program meanwhile")
        with writing(self.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), end.st_size)
                raise
        self.rows.append(row)

    def leave_out(self, dropped: Sequence[Mapping[str, Any]]) -> None:
        """Take rows out: the rest of the file is written anew, aside, and renamed."""
        if not dropped:
            return
        kept = [row for row in self.rows if row not in dropped]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        self.close()
        write_atomically(self.path, lines.encode("utf-8", "backslashreplace"))
        self._open()
        self.rows = kept

    def _open(self) -> None:
        if self._file is not None:
            return
        refuse_links(self.path)
        new = not self.path.exists()
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(f"{self.path}: is being written by another process") from None
        if new:
            sync_folder(self.path.absolute().parent)

    def _read(self, line: bytes, number: int) -> dict[str, Any]:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict):
                return row
        raise UserError(f"{self.path}:{number}: not a JSON object, and no row of this file")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
