"""The losses of group methods: pure functions of arrays -> (loss, metrics).

A loss has two parts, each one of a family with one signature:

- a *surrogate*, ``f(logprobs, log_ratio, advantages, mask, **options) -> (terms, metrics)``, gives
  what each token (N, T), or with the sequence's ratio each row (N, 1), adds to the loss;
- a *reduction*, ``f(terms, mask, *, tokens_per_pass, max_completion_length) -> scalar``, adds up.

`LOSSES` names the pairs as TRL does. Around them `group_loss` puts the KL to the reference, the
masks and the entropy term. Arrays are (N, T) float32, `advantages` (N, 1) or (N, T); `mask` is 1 on
the tokens that count. What stands at a masked place, NaN included, changes nothing. Nothing
branches on a value, so all of it compiles. Metric names are TRL's.

Legend: N rows, T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from rl.group_config import GroupConfig, Level, LossType
from rl.losses import Metrics, _counted, _detached

# VESPO holds the product of ratios within these.
LEAST_WEIGHT, LARGEST_LOG_WEIGHT = 1e-8, 20.0


# ---- ratios ------------------------------------------------------------------------------------


def row_lengths(mask: mx.array) -> mx.array:
    """(N, 1) tokens that count, at least 1."""
    return mx.maximum(mask.sum(axis=1, keepdims=True), 1.0)


def token_level(log_ratio: mx.array, mask: mx.array) -> mx.array:
    """(N, T) log of each token's ratio, as it is."""
    return log_ratio


def sequence_level(log_ratio: mx.array, mask: mx.array) -> mx.array:
    """(N, 1) log of the geometric mean of a row's ratios (GSPO, Zheng et al. 2025, eq. 7)."""
    return _counted(log_ratio, mask).sum(axis=1, keepdims=True) / row_lengths(mask)


LEVELS = {"token": token_level, "sequence": sequence_level}


# ---- surrogates --------------------------------------------------------------------------------


