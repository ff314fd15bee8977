"""Two or more programs measured in turns, each in a process (and environment) of its own.

A worker announces named calls and runs one whenever it is told to; the others wait meanwhile, so
what else the machine is doing falls on all of them alike. `compare` gives seconds on the clock and
seconds of processor time (of all threads), as medians with the range of the middle half.

This file is read by every environment, so it uses nothing but the standard library.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def serve(calls: dict[str, Callable[[], dict | None]]) -> None:
    """The worker's side: run `calls` by name as asked on standard input, until it ends.

    A call may return numbers, which go with its times; "setup_cpu" in them is processor time that
    does not count.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not mix with the answers
    print(json.dumps({"ready": sorted(calls)}), file=answers)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        extra = calls[line.strip()]() or {}
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"wall": wall, "cpu": cpu, "peak_rss": rss, **extra}), file=answers)


class Worker:
    """A running worker, from the parent's side."""

    def __init__(self, python: str | Path, *arguments: str):
        environment = os.environ | dict.fromkeys(ONE_THREAD, "1")
        command = [str(python), *arguments]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended early: {self._process.args}")
        return json.loads(line)

    def call(self, name: str) -> dict:
        self._process.stdin.write(name + "\n")
        return self._answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.wait()


def interleave(
    calls: dict[str, tuple[Worker, str]], repeats: int, warm_up: int = 2
) -> dict[str, list[dict]]:
    """Each call `repeats` times in turns, after `warm_up` turns that do not count."""
    samples: dict[str, list[dict]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, (worker, call) in calls.items():
            sample = worker.call(call)
            if turn >= warm_up:
                samples[name].append(sample)
    return samples


def median_and_spread(values: list[float]) -> dict[str, float]:
    """Median, and quartiles as the spread."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def summary(samples: dict[str, list[dict]]) -> dict[str, dict]:
    """Every measured number of every call: median and quartiles."""
    return {
        name: {key: median_and_spread([s[key] for s in runs]) for key in runs[0]}
        for name, runs in samples.items()
    }


def ratio(
    samples: dict[str, list[dict]], slower: str, faster: str, key: str = "cpu"
) -> dict[str, float]:
    """By how much `faster` wins, from each turn's own pair: median and quartiles."""
    pairs = zip(samples[slower], samples[faster], strict=True)
    return median_and_spread([a[key] / b[key] for a, b in pairs])
