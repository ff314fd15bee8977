"""Learning rates by step, and what options of optimizers stand for: for either backend."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from errors import UserError

Array = Any  # of MLX or NumPy

DECAY = {"adamw": 0.01, "muon": 0.01}  # where none is asked for; 0 elsewhere


def is_inner_matrix(path: str, weight: Array) -> bool:
    """Whether Muon suits a weight: a matrix between layers, no embedding, head or prompt."""
    outer = any(word in path for word in ("embed", "head", "score", "prompt"))
    return weight.ndim >= 2 and min(weight.shape) > 1 and not outer


def both_betas(name: str, betas: tuple[float, float | None]) -> tuple[float, float]:
    """The second beta of an optimizer where None was asked for."""
    first, second = betas
    return first, (0.99 if name == "lion" else 0.999) if second is None else second


# Of progress from 0 to 1, the number of cycles, the power, and the array library.
SHAPES: dict[str, Callable[[Array, int, float, Any], Array]] = {
    "constant": lambda progress, *_, xp: xp.ones_like(progress),
    "linear": lambda progress, *_, xp: 1.0 - progress,
    "polynomial": lambda progress, _, power, xp: (1.0 - progress) ** power,
    "cosine": lambda progress, *_, xp: 0.5 * (1.0 + xp.cos(math.pi * progress)),
    "cosine_with_restarts": lambda progress, cycles, _, xp: restarts(progress, cycles, xp),
}


def restarts(progress: Array, cycles: int, xp: Any) -> Array:
    """Cosine from 1 to 0, ``cycles`` times over; 0 at the very end."""
    within = (progress * cycles) % 1.0
    return xp.where(progress >= 1.0, 0.0, 0.5 * (1.0 + xp.cos(math.pi * within)))


def learning_rate_schedule(
    name: str,
    peak: float,
    *,
    steps: int,
    warmup: int = 0,
    cycles: int = 1,
    power: float = 2.0,
    end_factor: float = 0.0,
    xp: Any = np,
) -> Callable[[Array | int], Array]:
    """A function from the number of updates done so far to the rate of the next one.

    ``warmup`` updates climb in equal parts to ``peak``, the first of them to peak / warmup, so no
    update is wasted on a rate of 0. What remains of ``steps`` falls to ``peak * end_factor``, as
    transformers' schedules of the same names do (optimization.py), and stays there afterwards.
    ``xp`` computes it: NumPy, or ``mlx.core``.
    """
    if name not in SHAPES:
        raise UserError(f"--lr-schedule: {name!r} is none of {', '.join(SHAPES)}")
    if warmup and warmup >= steps and name != "constant":
        raise UserError(f"--warmup-steps: {warmup} updates of warm-up leave none of {steps}")
    shape = SHAPES[name]
    span = max(steps - warmup, 1)

    def rate(step: Array | int) -> Array:
        done = xp.array(step) * 1.0  # float32 in MLX, double in NumPy
        progress = xp.clip((done - warmup) / span, 0.0, 1.0)
        factor = end_factor + (1.0 - end_factor) * shape(progress, cycles, power, xp=xp)
        if name == "constant":
            factor = xp.ones_like(done)
        if warmup:
            factor = xp.where(done < warmup, (done + 1.0) / warmup, factor)
        return peak * factor

    return rate
