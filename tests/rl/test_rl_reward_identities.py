"""What must hold for any numbers: KL, rewards, scores, and losses of reward models."""

import json

import mlx.core as mx
import numpy as np
import pytest
from batches import make_batch, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.kl import PER_TOKEN, full_kl, kl_penalty
from rl.losses import (
    masked_mean,
    pairwise_loss,
    regression_loss,
)
from rl.scores import (
    AdaptiveKLController,
    FixedKLController,
    RunningMoments,
    clip_scores,
    length_penalties,
    scale_scores,
)
from rl.shaping import per_token_rewards, rollout_stats


@pytest.mark.parametrize("mode", [*PER_TOKEN])
def test_kl_of_a_policy_that_is_its_reference(mode):
    logprobs = make_batch(12)["logprobs"]
    assert not np.array(kl_penalty(logprobs, logprobs, mode)).any()


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_kl_estimators_have_the_full_kl_as_mean(seed):
    logits = mx.array(np.random.default_rng(seed).normal(size=(2, 6)), dtype=mx.float32)
    logp, ref = (x - mx.logsumexp(x) for x in logits)  # (V,)
    exact = full_kl(logits[0], logits[1]).item()
    assert full_kl(logits[0], logits[0]).item() == pytest.approx(0, abs=1e-6)
    for mode in ("kl", "k1", "k3"):
        mean = (mx.exp(logp) * kl_penalty(logp, ref, mode)).sum().item()
        assert mean == pytest.approx(exact, rel=1e-4, abs=1e-6)
    assert (kl_penalty(logp, ref, "k3") >= 0).all().item()


def test_full_kl_of_impossible_tokens():
    ruled_out = mx.array([0.0, 0.0, -mx.inf])
    np.testing.assert_allclose(full_kl(ruled_out, mx.zeros(3)), np.log(3 / 2), rtol=1e-6)
    assert full_kl(mx.zeros(3), ruled_out).item() == mx.inf
    assert full_kl(ruled_out, ruled_out).item() == 0


def test_unknown_kl_mode_is_refused():
    with pytest.raises(ValueError, match="k9"):
        kl_penalty(mx.zeros((1, 1)), mx.zeros((1, 1)), "k9")


def test_adaptive_controller_moves_towards_its_target():
    controller = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    controller.update(7.0, 10)
    assert controller.value > 0.2
    controller.update(100.0, 10)  # an error of more than 20% counts as 20%
    assert controller.value == pytest.approx(0.2 * (1 + 10 / 6000) * 1.002)
    high = controller.value
    controller.update(-5.0, 10)
    assert controller.value < high


def test_controllers_resume():
    def adaptive(coefficient):
        return AdaptiveKLController(coefficient, target=6.0, horizon=100)

    for make in (adaptive, FixedKLController):
        controller, other = make(0.5), make(9.0)
        controller.update(20.0, 64)
        other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
        for each in (controller, other):
            each.update(3.0, 64)
        assert controller.value == other.value


def test_controller_refuses_what_could_make_the_coefficient_negative():
    with pytest.raises(ValueError, match="horizon"):
        AdaptiveKLController(0.2, 6.0, 0)
    controller = AdaptiveKLController(0.2, 6.0, 100)
    with pytest.raises(ValueError, match="fifth of 500"):
        controller.update(0.0, 500)
    assert controller.value == 0.2


# ---- rewards and scores ------------------------------------------------------------------------


def test_score_falls_on_the_last_token_that_counts():
    mask = mx.array([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=mx.float32)
    scores, kls = mx.array([5.0, 6.0, 7.0]), mx.full(mask.shape, 2.0)
    rewards, non_score = per_token_rewards(scores, kls, mask, 0.25)
    assert non_score.tolist() == [[0, -0.5, 0, -0.5, 0], [-0.5] * 5, [0] * 5]
    assert (rewards - non_score).tolist() == [[0, 0, 0, 5, 0], [0, 0, 0, 0, 6], [0] * 5]


def test_length_penalties():
    options = dict(missing_eos_penalty=2.0, max_length=20, overlong_buffer=8, overlong_penalty=4.0)
    found = length_penalties([5, 12, 13, 20, 20, 30], [1, 1, 1, 1, 0, 1], **options)
    assert found == [0, 0, -0.5, -4, -6, -4]
    assert length_penalties([20, 20], [True, False], missing_eos_penalty=1.5) == [0, -1.5]
    assert length_penalties([20], [False]) == [0]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"missing_eos_penalty": -1.0}, "negative"),
        ({"max_length": 4, "overlong_buffer": 8, "overlong_penalty": 1.0}, "at least that"),
        ({"overlong_buffer": 8, "overlong_penalty": 1.0}, "max_length"),
    ],
)
def test_length_penalties_refuse(options, match):
    with pytest.raises(ValueError, match=match):
        length_penalties([3], [True], **options)


