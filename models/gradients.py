"""Loss and gradient of what is trained in a model, compiled or not."""

from collections.abc import Callable

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
