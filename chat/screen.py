"""What is shown: replies on standard output, everything else on standard error."""

import os
import shutil
import sys
import textwrap
import unicodedata
from typing import TYPE_CHECKING, TextIO

from run_folder.output import own_text, printable
from run_folder.secrets import clean

if TYPE_CHECKING:  # loads MLX, which label.py shows replies without
    from chat.speaker import Reply

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

    def reply_writer(self, *, continues: bool = False) -> "ReplyWriter":
        """`continues`: the reply goes on with the prompt's text, so a blank in front counts."""
        width = shutil.get_terminal_size().columns if self.person_reads else None
        return ReplyWriter(self.out, width, continues=continues)

    def side_by_side(self, names: list[str], texts: list[str], notes: list[str]) -> None:
        """Two replies in columns in a terminal, one after the other elsewhere."""
        texts = [text.strip() for text in texts]
        if not self.person_reads:
            for name, text in zip(names, texts, strict=True):
                print(f"[{printable(name)}]\n{text}", file=self.out, flush=True)
            for name, note in zip(names, notes, strict=True):
                if note:
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
        if any(notes):
            for line in columns([wrap(printable(note), width) for note in notes], width):
                self.note(line)


class ReplyWriter:
    """Writes a reply as it comes, without the white space at its two ends.

    In a terminal of `width` columns lines are broken between words; elsewhere (None) nowhere. With
    `continues` white space in front stays: it parts the reply from the text that it goes on with.
    """

    def __init__(self, out: TextIO, width: int | None, *, continues: bool = False):
        self._out, self._wrap = out, WordWrap(width) if width else None
        self._held = ""  # white space that is the end, unless more text comes
        self._begun = continues

    def __call__(self, piece: str) -> None:
        text = self._held + piece
        if not self._begun:
            text = text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :]
        if kept:
            self._begun = True
            self._write(self._wrap.add(printable(kept)) if self._wrap else kept)

    def end(self) -> None:
        self._write((self._wrap.rest() if self._wrap else "") + "\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class WordWrap:
    """Breaks lines between words while a text comes; a word is held until its end is known."""

    def __init__(self, width: int):
        self.width = width
        self._column, self._gap, self._word = 0, "", ""

    def add(self, text: str) -> str:
        """What can be written, now that `text` has come."""
        out = []
        for character in text.expandtabs(4):
            if character == "\n":
                out.append(self.rest() + "\n")
                self._column, self._gap = 0, ""
            elif character.isspace():
                out.append(self.rest())
                self._gap += character
            else:
                self._word += character
                # East Asian text has no blanks, and a word may be longer than a line.
                if columns_of(character) > 1 or columns_of(self._word) >= self.width:
                    out.append(self.rest())
        return "".join(out)

    def rest(self) -> str:
        """The word that is held, on a line where it has room."""
        if not self._word:
            return ""
        need, gap = columns_of(self._word), self._gap
        if self._column and self._column + columns_of(gap) + need > self.width:
            gap, self._column = "\n", 0
        else:
            self._column += columns_of(gap)
        word, self._word, self._gap = self._word, "", ""
        self._column += need
        return gap + word


def describe(reply: "Reply", scores: dict[str, float]) -> str:
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
