"""The losses of preference training that compare with a reference: DPO's family and KTO.

Those without one are in rl/reference_free_losses.py. A loss of a family is a function of one
signature; its name is the choice, its keyword parameters are the flags:

- DPO (`DPO_LOSSES`): ``f(pairs, *, beta, ...) -> losses (P,)``; `dpo_loss` mixes and weighs them.
- KTO (`KTO_LOSSES`): ``f(log_ratios, label, baseline, *, beta, ...) -> losses (N,)``.

Formulas, names and defaults are TRL 1.16's. What stands at a masked place, NaN included, changes
nothing. Metrics are (sum, weight) pairs, each of them divided by its own weight, so that those of
several passes add up. Nothing branches on a value, so all of it compiles.

Legend: N rows (responses after their prompts), P pairs of them, R longest response.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rl.losses import _counted, cross_entropy

Sums = dict[str, tuple[mx.array, mx.array]]
MAX_EXPONENT = 80.0  # of the alpha divergence; e^80 is still a float32


@dataclass(frozen=True)
class Pairs:
    """What pairs of responses are compared by; every array (P,) unless noted, float32."""

    chosen: mx.array  # log p of the response: the sum over its tokens
    rejected: mx.array
    chosen_tokens: mx.array  # tokens of the response
    rejected_tokens: mx.array
    weights: mx.array  # 1; of ranked lists 1 / pairs of the list, so that lists count alike
    ref_chosen: mx.array | None = None  # the same under the reference
    ref_rejected: mx.array | None = None
    nll: mx.array | None = None  # -log p of the chosen side, which is divided by its tokens
    nll_tokens: mx.array | None = None
    probability: mx.array | None = None  # that the chosen one is the better; None: certainly
    tokens_per_pair: mx.array | None = None  # scalar: of all passes of an update; None: of this one

    @property
    def chosen_ratio(self) -> mx.array:
        """log p - log p_ref of the chosen responses."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> mx.array:
        """log p - log p_ref of the rejected responses."""
        return self.rejected - self.ref_rejected

    def mean(self, x: mx.array) -> mx.array:
        """Mean over the pairs, by their weights."""
        return (x * self.weights).sum() / self.weights.sum()

    def mean_nll(self) -> mx.array:
        """Nats per token of the chosen sides. Passes with the same `tokens_per_pair` add up."""
        per_pair = self.tokens_per_pair
        return self.mean(self.nll) / (self.mean(self.nll_tokens) if per_pair is None else per_pair)


def pair_sums(
    logprobs: mx.array,
    mask: mx.array,
    better: mx.array,
    worse: mx.array,
    ld_alpha: float | None = None,
) -> tuple[mx.array, mx.array]:
    """Log-probabilities of both responses of each pair: (N, R), (N, R), (P,), (P,) -> (P,), (P,).

    `better` and `worse` are row numbers. With `ld_alpha`, tokens beyond the shorter side's length
    count that much (LD-DPO, Liu et al. 2024, eq. 10).
    """
    logprobs = _counted(logprobs, mask)
    if ld_alpha is None:
        sums = logprobs.sum(axis=1)
        return sums[better], sums[worse]
    place, length = mx.cumsum(mask, axis=1), mask.sum(axis=1)
    shared = mx.minimum(length[better], length[worse])[:, None]

    def weighed(rows: mx.array) -> mx.array:
        return (mx.where(place[rows] <= shared, 1.0, ld_alpha) * logprobs[rows]).sum(axis=1)

    return weighed(better), weighed(worse)


# ---- DPO ---------------------------------------------------------------------------------------

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def scores(
    pairs: Pairs, f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5
) -> tuple[mx.array, mx.array]:
    """f(log ratio) of both sides, f the derivative of a divergence (f-DPO, Wang et al. 2023)."""
    alpha = f_alpha_divergence_coef

    def f(x: mx.array) -> mx.array:
        if f_divergence_type == "forward_kl":
            return 1 - mx.exp(-x)
        if f_divergence_type == "js_divergence":
            return math.log(2) + nn.log_sigmoid(x)
        if f_divergence_type == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
            return (mx.exp(mx.minimum((alpha - 1) * x, MAX_EXPONENT)) - 1) / (alpha - 1)
        return x  # reverse_kl, and its limit alpha -> 1

    return f(pairs.chosen_ratio), f(pairs.rejected_ratio)


def _difference(pairs: Pairs, divergence: Mapping[str, Any]) -> mx.array:
    chosen, rejected = scores(pairs, **divergence)
    return chosen - rejected


def _mean_difference(pairs: Pairs, divergence: Mapping[str, Any]) -> mx.array:
    """The difference of scores, each divided by the tokens of its side."""
    chosen, rejected = scores(pairs, **divergence)
    return chosen / mx.maximum(pairs.chosen_tokens, 1) - rejected / mx.maximum(
        pairs.rejected_tokens, 1
    )


def smoothed(x: mx.array, label_smoothing: float) -> mx.array:
    """-log sigmoid(x), and with probability `label_smoothing` that of the swapped pair."""
    if not label_smoothing:
        return -nn.log_sigmoid(x)
    return -(1 - label_smoothing) * nn.log_sigmoid(x) - label_smoothing * nn.log_sigmoid(-x)


