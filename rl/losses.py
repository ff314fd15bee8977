"""The losses of PPO and of reward-model training: pure functions of arrays -> (loss, metrics).

PPO arrays are (B, T), float32; `mask` (B, T) is 1 on the tokens that count and 0 elsewhere. What
stands at a masked place, NaN included, changes no loss, no gradient and no metric. Metric names
are TRL's without their "ppo/" prefix. Nothing here branches on a value, so all of it compiles.

Legend: B batch, T tokens.
"""

import mlx.core as mx
import mlx.nn as nn

Metrics = dict[str, mx.array]


def _counted(x: mx.array, mask: mx.array) -> mx.array:
    """x with 0 at masked places; unlike x * mask, also where x is infinite or NaN there."""
    return mx.where(mask > 0, x, 0.0)


# ---- masked statistics -------------------------------------------------------------------------


def masked_mean(x: mx.array, mask: mx.array) -> mx.array:
    """Mean over the places where mask is 1, a scalar; NaN if there are none."""
    return _counted(x, mask).sum() / mask.astype(mx.float32).sum()


def _accurate_mean(x: mx.array, mask: mx.array) -> mx.array:
    """masked_mean with its rounding error taken off: the mean of equal numbers is that number."""
    mean = masked_mean(x, mask)
    return mean + masked_mean(x - mean, mask)


def masked_var(x: mx.array, mask: mx.array) -> mx.array:
    """Variance over the places where mask is 1, divided by their number - 1; 0 if there is one."""
    squares = _counted(mx.square(x - _accurate_mean(x, mask)), mask).sum()
    return squares / mx.maximum(mask.astype(mx.float32).sum() - 1, 1)


def masked_whiten(x: mx.array, mask: mx.array, shift_mean: bool = True) -> mx.array:
    """Scale to variance 1 and (with `shift_mean`) mean 0 over the mask; masked places become 0.

    (x - mean) / sqrt(var + 1e-8), + mean without `shift_mean`. TRL's
    masked_whiten leaves numbers at masked places, and its GAE reads them. Equal numbers whiten to
    exactly 0: the 1e-8 would blow the mean's rounding error up ten thousand times.
    """
    mean = _accurate_mean(x, mask)
    whitened = (x - mean) * mx.rsqrt(masked_var(x, mask) + 1e-8)
    return _counted(whitened if shift_mean else whitened + mean, mask)


# ---- PPO ---------------------------------------------------------------------------------------


