"""The arrays of a checkpoint in named groups: what is trained, and heads beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.adapter_description import CONFIG_KEY

Arrays = dict[str, Any]  # of MLX or PyTorch, by name


@dataclass
class Group:
    """Arrays of a checkpoint: `get()` gives them by name, `put(arrays)` takes them back.

    `described()` is what their file says of itself, so that it also serves as an adapter or a head.
    """

    get: Callable[[], Arrays]
    put: Callable[[Arrays], None]
    described: Callable[[], dict[str, Any]] = dict


def adapter_group(tuning: Any, described: dict) -> Group:
    """The arrays of `tuning` (models/tuning.py); `described` is models.adapter_files.describe's."""
    return Group(
        tuning.arrays,
        lambda arrays: tuning.load_arrays(arrays, "checkpoint"),
        lambda: {CONFIG_KEY: described},
    )
