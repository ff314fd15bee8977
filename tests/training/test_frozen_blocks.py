"""Frozen blocks below the trained ones: run once a rollout, and the weights move as without."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from tiny import ARCHITECTURES, OTHERS, tiny_model
from tiny_group import make_trainer as make_group_trainer
from tiny_group import random_groups
from tiny_ppo import assert_close, make_trainer, movement, random_batch, tuned

from models.trunk import entered, entering_states, frozen_below, hidden_states
from training.rollout_stages import KeptStates

MAKERS = {"ppo": (make_trainer, random_batch), "group": (make_group_trainer, random_groups)}


def deep_model(**changes):
    return tiny_model(num_hidden_layers=4, **changes)


def moved(method: str, recompute: bool, batch=None, **options) -> dict[str, np.ndarray]:
    """What a step adds to the weights of a model of four blocks, an adapter in the last one."""
    make, random = MAKERS[method]
    options = {"model": deep_model(), "blocks": 1, **options}
    trainer = make(recompute_frozen=recompute, **options)
    assert trainer.frozen == (0 if recompute else len(options["model"].layers) - options["blocks"])
    return movement(trainer, *(batch or random()))


def block_calls(monkeypatch, model) -> Counter:
    """Counts the rows that go through each block of `model`."""
    calls, kind = Counter(), type(model.layers[0])
    call, places = kind.__call__, {id(block): i for i, block in enumerate(model.layers)}

    def counted(block, x, *args, **kwargs):
        calls[places[id(block)]] += len(x)
        return call(block, x, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counted)
    return calls


# ------------------------------------------------------------------------------ what is run


@pytest.mark.parametrize("recompute", [False, True])
def test_rows_pass_frozen_blocks_once(monkeypatch, recompute):
    model = deep_model()
    trainer = make_trainer(model=model, blocks=2, ppo_epochs=3, recompute_frozen=recompute)
    batch = random_batch()
    assert trainer.frozen == (0 if recompute else 2)
    calls = block_calls(monkeypatch, model)
    trainer.step(*batch)
    passes = 1 + 1 + 3  # policy, reference, epochs
    frozen = 8 * passes if recompute else 8
    assert calls == {0: frozen, 1: frozen, 2: 8 * passes, 3: 8 * passes}


@pytest.mark.parametrize("beta, epochs, kept", [(0.0, 1, 0), (0.0, 2, 3), (0.1, 1, 3)])
def test_nothing_is_kept_in_vain(beta, epochs, kept):
    """One pass over sampled responses asks for no row twice."""
    trainer = make_group_trainer(model=deep_model(), blocks=1, beta=beta, ppo_epochs=epochs)
    assert trainer.frozen == kept


def test_states_are_let_go_after_the_epochs():
    trainer = make_trainer(model=deep_model(), blocks=1)
    queries, responses, scores = random_batch()
    rollout = trainer.as_rollout(queries, responses)
    trainer.score_policy(rollout)
    assert isinstance(rollout.kept, KeptStates)
    trainer.update(rollout, scores)
    assert rollout.kept is None


@pytest.mark.parametrize("kind", ["prompt", "full"])
def test_trained_embeddings_leave_nothing_frozen(kind):
    model = deep_model()
    tuned(model, kind)
    assert frozen_below(model) == 0
    assert make_trainer(kind, model=deep_model()).frozen == 0


# ------------------------------------------------------------------------------ the same numbers


SAME = {
    "plain": {},
    "dora": {"kind": "dora", "blocks": 2},
    "checkpointed": {"grad_checkpoint": True},
    "padded": {"pad_to_multiple": 16},
    "small minibatches": {"mini_batch_size": 2, "gradient_accumulation_steps": 2},
    "whole KL": {"kl_penalty": "full"},
    "not those of sampling": {"rollout_logprobs": False},
}


@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_ppo_moves_as_without(options):
    assert_close(moved("ppo", False, **options), moved("ppo", True, **options), relative=1e-5)


PAIRS = {"online_dpo": True, "num_generations": 2, "beta": 0.1}


@pytest.mark.parametrize("options", [{"beta": 0.1}, {"ppo_epochs": 3}, PAIRS], ids=str)
def test_group_methods_move_as_without(options):
    batch = random_groups(size=options.get("num_generations", 4))
    ours, theirs = (moved("group", on, batch, **options) for on in (False, True))
    assert_close(ours, theirs, relative=1e-5)


def test_the_same_shapes_give_the_same_bits():
    """One minibatch of all rows, in their order: every pass has the rows of the first one."""
    batch, found = random_batch(length=5), []
    for recompute in (False, True):
        trainer = make_trainer(
            model=deep_model(), blocks=1, mini_batch_size=8, recompute_frozen=recompute
        )
        trainer.minibatch_order = lambda epoch: np.arange(8)
        found.append(movement(trainer, *batch))
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][name], err_msg=name)


def test_compiled_updates_take_the_states():
    batch = random_batch(length=5)  # one shape
    ours = moved("ppo", False, batch, compile=True, pad_to_multiple=16, ppo_epochs=1)
    assert_close(ours, moved("ppo", True, batch, ppo_epochs=1), relative=1e-5)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_every_architecture_is_split_or_left_whole(architecture):
    """Windows, experts and state spaces too; longer texts than the trial has."""
    model = tiny_model(architecture)
    model.eval()
    tuned(model, "lora", blocks=1)
    first = frozen_below(model)
    assert first == len(model.layers) - 1
    tokens = mx.array(np.random.default_rng(0).integers(2, 60, (3, 21)))
    whole = hidden_states(model, tokens)
    with entered(model, first, entering_states(model, first, tokens)):
        parts = hidden_states(model, tokens)
    np.testing.assert_array_equal(np.array(parts), np.array(whole))


def test_a_block_that_hands_on_more_is_left_whole(monkeypatch):
    model = deep_model()
    tuned(model, "lora", blocks=1)
    kind, first = type(model.layers[0]), model.layers[0]
    call, seen = kind.__call__, {}

    def with_memory(block, x, *args, **kwargs):
        """Blocks above read what the first one left for them, as where keys are shared."""
        if block is first:
            seen["x"] = x
        return call(block, x, *args, **kwargs) + seen["x"]

    monkeypatch.setattr(kind, "__call__", with_memory)
    assert frozen_below(model) == 0


def test_half_precision_keeps_half_precision():
    model = deep_model()
    model.set_dtype(mx.bfloat16)
    trainer = make_trainer(model=model, blocks=1)
    tokens = mx.array([[3, 4, 5], [6, 7, 8]])
    _, states = KeptStates(model, trainer.frozen, 2).below([0, 1], tokens)
    assert states.dtype == mx.bfloat16
    batch = random_batch()
    ours, theirs = (moved("ppo", on, batch, model=halved()) for on in (False, True))
    assert_close(ours, theirs, relative=0.05)  # eight bits of mantissa, rows in other batches


def halved():
    model = deep_model()
    model.set_dtype(mx.bfloat16)
    return model


# ------------------------------------------------------------------------------ rows, lengths


def test_rows_in_other_batches_and_lengths():
    model = deep_model()
    model.eval()
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 60, (4, 9))
    whole = np.array(entering_states(model, 2, mx.array(tokens)))
    kept = KeptStates(model, 2, 4)
    kept.below([0, 1], mx.array(tokens[:2, :6]))
    first, states = kept.below([2, 0, 3], mx.array(tokens[[2, 0, 3]]))  # row 0 has 6 of its own
    assert first == 2 and states.shape == (3, 9, 32)
    np.testing.assert_allclose(np.array(states)[[0, 2]], whole[[2, 3]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.array(states)[1, :6], whole[0, :6], rtol=1e-5, atol=1e-5)
    assert np.isfinite(np.array(states)).all()
    _, short = kept.below([1, 3], mx.array(tokens[[1, 3], :4]))
    np.testing.assert_allclose(np.array(short), whole[[1, 3], :4], rtol=1e-5, atol=1e-5)
