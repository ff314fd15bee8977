"""What must hold of group advantages and losses, whatever the numbers."""

import math

import mlx.core as mx
import numpy as np
import pytest

from rl.group_advantages import ESTIMATORS, reward_metrics, weighted_sum
from rl.group_losses import LOSSES, Pass, entropy_mask, group_loss
from rl.response_losses import rloo_loss

N, T, G = 8, 5, 4
ONE = np.array([1.0])


def advantages(name: str, rewards, penalties=None, mask=None, group_size=G, weights=ONE, **options):
    rewards = np.asarray(rewards, dtype=np.float64)
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    mask = np.ones((len(rewards), T)) if mask is None else mask
    penalties = np.zeros(mask.shape) if penalties is None else penalties
    return ESTIMATORS[name](
        rewards, penalties, mask, weights=weights, group_size=group_size, **options
    )


def rows(seed: int = 0, lengths=None, drift: float = 0.3, of_tokens: bool = False) -> Pass:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, N) if lengths is None else lengths
    mask = (np.arange(T) < np.asarray(lengths)[:, None]).astype(np.float32)
    logprobs = -rng.exponential(size=(N, T))
    found = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + drift * rng.normal(size=(N, T)),
        "advantages": rng.normal(size=(N, T if of_tokens else 1)),
        "mask": mask,
        "entropy": rng.exponential(size=(N, T)),
        "ref_logprobs": logprobs + rng.normal(size=(N, T)),
    }
    return Pass(**{name: mx.array(a.astype(np.float32)) for name, a in found.items()})


def changed(rows: Pass, **arrays) -> Pass:
    return Pass(**{**vars(rows), **arrays})


def loss_and_gradient(rows: Pass, loss_type: str = "dapo", **options) -> tuple[float, np.ndarray]:
    sizes = {"tokens_per_pass": rows.mask.sum(), "max_completion_length": T}

    def loss(logprobs):
        return group_loss(
            changed(rows, logprobs=logprobs), **{"loss_type": loss_type, **sizes, **options}
        )[0]

    value, gradient = mx.value_and_grad(loss)(rows.logprobs)
    return value.item(), np.array(gradient)


# ---- advantages --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_give_exactly_nothing(name, reward):
    assert not advantages(name, [reward] * N).any()


def test_equal_sums_are_exactly_nothing_where_trl_leaves_5e_4():
    rewards = np.array([[0.1, 0.7]] * N)
    found = advantages("grpo", rewards, weights=np.array([0.3, 0.9]))
    assert not found.any()
    metrics = reward_metrics(rewards, ["a", "b"], weights=np.array([0.3, 0.9]), group_size=G)
    assert metrics["frac_reward_zero_std"] == 1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_inverted_rewards_invert_advantages(name):
    rewards = np.random.default_rng(0).normal(size=N)
    np.testing.assert_allclose(
        advantages(name, rewards), -advantages(name, -rewards), rtol=1e-12, atol=1e-12
    )


def test_rloo_is_the_mean_of_the_others():
    rewards = np.random.default_rng(1).normal(size=N)
    found = advantages("rloo", rewards)[:, 0]
    for row, reward in enumerate(rewards):
        group = range(row // G * G, row // G * G + G)
        others = [rewards[i] for i in group if i != row]
        assert found[row] == pytest.approx(reward - sum(others) / len(others))
    means = rewards.reshape(-1, G).mean(axis=1).repeat(G)
    np.testing.assert_allclose(found, G / (G - 1) * (rewards - means), rtol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_an_unscored_row_counts_nowhere(name):
    """Left out, not 0: counted as 0 it would move the others (the advantage of one peer by .94)."""
    rewards = np.array([1.0, 2.0, np.nan, 4.0, 0.0, 1.0, 1.0, 0.0])
    found = advantages(name, rewards)[:, 0]
    alone = advantages(name, [1.0, 2.0, 4.0], group_size=3)[:, 0]
    assert found[2] == 0
    np.testing.assert_allclose(found[[0, 1, 3]], alone, rtol=1e-12)
    as_zero = advantages(name, np.nan_to_num(rewards))[:, 0]
    assert np.abs(as_zero - found).max() > 0.5


def test_a_function_that_did_not_score_a_row_is_left_out_of_its_sum():
    rewards = np.array([[1.0, np.nan], [np.nan, np.nan], [np.nan, 3.0]])
    total = weighted_sum(rewards, np.array([2.0, 0.5]))
    np.testing.assert_array_equal(total, [2.0, np.nan, 1.5])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_groups_without_any_score_get_nothing(name):
    rewards = [np.nan] * G + [1.0, 2.0, 3.0, 4.0]
    found = advantages(name, rewards)
    assert not found[:G].any() and found[G:].any() and np.isfinite(found).all()


def test_standard_deviations_divide_by_n_minus_1():
    found = advantages("grpo", [0.0, 1.0, 0.0, 1.0])[:, 0]
    assert found[1] == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-4))


