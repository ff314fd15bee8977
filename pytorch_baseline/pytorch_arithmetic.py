"""rl/losses.py, kl.py, shaping.py and advantages.py in PyTorch: the arithmetic of PPO and rewards.

The functions of the same names there say what their options mean, and whose equations these are.
PPO tensors are (B, T), float32; `mask` (B, T) is 1 on the tokens that count. What stands at a
masked place, NaN included, changes nothing. Metric names are TRL's without their "ppo/" prefix.

Legend: B batch, T tokens, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Metrics = dict[str, Tensor]


def counted(x: Tensor, mask: Tensor) -> Tensor:
    """x with 0 at masked places; unlike x * mask, also where x is infinite or NaN there."""
    return torch.where(mask > 0, x, 0.0)


# ---- masked statistics -------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the places where mask is 1, a scalar; NaN if there are none."""
    return counted(x, mask).sum() / mask.float().sum()


def accurate_mean(x: Tensor, mask: Tensor) -> Tensor:
    """masked_mean with its rounding error taken off: the mean of equal numbers is that number."""
    mean = masked_mean(x, mask)
    return mean + masked_mean(x - mean, mask)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Variance over the places where mask is 1, divided by their number - 1; 0 if there is one."""
    squares = counted((x - accurate_mean(x, mask)).square(), mask).sum()
    return squares / (mask.float().sum() - 1).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1 and (with `shift_mean`) mean 0 over the mask; masked places become 0."""
    mean = accurate_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    return counted(whitened if shift_mean else whitened + mean, mask)


# ---- PPO ---------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate objective, negated: a scalar to minimise."""
    high = cliprange if cliprange_high is None else cliprange_high
    log_ratio = counted(logprobs - old_logprobs, mask)  # before exp: no overflow in the gradient
    advantages = counted(advantages, mask)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + high)
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        bounded = torch.minimum(losses, -dual_clip * advantages)
        losses = torch.where(advantages < 0, bounded, losses)
    loss = masked_mean(losses, mask)
    metrics = {
        "loss/policy": loss,
        "policy/approxkl": 0.5 * masked_mean(log_ratio.square(), mask),
        "policy/policykl": masked_mean(-log_ratio, mask),
        "policy/clipfrac": masked_mean((clipped > unclipped).float(), mask),
        "policy/ratio": masked_mean(ratio, mask),
        "policy/advantages_mean": masked_mean(advantages, mask),
    }
    return loss, detached(metrics)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange_value: float = 0.2,
) -> tuple[Tensor, Metrics]:
    """Half the mean squared error of the values; per token the worse of unclipped and clipped."""
    values, old_values, returns = (counted(x, mask) for x in (values, old_values, returns))
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    unclipped = (values - returns).square()
    clipped = (near - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask)
    metrics = {
        "loss/value": loss,
        "val/vpred": masked_mean(values, mask),
        "val/error": masked_mean(unclipped, mask),
        "val/clipfrac": masked_mean((clipped > unclipped).float(), mask),
        "val/mean": masked_mean(old_values, mask),
        "val/var": masked_var(old_values, mask),
        "returns/mean": masked_mean(returns, mask),
        "returns/var": masked_var(returns, mask),
    }
    return loss, detached(metrics)


# ---- reward models -----------------------------------------------------------------------------


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    centering: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Bradley-Terry: mean of -log sigmoid(chosen - rejected - margin); all (B,)."""
    difference = chosen - rejected

    def mean(x: Tensor) -> Tensor:
        return x.mean() if weights is None else (x * weights).sum() / weights.sum()

    loss = mean(-logsigmoid(difference if margin is None else difference - margin))
    if centering:
        loss = loss + centering * mean((chosen + rejected).square())
    metrics = {
        "loss": loss,
        "accuracy": mean((difference > 0).float()),
        "score_difference": mean(difference),
        "chosen": mean(chosen),
        "rejected": mean(rejected),
    }
    return loss, detached(metrics)


def regression_loss(scores: Tensor, targets: Tensor) -> tuple[Tensor, Metrics]:
    """Mean squared error of predicted scores against the rewards in the data; both (B,)."""
    error = scores - targets
    loss = error.square().mean()
    return loss, detached({"loss": loss, "mean_absolute_error": error.abs().mean()})


def detached(metrics: Metrics) -> Metrics:
    return {name: value.detach() for name, value in metrics.items()}


# ---- from scores to advantages -----------------------------------------------------------------

PER_TOKEN = {
    "kl": lambda d: d,
    "abs": torch.abs,
    "mse": lambda d: 0.5 * d.square(),
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * d.square(),
    "k3": lambda d: torch.expm1(-d) + d,
}


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mode: str = "kl") -> Tensor:
    """Penalty per token, (B, T), from the log-probabilities of the sampled tokens, (B, T)."""
    return PER_TOKEN[mode](logprobs - ref_logprobs)


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact KL(policy, reference): sum over V of p (log p - log p_ref); (..., V) -> (...)."""
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    possible = logp > -torch.inf
    return torch.where(possible, logp.exp() * (logp - ref_logp), 0.0).sum(-1)


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
    """(advantages, returns), both (B, T), unwhitened, 0 at masked places.

    This is the plain loop of the textbook; rl/advantages.py computes the same in log2(T) rounds.
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
    """Metrics of a batch before it is trained on (rl/shaping.py); scores (B,), the rest (B, T)."""
    kl_dist = counted(kls, mask).sum(dim=1)  # (B,)
    return {
        "objective/kl": kl_dist.mean(),
        "objective/kl_dist": kl_dist.cpu().numpy(),
        "objective/logprobs": masked_mean(logprobs, mask),
        "objective/ref_logprobs": masked_mean(ref_logprobs, mask),
        "objective/entropy": counted(-logprobs, mask).sum(dim=1).mean(),
        "ppo/mean_non_score_reward": masked_mean(non_score_rewards, mask),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": scores.std() if len(scores) > 1 else torch.zeros(()),
    }
