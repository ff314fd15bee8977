"""A signal at one of several workers: all finish the step and stop alike."""

import contextlib
from collections.abc import Iterator
from types import FrameType

from distributed.group import Workers
from run_folder.stopping import GracefulStop, end_at_the_next


class SharedStop(GracefulStop):
    """`GracefulStop` whose flag counts once every worker has it.

    It goes with the next sum over the workers (`Workers.sum`). No step is given up: the others are
    in it.
    """

    def __init__(self, workers: Workers) -> None:
        super().__init__()
        self.workers = workers

    @property
    def requested(self) -> bool:
        self.signal = self.workers.stop
        return self.signal is not None

    @contextlib.contextmanager
    def giving_up(self) -> Iterator[None]:
        yield

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.workers.heard is not None:  # the same one again
            return
        self.workers.heard = number
        end_at_the_next()
