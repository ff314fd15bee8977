"""Runs of the real scripts as two workers on this machine, and as one, to compare."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from files import ROOT

TOO_LONG = 180  # seconds for a run of a test, on a machine that does other things too
# Sums of two halves round otherwise than those of the whole, and Adam's step has the size of the
# rate whatever the gradient: of rates up to 3e-3 and some updates this is what is left.
CLOSE = 1e-5


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of error."""
        lines = [line for line in self.err.splitlines() if "error" in line]
        assert len(lines) == 1, self.err
        return lines[0]


def started(folder: Path, script: str, line: str, workers: int = 1, **env: str):
    """The script in `folder`, which is made; its process."""
    folder.mkdir(parents=True, exist_ok=True)
    words = line.replace("DATA", str(ROOT / "data")).split()
    more = ["--num-training-workers", str(workers)] if workers > 1 else []
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *words, *more],
        cwd=folder,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> Ended:
    try:
        out, err = process.communicate(timeout=TOO_LONG)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


def ran(folder: Path, script: str, line: str, workers: int = 1, code: int = 0, **env: str) -> Ended:
    """The script, run to its end with exit status `code`."""
    found = ended(started(folder, script, line, workers, **env))
    assert found.code == code, found.err + found.out
    return found


# ------------------------------------------------------------------------------ what came out


def weights(file: Path) -> dict[str, np.ndarray]:
    arrays = mx.load(str(file))
    return {k: np.array(a) for k, a in arrays.items() if a.dtype != mx.uint8}


def largest_difference(one: Path, other: Path) -> float:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys() and len(one)
    return max(float(np.abs(one[k] - other[k]).max()) for k in one)


def moved(file: Path) -> float:
    """The largest weight, of an adapter whose one side starts at 0: that it was trained at all."""
    return max(float(np.abs(a).max()) for k, a in weights(file).items() if "lora_a" not in k)


def rows(folder: Path) -> list[dict]:
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def numbers(row: dict) -> dict:
    """Of a row of metrics: no times, no memory, nothing that only several workers log."""
    own = ("time/", "memory/", "distributed/")
    return {k: v for k, v in row.items() if not k.startswith(own) and k != "step_time"}


def assert_same_numbers(one: list[dict], other: list[dict], tolerance: float = 1e-4) -> None:
    """Every metric; the tolerance is relative where a number is large."""
    assert len(one) == len(other)
    for row, its in zip(map(numbers, one), map(numbers, other), strict=True):
        assert row.keys() == its.keys()
        for name, value in row.items():
            if value is None or its[name] is None:
                assert value is its[name], name
                continue
            close = abs(value - its[name]) <= tolerance * max(1, abs(value))
            assert close, (name, value, its[name])


# ------------------------------------------------------------------------------ signals


def workers_of(process: subprocess.Popen) -> dict[int, int]:
    """{rank: process id} of the workers that a process started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == process.pid:
                env = (folder / "environ").read_text().split("\0")
                [rank] = [line for line in env if line.startswith("MLX_RANK=")]
                found[int(rank.partition("=")[2])] = int(folder.name)
    return found


def when(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Wait until something is so, while the process runs."""
    limit = time.monotonic() + TOO_LONG
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def logged(folder: Path, count: int) -> Callable[[], bool]:
    """Whether a run has logged so many rows."""
    file = folder / "run" / "metrics.jsonl"
    return lambda: file.exists() and len(file.read_bytes().splitlines()) >= count


def is_alive(number: int) -> bool:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(number) / "stat").read_text().rpartition(")")[2][1] != "Z"
    return False


def signalled(
    folder: Path, script: str, line: str, number: int, rank: int, after: int, **env: str
) -> Ended:
    """Two workers of which one gets a signal once so many rows are logged; none is left."""
    process = started(folder, script, line, 2, **env)
    when(process, logged(folder, after))
    workers = workers_of(process)
    assert sorted(workers) == [0, 1]
    os.kill(workers[rank], number)
    found = ended(process)
    for worker in workers.values():
        assert not is_alive(worker)
    return found


KILL, STOP, INT = signal.SIGKILL, signal.SIGSTOP, signal.SIGINT