def test_kl_in_the_reward():
    rewards, drift = np.zeros(N), np.random.default_rng(2).normal(size=(N, T))
    for name in ("grpo", "rloo"):
        found = advantages(name, rewards, penalties=drift)
        np.testing.assert_allclose(found, advantages(name, -drift.sum(axis=1)), rtol=1e-12)


def slow_reinforce(scores, penalties, mask, group_size=None):
    """REINFORCE++ from the formula, one token at a time."""
    scores = list(scores)
    if group_size:
        for start in range(0, len(scores), group_size):
            group = scores[start : start + group_size]
            scored = [s for s in group if s == s]
            for i in range(start, start + group_size):
                scores[i] -= sum(scored) / len(scored)
    returns = {}
    for i, score in enumerate(scores):
        tokens = [t for t in range(len(mask[i])) if mask[i][t]]
        for place, t in enumerate(tokens):
            if score == score:
                later = tokens[place:]
                rewards = [-penalties[i][u] for u in later]
                rewards[-1] += score
                returns[i, t] = sum(rewards)
    mean = sum(returns.values()) / len(returns)
    variance = sum((r - mean) ** 2 for r in returns.values()) / len(returns)
    found = np.zeros(np.shape(mask))
    for place, r in returns.items():
        found[place] = (r - mean) / math.sqrt(max(variance, 1e-8))
    return found


@pytest.mark.parametrize("name", ["reinforce", "reinforce_baseline"])
@pytest.mark.parametrize("holes", [False, True])
def test_reinforce_is_what_the_formula_says(name, holes):
    rng = np.random.default_rng(3)
    mask = (np.arange(T) < rng.integers(1, T + 1, N)[:, None]).astype(float)
    if holes:
        mask[1, 0], mask[2] = 0, 0
    scores, penalties = rng.normal(size=N), 0.1 * rng.normal(size=(N, T))
    scores[5] = np.nan
    group = G if name == "reinforce_baseline" else None
    wanted = slow_reinforce(scores, penalties, mask, group)
    found = advantages(name, scores, penalties, mask)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert np.ptp(found[0][mask[0] > 0]) > 0  # tokens differ: each has its own penalties


# ---- losses ------------------------------------------------------------------------------------

CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]


@pytest.mark.parametrize("of_tokens", [False, True])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_on_policy_the_gradient_is_the_policy_gradient(loss_type, of_tokens):
    """-sum(A grad lp) / normaliser at the first update of a rollout."""
    batch = rows(of_tokens=of_tokens)
    batch = changed(batch, old_logprobs=batch.logprobs)
    mask, lengths = np.array(batch.mask), np.array(batch.mask.sum(axis=1, keepdims=True))
    normaliser = {
        "grpo": N * lengths,
        "sapo": N * lengths,
        "bnpo": lengths.sum(),
        "dapo": lengths.sum(),
        "cispo": lengths.sum(),
        "vespo": lengths.sum(),
        "dr_grpo": N * T,
        "luspo": N,
    }[loss_type]
    _, gradient = loss_and_gradient(batch, loss_type)
    wanted = -np.array(batch.advantages) * mask / normaliser
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_no_advantage_and_no_kl_is_a_gradient_of_exactly_0(loss_type):
    batch = rows()
    batch = changed(batch, advantages=mx.zeros((N, 1)))
    assert not loss_and_gradient(batch, loss_type)[1].any()


