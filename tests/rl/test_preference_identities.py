"""What must hold of the preference losses whatever the numbers; defects of other programs."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from rl.preference_losses import (
    DPO_LOSSES,
    KTO_LOSSES,
    Pairs,
    aot,
    discopop,
    dpo_loss,
    ipo,
    kto_baseline,
    kto_loss,
    pair_sums,
    scores,
    sigmoid,
)
from rl.reference_free_losses import CPO_LOSSES, cpo_loss, log1mexp, odds_ratio, orpo_loss, simpo

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def some_pairs(count: int = 5, seed: int = 0) -> Pairs:
    random = np.random.default_rng(seed)

    def column(low: float, high: float) -> mx.array:
        return mx.array(random.uniform(low, high, count).astype(np.float32))

    chosen, rejected = column(-30, -5), column(-30, -5)
    return Pairs(
        chosen,
        rejected,
        mx.array(random.integers(3, 9, count)).astype(mx.float32),
        mx.array(random.integers(3, 9, count)).astype(mx.float32),
        mx.ones(count),
        chosen + column(-3, 3),
        rejected + column(-3, 3),
        -chosen,
        mx.array(random.integers(3, 9, count)).astype(mx.float32),
    )


def fresh(pairs: Pairs) -> Pairs:
    """The policy is the reference."""
    return replace(pairs, ref_chosen=pairs.chosen, ref_rejected=pairs.rejected)


def swapped(pairs: Pairs) -> Pairs:
    return replace(
        pairs,
        chosen=pairs.rejected,
        rejected=pairs.chosen,
        ref_chosen=pairs.ref_rejected,
        ref_rejected=pairs.ref_chosen,
        chosen_tokens=pairs.rejected_tokens,
        rejected_tokens=pairs.chosen_tokens,
    )


def mean_of(metrics: dict, name: str) -> float:
    total, weight = metrics[name]
    return (total / weight).item()


def test_a_policy_equal_to_its_reference_has_a_loss_of_log_2_and_no_margin():
    loss, metrics = dpo_loss(fresh(some_pairs()))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert mean_of(metrics, "rewards/margins") == 0


def test_swapped_sides_negate_the_margin():
    pairs = some_pairs()
    one, other = dpo_loss(pairs)[1], dpo_loss(swapped(pairs))[1]
    assert mean_of(one, "rewards/margins") == -mean_of(other, "rewards/margins") != 0
    # Without smoothing, the loss of half of the pairs swapped is that of smoothing by a half.
    half = (sigmoid(pairs) + sigmoid(swapped(pairs))) / 2
    assert mx.allclose(half, sigmoid(pairs, label_smoothing=0.5))


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_a_loss_equals_a_mixture_of_one_and_half_of_two(name):
    pairs = some_pairs()
    alone = dpo_loss(pairs, loss_type=[name])[0]
    assert dpo_loss(pairs, loss_type=[name], loss_weights=[1.0])[0].item() == alone.item()
    twice = dpo_loss(pairs, loss_type=[name, name], loss_weights=[0.25, 0.75])[0]
    assert twice.item() == pytest.approx(alone.item(), rel=1e-6)
    assert mx.allclose(alone, pairs.mean(DPO_LOSSES[name](pairs)))


def test_ipo_of_equal_answers_is_a_quarter_of_the_inverse_square_of_beta():
    for beta in (0.1, 0.7):
        assert np.allclose(ipo(fresh(some_pairs()), beta=beta), 1 / (4 * beta**2))


def token_columns(seed: int = 1):
    random = np.random.default_rng(seed)
    logprobs = mx.array(random.uniform(-5, -0.1, (4, 6)).astype(np.float32))
    mask = mx.array(np.arange(6) < random.integers(2, 6, (4, 1))).astype(mx.float32)
    return logprobs, mask, mx.array([0, 1]), mx.array([2, 3])


def test_an_ld_alpha_of_1_changes_nothing_and_of_0_cuts_to_the_shorter_side():
    logprobs, mask, better, worse = token_columns()
    plain = pair_sums(logprobs, mask, better, worse)
    assert all(map(mx.allclose, plain, pair_sums(logprobs, mask, better, worse, 1.0)))
    cut = pair_sums(logprobs, mask, better, worse, 0.0)
    for i in range(2):
        shared = int(min(mask[better[i]].sum().item(), mask[worse[i]].sum().item()))
        assert cut[0][i].item() == pytest.approx(logprobs[better[i], :shared].sum().item())
        assert cut[1][i].item() == pytest.approx(logprobs[worse[i], :shared].sum().item())


def test_what_stands_at_masked_places_changes_nothing():
    logprobs, mask, better, worse = token_columns()
    for junk in (7.0, float("nan"), float("inf")):
        spoilt = mx.where(mask > 0, logprobs, junk)
        for alpha in (None, 0.3):

            def total(x, alpha=alpha):
                return sum(s.sum() for s in pair_sums(x, mask, better, worse, alpha))

            one, other = mx.value_and_grad(total)(logprobs), mx.value_and_grad(total)(spoilt)
            assert one[0].item() == other[0].item()
            assert mx.array_equal(one[1], other[1])


@pytest.mark.parametrize("size", [0.01, 50.0, 5000.0])
@pytest.mark.parametrize("name", DPO_LOSSES)
def test_losses_and_gradients_are_finite_however_far_policy_and_reference_are_apart(name, size):
    pairs = some_pairs(8)
    pairs = replace(pairs, ref_chosen=pairs.chosen + size, ref_rejected=pairs.rejected - size)
    for one in (pairs, swapped(pairs)):
        loss, gradient = mx.value_and_grad(
            lambda x, one=one: DPO_LOSSES[name](replace(one, chosen=x)).mean()
        )(one.chosen)
        assert np.isfinite(loss.item())
        assert np.isfinite(np.array(gradient)).all()


def test_discopop_does_not_overflow_where_the_peer_s_does():
    pairs = replace(fresh(some_pairs(1)), ref_rejected=some_pairs(1).rejected - 10_000)
    assert discopop(pairs).item() == pytest.approx(0.1 * 10_000, rel=1e-5)  # -log sigmoid of -1000


def test_divergences_agree_where_policy_and_reference_do_and_at_their_limit():
    pairs = some_pairs()
    for kind in DIVERGENCES:
        assert all(np.allclose(s, 0, atol=1e-6) for s in scores(fresh(pairs), kind))
        near = replace(fresh(pairs), ref_chosen=pairs.chosen - 1e-3)
        assert np.allclose(scores(near, kind)[0] / 1e-3, 0.5 if kind[:2] == "js" else 1, atol=3e-3)
    limit, plain = scores(pairs, "alpha_divergence", 1.0), scores(pairs)
    assert all(map(mx.array_equal, limit, plain))


def test_aot_compares_ranks_and_of_one_pair_is_dpo():
    pairs = some_pairs()
    order = mx.array([3, 1, 4, 0, 2])
    mixed = replace(pairs, chosen=pairs.chosen[order], rejected=pairs.rejected[order])
    assert mx.allclose(aot(pairs).mean(), aot(mixed).mean())
    assert not mx.allclose(sigmoid(pairs).mean(), sigmoid(mixed).mean())
    assert mx.allclose(aot(some_pairs(1)), sigmoid(some_pairs(1)))


def test_the_nll_of_passes_adds_up_to_that_of_one():
    """Means of means, as elsewhere, change with the number of passes."""
    pairs = some_pairs(6)

    def part(rows: slice, per_pair=None) -> Pairs:
        columns = {k: v[rows] for k, v in vars(pairs).items() if v is not None}
        return Pairs(**columns, tokens_per_pair=per_pair)

    per_pair = pairs.nll_tokens.mean()
    for loss in (
        lambda p: dpo_loss(p, loss_type=["sft"])[0],
        lambda p: cpo_loss(p)[0],
        lambda p: orpo_loss(p)[0],
    ):
        whole = loss(pairs).item()
        short, long = part(slice(0, 2), per_pair), part(slice(2, 6), per_pair)
        assert (loss(short) * 2 + loss(long) * 4).item() / 6 == pytest.approx(whole, rel=1e-6)
        unaware = loss(part(slice(0, 2))) * 2 + loss(part(slice(2, 6))) * 4
        assert unaware.item() / 6 != pytest.approx(whole, rel=1e-4)


# ---- defects of other programs -----------------------------------------------------------------


def test_accuracies_count_pairs_and_do_not_compare_two_means():
    """mlx-lm-lora: 1 where the mean chosen reward is above the mean rejected one."""
    zero = mx.zeros(3)
    pairs = Pairs(mx.array([9.0, -1, -1]), zero, zero + 1, zero + 1, zero + 1, zero, zero)
    assert mean_of(dpo_loss(pairs)[1], "rewards/accuracies") == pytest.approx(1 / 3)


def test_kto_leaves_its_first_loss():
    """mlx-tune: a KTO without reference, whose loss is log 2 for ever."""
    logps, label = mx.array([-3.0, -5.0, -4.0]), mx.array([True, False, True])
    for name in KTO_LOSSES:
        for at, wanted in ((logps, 0.5), (logps + mx.array([2.0, -2, 2]), 0.45)):
            loss = kto_loss(at, logps, label, mx.zeros(()), loss_type=name)[0].item()
            assert loss == pytest.approx(wanted, abs=2e-3)
        slope = mx.grad(
            lambda x, name=name: kto_loss(x, logps, label, mx.zeros(()), loss_type=name)[0]
        )(logps)
        assert np.array_equal(np.sign(slope), [-1, 1, -1])


def test_the_baseline_of_kto_is_at_least_0_and_has_no_gradient():
    assert kto_baseline(mx.array([-3.0, 1])).item() == 0
    assert kto_baseline(mx.array([3.0, 1])).item() == 2
    assert mx.grad(kto_baseline)(mx.array([3.0, 1])).sum().item() == 0


def test_rows_of_one_kind_leave_kto_s_metrics_of_the_other_without_weight():
    logps = mx.array([-3.0, -5.0])
    metrics = kto_loss(logps, logps - 1, mx.array([True, True]), mx.zeros(()))[1]
    assert mean_of(metrics, "rewards/chosen") == pytest.approx(0.1)
    assert metrics["rewards/rejected"][1].item() == 0


def test_simpo_takes_gamma_as_it_is():
    """mlx-tune: gamma times beta."""
    a = mx.array([-1.0])
    for beta in (1.0, 2.0, 4.0):
        loss = simpo(a, a, beta=beta, simpo_gamma=0.8)[0].item()
        assert loss == pytest.approx(math.log1p(math.exp(0.8)), rel=1e-6)


def test_alphapo_tends_to_simpo():
    inputs = mx.array([-1.0, -2.5]), mx.array([-1.5, -0.5])
    near = CPO_LOSSES["alphapo"](*inputs, alpha=1e-4)[0]
    assert mx.allclose(near, simpo(*inputs)[0], atol=1e-3)
    assert mx.array_equal(CPO_LOSSES["alphapo"](*inputs, alpha=0.0)[0], simpo(*inputs)[0])


def test_cpo_has_its_nll():
    """mlx-lm-lora: CPO without it."""
    pairs = some_pairs()
    with_it, metrics = cpo_loss(pairs)
    without, none = cpo_loss(pairs, cpo_alpha=0.0)
    nll = pairs.nll.sum().item() / pairs.nll_tokens.sum().item()
    assert with_it.item() - without.item() == pytest.approx(nll, rel=1e-5)
    assert mean_of(metrics, "nll_loss") == pytest.approx(nll, rel=1e-6)
    assert "nll_loss" not in none


def test_odds_are_of_the_mean_per_token_and_finite_at_both_ends():
    """mlx-tune: a difference of sums in place of log odds."""
    chosen, rejected = mx.array([math.log(0.8)]), mx.array([math.log(0.5)])
    odds = math.log(0.8 / 0.2) - math.log(0.5 / 0.5)
    loss = odds_ratio(chosen, rejected, beta=1.0)[0].item()
    assert loss == pytest.approx(math.log1p(math.exp(-odds)), rel=1e-5)
    for a in (-1e-12, 0.0, -1e-4, -0.5, -0.7, -40.0, -3000.0):
        value, slope = mx.value_and_grad(lambda x: log1mexp(x).sum())(mx.array([a]))
        assert np.isfinite([value.item(), slope.item()]).all(), a
        if -500 < a < -1e-6:
            wanted = math.log(-math.expm1(a))
            assert value.item() == pytest.approx(wanted, rel=1e-5, abs=1e-7)