def policy_loss(
    logprobs: mx.array,
    old_logprobs: mx.array,
    advantages: mx.array,
    mask: mx.array,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[mx.array, Metrics]:
    """Clipped surrogate objective (Schulman et al. 2017, eq. 7), negated: a scalar to minimise.

    The ratio p/p_old is clipped to [1 - cliprange, 1 + cliprange_high]; `cliprange_high` None means
    `cliprange` (a higher one is DAPO's clip-higher). `dual_clip` c > 1 bounds the loss of a token
    with negative advantage A at -c A (Ye et al. 2020, eq. 5), however far its ratio has grown.

    "policy/ratio" is the mean ratio, which the ratio guard reads; "policy/policykl" is
    mean(old - new), which early stopping reads; "policy/clipfrac" is the share of tokens where the
    clip (not the dual clip) was what counted.
    """
    high = cliprange if cliprange_high is None else cliprange_high
    # Masked before the exponential: an overflow there would turn the zero gradient into NaN.
    log_ratio = _counted(logprobs - old_logprobs, mask)
    advantages = _counted(advantages, mask)
    ratio = mx.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * mx.clip(ratio, 1.0 - cliprange, 1.0 + high)
    losses = mx.maximum(unclipped, clipped)
    if dual_clip is not None:
        bounded = mx.minimum(losses, -dual_clip * advantages)
        losses = mx.where(advantages < 0, bounded, losses)
    loss = masked_mean(losses, mask)
    metrics = {
        "loss/policy": loss,
        "policy/approxkl": 0.5 * masked_mean(mx.square(log_ratio), mask),
        "policy/policykl": masked_mean(-log_ratio, mask),
        "policy/clipfrac": masked_mean((clipped > unclipped).astype(mx.float32), mask),
        "policy/ratio": masked_mean(ratio, mask),
        "policy/advantages_mean": masked_mean(advantages, mask),
    }
    return loss, _detached(metrics)


def value_loss(
    values: mx.array,
    old_values: mx.array,
    returns: mx.array,
    mask: mx.array,
    *,
    cliprange_value: float = 0.2,
) -> tuple[mx.array, Metrics]:
    """Half the mean squared error of the value head, the worse of unclipped and clipped per token.

    Clipped: `values` held within `cliprange_value` of the rollout's `old_values`. The scalar does
    not include vf_coef. "val/mean" and "val/var" describe old_values, "val/vpred" `values`.
    """
    values, old_values, returns = (_counted(x, mask) for x in (values, old_values, returns))
    near = mx.clip(values, old_values - cliprange_value, old_values + cliprange_value)
    unclipped = mx.square(values - returns)
    clipped = mx.square(near - returns)
    loss = 0.5 * masked_mean(mx.maximum(unclipped, clipped), mask)
    metrics = {
        "loss/value": loss,
        "val/vpred": masked_mean(values, mask),
        "val/error": masked_mean(unclipped, mask),
        "val/clipfrac": masked_mean((clipped > unclipped).astype(mx.float32), mask),
        "val/mean": masked_mean(old_values, mask),
        "val/var": masked_var(old_values, mask),
        "returns/mean": masked_mean(returns, mask),
        "returns/var": masked_var(returns, mask),
    }
    return loss, _detached(metrics)


# ---- reward models -----------------------------------------------------------------------------


def pairwise_loss(
    chosen: mx.array,
    rejected: mx.array,
    margin: mx.array | None = None,
    *,
    centering: float = 0.0,
    weights: mx.array | None = None,
    probability: mx.array | None = None,
) -> tuple[mx.array, Metrics]:
    """Bradley-Terry: mean of -log sigmoid(chosen - rejected - margin); all (B,).

    `margin` (B,): by how much the chosen one should win (Llama 2, eq. 2). `centering` adds that
    multiple of mean((chosen + rejected)^2), which keeps scores around 0 (Eisenstein et al. 2023).
    `weights` (B,) weigh the pairs: with 1 / pairs of the same prompt, a ranked list of any length
    counts like one pair (InstructGPT, eq. 1).
    `probability` (B,) that the chosen one is the better: the cross-entropy with it in place of the
    certainty, -P log sigmoid(d) - (1 - P) log sigmoid(-d), least where d is the log-odds of P.
    """
    difference = chosen - rejected

    def mean(x: mx.array) -> mx.array:
        return x.mean() if weights is None else (x * weights).sum() / weights.sum()

    wanted = difference if margin is None else difference - margin
    loss = mean(cross_entropy(wanted, probability))
    if centering:
        loss = loss + centering * mean(mx.square(chosen + rejected))
    metrics = {
        "loss": loss,
        "accuracy": mean((difference > 0).astype(mx.float32)),
        "score_difference": mean(difference),
        "chosen": mean(chosen),
        "rejected": mean(rejected),
    }
    return loss, _detached(metrics)


def cross_entropy(logits: mx.array, probability: mx.array | None = None) -> mx.array:
    """-P log sigmoid(x) - (1 - P) log sigmoid(-x), with P = 1 where it is None; arrays of x."""
    if probability is None:
        return -nn.log_sigmoid(logits)
    return -probability * nn.log_sigmoid(logits) - (1 - probability) * nn.log_sigmoid(-logits)


def regression_loss(scores: mx.array, targets: mx.array) -> tuple[mx.array, Metrics]:
    """Mean squared error of predicted scores against the rewards in the data; both (B,)."""
    error = scores - targets
    loss = mx.square(error).mean()
    return loss, _detached({"loss": loss, "mean_absolute_error": mx.abs(error).mean()})


def _detached(metrics: Metrics) -> Metrics:
    return {name: mx.stop_gradient(value) for name, value in metrics.items()}
