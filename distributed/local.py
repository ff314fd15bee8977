"""Several workers on this machine: copies of one command, started, watched and ended. No MLX.

`mlx.launch` does the same over several machines. Here it is not used: it exits with 0 where a
worker was killed, two of its runs meet at one port, and Ctrl-C ends it with a traceback.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from distributed.membership import LOST, workers_named
from distributed.place import HOSTFILE, NOTES, PARENT, RANK, TERMINAL
from run_folder.secrets import tell
from run_folder.stopping import AGAIN, SIGNALS

PATIENCE = 5.0  # seconds that the others get once one has failed
LOOK = 0.05  # seconds between looks at them
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def run_local(command: Sequence[str], count: int, threads: int | None = None) -> int:
    """Run a Python command line as `count` workers; the first exit status that is not 0.

    Worker 0 has the terminal; what MLX's ring writes there when it breaks is dropped. Of the others
    standard error shows, as ``worker 1: ...``, but errors that worker 0 says as well. A signal goes
    to worker 0, which tells the others. Where one fails, the others get a few seconds and are
    ended. 3 where a worker was killed or broke.
    """
    with tempfile.TemporaryDirectory(prefix="mlx-rlhf-") as notes:
        hostfile = Path(notes, "hosts.json")
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
        workers: list[Worker] = []
        with forwarding(workers) as heard:
            for rank in range(count):
                workers.append(Worker(rank, command, hostfile, notes, threads))
            try:
                first = wait(workers)
            finally:
                end(workers)
        if len(heard) > 1:
            return 128 + heard[0]
        return status(workers, first, Path(notes, "run"))


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    with contextlib.ExitStack() as held:
        servers = [held.enter_context(socket.socket()) for _ in range(count)]
        for server in servers:
            server.bind(("127.0.0.1", 0))
        return [server.getsockname()[1] for server in servers]


class Worker:
    """One of the processes, in a process group of its own, so that Ctrl-C comes here alone."""

    def __init__(
        self, rank: int, command: Sequence[str], hostfile: Path, notes: str, threads: int | None
    ) -> None:
        more = {RANK: str(rank), HOSTFILE: str(hostfile), NOTES: notes, PARENT: str(os.getpid())}
        if threads is not None:
            more |= dict.fromkeys(THREADS, str(threads))
        mute, terminal = rank > 0, 2
        self.rank, self.errors, self.ended = rank, [], False  # ended from here
        if not mute:
            terminal = os.dup(terminal)
            more[TERMINAL] = str(terminal)
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | more,
            stdin=subprocess.DEVNULL if mute else None,
            stdout=subprocess.DEVNULL if mute else None,
            stderr=subprocess.PIPE,
            pass_fds=() if mute else (terminal,),
            process_group=0,
        )
        if not mute:
            os.close(terminal)
        self.reader = threading.Thread(target=self._forward, daemon=True)
        self.reader.start()

    def _forward(self) -> None:
        """Standard error, line by line; errors wait for the end, as worker 0 may say the same."""
        for line in self.process.stderr:
            text = line.decode(errors="replace").rstrip("\n")
            if text.startswith("[ring]"):
                continue
            if self.rank == 0:
                print(text, file=sys.stderr, flush=True)
            elif text.startswith("error: "):
                self.errors.append(text)
            elif text:
                tell(f"worker {self.rank}: {text}")

    @property
    def code(self) -> int | None:
        return self.process.poll()


@contextlib.contextmanager
def forwarding(workers: list[Worker]) -> Iterator[list[int]]:
    """Within it a signal goes to worker 0; a second one ends all at once. Gives those heard."""
    heard: list[int] = []
    first = 0.0  # when

    def hear(number: int, _) -> None:
        nonlocal first
        if heard and time.monotonic() - first < AGAIN:
            return
        first = time.monotonic()
        heard.append(number)
        for worker in workers if len(heard) > 1 else workers[:1]:
            if worker.process.returncode is None:
                worker.process.send_signal(signal.SIGKILL if len(heard) > 1 else number)

    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(workers: Sequence[Worker]) -> Worker | None:
    """Until all have ended, or one has failed: the first that did."""
    while True:
        failed = [worker for worker in workers if worker.code]
        if failed:
            # Two at one look: one that lost another is not the first.
            return min(failed, key=lambda worker: (worker.code == LOST, worker.rank))
        if all(worker.code == 0 for worker in workers):
            return None
        time.sleep(LOOK)


def end(workers: Sequence[Worker]) -> None:
    """Give those that still run some seconds, and end them."""
    limit = time.monotonic() + PATIENCE
    while any(worker.code is None for worker in workers) and time.monotonic() < limit:
        time.sleep(LOOK)
    for worker in workers:
        if worker.code is None:
            worker.ended = True
            worker.process.kill()
        worker.process.wait()
        worker.reader.join(1.0)


def status(workers: Sequence[Worker], first: Worker | None, note: Path) -> int:
    """The exit status of all together; what ended a worker that could not say it is said."""
    if first is None:
        return 0
    if not workers[0].ended and workers[0].code not in (0, LOST):
        first = workers[0]  # it speaks for all that fail alike
    code = LOST if first.code == -signal.SIGALRM else first.code  # which its guard has told of
    if code < 0 or code == 1:
        run = note.read_text(encoding="utf-8") if note.exists() else None
        how = f"signal {-code}" if code < 0 else "it broke: see above"
        cure = f"go on with --resume {run}" if run else "start anew"
        tell(f"error: {workers_named([first.rank])} is gone ({how}); {cure}")
        return LOST
    spoken = workers[0].code == first.code
    for line in first.errors if not spoken else ():
        tell(f"error: {workers_named([first.rank])}: {line.removeprefix('error: ')}")
    return code
