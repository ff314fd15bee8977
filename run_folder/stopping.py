"""Ctrl-C and SIGTERM give up a step that has moved no weight, or end a run after it."""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds within which a signal is the same one again: `timeout` and service managers send it to
# each process of a group, and a parent hands it on.
AGAIN = 0.25
GIVING_UP = b"\nstopping: this step has moved no weight and is given up; once more stops at once\n"
FINISHING = b"\nstopping after this step; once more stops at once\n"


class StepGivenUp(BaseException):
    """A signal came before any weight of the step had moved.

    Not an Exception, so that an ``except Exception`` in a reward function lets it through.
    """


class GracefulStop:
    """Turns the first SIGINT or SIGTERM into a flag. Use as a context manager around the loop.

    with GracefulStop() as stop:
        for step in ...:
            with stop.giving_up():      # a signal in here raises StepGivenUp
                sample(), score()
                stop.finish_step()      # from here on it sets the flag alone
                update()
            if stop.requested:
                save(); break
    stop.exit_if_requested("sft.py", run.folder)
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._may_give_up = self._given_up = False
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether the run has been asked to stop."""
        return self.signal is not None

    @contextlib.contextmanager
    def giving_up(self) -> Iterator[None]:
        """A part of the run that a signal ends by StepGivenUp, as soon as Python runs again."""
        self._may_give_up = True
        try:
            if self.requested:
                raise StepGivenUp
            yield
        finally:
            self._may_give_up = False

    def finish_step(self) -> None:
        """Weights are about to move: a signal from here on lets the step finish."""
        self._may_give_up = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:  # the same one again
            return
        self.signal = number
        end_at_the_next()
        if self._may_give_up:
            self._may_give_up, self._given_up = False, True
            raise StepGivenUp

    def _answer(self, pipe: int) -> None:
        """In a thread: say at once that a signal was heard; end the process at a second one.

        Python runs `_handle` when the device call under way is over, which may take minutes.
        """
        heard = None  # when
        with open(pipe, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] not in SIGNALS:
                    continue  # the alarm of a reward's time limit, for one
                if heard is not None:
                    if time.monotonic() - heard > AGAIN:
                        os._exit(128 + number[0])
                    continue
                heard = time.monotonic()
                given_up = self._may_give_up or self._given_up
                with contextlib.suppress(OSError):  # nobody reads any more
                    os.write(2, GIVING_UP if given_up else FINISHING)

    def __enter__(self) -> "GracefulStop":
        heard, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        # The system's handler writes the signal's number here, whatever the interpreter does.
        self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._answer, args=(heard,), daemon=True)
        self._thread.start()
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._pipe_before)
        os.close(self._pipe)
        self._thread.join()

    def exit_if_requested(self, script: str, folder: str | Path, more: str = "") -> None:
        """Say how to go on and exit with 130 (Ctrl-C) or 143 (SIGTERM); else do nothing.

        `more` is said behind it.
        """
        if self.signal is not None:
            lines = [
                f"stopped; go on with:\n  {resume_command(script, folder)}",
                *filter(None, [more]),
            ]
            print("\n".join(lines), flush=True)
            sys.exit(128 + self.signal)


def end_at_the_next() -> None:
    """From a handler of a signal: the next one ends the process, but not the same one again.

    The system's own handler does, which needs no interpreter: also in the middle of a long step.
    """
    time.sleep(AGAIN)
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)


def resume_command(script: str, folder: str | Path) -> str:
    """The command line that goes on with a run."""
    return f"python {script} --resume {shlex.quote(str(folder))}"
