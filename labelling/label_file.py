"""The file of labels: on disk before anybody hears of it, undone from its end. No MLX.

A label is one line, appended and synced; undo cuts the last line off and syncs. So a kill at any
moment leaves whole lines and at most a torn one at the end, of a label that nobody was told of.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from errors import UserError
from labelling.records import OURS, kind_of
from run_folder.locks import OutputLock
from safe_files import refuse_links, sync_folder, writing

BEGINNING = b'{"prompt"'  # of every row of ours


class LabelFile:
    """Rows of `path`, in its order, and the lock that keeps a second program off.

    Raises UserError where another program has it, it cannot be written, or holds other rows.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._made = [folder for folder in self.path.parents if not folder.exists()]
        self._lock = OutputLock(self.path, "--output")
        self._file = None
        self.rows: list[dict[str, Any]] = []
        self._ends = [0]  # bytes of the file before the first row and up to the end of each
        self.torn = 0  # bytes of half a row at the end, taken off at the first write
        self._unended = False  # the last row is whole but for the end of its line
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lock.close()
        for folder in self._made:  # of no use where nothing was written
            with contextlib.suppress(OSError):
                folder.rmdir()

    # ----------------------------------------------------------------- reading

    def _read(self) -> None:
        refuse_links(self.path)
        if not self.path.exists():
            return
        if not self.path.is_file():
            raise UserError(f"--output {self.path}: is not a file; give a file for the labels")
        with writing(self.path), open(self.path, "r+b") as file:
            data = file.read()
        lines, end = data.split(b"\n"), 0
        tail = lines.pop()
        if tail.strip():
            if self._row_of(tail) is not None:  # whole, without the end of its line
                lines.append(tail)
            else:
                self.torn = len(tail)
        for number, line in enumerate(lines, 1):
            end += len(line) + 1
            if not line.strip():
                continue
            row = self._row_of(line)
            if row is None or not row.keys() >= OURS:
                raise UserError(
                    f"{self.path}:{number}: is no row of label.py; name another file with --output"
                )
            self.rows.append(row)
            self._ends.append(end)
        self._ends[-1] = end  # with blank lines behind
        self._unended = bool(tail.strip()) and not self.torn
        if self.torn and not self.rows and not tail.startswith(BEGINNING):
            raise UserError(
                f"{self.path}:1: is no row of label.py; name another file with --output"
            )

    @staticmethod
    def _row_of(line: bytes) -> dict[str, Any] | None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return row if isinstance(row, dict) else None

    # ----------------------------------------------------------------- writing

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it is on the disk when this returns. A disk that refuses leaves no half."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        start = self._open()
        with writing(self.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._file.fileno(), rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), start)
                raise
        self.rows.append(row)
        self._ends.append(start + len(line))

    def take_back(self) -> dict[str, Any] | None:
        """Cut the last row off and return it; None where there is none."""
        if not self.rows:
            return None
        self._open()
        with writing(self.path):
            os.ftruncate(self._file.fileno(), self._ends[-2])
            os.fsync(self._file.fileno())
        self._ends.pop()
        return self.rows.pop()

    def _open(self) -> int:
        """Where the next row goes. UserError where somebody else has changed the file."""
        end = self._ends[-1]
        if self._file is None:
            new = not self.path.exists()
            with writing(self.path):
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
                if new:
                    sync_folder(self.path.absolute().parent)
                if self.torn:
                    os.ftruncate(self._file.fileno(), end)
                    self.torn = 0
                elif self._unended:
                    os.write(self._file.fileno(), b"\n")
                    self._unended = False
        now = os.fstat(self._file.fileno())
        if now.st_nlink == 0 or now.st_size != end:
            raise UserError(f"{self.path}: was changed or deleted by another program meanwhile")
        return end

    # ----------------------------------------------------------------- what it holds

    def counts(self) -> dict[str, int]:
        """How many rows there are of each kind."""
        found = {"choice": 0, "tie": 0, "skipped": 0}
        for row in self.rows:
            found[kind_of(row)] += 1
        return found
