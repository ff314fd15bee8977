"""What must hold for any numbers: the arithmetic of rl/ against its own definitions."""

import mlx.core as mx
import numpy as np
import pytest
from batches import NAMES, make_batch, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.advantages import gae
from rl.kl import kl_penalty
from rl.losses import (
    masked_var,
    masked_whiten,
    policy_loss,
    value_loss,
)
from rl.shaping import (
    per_token_rewards,
    rollout_stats,
)


def run_pipeline(batch: dict, *, kl_coef=0.1, gamma=0.98, lam=0.9) -> dict:
    """Scores to losses, gradients and metrics, in the order of a PPO step."""
    mask = batch["mask"]
    kls = kl_penalty(batch["old_logprobs"], batch["ref_logprobs"], "k3")
    rewards, non_score = per_token_rewards(batch["scores"], kls, mask, kl_coef)
    rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, batch["old_values"], mask, gamma=gamma, lam=lam)
    advantages = masked_whiten(advantages, mask)

    def policy(logprobs):
        return policy_loss(
            logprobs, batch["old_logprobs"], advantages, mask, cliprange=0.2, dual_clip=3.0
        )

    def value(values):
        return value_loss(values, batch["old_values"], returns, mask, cliprange_value=0.2)

    (loss_p, stats_p), grad_p = mx.value_and_grad(policy)(batch["logprobs"])
    (loss_v, stats_v), grad_v = mx.value_and_grad(value)(batch["values"])
    stats = rollout_stats(
        batch["scores"], batch["old_logprobs"], batch["ref_logprobs"], kls, non_score, mask
    )
    arrays = {"advantages": advantages, "returns": returns, "grad_p": grad_p, "grad_v": grad_v}
    scalars = {"loss_p": loss_p, "loss_v": loss_v, **stats_p, **stats_v, **stats}
    return {"arrays": arrays, "scalars": scalars}


def assert_same(found: dict, wanted: dict, place=np.s_[:, :], atol: float = 1e-6) -> None:
    """Equal metrics; equal arrays where `wanted`'s tokens lie in `found`, and 0 elsewhere."""
    for name, value in wanted["scalars"].items():
        np.testing.assert_allclose(found["scalars"][name], value, atol=atol, rtol=1e-5)
    for name, value in wanted["arrays"].items():
        array = np.array(found["arrays"][name])
        np.testing.assert_allclose(array[place], value, atol=atol, rtol=1e-5)
        array[place] = 0
        assert not array.any()


# ---- masks and padding -------------------------------------------------------------------------