def sigmoid(
    pairs: Pairs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    soft_labels: bool = False,
    **divergence: Any,
) -> mx.array:
    """DPO (Rafailov et al. 2023, eq. 7); smoothed, as TRL 0.11 has it, cDPO (Mitchell 2023).

    With `soft_labels` each pair counts by `pairs.probability`, which is cDPO with a rate of its own
    for every pair.
    """
    x = beta * _difference(pairs, divergence)
    return cross_entropy(x, pairs.probability) if soft_labels else smoothed(x, label_smoothing)


def hinge(pairs: Pairs, *, beta: float = 0.1, **divergence: Any) -> mx.array:
    """SLiC (Zhao et al. 2023) on DPO's rewards (RSO, Liu et al. 2023)."""
    return mx.maximum(1 - beta * _difference(pairs, divergence), 0)


def ipo(pairs: Pairs, *, beta: float = 0.1, **divergence: Any) -> mx.array:
    """IPO (Azar et al. 2023, eq. 17), each side divided by its tokens; `beta` is its tau."""
    return mx.square(_mean_difference(pairs, divergence) - 1 / (2 * beta))


def sigmoid_norm(pairs: Pairs, *, beta: float = 0.1, **divergence: Any) -> mx.array:
    """DPO with each side divided by its tokens (Tulu 3, Lambert et al. 2024, eq. 6)."""
    return -nn.log_sigmoid(beta * _mean_difference(pairs, divergence))


def exo_pair(
    pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3, **divergence: Any
) -> mx.array:
    """EXO (Ji et al. 2024, eq. 16): reverse KL to a target of 1 - epsilon and epsilon > 0."""
    x = beta * _difference(pairs, divergence)
    won = mx.sigmoid(x) * (nn.log_sigmoid(x) - math.log1p(-label_smoothing))
    return won + mx.sigmoid(-x) * (nn.log_sigmoid(-x) - math.log(label_smoothing))


def robust(
    pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0, **divergence: Any
) -> mx.array:
    """Robust DPO (Chowdhury et al. 2024, eq. 9): unbiased where that share of pairs is swapped."""
    x, e = beta * _difference(pairs, divergence), label_smoothing
    return (-(1 - e) * nn.log_sigmoid(x) + e * nn.log_sigmoid(-x)) / (1 - 2 * e)


def nca_pair(pairs: Pairs, *, beta: float = 0.1) -> mx.array:
    """NCA (Chen et al. 2024, eq. 10 of its pairwise form)."""
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    both = nn.log_sigmoid(-chosen) + nn.log_sigmoid(-rejected)
    return -nn.log_sigmoid(chosen) - 0.5 * both


def bco_pair(pairs: Pairs, *, beta: float = 0.1) -> mx.array:
    """BCO (Jung et al. 2024) on pairs, without its running mean of rewards."""
    return -nn.log_sigmoid(beta * pairs.chosen_ratio) - nn.log_sigmoid(-beta * pairs.rejected_ratio)


def sppo_hard(pairs: Pairs, *, beta: float = 0.1) -> mx.array:
    """SPPO (Wu et al. 2024, eq. 4.7) with probabilities of 1 and 0."""
    target = 0.5 / beta
    return mx.square(pairs.chosen_ratio - target) + mx.square(pairs.rejected_ratio + target)


def _sorted(x: mx.array) -> mx.array:
    return x[mx.argsort(mx.stop_gradient(x))]


