"""What reaches a terminal or a log: no control characters, and no end of a run with its reader."""

import errno
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EBADF, errno.EIO)  # nobody reads: `| head`, a closed terminal


def printable(text: str) -> str:
    """Without control characters, which could rewrite the screen."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


bars: set[Any] = set()  # that are in the terminal now, with tqdm's methods and `due`


class Output:
    """A standard stream whose `write` cleans text, and drops it once nobody takes it any more.

    In a terminal a line stands above the bars, whoever writes it: a warning, a user's function.

    `own` is the same stream for text that is clean and has escape sequences of ours in it.
    """

    def __init__(self, stream: TextIO, clean: Callable[[str], str]) -> None:
        self.stream, self.clean = stream, clean
        self.lost: OSError | None = None  # why nothing is written any more
        self.partial = False  # the last line is not ended yet
        self.own = OwnText(self)

    def write(self, text: str) -> int:
        if not bars or not text or not self.stream.isatty():
            self.write_own(self.clean(text))
            return len(text)
        with next(iter(bars)).get_lock():
            if not self.partial:
                for bar in [bar for bar in bars if bar.due()]:
                    bar.clear()
            self.write_own(self.clean(text))
            self.partial = not text.endswith("\n")
            if not self.partial:
                self.flush()  # bars may stand on the other stream
                for bar in [bar for bar in bars if bar.due()]:
                    bar.refresh()
        return len(text)

    def write_own(self, text: str) -> int:
        if self.lost is None:
            try:
                self.stream.write(text)
            except OSError as wrong:
                self.lose(wrong)
        return len(text)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self.stream.flush()
            except OSError as wrong:
                self.lose(wrong)

    def lose(self, wrong: OSError) -> None:
        """What waits in buffers goes to the null device, or it would fail again at every turn."""
        self.lost = wrong
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class OwnText:
    """`Output` without its cleaning."""

    def __init__(self, output: Output) -> None:
        self.output = output

    def write(self, text: str) -> int:
        return self.output.write_own(text)

    def __getattr__(self, name: str):
        return getattr(self.output, name)


def own_text(stream: TextIO) -> TextIO:
    """`stream` for escape sequences of ours; what else is written there has to be clean."""
    return getattr(stream, "own", stream)


def open_outputs(clean: Callable[[str], str]) -> None:
    """Make standard output and error safe to print on; closed ones become the null device."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed, and the first file that is opened would get its number
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(stream, Output):
            continue
        if hasattr(stream, "reconfigure"):  # "é" on a terminal that has ASCII alone
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Output(stream, clean))


def say_on(number: int) -> None:
    """Standard error of Python is the open file `number`; that of libraries stays as it is."""
    stream = os.fdopen(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    sys.stderr = Output(stream, sys.stderr.clean)


def mute() -> None:
    """From now on nothing that is printed is seen, but errors: for one of several processes that
    all say the same.
    """
    global _errors
    _errors = sys.stderr
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.excepthook = lambda *wrong: traceback.print_exception(*wrong, file=_errors)


_errors: TextIO | None = None


def errors() -> TextIO:
    """Where errors are printed, also when all else is muted."""
    return _errors or sys.stderr


def lost_output() -> OSError | None:
    """Why standard output took not all, where that is no reader's choice: a full disk, say."""
    wrong = getattr(sys.stdout, "lost", None)
    return wrong if wrong is not None and wrong.errno not in GONE else None
