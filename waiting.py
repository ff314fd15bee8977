"""Work that may take long: what is watched, not by whom. Loads nothing.

Scripts show a bar meanwhile (command_line/exits.py); to anyone else who calls, nothing is shown.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Self, TypeVar

Item = TypeVar("Item")


class Unseen:
    """A wait (name, how many things there are) that nobody is told of."""

    def __init__(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, count: int = 1) -> None:
        """So many more are done."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


_wait: Callable[[str, int | None], AbstractContextManager] = Unseen


def watched(items: Iterable[Item], name: str, total: int | None = None) -> Iterator[Item]:
    """The items while `name` is being done; `total`: how many, where they do not say it."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with _wait(name, total) as wait:
        for item in items:
            yield item
            wait.advance()


def busy(name: str) -> AbstractContextManager[Any]:
    """Around work of which nobody knows how much there is; its time is shown."""
    return _wait(name, None)


def watch_with(wait: Callable[[str, int | None], AbstractContextManager]) -> None:
    """From now on waits are of the kind `wait`."""
    global _wait
    _wait = wait
