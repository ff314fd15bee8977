"""Hidden states of picked positions with a short last block equal those of a whole one."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import ARCHITECTURES, OTHERS, tiny_model

from models.gradients import checkpointed_blocks
from models.last_block import allow_short_last_block, picked_hidden
from models.lora import LoraConfig, add_lora
from models.trunk import hidden_states

# Longer than the windows of 8 tokens of some; two rows of different length.
TOKENS = mx.array([[5, 9, 60, 3, 17, 8, 22, 41, 7, 30], [8, 8, 2, 33, 40, 0, 0, 0, 0, 0]])
INDEX = mx.array([6, 7, 8, 12, 13])
WHOLE = {"exaone", "mamba", "mamba2"}  # their blocks have no attention of their own to stop at


def whole(model: nn.Module) -> mx.array:
    hidden = hidden_states(model, TOKENS)
    return hidden.reshape(-1, hidden.shape[-1])[INDEX]


def last_mlp_positions(model: nn.Module, monkeypatch, run) -> int:
    """How many positions go through the MLP of the last block while `run()` runs."""
    mlp, seen = model.layers[-1].mlp, []
    call = type(mlp).__call__

    def counting(self, x):
        if self is mlp:
            seen.append(x.size // x.shape[-1])
        return call(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(type(mlp), "__call__", counting)
        run()
    return seen[-1]  # what comes before is never evaluated


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_short_and_whole_give_the_same_states_and_gradients(architecture):
    model = tiny_model(architecture)
    if architecture not in WHOLE:
        add_lora(model, LoraConfig(rank=2))
    assert allow_short_last_block(model) == (architecture not in WHOLE)
    # Sums of other lengths round differently; the states are of the order of 1.
    short = picked_hidden(model, TOKENS, INDEX)
    np.testing.assert_allclose(short, whole(model), atol=2e-5, rtol=2e-5)

    def loss(states):
        return lambda: (mx.sin(states()) * mx.arange(1, 6)[:, None]).sum()

    if architecture not in WHOLE:
        _, ours = nn.value_and_grad(model, loss(lambda: picked_hidden(model, TOKENS, INDEX)))()
        _, plain = nn.value_and_grad(model, loss(lambda: whole(model)))()
        for (name, a), (_, b) in zip(tree_flatten(ours), tree_flatten(plain), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4, err_msg=name)


def test_only_the_picked_positions_are_paid_for(monkeypatch):
    model = tiny_model()

    def run():
        picked_hidden(model, TOKENS, INDEX)

    assert last_mlp_positions(model, monkeypatch, run) == 20  # nobody has tried it yet
    assert allow_short_last_block(model)
    assert last_mlp_positions(model, monkeypatch, run) == 5
    nearly_all = mx.arange(19)
    assert (
        last_mlp_positions(model, monkeypatch, lambda: picked_hidden(model, TOKENS, nearly_all))
        == 20
    )


def test_checkpointed_blocks_run_whole_and_keep_their_gradient(monkeypatch):
    model = tiny_model()
    add_lora(model, LoraConfig(rank=2))
    allow_short_last_block(model)

    def loss():
        return mx.sin(picked_hidden(model, TOKENS, INDEX)).sum()

    _, plain = nn.value_and_grad(model, loss)()
    with checkpointed_blocks(model):
        _, checkpointed = nn.value_and_grad(model, loss)()
        positions = last_mlp_positions(model, monkeypatch, loss)
    assert positions == 20
    for (name, a), (_, b) in zip(tree_flatten(plain), tree_flatten(checkpointed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4, err_msg=name)


def test_a_block_that_mixes_positions_after_attention_runs_whole(monkeypatch):
    model = tiny_model()
    call = type(model.layers[-1].mlp).__call__
    monkeypatch.setattr(
        type(model.layers[-1].mlp),
        "__call__",
        lambda self, x: call(self, x - x.mean(axis=1, keepdims=True)),
    )
    assert not allow_short_last_block(model)
    np.testing.assert_array_equal(picked_hidden(model, TOKENS, INDEX), whole(model))


def test_trying_leaves_the_model_and_the_random_numbers_alone(monkeypatch):
    model = tiny_model()
    add_lora(model, LoraConfig(rank=2, dropout=0.5))
    model.train()
    modes = [module.training for module in model.modules()]
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(3,))
    mx.random.seed(7)
    assert allow_short_last_block(model)
    np.testing.assert_array_equal(mx.random.uniform(shape=(3,)), expected)
    assert [module.training for module in model.modules()] == modes
    # An error in the middle leaves no stand-in behind.
    block = model.layers[-1]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(type(block.mlp), "__call__", lambda self, x: 1 / 0)
        picked_hidden(model, TOKENS, INDEX)
    assert model.layers[-1] is block and "self_attn" not in block.__dict__
