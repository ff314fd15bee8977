"""What is shown: replies on standard output, everything else on standard error."""

import os
import shutil
import sys
import textwrap
import unicodedata
from typing import TextIO

from chat.speaker import Reply
from run_folder.output import own_text, printable
from run_folder.secrets import clean

GAP = "  │  "
NARROWEST_COLUMN = 20


class Screen:
    """Replies go to `out`, notes to `err`; colour and columns only where a person reads them."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None):
        self.out, self.err = own_text(out or sys.stdout), own_text(err or sys.stderr)
        self.person_reads = self.out.isatty()
        self._dim = self.err.isatty() and not os.environ.get("NO_COLOR")

    def note(self, text: str) -> None:
        """A line beside the conversation; a long one is broken between words."""
        text = clean(text)
        if self.err.isatty():
            text = "\n".join(wrap(text, shutil.get_terminal_size().columns))
        text = f"\x1b[2m{text}\x1b[0m" if self._dim else text
        print(text, file=self.err, flush=True)

    @property
    def nobody_reads(self) -> bool:
        """Whether whoever read the replies has gone: `| head -1`."""
        return getattr(self.out, "lost", None) is not None

    def progress(self, text: str) -> None:
        """A line that the next one overwrites; only in a terminal."""
        if self.err.isatty():
            print(f"\r\x1b[K{clean(text)}", end="", file=self.err, flush=True)

    def reply_writer(self) -> "ReplyWriter":
        return ReplyWriter(self.out, self.person_reads)

    def side_by_side(self, names: list[str], texts: list[str], notes: list[str]) -> None:
        """Two replies in columns in a terminal, one after the other elsewhere."""
        texts = [text.strip() for text in texts]
        if not self.person_reads:
            for name, text in zip(names, texts, strict=True):
                print(f"[{printable(name)}]\n{text}", file=self.out, flush=True)
            for name, note in zip(names, notes, strict=True):
                self.note(f"[{name}] {note}")
            return
        room = shutil.get_terminal_size().columns - len(GAP)
        width = max(NARROWEST_COLUMN, room // 2)
        cells = [wrap(printable(text), width) for text in texts]
        for line in columns([wrap(printable(name), width) for name in names], width):
            print(f"\x1b[1m{line}\x1b[0m" if self._dim else line, file=self.out)
        print("─" * (width + 2) + "┼" + "─" * (width + 2), file=self.out)
        for line in columns(cells, width):
            print(line, file=self.out)
        self.out.flush()
        for line in columns([wrap(printable(note), width) for note in notes], width):
            self.note(line)


class ReplyWriter:
    """Writes a reply as it comes, without the white space at its two ends."""

    def __init__(self, out: TextIO, person_reads: bool):
        self._out, self._person_reads = out, person_reads
        self._held = ""  # white space that is the end, unless more text comes
        self._begun = False

    def __call__(self, piece: str) -> None:
        text = self._held + piece
        if not self._begun:
            text = text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :]
        if kept:
            self._begun = True
            self._out.write(printable(kept) if self._person_reads else kept)
            self._out.flush()

    def end(self) -> None:
        self._out.write("\n")
        self._out.flush()


def describe(reply: Reply, scores: dict[str, float]) -> str:
    """Length, speed and scores of a reply, one line."""
    count = len(reply.tokens)
    parts = [f"{count} token{'s' * (count != 1)}, {reply.tokens_per_second:,.0f} tokens/s"]
    if reply.ended == "length":
        parts.append("cut at --max-tokens")
    if reply.ended == "interrupted":
        parts.append("stopped")
    parts += [f"{name} {score:.3f}" for name, score in scores.items()]
    return ", ".join(parts)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, line breaks of the text kept."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        wide = columns_of(line) > len(line)  # East Asian text: two columns a character
        lines += textwrap.wrap(line, width // 2 if wide else width) or [""]
    return lines


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    double = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + double - sum(unicodedata.combining(c) > 0 for c in text)


def columns(cells: list[list[str]], width: int) -> list[str]:
    """Wrapped texts beside each other."""
    height = max(len(cell) for cell in cells)
    padded = [cell + [""] * (height - len(cell)) for cell in cells]
    return [
        GAP.join(line + " " * (width - columns_of(line)) for line in row).rstrip()
        for row in zip(*padded, strict=True)
    ]