def test_inverting_advantages_inverts_the_gradient_on_policy():
    batch = rows(drift=0.0)
    one = loss_and_gradient(batch)[1]
    other = loss_and_gradient(changed(batch, advantages=-batch.advantages))[1]
    np.testing.assert_array_equal(one, -other)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_order_of_rows_does_not_matter(loss_type):
    batch, order = rows(), np.random.default_rng(4).permutation(N)
    moved = Pass(**{name: array[mx.array(order)] for name, array in vars(batch).items()})
    loss, gradient = loss_and_gradient(batch, loss_type, beta=0.1)
    moved_loss, moved_gradient = loss_and_gradient(moved, loss_type, beta=0.1)
    assert moved_loss == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(moved_gradient, gradient[order], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_type", CLIPPED)
def test_token_and_sequence_agree_on_one_token(loss_type):
    batch = rows(lengths=[1] * N)
    one = loss_and_gradient(batch, loss_type, beta=0.1)
    other = loss_and_gradient(batch, loss_type, beta=0.1, level="sequence")
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-6)


def test_bnpo_is_dapo_in_one_pass_and_grpo_at_equal_lengths():
    for lengths, others in ((None, ["dapo"]), ([3] * N, ["dapo", "grpo"])):
        batch = rows(lengths=lengths)
        value, gradient = loss_and_gradient(batch, "bnpo")
        for name in others:
            other, other_gradient = loss_and_gradient(batch, name)
            assert other == pytest.approx(value, rel=1e-5)
            np.testing.assert_allclose(other_gradient, gradient, rtol=1e-5, atol=1e-8)


def test_a_masked_row_is_an_absent_one_under_dapo():
    batch = rows()
    mask = np.array(batch.mask)
    mask[2] = 0
    masked = loss_and_gradient(changed(batch, mask=mx.array(mask)), beta=0.1)
    there = mx.array([i for i in range(N) if i != 2])
    absent = loss_and_gradient(Pass(**{k: a[there] for k, a in vars(batch).items()}), beta=0.1)
    assert masked[0] == pytest.approx(absent[0], rel=1e-5)
    np.testing.assert_allclose(masked[1][np.array(there)], absent[1], rtol=1e-5, atol=1e-8)
    assert not masked[1][2].any()


def test_cispo_on_policy_has_dapo_s_gradient():
    batch = rows(drift=0.0)
    np.testing.assert_allclose(
        loss_and_gradient(batch, "cispo")[1], loss_and_gradient(batch, "dapo")[1], rtol=1e-6
    )


def test_cispo_s_default_bound_leaves_weights_apart():
    """TRL bounds them by epsilon, .2, when told nothing, so that every weight is .2."""
    batch = rows()
    gradient = loss_and_gradient(batch, "cispo")[1]
    weights = gradient / np.where(np.array(batch.mask) > 0, -np.array(batch.advantages), np.nan)
    weights = weights[np.isfinite(weights)] * float(batch.mask.sum())
    assert np.ptp(weights) > 0.1


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -1e30])
def test_masked_places_change_nothing(loss_type, junk):
    batch = rows(of_tokens=True)
    hole = batch.mask == 0
    names = ("logprobs", "old_logprobs", "ref_logprobs", "entropy")
    dirty = changed(batch, **{n: mx.where(hole, junk, getattr(batch, n)) for n in names})
    options = {
        "beta": 0.1,
        "entropy_coef": 0.01,
        "top_entropy_quantile": 0.5,
        "off_policy_mask_threshold": 0.1,
    }
    clean_loss, clean_gradient = loss_and_gradient(batch, loss_type, **options)
    loss, gradient = loss_and_gradient(dirty, loss_type, **options)
    assert loss == clean_loss
    np.testing.assert_array_equal(gradient, clean_gradient)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_pass_without_tokens_is_0_and_finite(loss_type):
    batch = rows()
    empty = changed(batch, mask=mx.zeros((N, T)))
    loss, gradient = loss_and_gradient(empty, loss_type, beta=0.1, entropy_coef=0.1)
    assert loss == 0 and not gradient.any()
    _, metrics = group_loss(
        empty, loss_type=loss_type, tokens_per_pass=mx.array(0.0), max_completion_length=T
    )
    assert all(math.isfinite(value.item()) for value in metrics.values())


