"""Optimizers and schedules against numbers worked out from their papers' formulas in float64."""

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from command_line.shared_flags import OPTIMIZERS, SCHEDULES
from errors import UserError
from training.optimizers import (
    build_optimizer,
    optimizer_arrays,
    restore_optimizer,
)
from training.schedules import SHAPES, is_inner_matrix, learning_rate_schedule
from training.update import clip_gradients

WEIGHT = np.array([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])
GRADIENTS = [np.cos(np.arange(6).reshape(2, 3) + k) / (k + 1) for k in range(4)]


def run(optimizer, steps: int = 4, name: str = "w") -> np.ndarray:
    """The weight after the same few gradients."""
    weights = {name: mx.array(WEIGHT, dtype=mx.float32)}
    for gradient in GRADIENTS[:steps]:
        gradients = {name: mx.array(gradient, dtype=mx.float32)}
        weights = optimizer.apply_gradients(gradients, weights)
        mx.eval(weights, optimizer.state)
    return np.array(weights[name], dtype=np.float64)


# ------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
    ("name", "options", "step", "expected"),
    [
        ("constant", {}, 77, 2.0),
        ("linear", {}, 0, 2.0),
        ("linear", {}, 25, 1.5),
        ("linear", {}, 99, 0.02),
        ("linear", {}, 100, 0.0),
        ("linear", {"end_factor": 0.1}, 100, 0.2),
        ("linear", {"end_factor": 0.1}, 50, 1.1),
        ("linear", {"warmup": 20}, 60, 1.0),
        ("cosine", {}, 50, 1.0),
        ("cosine", {}, 25, 1.0 + math.cos(math.pi / 4)),
        ("cosine", {"end_factor": 0.5}, 1000, 1.0),
        ("polynomial", {}, 50, 0.5),
        ("polynomial", {"power": 3.0, "end_factor": 0.5}, 50, 1.125),
        ("polynomial", {"power": 1.0, "warmup": 20}, 60, 1.0),
        ("polynomial", {"power": 0.5}, 100, 0.0),
        ("cosine_with_restarts", {"cycles": 2}, 25, 1.0),
        ("cosine_with_restarts", {"cycles": 2}, 50, 2.0),
        ("cosine_with_restarts", {"cycles": 2}, 75, 1.0),
        ("cosine_with_restarts", {"cycles": 2}, 100, 0.0),
        ("cosine_with_restarts", {"cycles": 4, "warmup": 20}, 30, 1.0),
        # The first update already moves, the last one of the warm-up is at the peak.
        ("constant", {"warmup": 4}, 0, 0.5),
        ("cosine", {"warmup": 4}, 3, 2.0),
        ("cosine", {"warmup": 4}, 4, 2.0),
    ],
)
def test_the_rate_at_a_step(name, options, step, expected):
    for xp in (mx, np):
        rate = learning_rate_schedule(name, 2.0, steps=100, xp=xp, **options)
        assert rate(step).item() == pytest.approx(expected, abs=1e-6)
        assert rate(xp.array(step, dtype=xp.uint64)).item() == pytest.approx(expected, abs=1e-6)


def test_one_cycle_of_restarts_is_cosine():
    one = learning_rate_schedule("cosine_with_restarts", 1.0, steps=10)
    cosine = learning_rate_schedule("cosine", 1.0, steps=10)
    assert [one(k).item() for k in range(12)] == [cosine(k).item() for k in range(12)]


def test_flags_and_code_know_the_same_names():
    assert set(SHAPES) == set(SCHEDULES)
    for name in OPTIMIZERS:
        build_optimizer(name, 0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: build_optimizer("adagrad", 0.1),
        lambda: learning_rate_schedule("step", 0.1, steps=9),
        lambda: learning_rate_schedule("linear", 0.1, steps=9, warmup=9),
    ],
)
def test_what_is_not_there_is_refused(wrong):
    with pytest.raises(UserError):
        wrong()


