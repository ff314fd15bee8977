"""Losses of group methods that treat a response as one action: RLOO's, and online DPO's.

Arrays, masks and metrics are those of rl/group_losses.py.
"""

import mlx.core as mx

from rl.group_config import DPOLoss
from rl.group_losses import Pass, clip_metrics, mean_of
from rl.losses import Metrics, _counted, _detached
from rl.preference_losses import DPO_LOSSES, Pairs, pair_sums


def rloo_loss(
    rows: Pass,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[mx.array, Metrics]:
    """The clipped loss with one ratio for a whole response, the mean over rows (TRL's RLOOTrainer).

    The ratio is that of the products of probabilities, not of their geometric means. A row whose
    tokens are all masked counts, as a ratio of 1.
    """
    mask = rows.mask
    high = epsilon if epsilon_high is None else epsilon_high
    log_ratio = _counted(rows.logprobs - rows.old_logprobs, mask).sum(axis=1, keepdims=True)
    ratio, advantages = mx.exp(log_ratio), rows.advantages  # (N, 1)
    held = mx.clip(ratio, 1.0 - epsilon, 1.0 + high)
    loss = -mx.minimum(ratio * advantages, held * advantages).mean()
    low_clip = ((ratio < 1.0 - epsilon) & (advantages < 0)).astype(mx.float32)
    high_clip = ((ratio > 1.0 + high) & (advantages > 0)).astype(mx.float32)
    metrics = clip_metrics(low_clip, high_clip, mask)
    metrics |= {"entropy": mean_of(_counted(rows.entropy, mask), mask), "loss": loss}
    return loss, _detached(metrics)


def online_dpo_loss(
    rows: Pass, *, loss: DPOLoss = "sigmoid", beta: float = 0.1
) -> tuple[mx.array, Metrics]:
    """DPO on pairs of adjoining rows (Guo et al. 2024); the mean over pairs that are decided.

    `advantages` (N, 1) are 1 for the better row of a pair and -1 for the other; 0 and 0 is a tie,
    which weighs nothing.
    """
    first = mx.arange(0, rows.logprobs.shape[0], 2)
    won = rows.advantages[first, 0] >= 0
    better, worse = mx.where(won, first, first + 1), mx.where(won, first + 1, first)
    lengths = rows.mask.sum(axis=1)
    decided = mx.abs(rows.advantages[first, 0])  # (P,)
    count = mx.maximum(decided.sum(), 1.0)
    chosen, rejected = pair_sums(rows.logprobs, rows.mask, better, worse)
    reference = pair_sums(rows.ref_logprobs, rows.mask, better, worse)
    pairs = Pairs(chosen, rejected, lengths[better], lengths[worse], decided, *reference)

    def mean(x: mx.array) -> mx.array:
        return (x * decided).sum() / count

    value = mean(DPO_LOSSES[loss](pairs, beta=beta))
    chosen_reward, rejected_reward = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    metrics = {
        "loss": value,
        "entropy": mean_of(_counted(rows.entropy, rows.mask), rows.mask),
        "rewards/chosen": mean(chosen_reward),
        "rewards/rejected": mean(rejected_reward),
        "rewards/margins": mean(chosen_reward - rejected_reward),
        "rewards/accuracies": mean((chosen_reward > rejected_reward).astype(mx.float32)),
        "ties": 1 - decided.mean(),
    }
    return value, _detached(metrics)