def loop_gae(rewards, values, mask, gamma, lam):
    """The definition, a row and a token at a time, over the tokens that count; float64."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for row in range(len(mask)):
        next_value = next_advantage = 0.0
        for t in reversed(np.flatnonzero(mask[row])):
            delta = rewards[row, t] + gamma * next_value - values[row, t]
            advantages[row, t] = delta + gamma * lam * next_advantage
            returns[row, t] = advantages[row, t] + values[row, t]
            next_value, next_advantage = values[row, t], advantages[row, t]
    return advantages, returns


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    rows=st.integers(1, 4),
    tokens=st.integers(1, 21),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_is_the_loop_with_holes(seed, rows, tokens, gamma, lam):
    batch = make_batch(seed, rows, tokens)
    rewards, values, mask = batch["logprobs"], batch["values"], batch["mask"]
    found = gae(rewards, values, mask, gamma=gamma, lam=lam)
    wanted = loop_gae(*(np.array(x, dtype=np.float64) for x in (rewards, values, mask)), gamma, lam)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, left=st.integers(0, 4), right=st.integers(0, 4))
def test_extra_padding_changes_nothing(seed, left, right):
    batch = make_batch(seed)
    pads = [(0, 0), (left, right)]
    padded = {k: mx.pad(v, pads) if v.ndim == 2 else v for k, v in batch.items()}
    end = left + batch["mask"].shape[1]
    assert_same(run_pipeline(padded), run_pipeline(batch), np.s_[:, left:end])


@pytest.mark.parametrize("junk", [1e30, mx.inf, -mx.inf, mx.nan])
@pytest.mark.parametrize("name", NAMES)
def test_junk_at_masked_places_changes_nothing(name, junk):
    batch = make_batch(3)
    spoilt = batch | {name: mx.where(batch["mask"] > 0, batch[name], junk)}
    assert_same(run_pipeline(spoilt), run_pipeline(batch), atol=0)


def test_masked_places_get_no_gradient():
    batch = make_batch(4)
    found = run_pipeline(batch)
    masked = np.array(batch["mask"]) == 0
    for name in ("grad_p", "grad_v", "advantages", "returns"):
        array = np.array(found["arrays"][name])
        assert not array[masked].any() and array[~masked].any()


def test_advantages_and_metrics_let_no_gradient_through():
    batch = make_batch(5)

    def through_gae(values):
        advantages, returns = gae(batch["logprobs"], values, batch["mask"])
        return (advantages + returns).sum()

    def through_metrics(values):
        metrics = value_loss(values, values, values, batch["mask"])[1]
        return sum(metrics.values())

    for function in (through_gae, through_metrics):
        assert not np.array(mx.grad(function)(batch["values"])).any()


def test_everything_can_be_traced():
    """By mx.compile: nothing asks for a value. Not evaluated: that costs g++ 14 seconds."""
    batch = make_batch(6)
    names = sorted(batch)

    def flat(*columns):
        found = run_pipeline(dict(zip(names, columns, strict=True)))
        return [*found["arrays"].values(), *found["scalars"].values()]

    traced = mx.compile(flat)(*(batch[name] for name in names))
    wanted = run_pipeline(batch)
    shapes = [x.shape for x in [*wanted["arrays"].values(), *wanted["scalars"].values()]]
    assert [x.shape for x in traced] == shapes


def test_compiled_gradient_equals_plain():
    batch = make_batch(6)

    def loss(logprobs):
        return policy_loss(logprobs, batch["old_logprobs"], batch["values"], batch["mask"])[0]

    plain = mx.grad(loss)(batch["logprobs"])
    compiled = mx.compile(mx.grad(loss))(batch["logprobs"])
    np.testing.assert_allclose(compiled, plain, atol=1e-7, rtol=1e-5)


# ---- whitening ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=seeds, scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
def test_whitening(seed, scale, shift):
    batch = make_batch(seed)
    mask, counted = batch["mask"], np.array(batch["mask"]) > 0
    x = batch["values"] * scale + shift
    inside = np.array(x, dtype=np.float64)[counted]
    whitened = np.array(masked_whiten(x, mask))[counted]
    kept = np.array(masked_whiten(x, mask, shift_mean=False))[counted]
    if counted.sum() > 1:
        np.testing.assert_allclose(masked_var(x, mask), inside.var(ddof=1), rtol=1e-3)
        np.testing.assert_allclose(whitened.mean(), 0, atol=1e-4 * (1 + abs(shift) / scale))
        np.testing.assert_allclose(whitened.std(ddof=1), 1, rtol=1e-3)
    np.testing.assert_allclose(kept.mean(), inside.mean(), rtol=1e-3, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, value=st.floats(-100, 100, width=32))
def test_equal_numbers_whiten_to_exactly_zero(seed, value):
    mask = make_batch(seed, rows=7, tokens=13)["mask"]
    x = mx.full(mask.shape, value)
    assert not np.array(masked_whiten(x, mask)).any()
    assert masked_var(x, mask).item() == 0
    kept = np.array(masked_whiten(x, mask, shift_mean=False))
    np.testing.assert_array_equal(kept, np.array(x) * np.array(mask))


def test_one_token_has_variance_zero_and_whitens_to_zero():
    mask = mx.array([[0.0, 1.0, 0.0]])
    assert masked_var(mx.array([[1.0, 2.0, 3.0]]), mask).item() == 0
    assert masked_whiten(mx.array([[1.0, 2.0, 3.0]]), mask).tolist() == [[0, 0, 0]]


# ---- what an update does -----------------------------------------------------------------------


def test_first_minibatch_has_ratio_one():
    batch = make_batch(7)
    mask, advantages = batch["mask"], batch["values"]

    def loss(logprobs):
        return policy_loss(logprobs, batch["old_logprobs"], advantages, mask)

    (_, metrics), gradient = mx.value_and_grad(loss)(batch["old_logprobs"])
    assert metrics["policy/ratio"].item() == 1
    for name in ("policy/approxkl", "policy/policykl", "policy/clipfrac"):
        assert metrics[name].item() == 0
    wanted = -np.array(advantages) * np.array(mask) / np.array(mask).sum()
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)


def policy_gradient(batch: dict, scores, values, lam: float) -> np.ndarray:
    """Of the first minibatch, beta 0, whitened advantages."""
    mask = batch["mask"]
    rewards, _ = per_token_rewards(scores, batch["ref_logprobs"], mask, 0.0)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=lam)
    advantages = masked_whiten(advantages, mask)

    def loss(logprobs):
        return policy_loss(logprobs, batch["old_logprobs"], advantages, mask)[0]

    return np.array(mx.grad(loss)(batch["old_logprobs"]))


@pytest.mark.parametrize("score", [0.0, 0.7, -3.3])
def test_equal_scores_without_kl_give_no_policy_gradient(score):
    batch = make_batch(8, rows=16)
    scores = mx.full(batch["scores"].shape, score)
    values = mx.zeros_like(batch["values"])  # a value head that starts at zero
    assert not policy_gradient(batch, scores, values, lam=1.0).any()
    # With lam < 1 late tokens get more of the score, so values must have learned it first.
    learned = mx.full(values.shape, score)
    assert not policy_gradient(batch, scores, learned, lam=0.95).any()


def test_inverted_scores_invert_the_policy_gradient():
    batch = make_batch(9)
    values = mx.zeros_like(batch["values"])
    up = policy_gradient(batch, batch["scores"], values, lam=0.95)
    down = policy_gradient(batch, -batch["scores"], values, lam=0.95)
    assert np.abs(up).max() > 1e-3
    np.testing.assert_allclose(up, -down, atol=1e-7)


def test_inverted_scores_change_the_gradient_with_kl_and_values_too():
    batch = make_batch(10)
    one = run_pipeline(batch)["arrays"]
    other = run_pipeline(batch | {"scores": -batch["scores"]})["arrays"]
    for name in ("grad_p", "grad_v"):
        assert np.abs(np.array(one[name]) - np.array(other[name])).max() > 1e-3


@pytest.mark.parametrize("which", ["policy", "value"])
def test_eight_minibatches_of_one_equal_one_of_eight(which):
    batch = make_batch(11, rows=8)
    mask = batch["mask"]

    def loss(x, rows):
        old, targets = batch["old_logprobs"][rows], batch["ref_logprobs"][rows]
        function = policy_loss if which == "policy" else value_loss
        return function(x[rows], old, targets, mask[rows])[0]

    x = batch["logprobs"]
    whole, gradient = mx.value_and_grad(loss)(x, mx.arange(8))
    share = mask.sum(axis=1) / mask.sum()  # a minibatch weighs as many tokens as it has
    parts = [mx.value_and_grad(loss)(x, mx.array([row])) for row in range(8)]
    total = sum(share[i] * part for i, (part, _) in enumerate(parts))
    summed = sum(share[i] * part for i, (_, part) in enumerate(parts))
    np.testing.assert_allclose(total, whole, rtol=1e-5)
    np.testing.assert_allclose(summed, gradient, atol=1e-6)


@pytest.mark.parametrize(
    "ratio, advantage, options, wanted",
    [
        (1.5, 1.0, {}, -1.2),  # a good token: nothing gained beyond the clip
        (0.5, 1.0, {}, -0.5),
        (1.5, -1.0, {}, 1.5),  # a bad token: the loss grows on
        (0.5, -1.0, {}, 0.8),
        (1.5, 1.0, {"cliprange_high": 0.4}, -1.4),  # a higher upper clip
        (0.5, -1.0, {"cliprange_high": 0.4}, 0.8),  # leaves the lower one
        (5.0, -1.0, {"dual_clip": 3.0}, 3.0),  # a bad token's loss is bounded
        (2.0, -1.0, {"dual_clip": 3.0}, 2.0),
        (5.0, 1.0, {"dual_clip": 3.0}, -1.2),  # a good token's is not touched
    ],
)
def test_policy_clips(ratio, advantage, options, wanted):
    zero, one = mx.zeros((1, 1)), mx.ones((1, 1))
    loss, _ = policy_loss(mx.log(ratio * one), zero, advantage * one, one, cliprange=0.2, **options)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_ratio_that_overflows_in_the_padding_is_harmless():
    mask = mx.array([[1.0, 0.0]])
    logprobs = mx.array([[0.0, 500.0]])
    gradient = mx.grad(lambda x: policy_loss(x, mx.zeros((1, 2)), mask, mask)[0])(logprobs)
    assert gradient.tolist() == [[-1, 0]]
