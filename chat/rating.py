"""Ratings as training data: a line for each, in formats that sft.py --reward-model reads."""

import json
from collections import Counter
from pathlib import Path

from errors import UserError
from safe_files import writing

FIELDS = {"unpaired": {"prompt", "completion", "label"},
          "preference": {"prompt", "chosen", "rejected"}}  # fmt: skip


class Ratings:
    """A file of unpaired (prompt, completion, label) or of preference records, added to at its end.

    Raises UserError for a file that holds records of another kind: sft.py reads one kind a file.
    """

    def __init__(self, path: str | Path, kind: str):
        self.path, self.kind = Path(path), kind
        self.counts: Counter[str] = Counter()
        self._written: list[tuple[int, int, str]] = []  # (start, end, what) in bytes
        self._check_file()

    def _check_file(self) -> None:
        if not self.path.exists():
            if not self.path.absolute().parent.is_dir():
                raise UserError(f"{self.path}: there is no such folder to write ratings in")
            return
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
            raise UserError(f"{self.path}: holds no {self.kind} records; name another file with "
                            "--ratings-file")  # fmt: skip

    def add_label(
        self, prompt: str | list[dict], completion: str, good: bool, extras: dict | None = None
    ) -> None:
        """Mark one reply; a prompt in messages makes the completion a message, too.

        `extras` are further fields of the row, such as tools.
        """
        row = {"prompt": prompt, "completion": _answer(prompt, completion), "label": good}
        self._append(row | (extras or {}), "good" if good else "bad")

    def add_preference(
        self,
        prompt: str | list[dict],
        chosen: str,
        rejected: str,
        winner: str,
        extras: dict | None = None,
    ) -> None:
        """Mark which of two replies is better; `winner` names its model, for the count."""
        row = {"prompt": prompt, "chosen": _answer(prompt, chosen),
               "rejected": _answer(prompt, rejected)}  # fmt: skip
        self._append(row | (extras or {}), winner)

    def _append(self, row: dict, what: str) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with writing(self.path), open(self.path, "ab+") as file:
            start = file.seek(0, 2)
            if start:
                file.seek(start - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
        self._written.append((start, start + len(line), what))
        self.counts[what] += 1

    def take_back(self) -> bool:
        """Remove the rating written last; False where the file has changed since."""
        if not self._written:
            return False
        start, end, what = self._written[-1]
        with writing(self.path), open(self.path, "rb+") as file:
            if file.seek(0, 2) != end:
                return False
            file.truncate(start)
        self._written.pop()
        self.counts[what] -= 1
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
