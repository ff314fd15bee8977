"""Advantages without a value function: a response is compared with others, not with a forecast.

Each estimator has one signature, ``estimator(rewards, penalties, mask, *, weights, group_size,
...)``, and returns (N, 1), one number for a response, or (N, T), one for a token:

- `rewards` (N, F): what each of F reward functions gave, NaN where it did not score the row;
- `penalties` (N, T): what the KL to the reference takes from the reward of each token, 0 for none;
- `mask` (N, T): 1 on the tokens that are trained on.

Rows of a group (answers to one prompt) adjoin. A row that no function scored gets 0 and counts in
no mean and no deviation. Float64 on the host: there is one number for a response.

Legend: N rows, T tokens, F reward functions, G rows of a group.
"""

import warnings
from collections.abc import Callable

import numpy as np

from rl.group_config import Aggregation, ScaleRewards

# Added to a standard deviation that divides (TRL's GRPOTrainer and RLOOTrainer).
STD_FLOOR = 1e-4
# The least variance of REINFORCE++'s token advantages (OpenRLHF).
VARIANCE_FLOOR = 1e-8


# ---- rewards -----------------------------------------------------------------------------------


def weighted_sum(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N, F) -> (N,): sum of weight x reward over the functions that scored; NaN where none did.

    A function of weight 0 is only logged, and scores no row.
    """
    scored = ~np.isnan(rewards) & (weights != 0)
    total = np.where(scored, rewards * weights, 0.0).sum(axis=1)
    return np.where(scored.any(axis=1), total, np.nan)


def group_means(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """(N,) the mean of each row's group over its scored rows; NaN where there are none.

    Of equal numbers it is exactly that number.
    """
    groups = rewards.reshape(-1, group_size)
    means = _quiet(np.nanmean, groups, axis=1)
    low, high = _quiet(np.nanmin, groups, axis=1), _quiet(np.nanmax, groups, axis=1)
    return np.repeat(np.where(low == high, low, means), group_size)


def group_stds(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """(N,) the standard deviation of each row's group, divided by (scored rows) - 1.

    Exactly 0 where scored rows are equal or there is one; NaN where there are none.
    """
    groups = rewards.reshape(-1, group_size)
    stds = _quiet(np.nanstd, groups, axis=1, ddof=1)
    low, high = _quiet(np.nanmin, groups, axis=1), _quiet(np.nanmax, groups, axis=1)
    return np.repeat(np.where(low == high, 0.0, np.where(np.isnan(low), np.nan, stds)), group_size)


def _quiet(function: Callable, *args, **options) -> np.ndarray:
    """A NaN-skipping function without the warning where everything is NaN (it returns NaN)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return function(*args, **options)


# ---- estimators --------------------------------------------------------------------------------


def grpo(
    rewards: np.ndarray,
    penalties: np.ndarray,
    mask: np.ndarray,
    *,
    weights: np.ndarray,
    group_size: int,
    scale_rewards: ScaleRewards = "group",
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
) -> np.ndarray:
    """(N, 1): the reward minus its group's mean, over a standard deviation (Shao et al. 2024, 4.1).

    `scale_rewards`: the group's own deviation, that of the whole batch, or none (Dr. GRPO, Liu et
    al. 2025). ``normalize_then_sum`` does this for each function apart, adds up, and normalises the
    sum over the batch (GDPO, Liu et al. 2026); the penalties then come off the sum.
    """
    penalty = penalties.sum(axis=1)
    if multi_objective_aggregation == "normalize_then_sum":
        parts = [
            _over(column - group_means(column, group_size), group_stds(column, group_size))
            for column in rewards.T
        ]
        summed = weighted_sum(np.stack(parts, axis=1), weights) - penalty
        return _or_0(_over(summed - _mean(summed), _std(summed)))
    total = weighted_sum(rewards, weights) - penalty
    advantages = total - group_means(total, group_size)
    if scale_rewards == "group":
        advantages = _over(advantages, group_stds(total, group_size))
    elif scale_rewards == "batch":
        advantages = _over(advantages, _std(total))
    return _or_0(advantages)


