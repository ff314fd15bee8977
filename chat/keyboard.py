"""The keyboard: prompts with history, an editor, a single key, and Ctrl-C that stops a reply."""

import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from errors import UserError

HISTORY = Path("~/.mlx_rlhf_history")
HISTORY_LINES = 1000
BLOCK = '"""'
PASTE_SECONDS = 0.02  # what comes sooner behind a line was not typed


class LineEditor:
    """Reads prompts with GNU readline or libedit, whichever Python was built with.

    A terminal marks a paste ("bracketed paste"), which GNU readline understands. With libedit,
    lines that are there at once behind the first one are taken for the rest of a paste.
    """

    def __init__(self, words: Callable[[str], Sequence[str]]):
        """`words(line so far)`: what the tab key may complete the word at the cursor to."""
        self._readline, self._brackets = None, False
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
        if not libedit and os.environ.get("TERM", "dumb") != "dumb":
            readline.parse_and_bind("set enable-bracketed-paste on")  # Python switches it off
            self._brackets = True
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
        r"""A prompt: a line, lines that were pasted, lines joined by \\ or between two \"\"\".

        EOFError at the end of input. One line that begins with / is a command, // sends it as text.
        """
        typed_ahead = self._more_waits()
        lines = [self._line(prompt)]
        if lines[0].lstrip().startswith(BLOCK):
            text = self._block(lines[0].lstrip()[len(BLOCK) :])
            return "/" * (is_command(text)) + text
        while True:
            if lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
            elif self._brackets or typed_ahead or not self._more_waits(PASTE_SECONDS):
                return "\n".join(lines)
            lines.append(self._line("… "))

    def _block(self, line: str) -> str:
        """What stands before the next three quotes, beginning with `line`."""
        lines = []
        while BLOCK not in line:
            lines.append(line)
            line = self._line("… ")
        before, _, behind = line.partition(BLOCK)
        return "\n".join([*lines, before + behind]).strip("\n")

    def _more_waits(self, seconds: float = 0) -> bool:
        return bool(select.select([sys.stdin], [], [], seconds)[0])

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


def is_command(text: str) -> bool:
    """Whether a prompt is a command: one line that begins with /."""
    return text.startswith("/") and "\n" not in text


def write_in_editor(text: str) -> str:
    """What a person made of `text` in $VISUAL or $EDITOR (vi without both). Raises UserError."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory(prefix="chat-") as folder:  # for its owner alone
        path = Path(folder, "prompt.md")
        path.write_text(text, encoding="utf-8")
        before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is the editor's
        try:
            done = subprocess.run([*shlex.split(editor), str(path)], check=False)
            if done.returncode:
                raise UserError(f"/edit: {editor} ended with status {done.returncode}")
            return path.read_text(encoding="utf-8").strip("\n")
        except (OSError, ValueError) as wrong:  # not there; not UTF-8, an open quote
            raise UserError(f"/edit: {editor}: {wrong}; set EDITOR to one that works") from None
        finally:
            signal.signal(signal.SIGINT, before)


class Keys:
    """Single key presses, from standard input or, where that is a pipe, from the terminal."""

    def __init__(self, who: str = "--rate"):
        """Raises UserError, naming who reads keys, where there is no terminal."""
        try:
            self._terminal = sys.stdin if sys.stdin.isatty() else open("/dev/tty")  # noqa: SIM115
            import termios  # noqa: F401  absent on Windows
        except (OSError, ImportError):
            raise UserError(f"{who} reads key presses and needs a terminal") from None

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

    def line(self, ask: Callable[[], None]) -> str:
        """A line, as the terminal lets it be edited; "" for Ctrl-D alone."""
        ask()
        # Not by the stream, which may know bytes that are no text for an error, and reads ahead.
        read = os.read(self._terminal.fileno(), 1 << 16)  # bytes; a terminal gives a line at a time
        return read.decode("utf-8", "surrogateescape").rstrip("\n")


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
