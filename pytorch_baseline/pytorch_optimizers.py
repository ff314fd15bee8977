"""training/optimizers.py in PyTorch."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from errors import UserError
from training.schedules import DECAY, both_betas, is_inner_matrix, learning_rate_schedule


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, algorithm 2), which torch has not."""

    def __init__(self, params, lr: float, betas=(0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in [p for p in group["params"] if p.grad is not None]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                direction = (b1 * m + (1 - b1) * p.grad).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * direction)
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


class Optimizer:
    """Optimizers of torch with one interface, each for parameters of its own.

    The learning rate of every update is its peak times `factor(updates done)`.
    """

    def __init__(
        self,
        *parts: torch.optim.Optimizer,
        factor: Callable[[int], float] = lambda done: 1.0,
    ):
        self.parts, self.factor = parts, factor
        self.peak = parts[0].param_groups[0]["lr"]
        self.count(0)

    def count(self, done: int) -> None:
        """So many updates are done: set the rate of the next one."""
        self.done, self.learning_rate = done, self.peak * float(self.factor(done))
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.learning_rate

    def step(self) -> None:
        for part in self.parts:
            part.step()
        self.count(self.done + 1)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> dict:
        states = [part.state_dict() for part in self.parts]
        return {
            "optimizer": states if len(states) > 1 else states[0],
            "schedule": {"done": self.done},
        }

    def load_state_dict(self, state: dict) -> None:
        states = state["optimizer"] if len(self.parts) > 1 else [state["optimizer"]]
        for part, its in zip(self.parts, states, strict=True):
            part.load_state_dict(its)
        self.count(state["schedule"]["done"])


def build_optimizer(
    parameters: dict[str, nn.Parameter],
    name: str,
    learning_rate: float,
    *,
    schedule: str = "constant",
    weight_decay: float | None = None,
    betas: tuple[float, float | None] = (0.9, None),
    eps: float = 1e-8,
    momentum: float | None = None,
    steps: int = 1,
    **shape,
) -> Optimizer:
    """An optimizer by name, with the options and defaults of training/optimizers.py."""
    decay = DECAY.get(name, 0.0) if weight_decay is None else weight_decay
    both, given, rate = both_betas(name, betas), list(parameters.values()), learning_rate
    if name == "adam":
        parts = [torch.optim.Adam(given, rate, both, eps, decay)]
    elif name == "adamw":
        parts = [torch.optim.AdamW(given, rate, both, eps, decay)]
    elif name == "lion":
        parts = [Lion(given, rate, both, decay)]
    elif name == "sgd":
        parts = [torch.optim.SGD(given, rate, momentum or 0.0, weight_decay=decay)]
    elif name == "adafactor":
        from transformers.optimization import Adafactor

        own = {"relative_step": False, "scale_parameter": False}
        parts = [Adafactor(given, rate, weight_decay=decay, **own)]
    elif name == "muon":
        inner = {n for n, p in parameters.items() if is_inner_matrix(n, p)}
        muon = torch.optim.Muon(
            [p for n, p in parameters.items() if n in inner],
            rate,
            weight_decay=decay,
            momentum=0.95 if momentum is None else momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        rest = [p for n, p in parameters.items() if n not in inner]
        parts = [muon, torch.optim.AdamW(rest, rate, both, eps, decay)] if rest else [muon]
    else:
        raise UserError(f"--optimizer: {name!r} is no optimizer this program has")
    factor = learning_rate_schedule(schedule, 1.0, steps=steps, **shape)
    return Optimizer(*parts, factor=factor)


def apply_update(trainer: Any, loss: float = 0.0) -> float:
    """Move `trainer.parameters` by the gradients that were added up in them; returns their norm.

    The norm is that before clipping. Where it or the `loss` is not finite, nothing moves, schedule
    and `trainer.learning_rate` included. `trainer.before_update` is called right before it does.
    """
    weights, most = trainer.parameters.values(), trainer.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(weights, most).item()
    if math.isfinite(norm) and math.isfinite(loss):
        trainer.before_update()
        trainer.learning_rate = trainer.optimizer.learning_rate
        trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return norm


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(torch.isfinite(t).all().item() for t in tensors)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
