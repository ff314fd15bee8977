"""Two or more programs measured in turns, each in a process (and environment) of its own.

A worker offers calls by name and runs one whenever it is told to, while the others wait; so what
else the machine is doing falls on all of them alike. Measured are seconds on the clock ("wall") and
seconds of processor time of all threads ("cpu"); where the machine is shared, the second is the one
to read. `ratio` compares the calls of each turn with one another, not the medians.

This file is read in every environment, so it uses nothing but the standard library.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
# Which of its kernels OpenBLAS uses, where a machine's set-up says so; the peer in torch has MKL.
BLAS_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")

Samples = dict[str, list[dict]]  # by the name of a call: what each repeat of it measured


# ---- the worker's side -------------------------------------------------------------------------


class Answers:
    """What a worker tells its parent; everything else that it prints goes to standard error."""

    def __init__(self):
        self._file = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.send({"ready": True})

    def send(self, answer: dict) -> None:
        print(json.dumps(answer), file=self._file)

    def wait(self) -> str:
        """The name of the call that is wanted next; ends the worker when none is any more."""
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        self._start = time.perf_counter(), time.process_time()
        return line.strip()

    def done(self, extra: dict | None = None) -> None:
        """Send what the call took since `wait`, and `extra` numbers."""
        wall, cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
        self.send({"wall": wall, "cpu": cpu, "peak_rss": peak, **(extra or {})})


def serve(calls: dict[str, Callable[[], dict | None]]) -> None:
    """Run `calls` as the parent asks for them. A call may return numbers, which go along."""
    answers = Answers()
    while True:
        answers.done(calls[answers.wait()]())


# ---- the parent's side -------------------------------------------------------------------------


class Worker:
    """A process that runs ``python script arguments...`` from benchmarks/, one thread to a library.

    `ours`: it may import the project's modules. `own_blas`: OpenBLAS picks its kernels by itself,
    whatever the environment says.
    """

    def __init__(
        self,
        python: str | Path,
        script: str,
        *arguments: str,
        ours: bool = True,
        own_blas: bool = False,
    ):
        environment = os.environ | dict.fromkeys(ONE_THREAD, "1")
        if ours:
            environment["PYTHONPATH"] = str(ROOT)
        for name in BLAS_SETTINGS if own_blas else ():
            environment.pop(name, None)
        command = [str(python), str(ROOT / "benchmarks" / script), *map(str, arguments)]
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")  # a full pipe would block it
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )
        self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise RuntimeError(f"{self._process.args} ended early:\n{self._said.read()[-2000:]}")
        return json.loads(line)

    def call(self, name: str) -> dict:
        self._process.stdin.write(name + "\n")
        return self._answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.wait()


def interleave(calls: dict[str, tuple[Worker, str]], repeats: int, warm_up: int = 2) -> Samples:
    """Each call `repeats` times in turns, after `warm_up` turns that do not count."""
    samples: Samples = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, (worker, call) in calls.items():
            sample = worker.call(call)
            if turn >= warm_up:
                samples[name].append(sample)
    return samples


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the quartiles as the spread."""
    if len(values) < 2:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def summary(samples: Samples) -> dict[str, dict]:
    """Every measured number of every call: median and quartiles."""
    return {
        name: {key: spread([sample[key] for sample in runs]) for key in runs[0]}
        for name, runs in samples.items()
    }


def ratio(samples: Samples, above: str, below: str, key: str = "cpu") -> dict[str, float]:
    """How many times as much of `key` the call `above` takes as `below`, turn by turn."""
    pairs = zip(samples[above], samples[below], strict=True)
    return spread([a[key] / b[key] for a, b in pairs])
