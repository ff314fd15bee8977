"""What a person sees of a run: a live bar in a terminal, one aligned line per report in a log, and
commands to go on with, as a shell takes them.
"""

import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from run_folder.output import bars, own_text, printable

NUMBER_WIDTH = 9
# A short bar: it fits into 80 columns, and the values stand on lines above it.
BAR = "{desc} {n_fmt}/{total_fmt} |{bar:10}| {rate_noinv_fmt}, {remaining} left{postfix}"
SLOW_BAR = BAR.replace("rate_noinv_fmt", "rate_inv_fmt")
# Where nobody knows how much there is, or what is done is no number of things.
COUNT_BAR = "{desc} {n_fmt} in {elapsed}, {rate_noinv_fmt}{postfix}"
TIME_BAR = "{desc} {elapsed}{postfix}"
PATIENCE = 2.0  # seconds of silence before a bar shows
TICK = 1.0  # and between two of its pictures, while nothing gets done
LOG_PATIENCE = 30.0  # and between lines about the same wait in a log
LOG_WORTH = 10.0  # seconds that a wait has to take to have a line in a log at all


class Bar(tqdm):
    """tqdm with seconds per step where there is less than one a second; lines stay above it."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        bars.add(self)

    def due(self) -> bool:
        """Whether it is shown by now."""
        return self._time() >= self.start_t + self.delay

    def close(self) -> None:
        bars.discard(self)
        super().close()

    @property
    def format_dict(self) -> dict[str, Any]:
        found = super().format_dict
        done, elapsed = found["n"] - found["initial"], found["elapsed"]
        rate = found["rate"] or (done / elapsed if elapsed else 0)
        form = SLOW_BAR if 0 < rate < 1 else BAR
        if found["total"] is None:
            form = COUNT_BAR if done else TIME_BAR
        return found | {"bar_format": form}

    def forget_time(self) -> None:
        """What was until now says nothing of the pace."""
        self.start_t = self.last_print_t = self._time()


class Progress:
    """Progress of ``total`` steps. Use as a context manager, or call ``close``.

    In a terminal every step moves a bar, and lines of values stay above it. Elsewhere ``report``
    prints the same lines, so that a log holds one line per report and no control characters.
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
        self.first, self.spent = done, 0.0  # of the last timed line: step, seconds since then
        self.moved = time.monotonic()
        self.bar = (
            Bar(
                total=total,
                initial=done,
                desc=name or None,
                file=own_text(self.stream),
                dynamic_ncols=True,
                unit="step",
            )
            if self.live
            else None
        )
        self.what, self.since = "", self.moved
        self.over = threading.Event()
        self.ticking = threading.Thread(target=self.tick, daemon=True)
        if self.live:
            self.ticking.start()

    def tick(self) -> None:
        """Say behind the bar how long the step has been at it, where that is more than a moment."""
        while not self.over.wait(TICK):
            if (seconds := time.monotonic() - self.since) > PATIENCE:
                self.bar.set_postfix_str(f"{self.what} {seconds:.0f} s".lstrip())

    def advance(self, steps: int = 1) -> None:
        """Steps are done: the time since the last ones, or the last evaluation, was theirs."""
        self.spent, self.moved = self.spent + time.monotonic() - self.moved, time.monotonic()
        self.what, self.since = "", self.moved
        if self.bar is not None:
            self.bar.set_postfix_str("", refresh=False)
            self.bar.update(steps)

    def doing(self, what: str) -> None:
        """Say behind the bar what the step is at; does nothing in a log."""
        self.what, self.since = what, time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(what)

    def report(self, step: int, values: Mapping[str, Any], *, timed: bool = True) -> None:
        """Print the named values after ``step`` steps; ``timed``: and the pace since the last time.

        What is not timed is an evaluation, which took the time since the step before it.
        """
        width = len(str(self.total))
        head = f"{self.name} {step:>{width}}/{self.total}".strip()
        cells = [f"{k} {short(v):<{NUMBER_WIDTH}}" for k, v in values.items()]
        if timed:
            cells.append(pace((step - self.first) / max(self.spent, 1e-9)))
            self.first, self.spent = step, 0.0
        else:
            gone, self.moved = time.monotonic() - self.moved, time.monotonic()
            if self.bar is not None:  # it is none of the steps' time
                self.bar.start_t, self.bar.last_print_t = (
                    then + gone for then in (self.bar.start_t, self.bar.last_print_t)
                )
        self.line(printable("  ".join([head, *cells]).rstrip()))

    def line(self, text: str) -> None:
        """Print a line of its own without disturbing the bar."""
        if self.bar is None:
            print(text, file=self.stream, flush=True)
            return
        with tqdm.get_lock():  # no bar is drawn into the line
            self.bar.clear()  # tqdm.write clears only bars on the very same stream
            print(text, file=self.stream, flush=True)
            self.bar.refresh()

    def begin(self) -> None:
        """The steps begin now: what was before, an evaluation say, is none of their time."""
        self.moved = time.monotonic()
        if self.bar is not None:
            self.bar.forget_time()

    def close(self) -> None:
        """Leave the bar where it stands; a second call does nothing."""
        if self.bar is not None:
            self.over.set()
            self.ticking.join()
            self.bar.set_postfix_str("", refresh=False)
            self.bar.close()
            self.bar = None
            self.live = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Wait:
    """Work beside the steps of a run: a bar that shows after two seconds and then goes again.

    It shows also while the first of `total` is not done. In a log, a line every 30 seconds and one
    at the end, if it took more than ten. Use as a context manager.
    """

    def __init__(
        self,
        name: str,
        total: int | None = None,
        *,
        stream: TextIO | None = None,
        live: bool | None = None,
        patience: float | None = None,
    ) -> None:
        """`patience`: seconds of silence; None: PATIENCE, in a log LOG_WORTH."""
        self.stream = stream or sys.stderr
        live = self.stream.isatty() if live is None else live
        if patience is None:
            patience = PATIENCE if live else LOG_WORTH
        self.name, self.total, self.done, self.patience = name, total, 0, patience
        self.started = self.said = time.monotonic()
        self.bar = (
            Bar(
                total=total,
                desc=name,
                file=own_text(self.stream),
                dynamic_ncols=True,
                delay=patience,
                leave=False,
            )
            if live
            else None
        )
        self.over = threading.Event()
        self.ticking = threading.Thread(target=self.tick, daemon=True)
        if live:
            self.ticking.start()

    def tick(self) -> None:
        """Draw the bar while nobody else does."""
        pause = self.patience
        while not self.over.wait(pause):
            self.bar.delay = 0  # or `close` would take it for one that was never shown
            self.bar.refresh()
            pause = TICK

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self.bar is not None:
            if count:  # else `tick` is enough
                self.bar.update(count)
        elif time.monotonic() - self.said > max(LOG_PATIENCE, self.patience):
            self.say()

    def say(self) -> None:
        self.said, seconds = time.monotonic(), time.monotonic() - self.started
        of = f" of {self.total:,}" if self.total and self.done < self.total else ""
        known = of and self.done
        left = f", {(self.total - self.done) / self.done * seconds:.0f} s left" if known else ""
        count = f"{self.done:,}{of} in " if self.done or of else ""
        print(f"{self.name}: {count}{seconds:.1f} s{left}", file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.over.set()
            self.ticking.join()
            self.bar.close()
        elif (self.done or self.total is None) and time.monotonic() - self.started > self.patience:
            self.say()

    def __enter__(self) -> "Wait":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def say_gb(gigabytes: float) -> str:
    """``1.23 GB``, or ``45.6 MB`` below a tenth of one."""
    return f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{gigabytes * 1000:.1f} MB"


def pace(rate: float) -> str:
    """A rate of steps per second; below one, seconds per step."""
    return f"{rate:.2f} steps/s" if rate >= 1 or rate <= 0 else f"{1 / rate:.3g} s/step"


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
    """``python SCRIPT --name VALUE ...`` with every value quoted; None leaves a flag out.

    It is one line: a line break of --prompt-template is written as that flag reads it, as \\n.
    """
    words = ["python", script]
    for name, value in named.items():
        if value is not None:
            text = str(value)
            text = text.replace("\n", "\\n") if name == "prompt_template" else text
            words += ["--" + name.replace("_", "-"), text]
    return shlex.join([*words, *flags])


def next_lines(commands: Sequence[str]) -> str:
    """The commands below each other, behind ``next:``."""
    return "next: " + "\n      ".join(commands)