numbers = st.floats(-1e4, 1e4)


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(st.lists(numbers, min_size=1, max_size=8), min_size=1, max_size=6))
def test_running_moments_are_those_of_all_scores(batches):
    moments = RunningMoments()
    for batch in batches:
        moments.update(batch)
    everything = np.concatenate(batches)
    assert moments.count == len(everything)
    np.testing.assert_allclose(moments.mean, everything.mean(), rtol=1e-9, atol=1e-9)
    if len(everything) > 1 and everything.std() > 1e-3:
        np.testing.assert_allclose(moments.std, everything.std(ddof=1), rtol=1e-6)


def test_scores_without_spread_stay_as_they_are():
    moments = RunningMoments()
    assert scale_scores([0.1], moments) == [0.1]
    assert scale_scores([0.1] * 6, moments) == [0.1] * 6
    moments.update([])
    assert moments.count == 7


def test_running_moments_resume():
    moments, other = RunningMoments(), RunningMoments()
    moments.update([1.0, 2.5, -3.0])
    other.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    scores = [0.3, 0.7]
    assert scale_scores(scores, moments) == scale_scores(scores, other)


def test_clip_scores():
    assert clip_scores([-3.0, -0.5, 0.2, 9.0], 0.5) == [-0.5, -0.5, 0.2, 0.5]
    with pytest.raises(ValueError, match="above 0"):
        clip_scores([1.0], 0)


def test_statistics_of_a_batch():
    mask = mx.array([[1.0, 1.0], [1.0, 0.0]])
    logprobs, kls = mx.array([[-1.0, -2.0], [-3.0, -9.0]]), mx.array([[0.5, 0.5], [2.0, 9.0]])
    stats = rollout_stats(mx.array([1.0, 4.0]), logprobs, logprobs - 1, kls, -kls, mask)
    found = {name: value.tolist() for name, value in stats.items()}
    assert found.pop("objective/kl_dist") == [1, 2]
    assert found == pytest.approx(
        {
            "objective/kl": 1.5,
            "objective/logprobs": -2.0,
            "objective/ref_logprobs": -3.0,
            "objective/entropy": 3.0,
            "ppo/mean_non_score_reward": -1.0,
            "ppo/mean_scores": 2.5,
            "ppo/std_scores": 4.5**0.5,
        }
    )


def test_one_score_has_no_spread():
    one = mx.ones((1, 1))
    assert rollout_stats(mx.array([3.0]), one, one, one, one, one)["ppo/std_scores"].item() == 0


# ---- reward models -----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=seeds, centering=st.sampled_from([0.0, 0.1]))
def test_weighted_pairs_make_every_ranked_list_count_alike(seed, centering):
    rng = np.random.default_rng(seed)
    ranked = [rng.normal(size=length) for length in rng.integers(2, 6, size=4)]  # best first
    lists, better, worse, weights = [], [], [], []
    for scores in ranked:
        pairs = [(a, b) for i, a in enumerate(scores) for b in scores[i + 1 :]]
        lists.append(
            np.mean([np.log1p(np.exp(b - a)) + centering * (a + b) ** 2 for a, b in pairs])
        )
        better += [a for a, _ in pairs]
        worse += [b for _, b in pairs]
        weights += [1 / len(pairs)] * len(pairs)
    better, worse, weights = (mx.array(x, dtype=mx.float32) for x in (better, worse, weights))
    loss, metrics = pairwise_loss(better, worse, centering=centering, weights=weights)
    np.testing.assert_allclose(loss, np.mean(lists), rtol=1e-5)
    right = np.average(np.array(better) > np.array(worse), weights=np.array(weights))
    np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-5, atol=1e-7)


def test_pairwise_loss_tells_winner_from_loser():
    chosen, rejected = make_batch(14, rows=2)["values"]
    gradient = mx.grad(lambda a, b: pairwise_loss(a, b)[0])
    assert (gradient(chosen, rejected) < 0).all().item()  # the chosen one's score goes up
    assert not np.allclose(gradient(chosen, rejected), gradient(rejected, chosen))
    metrics = pairwise_loss(chosen, rejected)[1], pairwise_loss(rejected, chosen)[1]
    assert metrics[0]["accuracy"].item() + metrics[1]["accuracy"].item() == pytest.approx(1)
    assert metrics[0]["score_difference"].item() == -metrics[1]["score_difference"].item()


def test_regression_loss():
    loss, metrics = regression_loss(mx.array([1.0, 2.0, 4.0]), mx.array([1.0, 0.0, 5.0]))
    assert loss.item() == pytest.approx(5 / 3)
    assert metrics["mean_absolute_error"].item() == pytest.approx(1)


def test_masked_mean_counts_only_the_mask():
    x, mask = mx.array([[1.0, 2.0, 90.0]]), mx.array([[1, 1, 0]])
    assert masked_mean(x, mask).item() == 1.5
