"""One update of the weights: gradients are made, added up, checked, clipped and applied.

What a gradient is divided by is the trainer's: tokens or rows (mlx_sft_trainer.py), or the number
of minibatches (training/rollout_trainer.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from models.frozen_blocks import patched_blocks
from training.optimizers import clip_gradients

# ------------------------------------------------------------------------------ gradients


def loss_and_gradient(model: nn.Module, loss: Callable, compiled: bool = False) -> Callable:
    """``f(*args) -> ((loss, rest), gradient)`` for ``loss(*args) -> (loss, rest)``.

    The gradient is that of the model's trainable arrays. Compiled, the weights and MLX's random
    state (dropout draws from it) are inputs, so that changes to them count.
    """
    step = nn.value_and_grad(model, loss)
    if not compiled:
        return step
    step = mx.compile(step, inputs=[model.state, mx.random.state], outputs=[mx.random.state])

    def run(*args):
        trained = model.trainable_parameters()
        result = step(*args)
        model.update(trained)  # the first call of a shape leaves placeholders in the model
        return result

    return run


@contextmanager
def checkpointed_blocks(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within this context, blocks of `model` that run are checkpointed."""
    if not enabled:
        yield
        return

    def checkpointed(call):
        def run(block, *args, **kwargs):
            def inner(parameters, *args, **kwargs):
                block.update(parameters)
                return call(block, *args, **kwargs)

            return mx.checkpoint(inner)(block.trainable_parameters(), *args, **kwargs)

        return run

    with patched_blocks(model, checkpointed):
        yield


# ------------------------------------------------------------------------------ the update


def added(total: Any, part: Any) -> Any:
    """`total` + `part`, trees of arrays of one form; a total of None is 0.

    Evaluated at once, or every gradient would stay in memory until the last one.
    """
    total = part if total is None else tree_map(mx.add, total, part)
    mx.eval(total)
    return total


def all_finite(gradient: Any) -> mx.array:
    """Whether no array of the tree holds NaN or infinity, a scalar."""
    return mx.stack([mx.isfinite(g).all() for _, g in tree_flatten(gradient)]).all()


def apply_update(
    model: nn.Module,
    optimizer: optim.Optimizer,
    total: Any,
    divisor: mx.array | float,
    max_grad_norm: float | None,
    *,
    loss: float = 0.0,
    before: Callable[[], None] = lambda: None,
) -> float:
    """Move the trained weights of `model` by the gradient `total` / `divisor`; returns its norm.

    The norm is that before clipping. Where it or the `loss` is not finite, nothing moves. `before`
    is called right before something does.
    """
    gradient = tree_map(lambda g: g / divisor, total)
    gradient, norm = clip_gradients(gradient, max_grad_norm)
    size = norm.item()
    if math.isfinite(size) and math.isfinite(loss):
        before()
        optimizer.update(model, gradient)
        mx.eval(model.trainable_parameters(), optimizer.state)
    return size


def minibatch_update(
    rows: Sequence[int],
    size: int,
    gradient: Callable[[Sequence[int]], tuple[Any, dict[str, float]]],
    apply: Callable[[Any], float],
) -> list[dict[str, float]]:
    """One update from the minibatches of `size` that `rows` fall into; the metrics of each.

    `gradient(rows)` gives a tree, None where the minibatch must not move the weights, and metrics.
    `apply(sum of the gradients)` returns their norm, which the last metrics get as "grad_norm".
    """
    total, metrics = None, []
    for start in range(0, len(rows), size):
        part, found = gradient(rows[start : start + size])
        metrics.append(found)
        if part is not None:
            total = added(total, part)
    if total is not None:
        norm = metrics[-1]["grad_norm"] = apply(total)
        if not math.isfinite(norm):  # of numbers that were finite themselves
            metrics[-1] |= {"not_finite": 1.0, "skipped": 1.0}
    return metrics
