"""What a person sees of a run: a live bar in a terminal, one aligned line per report in a log, and
commands to go on with, as a shell takes them.
"""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from run_folder.output import own_text, printable

NUMBER_WIDTH = 9
# A short bar, so that the values behind it fit into 80 columns.
BAR = "{desc} {n_fmt}/{total_fmt} |{bar:10}| {remaining} left{postfix}"


class Progress:
    """Progress of ``total`` steps. Use as a context manager, or call ``close``.

    In a terminal every step moves a bar with the latest values behind it. Elsewhere ``report``
    prints a line, so that a log holds one line per report and no control characters.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        name: str = "",
        stream: TextIO | None = None,
        live: bool | None = None,
    ) -> None:
        """``done``: steps behind us already (a resumed run). ``live``: None asks the stream."""
        self.total, self.name = total, name
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty() if live is None else live
        self.started, self.first = time.monotonic(), done
        self.bar = (
            tqdm(
                total=total,
                initial=done,
                desc=name or None,
                file=own_text(self.stream),
                dynamic_ncols=True,
                bar_format=BAR,
            )
            if self.live
            else None
        )

    def advance(self, steps: int = 1) -> None:
        """Move the bar on; does nothing in a log."""
        if self.bar is not None:
            self.bar.update(steps)

    def report(self, step: int, values: Mapping[str, Any], *, keep: bool = False) -> None:
        """Show the named values after ``step`` steps; ``keep`` them on a line in a terminal too."""
        width = len(str(self.total))
        head = f"{self.name} {step:>{width}}/{self.total}".strip()
        if self.bar is not None:
            shown = printable("  ".join(f"{k} {short(v)}" for k, v in values.items()))
            if keep:
                self.line(f"{head}  {shown}")
            else:
                self.bar.set_postfix_str(shown)
            return
        pace = (step - self.first) / max(time.monotonic() - self.started, 1e-9)
        cells = [f"{k} {short(v):<{NUMBER_WIDTH}}" for k, v in values.items()]
        self.line("  ".join([head, *cells, f"{pace:.2f} steps/s"]))

    def line(self, text: str) -> None:
        """Print a line of its own without disturbing the bar."""
        if self.bar is not None:
            self.bar.clear()  # tqdm.write clears only bars on the very same stream
        print(text, file=self.stream, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        """Leave the bar where it stands; a second call does nothing."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
            self.live = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def short(value: Any) -> str:
    """A number in four significant digits; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return str(value)
    size = abs(value)
    return f"{value:.3e}" if size and (size < 1e-3 or size >= 1e5) else f"{value:.4g}"


# ------------------------------------------------------------------------------ what comes next


def command(script: str, *flags: str, **named: object) -> str:
    """``python SCRIPT --name VALUE ...`` with every value quoted; None leaves a flag out."""
    words = ["python", script]
    for name, value in named.items():
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join([*words, *flags])


def next_lines(commands: Sequence[str]) -> str:
    """The commands below each other, behind ``next:``."""
    return "next: " + "\n      ".join(commands)
