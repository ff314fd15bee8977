"""Reward models: trunk, pooling, head; on a base of their own or on a shared one."""

import mlx.core as mx
import numpy as np
import pytest
from adapters import shake
from tiny import flat, tiny_model, tiny_model_folder

from errors import UserError
from models.adapter_files import save_adapter
from models.load import load_model, weight_bytes
from models.lora import LoraConfig, add_lora
from models.reward_model import (
    RewardModel,
    load_reward_model,
    normalise,
    save_reward_head,
)
from models.soft_prompt import SoftPrompt
from models.trunk import hidden_states

TEXTS = [[5, 9, 60, 3, 17], [8], [8, 2, 33], [1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_scores_are_the_heads_on_pooled_hidden_states(pooling):
    model = RewardModel(tiny_model(), pooling=pooling, gain=2.0, offset=-1.0)
    model.head["bias"] = mx.array([0.25])
    weight = np.array(model.head["weight"])[0]
    scores = model.score(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        states = np.array(hidden_states(model.model, mx.array([text]))[0])
        pooled = states.mean(axis=0) if pooling == "mean" else states[-1]
        assert score == pytest.approx(2.0 * (pooled @ weight + 0.25) - 1.0, abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_scores_do_not_depend_on_the_batch(pooling):
    model = RewardModel(tiny_model(), pooling=pooling)
    whole = model.score(TEXTS, batch_size=64)
    for size in (1, 2, 3):
        np.testing.assert_allclose(model.score(TEXTS, batch_size=size), whole, atol=1e-5)
    padded = model(mx.array([[*TEXTS[2], 9, 9, 9, 9]]), mx.array([3]))
    np.testing.assert_allclose(padded[0], whole[2], atol=1e-5)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(UserError, match="pooling 'max' is none of mean, last"):
        RewardModel(tiny_model(), pooling="max")


def test_scoring_has_no_dropout_whatever_mode_the_model_is_in():
    base = tiny_model()
    adapter = add_lora(base, LoraConfig(rank=8, dropout=0.5))
    shake(adapter)
    model = RewardModel(base, tuning=adapter)
    first = model.score(TEXTS)
    model.train()
    assert model.score(TEXTS) == first
    assert all(layer.training for layer in adapter.layers.values())  # as it was before
    adapter.deactivate()
    assert model.score(TEXTS) == first


def test_scoring_leaves_the_shared_base_as_it_found_it():
    base = tiny_model()
    before = {id(a) for a in flat(base.parameters()).values()}
    plain = RewardModel(base).score(TEXTS)
    adapter = add_lora(base, LoraConfig(rank=2))
    shake(adapter)
    adapter.deactivate()
    model = RewardModel(base, tuning=adapter)
    assert np.abs(np.array(model.score(TEXTS)) - plain).max() > 0.01
    assert not adapter.active
    assert {id(a) for a in flat(base.parameters()).values()} == before


def test_normalised_scores_have_mean_0_and_deviation_1():
    model = RewardModel(tiny_model(), gain=3.0, offset=7.0)
    normalise(model, TEXTS)
    scores = np.array(model.score(TEXTS))
    assert scores.mean() == pytest.approx(0, abs=1e-5)
    assert scores.std() == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="all samples have the same score"):
        normalise(model, [TEXTS[0], TEXTS[0]])


@pytest.fixture
def loaded(tmp_path):
    return load_model(tiny_model_folder(tmp_path / "model"))


def saved_adapter(loaded, path, pooling="last"):
    """A trained reward model's file; the base is left as it was."""
    adapter = add_lora(loaded.model, LoraConfig(rank=2, dropout=0.3))
    shake(adapter)
    model = RewardModel(loaded.model, tuning=adapter, pooling=pooling, gain=2.0, offset=0.5)
    save_adapter(path, adapter, loaded)
    save_reward_head(path, model)
    scores = model.score(TEXTS)
    adapter.deactivate()
    return scores


def test_an_adapter_shares_the_weights_of_the_policys_base(tmp_path, loaded):
    scores = saved_adapter(loaded, tmp_path / "reward.npz")
    size = weight_bytes(loaded.model.parameters())
    policy = add_lora(loaded.model, LoraConfig(rank=2))
    with policy.disabled():
        model = load_reward_model(tmp_path / "reward.npz", loaded)
    assert policy.active
    with policy.disabled():
        np.testing.assert_allclose(model.score(TEXTS), scores, atol=1e-5)
        assert not model.tuning.active
    assert (model.pooling, model.gain, model.offset) == ("last", 2.0, 0.5)
    # The policy is still trained, and nothing of the reward model is.
    assert set(flat(loaded.model.trainable_parameters())) == set(policy.arrays())
    own = [*policy.arrays().values(), *model.tuning.arrays().values(), *model.head.values()]
    trees = [
        loaded.model.parameters(),
        model.parameters(),
        *(layer.parameters() for layer in model.tuning.layers.values()),
    ]
    assert weight_bytes(*trees) == size + sum(a.nbytes for a in own)


def test_a_soft_prompt_may_score_too(tmp_path, loaded):
    prompt = SoftPrompt(loaded.model, 3)
    model = RewardModel(loaded.model, tuning=prompt)
    save_adapter(tmp_path / "p.npz", prompt, loaded)
    save_reward_head(tmp_path / "p.npz", model)
    scores = model.score(TEXTS)
    by_hand = model(mx.array([[*prompt.prefix, *TEXTS[0]]]), mx.array([8]))
    assert scores[0] == pytest.approx(by_hand.item(), abs=1e-5)
    prompt.deactivate()
    again = load_reward_model(tmp_path / "p.npz", loaded)
    np.testing.assert_allclose(again.score(TEXTS), scores, atol=1e-5)


def test_what_has_no_head_is_refused(tmp_path, loaded):
    adapter = add_lora(loaded.model, LoraConfig(rank=2))
    save_adapter(tmp_path / "a.npz", adapter, loaded)
    adapter.deactivate()
    with pytest.raises(UserError, match="has no reward head beside it"):
        load_reward_model(tmp_path / "a.npz", loaded)
    with pytest.raises(UserError, match="it needs its base model as well"):
        load_reward_model(tmp_path / "a.npz")
    with pytest.raises(UserError, match="no such reward model"):
        load_reward_model(tmp_path / "none", loaded)