def aot(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> mx.array:
    """AOT (Melnyk et al. 2024): margins of policy and reference compared rank by rank in a pass."""
    margins = _sorted(pairs.chosen - pairs.rejected)
    reference = _sorted(pairs.ref_chosen - pairs.ref_rejected)
    return smoothed(beta * (margins - reference), label_smoothing)


def aot_unpaired(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> mx.array:
    """AOT without pairs: chosen and rejected log ratios compared rank by rank in a pass."""
    difference = _sorted(pairs.chosen_ratio) - _sorted(pairs.rejected_ratio)
    return smoothed(beta * difference, label_smoothing)


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> mx.array:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7): chosen up, rejected down."""
    return 1 - mx.sigmoid(beta * pairs.chosen_ratio) + mx.sigmoid(beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> mx.array:
    """APO-down (eq. 8): both down, rejected more; for chosen texts worse than the model's own."""
    chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
    return mx.sigmoid(beta * chosen) + 1 - mx.sigmoid(beta * (chosen - rejected))


def discopop(
    pairs: Pairs, *, beta: float = 0.1, discopop_tau: float = 0.05, **divergence: Any
) -> mx.array:
    """DiscoPOP (Lu et al. 2024, eq. 5): logistic and exponential loss, blended by the log ratio.

    e^-x k, k = sigmoid(x / tau), is written e^(-x + log k): TRL's overflows at x < -88.
    """
    x = beta * _difference(pairs, divergence)
    scaled = x / discopop_tau
    exponential = mx.exp(nn.log_sigmoid(scaled) - x)
    return -nn.log_sigmoid(x) * mx.sigmoid(-scaled) + exponential


def sft(pairs: Pairs) -> mx.array:
    """Nats per token of the chosen responses, the same for every pair."""
    return mx.broadcast_to(pairs.mean_nll(), pairs.weights.shape)


DPO_LOSSES = {
    f.__name__: f
    for f in (
        sigmoid,
        hinge,
        ipo,
        sigmoid_norm,
        exo_pair,
        robust,
        nca_pair,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
        sft,
    )
}


def dpo_loss(
    pairs: Pairs,
    *,
    loss_type: Sequence[str] = ("sigmoid",),
    loss_weights: Sequence[float] | None = None,
    weighting: mx.array | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    beta: float = 0.1,
) -> tuple[mx.array, Sums]:
    """One loss of `DPO_LOSSES`, or several added up by `loss_weights` (all 1 where None): a scalar.

    `options[name]`: keyword arguments of each. `weighting` (P,) multiplies the losses of pairs
    (WPO, Zhou et al. 2024, eq. 2; `sequence_weights`). Rewards are beta times the log ratios.
    """
    loss = mx.zeros(())
    for name, weight in zip(loss_type, loss_weights or [1.0] * len(loss_type), strict=True):
        losses = DPO_LOSSES[name](pairs, **(options or {}).get(name, {}))
        loss = loss + weight * pairs.mean(losses if weighting is None else losses * weighting)
    rewards = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    metrics = pair_metrics(pairs.weights, rewards, (pairs.chosen, pairs.rejected))
    return loss, metrics | nll_metrics(pairs, "sft" in loss_type and len(loss_type) > 1)


def sequence_weights(logprobs: mx.array, log_sum_sq: mx.array, mask: mx.array) -> mx.array:
    """exp of the mean of log p - log sum_v p_v^2 over a row's tokens: (N, R) -> (N,), detached."""
    aligned = _counted(logprobs - log_sum_sq, mask).sum(axis=1)
    return mx.stop_gradient(mx.exp(aligned / mx.maximum(mask.sum(axis=1), 1)))


# ---- KTO ---------------------------------------------------------------------------------------


def kto(
    log_ratios: mx.array,
    label: mx.array,
    baseline: mx.array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> mx.array:
    """KTO (Ethayarajh et al. 2024, eq. 8): 1 - sigmoid(+-beta (log ratio - baseline)), weighed.

    `label` (N,) is 1 for desirable rows; `baseline` is the scalar of `kto_baseline`.
    """
    x = beta * (log_ratios - baseline)
    wanted = desirable_weight * mx.sigmoid(-x)
    return mx.where(label > 0, wanted, undesirable_weight * mx.sigmoid(x))


def apo_zero_unpaired(
    log_ratios: mx.array, label: mx.array, baseline: mx.array | None = None, **options: float
) -> mx.array:
    """APO-zero without pairs: KTO whose baseline is 0."""
    return kto(log_ratios, label, mx.zeros(()), **options)


KTO_LOSSES = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}


def kto_baseline(log_ratios: mx.array) -> mx.array:
    """max(0, mean) of the log ratios of prompts with other prompts' responses, detached."""
    return mx.stop_gradient(mx.maximum(log_ratios.mean(), 0))


def kto_loss(
    logps: mx.array,
    ref_logps: mx.array,
    label: mx.array,
    baseline: mx.array,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    **options: float,
) -> tuple[mx.array, Sums]:
    """Mean over rows of a loss of `KTO_LOSSES`; `logps` (N,) are sums over response tokens."""
    ratios, label = logps - ref_logps, label.astype(mx.float32)
    losses = KTO_LOSSES[loss_type](ratios, label, baseline, beta=beta, **options)
    rows = float(label.size)
    metrics = {
        "rewards/chosen": weighed_sum(beta * ratios, label),
        "rewards/rejected": weighed_sum(beta * ratios, 1 - label),
        "logps/chosen": weighed_sum(logps, label),
        "logps/rejected": weighed_sum(logps, 1 - label),
        "kl": (baseline * rows, mx.array(rows)),
    }
    return losses.mean(), detached(metrics)


# ---- metrics -----------------------------------------------------------------------------------


def pair_metrics(
    weights: mx.array,
    rewards: tuple[mx.array, mx.array],
    logps: tuple[mx.array, mx.array],
) -> Sums:
    """TRL's metrics of pairs; accuracies are of each pair, not of two means."""
    chosen, rejected = rewards
    columns = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(mx.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    return detached({name: weighed_sum(column, weights) for name, column in columns.items()})


def nll_metrics(pairs: Pairs, used: bool = True) -> Sums:
    """Nats per token of the chosen sides, where a loss has a part for them."""
    if not used:
        return {}
    sums = (pairs.nll * pairs.weights).sum(), (pairs.nll_tokens * pairs.weights).sum()
    return detached({"nll_loss": sums})


def weighed_sum(x: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    return (x * weights).sum(), weights.sum()


def detached(metrics: Sums) -> Sums:
    return {k: tuple(mx.stop_gradient(part) for part in v) for k, v in metrics.items()}
