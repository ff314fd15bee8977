"""One update of the weights: gradients are made, added up, checked, clipped and applied.

What a gradient is divided by is the trainer's: tokens or rows (mlx_sft_trainer.py), or the number
of minibatches (training/rollout_trainer.py).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from models.trunk import patched_blocks

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


def clip_gradients(gradients: Any, max_norm: float | None) -> tuple[Any, mx.array]:
    """Gradients scaled down to a global norm of ``max_norm`` (None: as they are), and the norm.

    The norm is of the gradients that came in, float32. As torch.nn.utils.clip_grad_norm_.
    """
    leaves = [leaf for _, leaf in tree_flatten(gradients)]
    if max_norm is None:
        total = sum(mx.square(leaf.astype(mx.float32)).sum() for leaf in leaves)
        return gradients, mx.sqrt(total)
    return optim.clip_grad_norm(gradients, max_norm)


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
