"""training/optimizers.py in PyTorch."""

from collections.abc import Callable, Iterable

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


class Together:
    """Several optimizers with one interface, for parameters that need different ones."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def build_optimizer(
    parameters: dict[str, nn.Parameter],
    name: str,
    learning_rate: float,
    *,
    weight_decay: float | None = None,
    betas: tuple[float, float | None] = (0.9, None),
    eps: float = 1e-8,
    momentum: float | None = None,
) -> torch.optim.Optimizer | Together:
    """An optimizer by name, with the defaults of training/optimizers.py."""
    decay = DECAY.get(name, 0.0) if weight_decay is None else weight_decay
    both, given, rate = both_betas(name, betas), list(parameters.values()), learning_rate
    if name == "adam":
        return torch.optim.Adam(given, rate, both, eps, decay)
    if name == "adamw":
        return torch.optim.AdamW(given, rate, both, eps, decay)
    if name == "lion":
        return Lion(given, rate, both, decay)
    if name == "sgd":
        return torch.optim.SGD(given, rate, momentum or 0.0, weight_decay=decay)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            given, rate, weight_decay=decay, relative_step=False, scale_parameter=False
        )
    if name == "muon":
        inner = {n for n, p in parameters.items() if is_inner_matrix(n, p)}
        muon = torch.optim.Muon(
            [p for n, p in parameters.items() if n in inner],
            rate,
            weight_decay=decay,
            momentum=0.95 if momentum is None else momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        rest = [p for n, p in parameters.items() if n not in inner]
        return Together([muon, torch.optim.AdamW(rest, rate, both, eps, decay)] if rest else [muon])
    raise UserError(f"--optimizer: {name!r} is no optimizer this program has")


class Scheduler:
    """Sets the learning rate of every update: its peak times `factor(updates done)`."""

    def __init__(self, optimizer, factor: Callable[[int], float]):
        self.optimizer, self.factor, self.done = optimizer, factor, 0
        self.waiting = False
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self._set()

    def _set(self) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * float(self.factor(self.done))

    def step(self) -> None:
        """After an update: the rate of the next one."""
        if not self.waiting:
            self.done += 1
            self._set()
        self.waiting = False

    def wait(self) -> None:
        """The update that is coming is skipped: the next `step` changes nothing."""
        self.waiting = True

    def get_last_lr(self) -> list[float]:
        """The rates of the update that was last made, or is next; as torch's schedulers have it."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict:
        return {"done": self.done}

    def load_state_dict(self, state: dict) -> None:
        self.done = state["done"]
        self._set()


def optimizer_and_schedule(parameters: dict[str, nn.Parameter], options: dict, steps: int):
    """Both from `command_line.shared_flags.optimizer_options`; `steps` counts updates."""
    schedule = {each: options.pop(each) for each in ("cycles", "power", "end_factor")}
    name, warmup = options.pop("schedule"), options.pop("warmup")
    optimizer = build_optimizer(parameters, **options)
    factor = learning_rate_schedule(name, 1.0, steps=steps, warmup=warmup, **schedule)
    return optimizer, Scheduler(optimizer, factor)


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(torch.isfinite(t).all().item() for t in tensors)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
