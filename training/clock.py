"""Seconds of the stages of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageClock:
    """Seconds of each stage, under TRL's names."""

    def __init__(self):
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[f"time/ppo/{name}"] = now - self._last
        self._last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part of what the next `lap` covers."""
        start = time.perf_counter()
        yield
        self._laps[f"time/ppo/{name}"] = time.perf_counter() - start

    def times(self) -> dict[str, float]:
        return self._laps | {"time/ppo/total": time.perf_counter() - self._start}
