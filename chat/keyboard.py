"""The keyboard: a line with editing and history, a single key, and Ctrl-C that stops a reply."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from errors import UserError

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
