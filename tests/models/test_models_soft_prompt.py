"""Virtual tokens in front of every sequence."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import flat, tiny_model

from errors import UserError
from models.decoding import Sampling, generate
from models.soft_prompt import SoftPrompt
from models.trunk import find_trunk, hidden_states

TOKENS = [5, 9, 60, 3]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "gpt2"])
def test_virtual_tokens_act_as_the_rows_they_hold(architecture):
    model = tiny_model(architecture)
    base = model(mx.array([TOKENS]))
    prompt = SoftPrompt(model, 3)
    assert prompt.prefix == (64, 65, 66)
    owner, name = find_trunk(model)
    embedding = next(m for m in owner[name].values() if hasattr(m, "prompt")).embedding
    prompt.load_arrays({"soft_prompt": embedding.weight[mx.array([7, 8, 21])]})
    found = model(mx.array([[*prompt.prefix, *TOKENS]]))
    assert found.shape[-1] == base.shape[-1]  # virtual tokens are never written
    prompt.deactivate()
    assert prompt.prefix == ()
    np.testing.assert_array_equal(model(mx.array([TOKENS])), base)
    np.testing.assert_allclose(found, model(mx.array([[7, 8, 21, *TOKENS]])), atol=1e-5)


def test_they_begin_as_rows_of_the_vocabulary():
    model = tiny_model()
    weight = np.array(model.model.embed_tokens.weight)
    rows = np.array(SoftPrompt(model, 4).arrays()["soft_prompt"])
    assert rows.shape == (4, 32)
    assert all((weight == row).all(axis=1).any() for row in rows)


def test_only_the_prompt_is_trained():
    model = tiny_model()
    prompt = SoftPrompt(model, 2)
    assert set(flat(model.trainable_parameters())) == {"model.embed_tokens.prompt"}
    tokens = mx.array([[*prompt.prefix, *TOKENS]])
    _, gradient = nn.value_and_grad(model, lambda: hidden_states(model, tokens)[0, -1].sum())()
    assert mx.abs(flat(gradient)["model.embed_tokens.prompt"]).max(axis=1).min().item() > 0


def test_a_batch_of_different_lengths_writes_what_each_row_writes_alone():
    model = tiny_model()
    prompt = SoftPrompt(model, 3)
    prompts = [[*prompt.prefix, *row] for row in ([5], [9, 60, 3, 17, 4], [8, 2])]
    options = dict(max_tokens=6, eos_ids={1}, sampling=Sampling(0))
    together = generate(model, prompts, **options).responses
    assert together == [generate(model, [p], **options).responses[0] for p in prompts]


def test_a_quantised_base_has_room_for_them():
    model = tiny_model()
    nn.quantize(model, 32, 4)
    base = model(mx.array([TOKENS]))
    prompt = SoftPrompt(model, 2)
    assert prompt.prefix == (64, 65) and prompt.arrays()["soft_prompt"].shape == (2, 32)
    changed = model(mx.array([[*prompt.prefix, *TOKENS]]))
    assert mx.abs(changed[:, 2:] - base).max().item() > 0.01
    prompt.deactivate()
    np.testing.assert_array_equal(model(mx.array([TOKENS])), base)


def test_a_prompt_of_another_size_is_refused():
    prompt = SoftPrompt(tiny_model(), 2)
    with pytest.raises(UserError, match=r"soft_prompt is \(3, 32\) in the file and \(2, 32\)"):
        prompt.load_arrays({"soft_prompt": mx.ones((3, 32))}, "file.npz")


def test_a_model_without_a_known_embedding_is_refused():
    model = tiny_model()
    model.model.symbols = model.model.pop("embed_tokens")
    with pytest.raises(UserError, match="model type llama: no token embedding found"):
        SoftPrompt(model, 2)
