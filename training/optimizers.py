"""Optimizers with the arithmetic of their PyTorch namesakes; learning rates: schedules.py."""

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from errors import UserError
from training.schedules import DECAY, both_betas, is_inner_matrix, learning_rate_schedule

# ------------------------------------------------------------------------------ optimizers


class Adam(optim.Adam):
    """torch.optim.Adam: bias-corrected, weight decay added to the gradient; or AdamW, decoupled.

    MLX computes 1 - beta2**step in float32, which leaves 4 digits at the first step (6e-6 in the
    weight's movement); expm1 keeps all of them.
    """

    def __init__(
        self,
        learning_rate: Callable[[mx.array], mx.array],
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        super().__init__(learning_rate, betas=list(betas), eps=eps, bias_correction=True)
        self.weight_decay, self.decoupled = weight_decay, decoupled

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        rate = self.learning_rate.astype(mx.float32)
        step = self.step.astype(mx.float32)
        b1, b2 = self.betas
        if self.weight_decay and self.decoupled:
            parameter = parameter * (1.0 - rate * self.weight_decay).astype(parameter.dtype)
        elif self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        m = state["m"] = b1 * state["m"] + (1.0 - b1) * gradient
        v = state["v"] = b2 * state["v"] + (1.0 - b2) * mx.square(gradient)
        size = (rate / remaining(b1, step)).astype(gradient.dtype)
        root = mx.sqrt(v) * mx.rsqrt(remaining(b2, step)).astype(gradient.dtype)
        return parameter - size * m / (root + self.eps)


def remaining(beta: float, step: mx.array) -> mx.array:
    """1 - beta**step without cancellation."""
    return -mx.expm1(step * math.log(beta)) if beta else mx.ones_like(step)


class Muon(optim.Muon):
    """Muon whose update has the size of AdamW's, so that one learning rate serves both.

    The orthogonal update is scaled by 0.2 * sqrt(max(rows, columns)) and weight decay is decoupled
    (arXiv 2502.16982, section 2.2; torch.optim.Muon with ``match_rms_adamw``).
    """

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        v = state["v"] = self.momentum * state["v"] + (1.0 - self.momentum) * gradient
        update = gradient * (1.0 - self.momentum) + v * self.momentum
        flat = update.reshape(update.shape[0], -1)
        flat = self._zeropower_via_newtonschulz5(flat, steps=self.ns_steps)
        rate = self.learning_rate.astype(gradient.dtype)
        scale = 0.2 * max(flat.shape) ** 0.5
        parameter = parameter * (1.0 - rate * self.weight_decay)
        return parameter - rate * scale * flat.reshape(update.shape)


def build_optimizer(
    name: str,
    learning_rate: float,
    *,
    schedule: str = "constant",
    steps: int = 1,
    warmup: int = 0,
    cycles: int = 1,
    power: float = 2.0,
    end_factor: float = 0.0,
    weight_decay: float | None = None,
    betas: tuple[float, float | None] = (0.9, None),
    eps: float = 1e-8,
    momentum: float | None = None,
) -> optim.Optimizer:
    """An optimizer by name; ``steps`` is the number of updates that the schedule spans.

    None takes the usual value: weight decay 0.01 for adamw and muon, else 0; the second beta 0.999,
    lion 0.99; momentum 0.95 for muon, 0 for sgd. With muon, everything but inner matrices goes to
    AdamW.
    """
    rate = learning_rate_schedule(
        schedule,
        learning_rate,
        steps=steps,
        warmup=warmup,
        cycles=cycles,
        power=power,
        end_factor=end_factor,
        xp=mx,
    )
    decay = DECAY.get(name, 0.0) if weight_decay is None else weight_decay
    both = both_betas(name, betas)
    if name in ("adam", "adamw"):
        return Adam(rate, both, eps, decay, decoupled=name == "adamw")
    if name == "lion":
        return optim.Lion(rate, betas=list(both), weight_decay=decay)
    if name == "sgd":
        return optim.SGD(rate, momentum=momentum or 0.0, weight_decay=decay)
    if name == "adafactor":
        return optim.Adafactor(rate, weight_decay=decay, relative_step=False, scale_parameter=False)
    if name == "muon":
        inner = Muon(rate, momentum=0.95 if momentum is None else momentum, weight_decay=decay)
        outer = Adam(rate, both, eps, decay, decoupled=True)
        return optim.MultiOptimizer([inner, outer], [is_inner_matrix])
    raise UserError(f"--optimizer: {name!r} is no optimizer this program has")


# ------------------------------------------------------------------------------ state


def optimizer_arrays(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's state as flat arrays, for a checkpoint."""
    return dict(tree_flatten(optimizer.state))


def restore_optimizer(
    optimizer: optim.Optimizer, arrays: dict[str, mx.array], parameters: dict
) -> None:
    """Put back what ``optimizer_arrays`` gave; ``parameters``: those that are being trained.

    The learning rate is computed anew from the step, so that a forced change of it has an effect.
    Raises ``UserError`` when the state belongs to another optimizer or other parameters.
    """
    optimizer.init(parameters)
    fresh = optimizer_arrays(optimizer)
    missing = sorted(set(fresh) ^ set(arrays))
    shapes = [name for name in set(fresh) & set(arrays) if fresh[name].shape != arrays[name].shape]
    if missing or shapes:
        name = (missing or sorted(shapes))[0]
        raise UserError(
            f"optimizer state: {len(missing) + len(shapes)} entries do not fit what is trained "
            f"now, the first of them {name}; resume with the options of the run"
        )
    optimizer.state = tree_unflatten(list(arrays.items()))
    optimizer.init(parameters)
    for part in getattr(optimizer, "optimizers", [optimizer]):
        for name, schedule in part._schedulers.items():
            part.state[name] = schedule(mx.maximum(part.step, 1) - 1)
