"""The file of samples beside the labels: written by the process that samples, read as it grows.

Its first line says what it was made of, so that a restart neither samples again nor goes on with
replies of another model. No MLX.
"""

import json
from pathlib import Path
from typing import Any

from errors import UserError

HEAD = "samples_of"
LEFT_OUT = "left_out"  # of an item whose prompt is bad or too long (--skip-bad-rows)
# How a person says what differs, for each part of the head.
DIFFERS = {
    "prompts": "are of other prompts",
    "models": "are of another model, or of one whose weights have changed",
    "samples": "are another number to each prompt (--samples)",
    "sampling": "were sampled with other options",
    "seed": "have another --seed",
    "template": "were asked for with another template",
    "template_date": "were asked for with another --template-date",
}


def sample_path(labels: Path) -> Path:
    """Where the samples of a file of labels are kept."""
    return labels.with_name(f"{labels.stem}.samples.jsonl")


class SampleFile:
    """Rows that are whole so far; `poll` reads those that have come since."""

    def __init__(self, path: Path):
        self.path = path
        self.head: dict[str, Any] | None = None
        self.rows: dict[str, dict[str, Any]] = {}  # by the item's id
        self.end = 0  # bytes read: whole lines
        self.poll()

    def poll(self) -> list[dict[str, Any]]:
        """The rows that are new. Raises UserError for a file that is something else."""
        try:
            if self.path.stat().st_size <= self.end:
                return []
            with open(self.path, "rb") as file:
                file.seek(self.end)
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as wrong:
            raise UserError(f"{self.path}: cannot be read: {wrong.strerror}") from None
        new = []
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            row = self._read(line)
            if self.head is None:
                self.head = row[HEAD]
            elif row["pair"] not in self.rows:
                self.rows[row["pair"]] = row
                new.append(row)
        self.end += len(whole)
        return new

    def _read(self, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
            fits = isinstance(row, dict) and (HEAD in row if self.head is None else "pair" in row)
        except (ValueError, RecursionError):
            fits = False
        if not fits:
            raise UserError(
                f"{self.path}: holds no samples of label.py; name another file with --output"
            )
        return row

    def check_head(self, wanted: dict[str, Any]) -> None:
        """Raise UserError where the samples are not those that `wanted` describes."""
        if self.head is None:
            return
        for name, text in DIFFERS.items():
            if self.head.get(name) != wanted[name]:
                raise UserError(
                    f"{self.path}: the replies there {text}; name another file with --output"
                )
