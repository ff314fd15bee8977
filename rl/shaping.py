"""From one score for a response to one reward for a token, and the metrics of both.

What is done to scores first: rl/scores.py.

Legend: B batch, T tokens.
"""

import mlx.core as mx

from rl.losses import masked_mean


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
