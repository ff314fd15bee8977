"""From one score for a response to one reward for a token, and what is done to scores first.

The order is: length penalties, scaling, clipping, then the per-token rewards. A score is a Python
float until it enters `per_token_rewards`; running moments are kept in double precision.

Legend: B batch, T tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import mlx.core as mx

from rl.losses import masked_mean

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


# ---- rewards -----------------------------------------------------------------------------------


def per_token_rewards(
    scores: mx.array, kls: mx.array, mask: mx.array, kl_coef: float | mx.array
) -> tuple[mx.array, mx.array]:
    """(rewards, non_score_rewards), both (B, T): -kl_coef KL, plus the score on the last token.

    scores (B,); kls (B, T) from rl.kl; the last token is the last one with mask 1. A row with no
    such token loses its score (PPOTrainer.step refuses it). At masked places both are 0.
    """
    counted = mask > 0
    tokens = mask.shape[1]
    places = mx.where(counted, mx.arange(tokens), -1)  # (B, T)
    last = places == places.max(axis=1, keepdims=True)  # (B, T)
    non_score_rewards = mx.where(counted, -kl_coef * kls, 0.0)
    rewards = mx.where(last & counted, non_score_rewards + scores[:, None], non_score_rewards)
    return rewards, non_score_rewards


def rollout_stats(
    scores: mx.array,
    logprobs: mx.array,
    ref_logprobs: mx.array | None,
    kls: mx.array | None,
    non_score_rewards: mx.array | None,
    mask: mx.array,
) -> dict[str, mx.array]:
    """Metrics of a batch before it is trained on, under TRL's names.

    scores (B,), the rest (B, T), None where an algorithm has none. "objective/kl" is the mean over
    responses of the summed KL (what the adaptive controller reads), "objective/kl_dist" (B,) those
    sums, "objective/entropy" the mean over responses of the summed -logprob. "objective/logprobs"
    and "objective/ref_logprobs" are means over tokens, where TRL logs the arrays. "ppo/std_scores"
    is 0 for a single score.
    """
    found = {}
    if kls is not None:
        found["objective/kl_dist"] = mx.where(mask > 0, kls, 0.0).sum(axis=1)  # (B,)
        found["objective/kl"] = found["objective/kl_dist"].mean()
    if ref_logprobs is not None:
        found["objective/ref_logprobs"] = masked_mean(ref_logprobs, mask)
    if non_score_rewards is not None:
        found["ppo/mean_non_score_reward"] = masked_mean(non_score_rewards, mask)
    surprise = mx.where(mask > 0, -logprobs, 0.0).sum(axis=1)  # (B,)
    deviations = scores - scores.mean()
    return found | {
        "objective/logprobs": masked_mean(logprobs, mask),
        "objective/entropy": surprise.mean(),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": mx.sqrt(mx.square(deviations).sum() / max(scores.size - 1, 1)),
    }
