"""The contrastive loss against numbers, and in training: added, and what it is for."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from files import ROOT
from mlx.utils import tree_flatten

import sft
from data_utils import TextRow, make_batch
from mlx_sft_trainer import ContrastiveTask, LanguageModelTask
from models.load import load_model
from models.lora import LoraConfig, add_lora
from rl.contrastive import contrastive_loss, pooled


def by_hand(z, labels, temperature):
    """Khosla's equation 2, a loop."""
    found = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i] >= 0]
        if positives:
            total = sum(np.exp(z[i] @ z[a] / temperature) for a in others)
            logs = [np.log(np.exp(z[i] @ z[p] / temperature) / total) for p in positives]
            found.append(-np.mean(logs))
    return np.mean(found) if found else 0.0


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 0, 0, 1], [2, -1, 2, -1], [0, 1, 2, 3]])
def test_four_rows_by_hand(labels):
    z = np.random.default_rng(1).normal(size=(4, 3))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    loss, _ = contrastive_loss(mx.array(z.astype(np.float32)), mx.array(labels), 0.5)
    assert loss.item() == pytest.approx(by_hand(z, labels, 0.5), rel=1e-5)


def test_equal_rows_and_no_positives():
    z = mx.ones((6, 4)) / 2
    assert contrastive_loss(z, mx.zeros(6), 0.07)[0].item() == pytest.approx(np.log(5), rel=1e-5)
    loss, gradient = mx.value_and_grad(lambda z: contrastive_loss(z, mx.arange(6), 0.07)[0])(z)
    assert loss.item() == 0 and not np.array(gradient).any()


def test_rows_are_means_of_their_tokens():
    hidden = mx.array([[1.0, 0], [0, 1], [3, 4], [9, 9]])
    shares = mx.array([[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    expected = [[0.5**0.5, 0.5**0.5], [0.6, 0.8], [0, 0]]
    np.testing.assert_allclose(np.array(pooled(hidden, shares)), expected, rtol=1e-5)


def rows():
    rng = np.random.default_rng(0)
    made = []
    for i in range(6):
        tokens = [1, *rng.integers(20, 90, 5 + i % 3).tolist()]
        made.append(TextRow(tokens, [0] + [1] * (len(tokens) - 1), f"{i}", label=i % 2))
    return made


def gradients(weight: float, made=None):
    mx.random.seed(0)
    loaded = load_model(None)
    tuning = add_lora(loaded.model, LoraConfig(rank=2))
    task = ContrastiveTask(loaded.model, tuning, temperature=0.1, contrastive_weight=weight)
    if weight is None:
        task = LanguageModelTask(loaded.model, tuning)
    arrays = task.arrays(make_batch(made or rows()))
    (loss, sums), gradient = nn.value_and_grad(loaded.model, lambda: task.loss(arrays))()
    flat = {name: np.array(value) for name, value in tree_flatten(gradient)}
    return loss.item(), {k: v.item() for k, v in sums.items()}, flat


def test_the_loss_is_added_and_a_weight_of_0_is_the_plain_one():
    plain, none, some, more = (gradients(weight) for weight in (None, 0.0, 0.1, 0.4))
    assert plain[0] == none[0] and plain[1]["loss"] == none[1]["loss"] == some[1]["loss"]
    for name, array in plain[2].items():
        np.testing.assert_array_equal(array, none[2][name])
    moved = max(np.abs(some[2][name] - array).max() for name, array in plain[2].items())
    assert moved > 1e-4
    for name, array in plain[2].items():  # linear in its weight
        np.testing.assert_allclose(
            more[2][name] - array, 4 * (some[2][name] - array), atol=moved * 1e-3
        )
    contrastive = some[1]["contrastive/loss"] * 0.1
    assert some[0] == pytest.approx(plain[0] + contrastive, rel=1e-5)


def test_rejected_rows_are_compared_and_not_trained():
    made = rows()
    for row in made[::2]:
        row.weight = 0.0
    loss, sums, _ = gradients(0.0, made)
    alone = gradients(None, made[1::2])
    assert loss == pytest.approx(alone[0], rel=1e-5) and sums["weight"] == alone[1]["weight"]
    assert sums["contrastive/loss"] > 0


@pytest.mark.parametrize("kind", ["reward_function", "preference"])
def test_sft_logs_it(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = (
        f"--train --data {ROOT}/data --data-base {kind}_increasing_mult_2_ --use-contrastive "
        "--iters 3 --batch-size 16 --steps-per-eval 0 --max-rows 64 --output-dir run"
    )
    line += " --chosen" * (kind == "preference")
    sft.main(line.split())
    assert '"train/contrastive/loss": ' in (tmp_path / "run" / "metrics.jsonl").read_text()