def test_eight_rows_once_are_four_rows_twice():
    """Accumulation changes no loss whose normaliser is known beforehand, as each pass's mean."""
    batch = rows()
    tokens = batch.mask.sum()
    for loss_type in ("dapo", "grpo", "dr_grpo", "luspo", "cispo", "sapo"):
        whole = loss_and_gradient(batch, loss_type, beta=0.1)[1]
        for part in (slice(0, 4), slice(4, 8)):
            some = Pass(**{name: array[part] for name, array in vars(batch).items()})
            half = loss_and_gradient(some, loss_type, beta=0.1, tokens_per_pass=tokens / 2)[1]
            np.testing.assert_allclose(half / 2, whole[part], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_entropy_term_is_the_mean_of_the_kept_tokens_whatever_the_loss(loss_type, share):
    """TRL 1.16's GRPOTrainer._compute_loss: (entropies * kept).sum() / kept.sum()."""
    batch = rows(3)
    options = {"top_entropy_quantile": share, "entropy_coef": 0.05}
    entropy, mask = np.array(batch.entropy), np.array(batch.mask) > 0
    kept = mask & (entropy >= np.quantile(entropy[mask], 1 - share) - 1e-7)

    def loss(of_entropy):
        some = changed(batch, entropy=of_entropy)
        sizes = {"tokens_per_pass": batch.mask.sum(), "max_completion_length": T}
        found, metrics = group_loss(some, loss_type=loss_type, **sizes, **options)
        return found - metrics["policy_loss"]

    value, gradient = mx.value_and_grad(loss)(batch.entropy)
    np.testing.assert_allclose(value.item(), -0.05 * entropy[kept].mean(), rtol=1e-5)
    np.testing.assert_allclose(np.array(gradient), -0.05 * kept / kept.sum(), atol=1e-7)


def test_entropy_mask_is_numpy_s_quantile():
    rng = np.random.default_rng(5)
    entropy, mask = rng.exponential(size=(N, T)), rng.random((N, T)) < 0.7
    for share in (0.1, 0.2, 0.5, 0.9, 0.999):
        found = entropy_mask(mx.array(entropy), mx.array(mask.astype(np.float32)), share)
        wanted = (entropy >= np.quantile(entropy[mask], 1 - share) - 1e-7) & mask
        np.testing.assert_array_equal(np.array(found) > 0, wanted)


def test_rloo_s_ratio_is_of_the_whole_response():
    batch = rows()
    advantages = np.array(batch.advantages)[:, 0]
    log_ratio = np.array((batch.logprobs - batch.old_logprobs) * batch.mask).sum(axis=1)
    ratio = np.exp(log_ratio)
    wanted = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages).mean()
    assert rloo_loss(batch)[0].item() == pytest.approx(wanted, rel=1e-5)


def test_losses_compile():
    batch = rows()
    names = list(vars(batch))

    def loss(*arrays):
        return group_loss(
            Pass(**dict(zip(names, arrays, strict=True))),
            loss_type="dapo",
            beta=0.1,
            max_completion_length=T,
            tokens_per_pass=mx.array(9.0),
            top_entropy_quantile=0.5,
        )[0]

    arrays = [getattr(batch, name) for name in names]
    assert mx.compile(loss)(*arrays).item() == pytest.approx(loss(*arrays).item(), rel=1e-5)