# ------------------------------------------------------------------------------ arithmetic


def adam_by_hand(rate, b1, b2, eps, decay, decoupled, steps=4):
    """Kingma and Ba, algorithm 1, as torch.optim writes it."""
    w, m, v = WEIGHT.copy(), 0.0, 0.0
    for t, g in enumerate(GRADIENTS[:steps], 1):
        if decoupled:
            w = w * (1 - rate * decay)
        else:
            g = g + decay * w
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - rate / (1 - b1**t) * m / (np.sqrt(v) / math.sqrt(1 - b2**t) + eps)
    return w


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_and_adamw(decoupled, decay):
    optimizer = build_optimizer(
        "adamw" if decoupled else "adam", 0.03, weight_decay=decay, betas=(0.8, 0.95), eps=1e-3
    )
    expected = adam_by_hand(0.03, 0.8, 0.95, 1e-3, decay, decoupled)
    np.testing.assert_allclose(run(optimizer), expected, rtol=1e-6)


def test_the_first_step_of_adam_keeps_its_digits():
    """MLX's own bias correction is off by 6e-6 of the step; heads start at 0 and show it."""
    start, gradient = {"w": mx.zeros((3,))}, {"w": mx.array([1.0, -0.5, 2.0])}
    ours = build_optimizer("adam", 1.0).apply_gradients(gradient, start)["w"]
    theirs = optim.Adam(1.0, bias_correction=True).apply_gradients(gradient, start)["w"]
    expected = np.array([-1.0, 1.0, -1.0])
    assert np.abs(np.array(ours) - expected).max() < 5e-7
    assert np.abs(np.array(theirs) - expected).max() > 2e-6


def test_sgd_with_momentum_and_decay():
    w, v = WEIGHT.copy(), 0.0
    for g in GRADIENTS:
        v = 0.9 * v + g + 0.1 * w
        w = w - 0.05 * v
    optimizer = build_optimizer("sgd", 0.05, momentum=0.9, weight_decay=0.1)
    np.testing.assert_allclose(run(optimizer), w, rtol=1e-6)


def test_lion():
    """arXiv 2302.06675, algorithm 2."""
    w, m = WEIGHT.copy(), 0.0
    for g in GRADIENTS:
        update = np.sign(0.9 * m + 0.1 * g)
        w = w - 0.05 * (update + 0.1 * w)
        m = 0.99 * m + 0.01 * g
    np.testing.assert_allclose(run(build_optimizer("lion", 0.05, weight_decay=0.1)), w, rtol=1e-6)


def test_adafactor():
    """arXiv 1804.04235, algorithm 4, with an absolute learning rate."""
    w, row, column = WEIGHT.copy(), 0.0, 0.0
    for t, g in enumerate(GRADIENTS, 1):
        b2 = 1 - t**-0.8
        square = g * g + 1e-30
        row = b2 * row + (1 - b2) * square.mean(1)
        column = b2 * column + (1 - b2) * square.mean(0)
        update = g / np.sqrt(np.outer(row, column) / row.mean())
        update = update / max(1.0, math.sqrt((update**2).mean()))
        w = w * (1 - 0.1 * 0.02) - 0.02 * update
    optimizer = build_optimizer("adafactor", 0.02, weight_decay=0.1)
    np.testing.assert_allclose(run(optimizer), w, rtol=1e-5)


def test_muon_moves_matrices_by_an_orthogonal_update_of_adamw_size():
    generator = np.random.default_rng(0)
    gradient = mx.array(generator.normal(size=(8, 32)), dtype=mx.float32)
    start = {"layer": mx.zeros((8, 32))}
    moved = build_optimizer("muon", 1.0, weight_decay=0.0).apply_gradients(
        {"layer": gradient}, start
    )
    singular = np.linalg.svd(np.array(moved["layer"]) / (0.2 * 32**0.5), compute_uv=False)
    # Five Newton-Schulz steps bring every singular value near 1.
    assert 0.6 < singular.min() and singular.max() < 1.3


