"""Work that may take long, as the rooms below see it: what is watched, not by whom. Loads nothing.

`watched(items, name)` gives the items. Scripts have a bar put around them (command_line/exits.py);
for anyone else who calls, nothing is shown.
"""

from collections.abc import Callable, Iterable
from typing import Any


def _unwatched(items: Iterable[Any], name: str) -> Iterable[Any]:
    return items


_around: Callable[[Iterable, str], Iterable] = _unwatched


def watched(items: Iterable[Any], name: str) -> Iterable[Any]:
    """The items, one at a time, while `name` is being done."""
    return _around(items, name)


def watch_with(around: Callable[[Iterable, str], Iterable]) -> None:
    """From now on `around(items, name)` gives what `watched` does."""
    global _around
    _around = around
