"""The losses of preference training without a reference: CPO's family with SimPO, and ORPO.

Each is ``f(chosen, rejected, *, beta, ...) -> (losses, chosen rewards, rejected rewards)``, all
(P,); its name is the choice, its keyword parameters are the flags. Formulas, names and defaults are
TRL 1.16's; arrays, masks and metrics are those of rl/preference_losses.py.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from rl.preference_losses import (
    Pairs,
    Sums,
    detached,
    nll_metrics,
    pair_metrics,
    smoothed,
    weighed_sum,
)

# ---- CPO, SimPO, AlphaPO -----------------------------------------------------------------------


def cpo_sigmoid(
    chosen: mx.array, rejected: mx.array, *, beta: float = 0.1, label_smoothing: float = 0.0
):
    """CPO (Xu et al. 2024, eq. 3) on log-probabilities."""
    losses = smoothed(beta * (chosen - rejected), label_smoothing)
    return losses, beta * chosen, beta * rejected


def cpo_hinge(chosen: mx.array, rejected: mx.array, *, beta: float = 0.1):
    """SLiC (Zhao et al. 2023) on log-probabilities."""
    return mx.maximum(1 - beta * (chosen - rejected), 0), beta * chosen, beta * rejected


def cpo_ipo(chosen: mx.array, rejected: mx.array, *, beta: float = 0.1):
    """IPO (Azar et al. 2023, eq. 17) on log-probabilities per token."""
    return mx.square(chosen - rejected - 1 / (2 * beta)), beta * chosen, beta * rejected


def simpo(
    chosen: mx.array,
    rejected: mx.array,
    *,
    beta: float = 2.0,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
):
    """SimPO (Meng et al. 2024, eq. 6): -log sigmoid(beta (a_c - a_r) - gamma), a per token."""
    losses = smoothed(beta * (chosen - rejected) - simpo_gamma, label_smoothing)
    return losses, beta * chosen, beta * rejected


def alphapo(chosen: mx.array, rejected: mx.array, *, alpha: float = 0.25, **options: float):
    """AlphaPO (Gupta et al. 2025, eq. 6): SimPO on (1 - p^-alpha) / alpha in place of log p.

    `alpha` 0 is its limit, SimPO. p is the geometric mean of a response's probabilities.
    """
    if alpha:
        chosen, rejected = ((1 - mx.exp(-alpha * a)) / alpha for a in (chosen, rejected))
    return simpo(chosen, rejected, **options)


CPO_LOSSES = {
    "sigmoid": cpo_sigmoid,
    "hinge": cpo_hinge,
    "ipo": cpo_ipo,
    "simpo": simpo,
    "alphapo": alphapo,
}
PER_TOKEN = ("ipo", "simpo", "alphapo")  # these compare means over tokens, not sums


def cpo_loss(
    pairs: Pairs, *, loss_type: str = "sigmoid", cpo_alpha: float = 1.0, **options: float
) -> tuple[mx.array, Sums]:
    """A loss of `CPO_LOSSES` + `cpo_alpha` times the nats per token of the chosen responses."""
    logps = _per_token(pairs) if loss_type in PER_TOKEN else (pairs.chosen, pairs.rejected)
    losses, *rewards = CPO_LOSSES[loss_type](*logps, **options)
    loss = pairs.mean(losses)
    if cpo_alpha:
        loss = loss + cpo_alpha * pairs.mean_nll()
    metrics = pair_metrics(pairs.weights, tuple(rewards), logps)
    return loss, metrics | nll_metrics(pairs, bool(cpo_alpha))


# ---- ORPO --------------------------------------------------------------------------------------


def log1mexp(a: mx.array) -> mx.array:
    """log(1 - e^a) for a <= 0, accurate on both ends; at 0 that of the nearest a below it."""
    a = mx.minimum(a, -1e-7)
    near, far = mx.maximum(a, -1.0), mx.minimum(a, -0.5)  # no infinity in the branch not taken
    return mx.where(a > -math.log(2), mx.log(-mx.expm1(near)), mx.log1p(-mx.exp(far)))


def odds_ratio(chosen: mx.array, rejected: mx.array, *, beta: float = 0.1):
    """ORPO (Hong et al. 2024, eq. 7): -beta log sigmoid of the log odds ratio, a per token."""
    losses = -beta * nn.log_sigmoid(_log_odds(chosen, rejected))
    return losses, beta * chosen, beta * rejected


def _log_odds(chosen: mx.array, rejected: mx.array) -> mx.array:
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def orpo_loss(pairs: Pairs, *, beta: float = 0.1) -> tuple[mx.array, Sums]:
    """`odds_ratio` + nats per token of the chosen side, whose `nll` has the prompt in it."""
    logps = _per_token(pairs)
    losses, *rewards = odds_ratio(*logps, beta=beta)
    odds = _log_odds(*logps)
    metrics = pair_metrics(pairs.weights, tuple(rewards), logps) | detached(
        {
            "log_odds_ratio": weighed_sum(nn.log_sigmoid(odds), pairs.weights),
            "log_odds_chosen": weighed_sum(odds, pairs.weights),
        }
    )
    return pairs.mean(losses) + pairs.mean_nll(), metrics | nll_metrics(pairs)


def _per_token(pairs: Pairs) -> tuple[mx.array, mx.array]:
    return pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