def test_muon_leaves_everything_else_to_adamw():
    options = {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}
    expected = adam_by_hand(0.03, 0.8, 0.95, 1e-3, 0.1, True)
    outer = run(build_optimizer("muon", 0.03, **options), name="value_head")
    np.testing.assert_allclose(outer, expected, rtol=1e-6)
    inner = run(build_optimizer("muon", 0.03, **options), name="lora_a")
    assert np.abs(inner - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("path", "shape", "inner"),
    [
        ("layers.0.self_attn.q_proj.lora_a", (64, 8), True),
        ("model.embed_tokens.weight", (64, 8), False),
        ("lm_head.weight", (64, 8), False),
        ("prompt.weight", (10, 8), False),
        ("norm.weight", (64,), False),
        ("layers.0.gate", (1, 64), False),
    ],
)
def test_which_weights_muon_suits(path, shape, inner):
    assert is_inner_matrix(path, mx.zeros(shape)) is inner


CHANGES = [
    ("adam", {"betas": (0.5, None)}),
    ("adam", {"betas": (0.9, 0.9)}),
    ("adam", {"eps": 0.1}),
    ("adam", {"weight_decay": 0.1}),
    ("adamw", {"weight_decay": 0.1}),
    ("adafactor", {"weight_decay": 0.1}),
    ("lion", {"weight_decay": 0.1}),
    ("lion", {"betas": (0.1, None)}),
    ("lion", {"betas": (0.9, 0.1)}),
    ("sgd", {"weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9}),
    ("muon", {"weight_decay": 0.1}),
    ("muon", {"momentum": 0.2}),
    ("adam", {"schedule": "linear"}),
    ("adam", {"schedule": "cosine", "end_factor": 0.5}),
    ("adam", {"schedule": "cosine_with_restarts", "cycles": 2}),
    ("adam", {"warmup": 3}),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_every_option_changes_the_result(name, change):
    plain = run(build_optimizer(name, 0.02, steps=8))
    assert np.abs(run(build_optimizer(name, 0.02, steps=8, **change)) - plain).max() > 1e-5


def test_every_optimizer_and_schedule_gives_another_result():
    ends = [run(build_optimizer(name, 0.02)) for name in OPTIMIZERS]
    ends += [
        run(build_optimizer("adam", 0.02, steps=6, schedule=s, cycles=2)) for s in SCHEDULES[1:]
    ]
    for i, end in enumerate(ends):
        assert all(np.abs(end - other).max() > 1e-6 for other in ends[:i]), i


# ------------------------------------------------------------------------------ clipping


def test_clipping_returns_the_norm_before_and_scales_to_the_limit():
    gradients = {"a": mx.array([3.0, 0.0]), "b": [mx.array([[4.0]])]}
    clipped, norm = clip_gradients(gradients, 1.0)
    assert norm.item() == pytest.approx(5.0)
    assert clipped["a"][0].item() == pytest.approx(0.6, rel=1e-5)
    assert clipped["b"][0].item() == pytest.approx(0.8, rel=1e-5)
    same, norm = clip_gradients(gradients, 10.0)
    assert same["a"].tolist() == [3.0, 0.0] and norm.item() == pytest.approx(5.0)
    same, norm = clip_gradients(gradients, None)
    assert same["a"].tolist() == [3.0, 0.0] and norm.item() == pytest.approx(5.0)


# ------------------------------------------------------------------------------ state


def new_model() -> nn.Module:
    mx.random.seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def train(model, optimizer, first: int, last: int, compiled: bool = False) -> None:
    def step(x):
        loss, gradients = nn.value_and_grad(model, lambda x: mx.square(model(x) - 1).mean())(x)
        gradients, norm = clip_gradients(gradients, 0.5)
        optimizer.update(model, gradients)
        return loss, norm

    state = [model.state, optimizer.state]
    call = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for k in range(first, last):
        mx.eval(call(mx.cos(mx.arange(6).reshape(2, 3) + k)), model.state, optimizer.state)


def same(a, b) -> bool:
    a, b = dict(tree_flatten(a)), dict(tree_flatten(b))
    return set(a) == set(b) and all(mx.array_equal(a[k], b[k]).item() for k in a)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_goes_on_to_the_same_bits(name):
    def build():
        return build_optimizer(name, 0.02, schedule="cosine", steps=9, warmup=2)

    straight, whole = new_model(), build()
    train(straight, whole, 0, 8)
    broken, first = new_model(), build()
    train(broken, first, 0, 5)
    second = build()
    restore_optimizer(second, optimizer_arrays(first), broken.trainable_parameters())
    assert same(optimizer_arrays(second), optimizer_arrays(first))
    train(broken, second, 5, 8)
    assert same(broken.parameters(), straight.parameters())
    assert same(optimizer_arrays(second), optimizer_arrays(whole))


@pytest.mark.parametrize("name", ["adam", "muon"])  # each new graph costs seconds of g++
def test_the_step_compiles_and_gives_the_same(name):
    results = []
    for compiled in (False, True):
        model = new_model()
        optimizer = build_optimizer(name, 0.02, schedule="linear", steps=9, warmup=2)
        optimizer.init(model.trainable_parameters())
        train(model, optimizer, 0, 4, compiled)
        results.append(
            np.concatenate([np.array(v).ravel() for _, v in tree_flatten(model.parameters())])
        )
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_a_new_learning_rate_survives_the_restore():
    model, first = new_model(), build_optimizer("adam", 0.02)
    train(model, first, 0, 2)
    second = build_optimizer("adam", 0.5)
    restore_optimizer(second, optimizer_arrays(first), model.trainable_parameters())
    assert second.learning_rate.item() == 0.5 and second.step.item() == 2


def test_a_state_of_another_optimizer_or_model_is_refused():
    model, first = new_model(), build_optimizer("adam", 0.02)
    train(model, first, 0, 1)
    arrays = optimizer_arrays(first)
    with pytest.raises(UserError, match="do not fit"):
        restore_optimizer(build_optimizer("sgd", 0.1), arrays, model.trainable_parameters())
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(UserError, match="do not fit"):
        restore_optimizer(build_optimizer("adam", 0.1), arrays, other.trainable_parameters())


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_the_ppo_trainers_own_optimizer_is_torchs_adam(epochs):
    """Movements from 0 against Adam in float64, to 2e-6; MLX's Adam is 1e-5 off at first."""
    from tiny import flat, tiny_model
    from tiny_ppo import EOS, SMALL, random_batch, tuned

    from mlx_ppo_trainer import PPOConfig, PPOTrainer
    from models.actor_critic import ActorCritic, ValueHead

    mx.random.seed(0)
    model = tiny_model()
    policy = ActorCritic(model, ValueHead(32), tuned(model, "lora"))
    config = PPOConfig(**{**SMALL, "mini_batch_size": 8, "ppo_epochs": epochs})
    trainer = PPOTrainer(config, policy, eos_ids=EOS)
    gradients, update = [], trainer.optimizer.update

    def recording(model, gradient):
        gradients.append({k: np.array(v, np.float64) for k, v in flat(gradient).items()})
        update(model, gradient)

    trainer.optimizer.update = recording
    trainer.step(*random_batch())
    assert len(gradients) == epochs
    ends = flat(policy.trainable_parameters())
    zero = [name for name in ends if "lora_b" in name or "value_head" in name]
    assert zero
    for name in zero:
        m = v = moved = 0.0
        for step, gradient in enumerate(gradients, 1):
            m = 0.9 * m + 0.1 * gradient[name]
            v = 0.999 * v + 0.001 * gradient[name] ** 2
            size = config.learning_rate / (1 - 0.9**step)
            moved = moved - size * m / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(np.array(ends[name]), moved, atol=2e-6 * np.abs(moved).max())
