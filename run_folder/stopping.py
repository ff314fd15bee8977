"""Ctrl-C and SIGTERM end a run after the step it is in; a second one ends it at once."""

import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType

NOTICE = b"\nstopping after this step; once more stops at once\n"


class GracefulStop:
    """Turns the first SIGINT or SIGTERM into a flag. Use as a context manager around the loop.

    with GracefulStop() as stop:
        for step in ...:
            ...
            if stop.requested:
                save(); break
    stop.exit_if_requested("sft.py", run.folder)
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether the run has been asked to stop."""
        return self.signal is not None

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        # The system's own handler needs no interpreter, so it works in the middle of a long step.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        os.write(2, NOTICE)

    def __enter__(self) -> "GracefulStop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exit_if_requested(self, script: str, folder: str | Path) -> None:
        """Say how to go on and exit with 130 (Ctrl-C) or 143 (SIGTERM); else do nothing."""
        if self.signal is not None:
            print(f"stopped; go on with:\n  {resume_command(script, folder)}", flush=True)
            sys.exit(128 + self.signal)


def resume_command(script: str, folder: str | Path) -> str:
    """The command line that goes on with a run."""
    return f"python {script} --resume {shlex.quote(str(folder))}"
