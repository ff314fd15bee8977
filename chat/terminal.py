"""The terminal: what is shown, and what is typed.

Replies go to standard output, everything else to standard error. A line has editing and history;
a single key is read where one is asked for; Ctrl-C stops a reply.
"""

import os
import shutil
import signal
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from chat.speaker import Reply
from errors import UserError
from run_folder.output import own_text, printable
from run_folder.secrets import clean

# ------------------------------------------------------------------------------ screen


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


# ------------------------------------------------------------------------------ keyboard


HISTORY = Path("~/.mlx_rlhf_history")
HISTORY_LINES = 1000


class LineEditor:
    """Reads prompts with GNU readline or libedit, whichever Python was built with."""

    def __init__(self, words: Callable[[str], Sequence[str]]):
        """`words(line so far)`: what the tab key may complete the word at the cursor to."""
        self._readline = None
        self._history = HISTORY.expanduser()
        # Python's input() edits lines only where it can also write to the terminal.
        self.in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if not self.in_terminal:
            return
        try:
            import readline
        except ImportError:  # Python built without it: lines cannot be edited
            return
        self._readline = readline
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        readline.set_completer_delims(" ")
        readline.set_completer(lambda text, n: self._complete(words, text, n))
        readline.set_history_length(HISTORY_LINES)
        try:
            readline.read_history_file(self._history)
        except OSError:  # none yet, or one of another library
            pass

    def _complete(self, words, text: str, n: int) -> str | None:
        line = self._readline.get_line_buffer()[: self._readline.get_begidx()]
        fits = [word for word in words(line) if word.startswith(text)]
        return fits[n] if n < len(fits) else None

    def read(self, prompt: str = "> ") -> str:
        r"""A line; one that ends with \ goes on in the next. EOFError at the end of input."""
        lines = [self._line(prompt)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line("… "))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if self.in_terminal:
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def save_history(self) -> None:
        if self._readline is None:
            return
        try:
            self._readline.write_history_file(self._history)
            os.chmod(self._history, 0o600)
        except OSError:  # a home that cannot be written to costs the history, nothing else
            pass


class Keys:
    """Single key presses, from standard input or, where that is a pipe, from the terminal."""

    def __init__(self):
        try:
            self._terminal = sys.stdin if sys.stdin.isatty() else open("/dev/tty")  # noqa: SIM115
            import termios  # noqa: F401  absent on Windows
        except (OSError, ImportError):
            raise UserError("--rate reads key presses and needs a terminal") from None

    def read(self, meanings: dict[str, str], ask: Callable[[], None]) -> str | None:
        """The meaning of the first key in `meanings`; None for Ctrl-D and Escape.

        What was typed before `ask` shows the question is thrown away: no stray key is a rating.
        """
        import termios
        import tty

        handle = self._terminal.fileno()
        before = termios.tcgetattr(handle)
        try:
            tty.setcbreak(handle, termios.TCSAFLUSH)
            ask()
            while True:
                pressed = os.read(handle, 16).decode(errors="replace")
                if pressed in ("", "\x04", "\x1b"):
                    return None
                # An arrow key is three characters; else each character is a key of its own.
                for key in [pressed] if pressed.startswith("\x1b") else pressed.lower():
                    if key in meanings:
                        return meanings[key]
        finally:
            termios.tcsetattr(handle, termios.TCSADRAIN, before)


class StopKey:
    """Within this context the first Ctrl-C sets `pressed`; a second one interrupts."""

    def __init__(self):
        self.pressed = False

    def __call__(self) -> bool:
        return self.pressed

    def _press(self, *_) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def __enter__(self) -> "StopKey":
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._before)
