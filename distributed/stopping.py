"""A signal at one of several workers: all finish the step and stop alike."""

import contextlib
from collections.abc import Iterator
from types import FrameType

from distributed.group import Workers
from run_folder.stopping import GracefulStop, end_at_the_next


class SharedStop(GracefulStop):
    """`GracefulStop` whose flag counts once every worker has it.

    It goes with the next sum over the workers (`Workers.sum`). No step is given up: the others are
    in it. Once they have parted, a signal is worker 0's own, which alone goes on.
    """

    def __init__(self, workers: Workers) -> None:
        super().__init__()
        self.workers = workers

    @property
    def requested(self) -> bool:
        if self.signal is None:
            self.signal = self.workers.stop or (self.workers.heard if self.alone else None)
        return self.signal is not None

    @property
    def alone(self) -> bool:
        return self.workers.parted and self.workers.rank == 0

    @contextlib.contextmanager
    def giving_up(self) -> Iterator[None]:
        with super().giving_up() if self.alone else contextlib.nullcontext():
            yield

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.workers.heard is not None:  # the same one again
            return
        self.workers.heard = number
        if self.alone:
            super()._handle(number, frame)
        else:
            end_at_the_next()
