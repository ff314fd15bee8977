"""A worker's part in the group while it runs: its line, a watchdog, how it ends. Loads no MLX.

A thread says to the others once a second that this process lives and what it waits for, looks
whether the process that started it is still there, and ends a wait that takes too long.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distributed.guard import ended_after
from distributed.line import BEAT, SILENT, Line, meet, parent_is_gone
from distributed.place import NOTES, PARENT, Place, place
from errors import Lost, UserError
from run_folder.output import errors
from run_folder.secrets import tell

LOST = 3  # exit status where another worker is gone or does not answer
TIMEOUT = 600.0  # seconds, by default, that a wait for others may take
LOOK = 0.02  # seconds between looks at what others said
CONNECT = 60.0  # seconds for MLX's own connections; all have said that they are about to make them
GRACE = 2.0  # seconds in which a connection that broke is seen to be broken on the line too


class Membership:
    """This process as one of several workers, from the meeting to its end."""

    def __init__(self, place: Place, timeout: float = TIMEOUT, given: Any = None) -> None:
        self.place, self.rank, self.size, self.timeout = place, place.rank, place.size, timeout
        self.backend = "any" if place.addresses is None else "ring"
        self.parent = os.environ.get(PARENT)
        self.run: str | None = None  # the run folder, once there is one
        self.stage, self.begun = "", 0.0  # what is waited for, and since when
        self.began = False  # what all do together
        self.shared_error: str | None = None  # one that every worker has
        self.line: Line | None = None
        self.ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        if place.addresses is not None:
            self.line = meet(place, timeout, given)

    @contextlib.contextmanager
    def waiting(self, stage: str) -> Iterator[None]:
        """Around what only comes to an end with all workers."""
        self.begun, self.stage = time.monotonic(), stage
        try:
            yield
        finally:
            self.stage = ""

    @contextlib.contextmanager
    def connecting(self) -> Iterator[None]:
        """Around MLX's own start, which waits without end for a worker that does not come."""
        # Where they have not met, who comes last may load for long.
        seconds = self.timeout if self.line is None else min(self.timeout, CONNECT)
        others = [rank for rank in range(self.size) if rank != self.rank]
        message = (
            f"error: no connection with {workers_named(others)} within {seconds:g} s; each worker "
            "has to reach the address of the next one, the last one that of worker 0, with no "
            "firewall between; start them again"
        )
        with ended_after(seconds + (GRACE if self.rank else 0), message):
            yield

    def ready(self) -> None:
        """Wait until all have loaded what they need, before MLX waits for them without end.

        Raises UserError with the error of another worker, at worker 0, and Lost.
        """
        line = self.line
        if line is None:
            return
        with self.waiting("loading model and data"):
            if self.rank:
                line.send(ready=True)
            while not (line.go.is_set() if self.rank else len(line.ready) == self.size - 1):
                if line.errors:
                    raise UserError(self.refusal())
                if line.gone:
                    raise Lost("the start")
                time.sleep(LOOK)
            if not self.rank:
                line.send(go=True)

    def refusal(self) -> str:
        """The error of a worker that is not going to come, as worker 0 says it."""
        rank = min(self.line.errors)
        return f"worker {rank}: {self.line.errors[rank]}"

    def note_run(self, folder: str) -> None:
        """The run that an error names, also one that another process of this machine says."""
        self.run = folder
        if self.rank == 0 and (notes := os.environ.get(NOTES)):
            Path(notes, "run").write_text(folder, encoding="utf-8")

    # ------------------------------------------------------------------ the watchdog

    def _watch(self) -> None:
        while not self.ended.wait(BEAT / 2):
            if parent_is_gone(self.parent):
                os._exit(LOST)
            if self.line is None:
                self._end_a_long_wait(())
                continue
            self.line.send(stage=self.stage)
            if self.line.told_to_stop.is_set():
                os._exit(2)
            if self.line.gone:  # where no collective notices it
                self._end_without_the_gone()
            self._end_a_long_wait(self.line.silent(min(SILENT, max(self.timeout / 2, 2 * BEAT))))

    def _end_without_the_gone(self) -> None:
        if self.ended.wait(SILENT):
            return
        if self.line.errors and not self.rank:  # still loading: the others are not waited for
            tell(f"error: {self.refusal()}", errors())
            self.line.send(stop=True)
            os._exit(2)
        if (said := self.lost()) is not None:
            tell(f"error: {said}", errors())
        os._exit(LOST)

    def _end_a_long_wait(self, silent) -> None:
        if not self.stage or time.monotonic() - self.begun < self.timeout:
            return
        if self.rank and 0 not in silent and self.line is not None:
            if time.monotonic() - self.begun < self.timeout + GRACE:
                return  # worker 0 says it
            os._exit(LOST)
        tell(f"error: {self.who_hangs(silent)}; {self.go_on()}", errors())
        os._exit(LOST)

    def who_hangs(self, silent) -> str:
        """Which worker a wait that took too long was for, and in what."""
        after = f"after {self.timeout:g} s (--worker-timeout) in {self.stage}"
        others = [rank for rank in range(self.size) if rank != self.rank]
        if silent or self.line is None:
            found = silent or others
            return f"{workers_named(found)} {verb(found, 'does', 'do')} not answer {after}"
        found = [rank for rank in others if self.line.stages.get(rank) != self.stage] or others
        return f"{workers_named(found)} {verb(found, 'did', 'did')} not come {after}"

    # ------------------------------------------------------------------ the end

    def go_on(self) -> str:
        if self.run is None:
            return "start them again"
        return f"go on with --resume {self.run}"

    def lost(self) -> str | None:
        """What to say where a collective broke; None where someone else says it better."""
        gone = self.wait_for_the_gone()
        if self.place.started_here or self.rank:
            return None  # who started the workers knows what ended one, and worker 0 speaks
        gone = gone or [rank for rank in range(self.size) if rank != self.rank]
        return f"{workers_named(gone)} {verb(gone, 'is', 'are')} gone; {self.go_on()}"

    def wait_for_the_gone(self) -> list[int]:
        end = time.monotonic() + GRACE
        while self.line is not None and not self.line.gone and time.monotonic() < end:
            time.sleep(0.05)
        return sorted(self.line.gone) if self.line is not None else []

    def error(self, message: str) -> str | None:
        """How an error of this worker is said, None where another one says it.

        Before all began, worker 0 says it and all end; after that it may be an error of all alike,
        and who started the workers holds it back.
        """
        if not self.began and self.line is not None:
            if self.rank == 0:
                self.line.send(stop=True)
            else:
                self.line.send(error=message)
                if not self.line.gone:
                    return None
        if self.rank and message == self.shared_error:
            return None
        return message if self.rank == 0 or self.place.started_here else f"{self.named}: {message}"

    @property
    def named(self) -> str:
        return f"worker {self.rank}"

    def leave(self) -> None:
        """What comes now needs no other worker."""
        self.ended.set()
        if self.line is not None:
            self.line.close()


def workers_named(ranks) -> str:
    """``worker 1`` or ``workers 1 and 2``."""
    *first, last = map(str, ranks)
    return f"workers {', '.join(first)} and {last}" if first else f"worker {last}"


def verb(ranks, one: str, several: str) -> str:
    return one if len(ranks) == 1 else several


_member: Membership | None = None


def member() -> Membership | None:
    """This process's membership; None where it works alone."""
    return _member


def given(name: str) -> Any:
    """What worker 0 handed to all when they met; None alone."""
    line = None if _member is None else _member.line
    return None if line is None else line.given.get(name)


def enter(timeout: float = TIMEOUT, given: Any = None) -> Membership | None:
    """Meet the other workers, where there are any; worker 0 hands `given` to all."""
    global _member
    if _member is None and (found := place()) is not None:
        _member = Membership(found, timeout, given)
    return _member
