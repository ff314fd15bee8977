"""Ratings as training data: a line for each, in formats that sft.py --reward-model reads."""

import contextlib
import itertools
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from safe_files import check_place, write_atomically, writing

FIELDS = {
    "unpaired": {"prompt", "completion", "label"},
    "preference": {"prompt", "chosen", "rejected"},
}


@dataclass
class Written:
    """A rating in the file: where it begins, its bytes, and what it counts as."""

    start: int
    line: bytes
    what: str


class Ratings:
    """A file of unpaired (prompt, completion, label) or of preference records, added to at its end.

    Raises UserError for a file that holds records of another kind: sft.py reads one kind a file.
    """

    def __init__(self, path: str | Path, kind: str):
        self.path, self.kind = Path(path), kind
        self.counts: Counter[str] = Counter()
        self._written: dict[int, Written] = {}  # by number, in the order of the file
        self._numbers = itertools.count()
        self._check_file()

    def _check_file(self) -> None:
        if not self.path.exists():
            if not self.path.absolute().parent.is_dir():
                raise UserError(f"{self.path}: there is no such folder to write ratings in")
            check_place(self.path)
            return
        with writing(self.path), open(self.path, "ab"):
            pass
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: cannot be read: {error}") from None
        first = next((line for line in lines if line.strip()), None)
        try:
            names = set(json.loads(first)) if first else FIELDS[self.kind]
        except (ValueError, TypeError):
            names = set()
        if not names >= FIELDS[self.kind]:
            raise UserError(
                f"{self.path}: holds no {self.kind} records; name another file with --ratings-file"
            )

    def add_label(
        self, prompt: str | list[dict], completion: str, good: bool, extras: dict | None = None
    ) -> int:
        """Mark one reply; a prompt in messages makes the completion a message, too.

        `extras` are further fields of the row, such as tools. Returns the
        rating's number, for `take_back`.
        """
        row = {"prompt": prompt, "completion": _answer(prompt, completion), "label": good}
        return self._append(row | (extras or {}), "good" if good else "bad")

    def add_preference(
        self,
        prompt: str | list[dict],
        chosen: str,
        rejected: str,
        winner: str,
        extras: dict | None = None,
    ) -> int:
        """Mark which of two replies is better; `winner` names its model, for the count.

        Returns the rating's number.
        """
        row = {
            "prompt": prompt,
            "chosen": _answer(prompt, chosen),
            "rejected": _answer(prompt, rejected),
        }
        return self._append(row | (extras or {}), winner)

    def _append(self, row: dict, what: str) -> int:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with writing(self.path), open(self.path, "ab+") as file:
            start = file.seek(0, 2)
            if start:
                file.seek(start - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), start)  # half a line would spoil the others
                raise
        number = next(self._numbers)
        self._written[number] = Written(start, line, what)
        self.counts[what] += 1
        return number

    def take_back(self, number: int | None = None) -> bool:
        """Remove a rating of this session (None: the last); False where the file has changed."""
        number = max(self._written, default=None) if number is None else number
        if number not in self._written:
            return False
        gone = self._written[number]
        end = gone.start + len(gone.line)
        try:
            data = self.path.read_bytes()
        except OSError:
            return False
        if data[gone.start : end] != gone.line:
            return False
        if end == len(data):
            with writing(self.path), open(self.path, "rb+") as file:
                file.truncate(gone.start)
        else:
            write_atomically(self.path, data[: gone.start] + data[end:])
        del self._written[number]
        for later in self._written.values():
            later.start -= len(gone.line) if later.start > gone.start else 0
        self.counts[gone.what] -= 1
        return True

    def summary(self) -> str:
        """One line for the end of a session."""
        total = self.counts.total()
        parts = [f"{count} {what}" for what, count in self.counts.most_common() if count]
        added = f"{total} rating{'s' * (total != 1)} added to {self.path}"
        return f"{added} ({', '.join(parts)})" if parts else added


def cannot_rate(texts: list[str]) -> str | None:
    """Why replies make no training record, or None. Readers refuse records without a text."""
    if any(not text.strip() for text in texts):
        return "an empty reply makes no training record; not rated"
    if len(set(texts)) < len(texts):
        return "the two replies are the same; not rated"
    return None


def _answer(prompt: str | list[dict], text: str) -> str | list[dict]:
    if isinstance(prompt, str):
        return text
    return [{"role": "assistant", "content": text}]
