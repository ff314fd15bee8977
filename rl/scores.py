"""Scores on their way to rewards, and the KL coefficient: numbers of PPO that are no arrays.

Scores go through length penalties, scaling, clipping, in this order. A score is a Python float, and
running moments are kept in double precision. No array library: the PyTorch twin shares it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rl.ppo_config import PPOConfig

# ---- scores ------------------------------------------------------------------------------------


def constant(scores: Sequence[float]) -> float | None:
    """The score that two or more responses all have, of those that have one; None: they differ."""
    known = [score for score in scores if math.isfinite(score)]
    return known[0] if len(known) > 1 and min(known) == max(known) else None


def length_penalties(
    lengths: Sequence[int],
    ended: Sequence[bool],
    *,
    missing_eos_penalty: float = 0.0,
    max_length: int | None = None,
    overlong_buffer: int = 0,
    overlong_penalty: float = 0.0,
) -> list[float]:
    """What is added to each score, <= 0, for how long its response is and how it ended; (B,).

    A response that did not end (`ended` False: no EOS) loses `missing_eos_penalty` (TRL 1.12).
    In the last `overlong_buffer` tokens before `max_length` the penalty rises evenly from 0 to
    `overlong_penalty` (DAPO, eq. 13; OpenRLHF's overlong_buffer_len). Raises ValueError for
    negative penalties, or a buffer that is longer than `max_length`.
    """
    if missing_eos_penalty < 0 or overlong_penalty < 0:
        raise ValueError("penalties are subtracted from the score and cannot be negative")
    shaped = overlong_buffer > 0 and overlong_penalty > 0
    if shaped and (max_length is None or overlong_buffer > max_length):
        raise ValueError(f"overlong_buffer {overlong_buffer} needs a max_length of at least that")
    penalties = []
    for length, has_ended in zip(lengths, ended, strict=True):
        penalty = 0.0 if has_ended else -missing_eos_penalty
        if shaped:
            excess = length - (max_length - overlong_buffer)
            penalty -= min(max(excess / overlong_buffer, 0.0), 1.0) * overlong_penalty
        penalties.append(penalty)
    return penalties


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far, merged batch by batch (Chan et al. 1979)."""

    mean: float = 0.0
    squares: float = 0.0  # sum of squared differences from the mean
    count: int = 0

    def update(self, scores: Sequence[float]) -> None:
        """Take in a batch of finite scores."""
        count = len(scores)
        if count == 0:
            return
        mean = math.fsum(scores) / count
        delta, total = mean - self.mean, self.count + count
        self.squares += math.fsum((score - mean) ** 2 for score in scores)
        self.squares += delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation, divided by count - 1; 1 while no two different scores were seen.

        So the first equal scores stay as they are; TRL divides them by 1.2e-7.
        """
        if self.count < 2:
            return 1.0
        std = math.sqrt(self.squares / (self.count - 1))
        # Below this the scores differ only by rounding.
        return std if std > 1e-9 * max(1.0, abs(self.mean)) else 1.0

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean, self.squares = float(state["mean"]), float(state["squares"])
        self.count = int(state["count"])


def scale_scores(
    scores: Sequence[float], moments: RunningMoments, *, subtract_mean: bool = False
) -> list[float]:
    """Take the scores into `moments`, then divide by its std, having subtracted its mean if asked.

    TRL's use_score_scaling and use_score_norm.
    """
    moments.update(scores)
    shift = moments.mean if subtract_mean else 0.0
    return [(score - shift) / moments.std for score in scores]


def clip_scores(scores: Sequence[float], limit: float) -> list[float]:
    """Scores held within [-limit, limit] (TRL's score_clip). Raises ValueError unless limit > 0."""
    if not limit > 0:
        raise ValueError(f"score_clip {limit}: a number above 0 is needed")
    return [min(max(score, -limit), limit) for score in scores]


# ---- KL coefficient -----------------------------------------------------------------------------


def make_kl_controller(config: "PPOConfig") -> "AdaptiveKLController | FixedKLController":
    """The controller that `config` asks for."""
    target = config.kl_target if config.use_dynamic_kl else config.target
    if config.adap_kl_ctrl or config.use_dynamic_kl:
        return AdaptiveKLController(config.init_kl_coef, target, config.horizon)
    return FixedKLController(config.init_kl_coef)


class AdaptiveKLController:
    """Moves the coefficient so that the KL comes to `target` (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float):
        """`target` in nats per response; `horizon` in episodes. Raises ValueError unless > 0."""
        if target <= 0 or horizon <= 0:
            raise ValueError(f"KL target {target} and horizon {horizon} must be above 0")
        self.value = float(init_kl_coef)
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, current: float, n_steps: int) -> None:
        """After a step: `current` is the mean KL of a response, `n_steps` the batch size.

        Raises ValueError where one step could bring the coefficient to 0 or below.
        """
        if 0.2 * n_steps >= self.horizon:
            raise ValueError(f"KL horizon {self.horizon} must be above a fifth of {n_steps}")
        error = min(max(float(current) / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n_steps / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What changes while training; target and horizon are options of the run."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = float(state["value"])


class FixedKLController:
    """A coefficient that stays as it is."""

    def __init__(self, init_kl_coef: float):
        self.value = float(init_kl_coef)

    def update(self, current: float, n_steps: int) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = float(state["value"])
