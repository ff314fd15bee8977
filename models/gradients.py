"""Gradients of what is trained, compiled or not; activations kept, or made again backwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn


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
    """Within this context, blocks of `model` that run are checkpointed.

    Calls go through the class of a block, so the class is patched while the graph is being built
    and restored on the way out; another model of that class is never left with it.
    """
    if not enabled:
        yield
        return
    kinds = {type(block): type(block).__call__ for block in model.layers}

    def checkpointed(call):
        def run(block, *args, **kwargs):
            def inner(parameters, *args, **kwargs):
                block.update(parameters)
                return call(block, *args, **kwargs)

            return mx.checkpoint(inner)(block.trainable_parameters(), *args, **kwargs)

        return run

    for kind, call in kinds.items():
        kind.__call__ = checkpointed(call)
    try:
        yield
    finally:
        for kind, call in kinds.items():
            kind.__call__ = call