def rloo(
    rewards: np.ndarray,
    penalties: np.ndarray,
    mask: np.ndarray,
    *,
    weights: np.ndarray,
    group_size: int,
    reward_clip_range: tuple[float, float] | None = None,
    normalize_advantages: bool = False,
) -> np.ndarray:
    """(N, 1): the reward minus the mean of the others of its group (Ahmadian et al. 2024, eq. 8).

    Rewards are clipped before the penalties come off. `normalize_advantages`: to mean 0 and
    deviation 1 over the batch. A row that is alone in having a score has no others, and gets 0.
    """
    total = weighted_sum(rewards, weights)
    if reward_clip_range is not None:
        total = np.clip(total, *reward_clip_range)
    total = total - penalties.sum(axis=1)
    scored = np.repeat((~np.isnan(total)).reshape(-1, group_size).sum(axis=1), group_size)
    # r - mean of the others = n / (n - 1) x (r - mean of all n)
    factor = scored / np.maximum(scored - 1, 1)
    advantages = factor * (total - group_means(total, group_size))
    if normalize_advantages:
        advantages = _over(advantages - _mean(advantages), _std(advantages))
    return _or_0(advantages)


def reinforce(
    rewards: np.ndarray,
    penalties: np.ndarray,
    mask: np.ndarray,
    *,
    weights: np.ndarray,
    group_size: int,
) -> np.ndarray:
    """(N, T): REINFORCE++ (Hu 2025): what a token and those after it earn, whitened over the batch.

    A token's reward is minus its penalty, the score stands on the last one; the sum from a token on
    (gamma 1), minus the mean, over the root of the variance (divided by N, at least 1e-8) of all
    tokens of the batch.
    """
    return _whitened_returns(weighted_sum(rewards, weights), penalties, mask)


def reinforce_baseline(
    rewards: np.ndarray,
    penalties: np.ndarray,
    mask: np.ndarray,
    *,
    weights: np.ndarray,
    group_size: int,
) -> np.ndarray:
    """(N, T): `reinforce` with the group's mean taken off the score first."""
    total = weighted_sum(rewards, weights)
    return _whitened_returns(total - group_means(total, group_size), penalties, mask)


def _whitened_returns(scores: np.ndarray, penalties: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """scores (N,), penalties and mask (N, T) -> (N, T), 0 at places that do not count."""
    counted = (mask > 0) & ~np.isnan(scores)[:, None]
    rewards = np.where(counted, -penalties, 0.0)
    # Every token of a row earns its score, which comes at the end of the row.
    returns = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1] + np.nan_to_num(scores)[:, None]
    found = returns[counted]
    if not found.size or found.min() == found.max():
        return np.zeros_like(returns)
    mean = found.mean()
    std = np.sqrt(max(np.square(found - mean).mean(), VARIANCE_FLOOR))
    return np.where(counted, (returns - mean) / std, 0.0)


ESTIMATORS: dict[str, Callable[..., np.ndarray]] = {
    "grpo": grpo,
    "rloo": rloo,
    "reinforce": reinforce,
    "reinforce_baseline": reinforce_baseline,
}


# ---- numbers -----------------------------------------------------------------------------------


def _mean(x: np.ndarray) -> float:
    return _quiet(np.nanmean, x)


def _std(x: np.ndarray) -> float:
    """Divided by N - 1; 0 for equal numbers."""
    if np.isnan(x).all() or np.nanmin(x) == np.nanmax(x):
        return 0.0
    return _quiet(np.nanstd, x, ddof=1)


def _over(x: np.ndarray, std: np.ndarray | float) -> np.ndarray:
    return x / (std + STD_FLOOR)


def _or_0(advantages: np.ndarray) -> np.ndarray:
    """(N,) with NaN -> (N, 1) without."""
    return np.nan_to_num(advantages)[:, None]


# ---- metrics -----------------------------------------------------------------------------------


def reward_metrics(
    rewards: np.ndarray, names: list[str], *, weights: np.ndarray, group_size: int
) -> dict[str, float]:
    """What rewards look like, under TRL's names; NaN where nothing was scored.

    ``reward_std`` is the deviation of rows; ``frac_reward_zero_std`` the share of rows whose group
    has equal rewards, which teach nothing.
    """
    total = weighted_sum(rewards, weights)
    found = {}
    for name, column in zip(names, rewards.T, strict=True):
        found[f"rewards/{name}/mean"] = float(_mean(column))
        found[f"rewards/{name}/std"] = float(_sample_std(column))
    found["reward"] = float(_mean(total))
    found["reward_std"] = float(_sample_std(total))
    stds = np.nan_to_num(group_stds(total, group_size))
    found["frac_reward_zero_std"] = float(np.mean(stds == 0))
    return found


def _sample_std(x: np.ndarray) -> float:
    """As torch's: NaN for fewer than two numbers."""
    return _std(x) if (~np.isnan(x)).sum() > 1 else float("nan")