def clipped(
    logprobs: mx.array,
    log_ratio: mx.array,
    advantages: mx.array,
    mask: mx.array,
    *,
    level: Level = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> tuple[mx.array, Metrics]:
    """-min(ratio A, clip(ratio) A), the ratio in [1 - epsilon, 1 + epsilon_high] (PPO, eq. 7).

    `epsilon_high` None is `epsilon`; a higher one is DAPO's clip-higher. `delta` bounds the ratio
    of the first term from above too (two-sided clipping, INTELLECT-2). Clip metrics are of the
    ratio before `delta`: TRL's are of the one after it, so that `delta` hides high clips.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = mx.exp(LEVELS[level](log_ratio, mask))
    held = mx.clip(ratio, 1.0 - epsilon, 1.0 + high)
    first = ratio if delta is None else mx.minimum(ratio, delta)
    terms = -mx.minimum(first * advantages, held * advantages)
    low_clip = ((ratio < 1.0 - epsilon) & (advantages < 0)).astype(mx.float32)
    high_clip = ((ratio > 1.0 + high) & (advantages > 0)).astype(mx.float32)
    return terms, clip_metrics(low_clip, high_clip, mask)


def clip_metrics(low: mx.array, high: mx.array, mask: mx.array) -> Metrics:
    """Shares of tokens (of rows, for (N, 1)) that were clipped, and the extremes over rows.

    A row without tokens has no share of them.
    """
    (low_min, low_max), (high_min, high_max) = _extremes(low, mask), _extremes(high, mask)
    return {
        "clip_ratio/low_mean": mean_of(low, mask),
        "clip_ratio/low_min": low_min,
        "clip_ratio/low_max": low_max,
        "clip_ratio/high_mean": mean_of(high, mask),
        "clip_ratio/high_min": high_min,
        "clip_ratio/high_max": high_max,
        "clip_ratio/region_mean": mean_of(mx.maximum(low, high), mask),
    }


def cispo(
    logprobs: mx.array,
    log_ratio: mx.array,
    advantages: mx.array,
    mask: mx.array,
    *,
    level: Level = "token",
    epsilon_high: float = 5.0,
) -> tuple[mx.array, Metrics]:
    """-min(ratio, epsilon_high) A logprob, the weight held constant (MiniMax-M1 2025, eq. 4)."""
    ratio = mx.stop_gradient(mx.exp(LEVELS[level](log_ratio, mask)))
    cut = ((ratio > epsilon_high) & (advantages > 0)).astype(mx.float32)
    terms = -mx.minimum(ratio, epsilon_high) * advantages * logprobs
    return terms, {"cispo_clip_ratio": mean_of(cut, mask)}


def sapo(
    logprobs: mx.array,
    log_ratio: mx.array,
    advantages: mx.array,
    mask: mx.array,
    *,
    level: Level = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> tuple[mx.array, Metrics]:
    """-(4 / t) sigmoid(t (ratio - 1)) A: a soft gate in place of the clip (Gao et al. 2025, eq. 5).

    t is `sapo_temperature_pos` where A is above 0, else `sapo_temperature_neg`.
    """
    ratio = mx.exp(LEVELS[level](log_ratio, mask))
    t = mx.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    return -mx.sigmoid(t * (ratio - 1.0)) * (4.0 / t) * advantages, {}


def vespo(
    logprobs: mx.array,
    log_ratio: mx.array,
    advantages: mx.array,
    mask: mx.array,
    *,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[mx.array, Metrics]:
    """-phi A logprob, phi = exp(l + k log w - l w) held constant, w the product of a row's ratios.

    w stays in [1e-8, e^20]; k and l are those of A >= 0 or of A < 0 (VESPO, as in TRL's
    get_gamma_weights).
    """
    log_w = _counted(log_ratio, mask).sum(axis=1, keepdims=True)  # (N, 1)
    log_w = mx.clip(log_w, math.log(LEAST_WEIGHT), LARGEST_LOG_WEIGHT)
    positive = advantages >= 0
    k = mx.where(positive, vespo_k_pos, vespo_k_neg)
    rate = mx.where(positive, vespo_lambda_pos, vespo_lambda_neg)
    phi = mx.stop_gradient(mx.exp(rate + k * log_w - rate * mx.exp(log_w)))
    return -phi * advantages * logprobs, {"vespo/phi_seq_mean": mean_of(phi, mask)}


# ---- reductions --------------------------------------------------------------------------------


def over_batch_tokens(
    terms: mx.array, mask: mx.array, *, tokens_per_pass: mx.array, max_completion_length: int
) -> mx.array:
    """The sum over the mean number of tokens in a pass of this batch (DAPO, Yu et al. 2025, eq. 8).

    So every token of the batch weighs the same, however the batch is cut into passes.
    """
    return _total(terms, mask) / mx.maximum(tokens_per_pass, 1.0)


def over_pass_tokens(
    terms: mx.array, mask: mx.array, *, tokens_per_pass: mx.array, max_completion_length: int
) -> mx.array:
    """The sum over the tokens of this pass."""
    return _total(terms, mask) / mx.maximum(mask.sum(), 1.0)


def over_each_row(
    terms: mx.array, mask: mx.array, *, tokens_per_pass: mx.array, max_completion_length: int
) -> mx.array:
    """The mean over rows of each row's mean; a row without tokens counts as 0."""
    return (_counted(terms, mask).sum(axis=1, keepdims=True) / row_lengths(mask)).mean()


def over_longest_rows(
    terms: mx.array, mask: mx.array, *, tokens_per_pass: mx.array, max_completion_length: int
) -> mx.array:
    """The sum over rows x the longest response allowed: a constant (Dr. GRPO, Liu et al. 2025)."""
    return _total(terms, mask) / (mask.shape[0] * max_completion_length)


def over_rows(
    terms: mx.array, mask: mx.array, *, tokens_per_pass: mx.array, max_completion_length: int
) -> mx.array:
    """The mean over rows of each row's sum: long rows weigh more (LUSPO)."""
    return _total(terms, mask) / mask.shape[0]


def _total(terms: mx.array, mask: mx.array) -> mx.array:
    """The sum over tokens; what a row has once, (N, 1), counts for each of its tokens."""
    return _counted(terms, mask).sum()


LOSSES: dict[str, tuple[Callable, Callable]] = {
    "grpo": (clipped, over_each_row),
    "bnpo": (clipped, over_pass_tokens),
    "dr_grpo": (clipped, over_longest_rows),
    "dapo": (clipped, over_batch_tokens),
    "cispo": (cispo, over_batch_tokens),
    "sapo": (sapo, over_each_row),
    "luspo": (clipped, over_rows),
    "vespo": (vespo, over_batch_tokens),
}


def surrogate_options(config: GroupConfig) -> dict:
    """The options that the surrogate of a config's loss has; None leaves it its own default."""
    surrogate, _ = LOSSES[config.loss_type]
    found = {
        clipped: {
            "epsilon": config.epsilon,
            "epsilon_high": config.epsilon_high,
            "delta": config.delta,
        },
        cispo: {"epsilon_high": config.epsilon_high},
        sapo: {
            "sapo_temperature_pos": config.sapo_temperature_pos,
            "sapo_temperature_neg": config.sapo_temperature_neg,
        },
        vespo: {
            "vespo_k_pos": config.vespo_k_pos,
            "vespo_lambda_pos": config.vespo_lambda_pos,
            "vespo_k_neg": config.vespo_k_neg,
            "vespo_lambda_neg": config.vespo_lambda_neg,
        },
    }[surrogate]
    return {name: value for name, value in found.items() if value is not None}


# ---- the whole loss ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """What one forward pass has of its rows."""

    logprobs: mx.array  # (N, T) of the policy as it is
    old_logprobs: mx.array  # (N, T) of the policy that wrote them
    advantages: mx.array  # (N, 1) or (N, T)
    mask: mx.array  # (N, T)
    entropy: mx.array  # (N, T) nats
    ref_logprobs: mx.array | None = None  # (N, T)


def group_loss(
    rows: Pass,
    *,
    loss_type: LossType,
    tokens_per_pass: mx.array,
    max_completion_length: int,
    level: Level = "token",
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float | mx.array | None = None,
    off_policy_mask_threshold: float | None = None,
    options: dict | None = None,
) -> tuple[mx.array, Metrics]:
    """Loss of one pass (TRL 1.16's GRPOTrainer._compute_loss), and its metrics.

    `tokens_per_pass`: the tokens of the whole batch over its number of passes. `options` are those
    of the surrogate. `beta` weighs the KL to the reference (`ref_logprobs` is needed), estimated by
    k3 and, with `use_bias_correction_kl`, times the ratio, gradient included. The entropy term
    (`entropy_coef` not None) is minus the coefficient times the mean entropy of the tokens that the
    policy's loss keeps. The other two are `entropy_mask` and `off_policy_mask`; neither touches the
    KL.
    """
    surrogate, reduction = LOSSES[loss_type]
    sizes = {"tokens_per_pass": tokens_per_pass, "max_completion_length": max_completion_length}
    mask = rows.mask
    logprobs, entropy = _counted(rows.logprobs, mask), _counted(rows.entropy, mask)
    # Masked before the exponential: an overflow there would turn the zero gradient into NaN.
    log_ratio = _counted(rows.logprobs - rows.old_logprobs, mask)
    options = dict(options or {})
    if surrogate is not vespo:
        options["level"] = level
    terms, metrics = surrogate(logprobs, log_ratio, rows.advantages, mask, **options)
    kept = mask
    if off_policy_mask_threshold is not None:
        terms = terms * off_policy_mask(log_ratio, rows.advantages, mask, off_policy_mask_threshold)
    if top_entropy_quantile < 1.0:
        kept = mask * entropy_mask(entropy, mask, top_entropy_quantile)
        terms = terms * kept
    if beta:
        divergence = reference_kl(logprobs, _counted(rows.ref_logprobs, mask))
        if use_bias_correction_kl:
            divergence = divergence * mx.exp(LEVELS[level](log_ratio, mask))
        terms = terms + beta * divergence
        metrics["kl"] = mean_of(divergence, mask)
    loss = reduction(terms, mask, **sizes)
    metrics["entropy"] = mean_of(entropy, mask)
    if entropy_coef is not None:
        metrics["policy_loss"] = loss
        mean_entropy = mean_of(entropy, kept)
        if reduction is over_batch_tokens:  # a pass weighs as its tokens do, as in the loss
            mean_entropy = mean_entropy * over_batch_tokens(mx.ones_like(mask), mask, **sizes)
        # What the adaptive coefficient reads: a sum and a count over the passes of an update.
        metrics["entropy_sum"] = _total(entropy, kept)
        metrics["entropy_count"] = kept.sum()
        loss = loss - entropy_coef * mean_entropy
    metrics["loss"] = loss
    return loss, _detached(metrics)


def reference_kl(logprobs: mx.array, ref_logprobs: mx.array) -> mx.array:
    """(N, T) the k3 estimate, never negative (Schulman 2020): e^d - d - 1 with d = ref - policy."""
    d = ref_logprobs - logprobs
    return mx.exp(d) - d - 1.0


def off_policy_mask(
    log_ratio: mx.array, advantages: mx.array, mask: mx.array, threshold: float
) -> mx.array:
    """(N, 1) or (N, T): 0 where A < 0 and the row's mean of old - new is above the threshold."""
    drift = -mx.stop_gradient(sequence_level(log_ratio, mask))  # (N, 1)
    return ((advantages >= 0) | (drift <= threshold)).astype(mx.float32)


def entropy_mask(entropy: mx.array, mask: mx.array, share: float) -> mx.array:
    """(N, T): 1 on the `share` of a pass's tokens with the highest entropy (Wang et al. 2025).

    They are those at or above the 1 - share quantile, interpolated between neighbours.
    """
    flat = mx.stop_gradient(mx.where(mask > 0, entropy, mx.inf)).reshape(-1)
    ordered = mx.sort(flat)  # tokens that do not count come last
    place = (1.0 - share) * mx.maximum(mask.sum() - 1.0, 0.0)
    below = mx.floor(place).astype(mx.int32)
    low = ordered[below]
    high = ordered[mx.ceil(place).astype(mx.int32)]
    part = place - below
    threshold = mx.where(part > 0, low + (high - low) * part, low)
    return ((entropy >= threshold) & (mask > 0)).astype(mx.float32)


# ---- means -------------------------------------------------------------------------------------


def mean_of(x: mx.array, mask: mx.array) -> mx.array:
    """The mean over counted tokens, or of (N, 1) over rows; 0 where there is none."""
    if x.shape[1] == 1 and mask.shape[1] != 1:
        return x.mean()
    return _total(x, mask) / mx.maximum(mask.sum(), 1.0)  # no 0 / 0: the gradient would be NaN


def _extremes(x: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """Least and largest over rows of each row's mean; 0 where no row has a token."""
    if x.shape[1] == 1 and mask.shape[1] != 1:
        return x.min(), x.max()
    means = _counted(x, mask).sum(axis=1) / row_lengths(mask).squeeze(1)  # (N,)
    there = mask.sum(axis=1) > 0
    low = mx.where(there, means, mx.inf).min()
    high = mx.where(there, means, -mx.inf).max()
    return mx.where(there.any(), low, 0.0), mx.where(there.any(), high, 0.0)
