"""Gradients meet the weights in one place, for every trainer."""

import fast_blas  # noqa: F401  isort: skip

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from rl.rollouts import minibatch_update
from training.optimizers import build_optimizer
from training.update import added, all_finite, apply_update


def layer() -> nn.Linear:
    made = nn.Linear(2, 1)
    made.update({"weight": mx.array([[1.0, 2.0]]), "bias": mx.array([0.0])})
    return made


def gradient(*numbers: float) -> dict:
    return {"weight": mx.array([numbers[:2]]), "bias": mx.array([numbers[2]])}


def test_a_sum_over_its_divisor_is_applied():
    total = added(added(None, gradient(3.0, 0.0, 1.0)), gradient(1.0, 4.0, 1.0))
    model, moved = layer(), []
    norm = apply_update(model, optim.SGD(0.5), total, 4, None, before=lambda: moved.append(1))
    assert norm == pytest.approx(np.sqrt(1 + 1 + 0.25)) and moved == [1]
    np.testing.assert_allclose(model.weight, [[0.5, 1.5]])
    np.testing.assert_allclose(model.bias, [-0.25])


def test_the_norm_is_clipped_after_the_division():
    model = layer()
    assert apply_update(model, optim.SGD(1.0), gradient(30.0, 40.0, 0.0), 10, 1.0) == 5.0
    np.testing.assert_allclose(model.weight, [[0.4, 1.2]], rtol=1e-5)


@pytest.mark.parametrize(
    "bad, loss",
    [
        (gradient(np.nan, 0.0, 0.0), 0.0),
        (gradient(0.0, 0.0, np.inf), 0.0),
        (gradient(3e38, 3e38, 0.0), 0.0),  # finite, and its norm is not
        (gradient(1.0, 1.0, 1.0), np.nan),
        (gradient(1.0, 1.0, 1.0), np.inf),
    ],
)
def test_what_is_not_finite_moves_neither_weights_nor_optimizer(bad, loss):
    model, optimizer, moved = layer(), build_optimizer("adam", 0.1), []
    optimizer.init(model.trainable_parameters())
    apply_update(model, optimizer, gradient(1.0, 1.0, 1.0), 1, 1.0)  # momentum to move them by
    before = np.array(model.weight), np.array(optimizer.state["weight"]["m"])
    norm = apply_update(model, optimizer, bad, 1, 1.0, loss=loss, before=lambda: moved.append(1))
    assert not (np.isfinite(norm) and np.isfinite(loss)) and not moved
    np.testing.assert_array_equal(model.weight, before[0])
    np.testing.assert_array_equal(optimizer.state["weight"]["m"], before[1])
    assert optimizer.step.item() == 1


def test_a_tree_is_finite_where_all_of_it_is():
    assert all_finite(gradient(1.0, -2.0, 3e38)).item()
    assert not all_finite(gradient(1.0, 2.0, -np.inf)).item()
    assert not all_finite({"deep": [gradient(0.0, 0.0, 0.0), gradient(0.0, np.nan, 0.0)]}).item()


def test_minibatches_of_an_update_add_up_and_bad_ones_are_left_out():
    seen, applied = [], []

    def one(rows):
        seen.append(list(rows))
        bad = 3 in rows
        return (None if bad else gradient(*rows[:2], 1.0)), {"first": rows[0], "skipped": bad}

    def apply(total):
        applied.append(total)
        return 5.0

    metrics = minibatch_update([0, 1, 2, 3, 4, 5], 2, one, added, apply)
    assert seen == [[0, 1], [2, 3], [4, 5]]
    assert [found["skipped"] for found in metrics] == [False, True, False]
    assert metrics[-1]["grad_norm"] == 5.0 and "grad_norm" not in metrics[0]
    (total,) = applied
    np.testing.assert_array_equal(total["weight"], [[4.0, 6.0]])
    np.testing.assert_array_equal(total["bias"], [2.0])


def test_an_update_without_a_good_minibatch_is_none_and_a_norm_that_is_not_finite_is_told():
    def refuse(total):
        raise AssertionError("nothing to apply")

    metrics = minibatch_update([0, 1], 1, lambda rows: (None, {"skipped": 1.0}), added, refuse)
    assert metrics == [{"skipped": 1.0}] * 2
    metrics = minibatch_update(
        [0, 1],
        1,
        lambda rows: (gradient(1.0, 1.0, 1.0), {"skipped": 0.0}),
        added,
        lambda total: np.inf,
    )
    assert metrics[0] == {"skipped": 0.0}
    assert metrics[1] == {"skipped": 1.0, "not_finite": 1.0, "grad_norm": np.inf}
