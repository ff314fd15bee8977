"""rl/losses.py in PyTorch: the losses of PPO and of reward models, arrays -> (loss, metrics).

PPO tensors are (B, T), float32; `mask` (B, T) is 1 on the tokens that count. What stands at a
masked place, NaN included, changes nothing. Metric names are TRL's without their "ppo/" prefix.

Legend: B batch, T tokens.
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
    """Clipped surrogate objective (Schulman et al. 2017, eq. 7), negated: a scalar to minimise.

    `cliprange_high` None means `cliprange`; `dual_clip` c > 1 bounds the loss of a token with
    negative advantage A at -c A (Ye et al. 2020, eq. 5).
    """
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
    """Half the mean squared error of the value head, the worse of unclipped and clipped per token.

    Clipped: `values` held within `cliprange_value` of the rollout's `old_values`. The scalar does
    not include vf_coef.
    """
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
    """Bradley-Terry: mean of -log sigmoid(chosen - rejected - margin); all (B,).

    `centering` adds that multiple of mean((chosen + rejected)^2). `weights` (B,) weigh the pairs.
    """
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
