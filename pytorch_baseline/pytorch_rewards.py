"""rl/kl.py, rl/shaping.py and rl/advantages.py in PyTorch: from scores to advantages.

Legend: B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from pytorch_losses import counted, masked_mean
from torch import Tensor

# ---- scores ------------------------------------------------------------------------------------


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

    No EOS costs `missing_eos_penalty`. In the last `overlong_buffer` tokens before `max_length`
    the penalty rises evenly to `overlong_penalty` (DAPO, eq. 13).
    """
    penalties = []
    for length, has_ended in zip(lengths, ended, strict=True):
        penalty = 0.0 if has_ended else -missing_eos_penalty
        if overlong_buffer and overlong_penalty:
            if max_length is None or overlong_buffer > max_length:
                raise ValueError(f"overlong_buffer {overlong_buffer} is above {max_length} tokens")
            excess = length - (max_length - overlong_buffer)
            penalty -= min(max(excess / overlong_buffer, 0.0), 1.0) * overlong_penalty
        penalties.append(penalty)
    return penalties


class RunningMoments:
    """Mean and variance of all scores so far, merged batch by batch (Chan et al. 1979)."""

    def __init__(self):
        self.mean, self.squares, self.count = 0.0, 0.0, 0

    def update(self, scores: Sequence[float]) -> None:
        batch = torch.tensor(scores, dtype=torch.float64)
        delta, total = batch.mean().item() - self.mean, self.count + len(batch)
        self.squares += (batch - batch.mean()).square().sum().item()
        self.squares += delta**2 * self.count * len(batch) / total
        self.mean += delta * len(batch) / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation, divided by count - 1; 1 while no two different scores were seen."""
        if self.count < 2:
            return 1.0
        std = math.sqrt(self.squares / (self.count - 1))
        return std if std > 1e-9 * max(1.0, abs(self.mean)) else 1.0

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)


def scale_scores(
    scores: Sequence[float], moments: RunningMoments, *, subtract_mean: bool = False
) -> list[float]:
    """Take the scores into `moments`, then (less its mean, if asked) divide them by its std."""
    moments.update(scores)
    shift = moments.mean if subtract_mean else 0.0
    return [(score - shift) / moments.std for score in scores]


def clip_scores(scores: Sequence[float], limit: float) -> list[float]:
    """Scores held within [-limit, limit]."""
    if not limit > 0:
        raise ValueError(f"score_clip {limit}: a number above 0 is needed")
    return [min(max(score, -limit), limit) for score in scores]


# ---- KL ----------------------------------------------------------------------------------------


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mode: str = "kl") -> Tensor:
    """Penalty per token, (B, T), from the log-probabilities of the sampled tokens, (B, T).

    k1, k2 and k3 are the estimators of http://joschu.net/blog/kl-approx.html.
    """
    d = logprobs - ref_logprobs
    if mode in ("kl", "k1"):
        return d
    if mode == "abs":
        return d.abs()
    if mode in ("mse", "k2"):
        return 0.5 * d.square()
    if mode == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"KL mode {mode!r}: one of kl, abs, mse, k1, k2, k3 is needed here")


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact KL(policy, reference): sum over V of p (log p - log p_ref); (..., V) -> (...)."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    possible = logp > -torch.inf
    return torch.where(possible, logp.exp() * (logp - ref_logp), 0.0).sum(-1)


class AdaptiveKLController:
    """Moves the coefficient so that the KL comes to `target` (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, init_kl_coef: float, target: float, horizon: float):
        if target <= 0 or horizon <= 0:
            raise ValueError(f"KL target {target} and horizon {horizon} must be above 0")
        self.value, self.target, self.horizon = float(init_kl_coef), target, horizon

    def update(self, current: float, n_steps: int) -> None:
        """After a step: `current` is the mean KL of a response, `n_steps` the batch size."""
        if 0.2 * n_steps >= self.horizon:
            raise ValueError(f"KL horizon {self.horizon} must be above a fifth of {n_steps}")
        error = min(max(current / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n_steps / self.horizon


class FixedKLController:
    """A coefficient that stays as it is."""

    def __init__(self, init_kl_coef: float):
        self.value = float(init_kl_coef)

    def update(self, current: float, n_steps: int) -> None:
        """Nothing to do."""


# ---- rewards and advantages --------------------------------------------------------------------


def per_token_rewards(
    scores: Tensor, kls: Tensor, mask: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """(rewards, non_score_rewards), both (B, T): -kl_coef KL, plus the score on the last token."""
    non_score_rewards = counted(-kl_coef * kls, mask)
    places = torch.where(mask > 0, torch.arange(mask.shape[1], device=mask.device), -1)  # (B, T)
    last = places.max(dim=1).values  # (B,)
    rows = torch.arange(len(scores), device=mask.device)[last >= 0]
    rewards = non_score_rewards.clone()
    rewards[rows, last[rows]] += scores[rows]
    return rewards, non_score_rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T), unwhitened, 0 at masked places (Schulman et al. 2016).

    delta_t = r_t + gamma V' - V_t,  A_t = delta_t + gamma lam A',  return_t = A_t + V_t, where ' is
    the next token of the row that counts. This is the plain loop of the textbook; rl/advantages.py
    computes the same in log2(T) rounds.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t] > 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(here, advantage, 0.0)
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
    return advantages.detach(), counted(advantages + values, mask).detach()


def rollout_stats(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kls: Tensor,
    non_score_rewards: Tensor,
    mask: Tensor,
) -> dict[str, Tensor]:
    """Metrics of a batch before it is trained on, under TRL's names; scores (B,), the rest (B, T).

    "objective/kl" is the mean over responses of the summed KL, "objective/kl_dist" (B,) those sums.
    """
    kl_dist = counted(kls, mask).sum(dim=1)  # (B,)
    return {
        "objective/kl": kl_dist.mean(),
        "objective/kl_dist": kl_dist,
        "objective/logprobs": masked_mean(logprobs, mask),
        "objective/ref_logprobs": masked_mean(ref_logprobs, mask),
        "objective/entropy": counted(-logprobs, mask).sum(dim=1).mean(),
        "ppo/mean_non_score_reward": masked_mean(non_score_rewards, mask),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": scores.std() if len(scores) > 1 else torch.zeros(()),
    }
