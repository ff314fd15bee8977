"""Adapters that go in and out of one base model."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapters import TOKENS, shake
from mlx.utils import tree_flatten
from tiny import flat, tiny_model

from errors import UserError
from models.load import weight_bytes
from models.lora import LoraConfig, add_lora, linear_keys, path_in_block
from models.tuning import FullTuning


def module_types(model) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize("use_dora", [False, True])
def test_off_is_the_base_model_itself(use_dora):
    model = tiny_model()
    types, base = module_types(model), model(TOKENS)
    ids = {id(array) for array in flat(model.parameters()).values()}
    adapter = add_lora(model, LoraConfig(rank=2, use_dora=use_dora))
    np.testing.assert_allclose(model(TOKENS), base, atol=1e-5)  # fresh: no effect
    shake(adapter)
    adapted = model(TOKENS)
    assert mx.abs(adapted - base).max().item() > 0.1
    adapter.deactivate()
    assert module_types(model) == types  # off costs nothing: nothing of it is in the tree
    assert {id(array) for array in flat(model.parameters()).values()} == ids
    np.testing.assert_array_equal(model(TOKENS), base)
    adapter.activate()
    np.testing.assert_array_equal(model(TOKENS), adapted)


def test_disabled_restores_what_was_there():
    model = tiny_model()
    base = model(TOKENS)
    adapter = add_lora(model, LoraConfig(rank=2))
    shake(adapter)
    with pytest.raises(RuntimeError), adapter.disabled():
        np.testing.assert_array_equal(model(TOKENS), base)
        raise RuntimeError
    assert adapter.active and mx.abs(model(TOKENS) - base).max().item() > 0.1
    adapter.deactivate()
    with adapter.disabled():
        pass
    assert not adapter.active


def test_two_adapters_share_one_base():
    model = tiny_model()
    base, size = model(TOKENS), weight_bytes(model.parameters())
    outputs, adapters = [], []
    for seed in (1, 2):
        adapter = add_lora(model, LoraConfig(rank=2, keys=["q_proj", "down_proj"]))
        shake(adapter, seed)
        outputs.append(model(TOKENS))
        adapter.deactivate()
        adapters.append(adapter)
    assert mx.abs(outputs[0] - outputs[1]).max().item() > 0.1
    for _ in range(2):
        for adapter, output in zip(adapters, outputs, strict=True):
            adapter.activate()
            np.testing.assert_array_equal(model(TOKENS), output)
            adapter.deactivate()
            np.testing.assert_array_equal(model(TOKENS), base)
    own = sum(a.nbytes for adapter in adapters for a in adapter.arrays().values())
    adapters[0].activate()
    trees = [model.parameters()] + [
        layer.parameters() for adapter in adapters for layer in adapter.layers.values()
    ]
    assert weight_bytes(*trees) == size + own


def test_a_second_adapter_while_one_is_on_is_refused():
    model = tiny_model()
    add_lora(model, LoraConfig(rank=2))
    with pytest.raises(UserError, match="has an adapter in it already"):
        add_lora(model, LoraConfig(rank=2))


def test_only_the_adapter_is_trainable():
    model = tiny_model()
    model.unfreeze()
    adapter = add_lora(model, LoraConfig(rank=2, num_layers=1, keys=["q_proj", "self_attn.v_proj"]))
    trainable = flat(model.trainable_parameters())
    assert set(trainable) == set(adapter.arrays())
    assert set(trainable) == {
        f"model.layers.1.self_attn.{key}.{leaf}"
        for key in ("q_proj", "v_proj")
        for leaf in ("lora_a", "lora_b")
    }
    assert adapter.description(2)["num_layers"] == 1
    assert all(a.dtype == mx.float32 for a in trainable.values())


def test_default_keys_are_all_linear_layers_of_a_block():
    model = tiny_model("mixtral")
    keys = linear_keys(model)
    assert {path_in_block(path) for path in add_lora(model, LoraConfig(rank=2)).layers} == set(keys)
    assert "block_sparse_moe.switch_mlp.up_proj" in keys and len(keys) == 8
    # mlx-lm has no DoRA for experts.
    dora = add_lora(tiny_model("mixtral"), LoraConfig(rank=2, use_dora=True))
    assert not any("switch_mlp" in path for path in dora.layers)


def test_a_wrong_key_is_refused_with_the_right_ones():
    with pytest.raises(UserError, match=r"--lora-keys query: no such layer; .*self_attn\.q_proj"):
        add_lora(tiny_model(), LoraConfig(keys=["q_proj", "query"]))
    with pytest.raises(UserError, match="no such layer"):
        add_lora(tiny_model(), LoraConfig(keys=["proj"]))  # no part of a name will do


def test_scale_multiplies_the_adapters_output():
    model = tiny_model(num_hidden_layers=1)
    layer = model.layers[0].self_attn.o_proj
    x = mx.random.normal((3, 32))
    base = layer(x)
    adapter = add_lora(model, LoraConfig(rank=4, scale=2.5, keys=["o_proj"]))
    shake(adapter)
    lora = model.layers[0].self_attn.o_proj
    np.testing.assert_allclose(
        lora(x), base + 2.5 * (x @ lora.lora_a @ lora.lora_b), rtol=1e-4, atol=1e-5
    )


def test_every_mismatch_is_listed_with_both_shapes():
    model = tiny_model()
    adapter = add_lora(model, LoraConfig(rank=2, num_layers=1, keys=["q_proj", "k_proj"]))
    before = {k: np.array(v) for k, v in adapter.arrays().items()}
    arrays = adapter.arrays()
    arrays["model.layers.1.self_attn.q_proj.lora_a"] = mx.ones((32, 5))
    arrays.pop("model.layers.1.self_attn.k_proj.lora_b")
    arrays["model.layers.7.mlp.up_proj.lora_a"] = mx.ones((64, 2))
    with pytest.raises(UserError) as caught:
        adapter.load_arrays(arrays, "some.npz")
    message = str(caught.value)
    assert message.startswith("some.npz: does not fit the model: ")
    assert "q_proj.lora_a is (32, 5) in the file and (32, 2) in the model" in message
    assert "k_proj.lora_b (2, 16) is missing" in message
    assert "model.layers.7.mlp.up_proj.lora_a (64, 2) has no place in this model" in message
    for name, array in adapter.arrays().items():  # nothing was taken over
        np.testing.assert_array_equal(array, before[name])


def test_arrays_of_half_precision_are_trained_in_float32():
    adapter = add_lora(tiny_model(), LoraConfig(rank=2))
    half = {k: mx.ones(v.shape, dtype=mx.bfloat16) for k, v in adapter.arrays().items()}
    adapter.load_arrays(half)
    assert {v.dtype for v in adapter.arrays().values()} == {mx.float32}
    assert all((v == 1).all().item() for v in adapter.arrays().values())


def test_dropout_is_off_until_training_begins():
    model = tiny_model()
    adapter = add_lora(model, LoraConfig(rank=8, dropout=0.5))
    shake(adapter)
    first, second = model(TOKENS), model(TOKENS)
    np.testing.assert_array_equal(first, second)
    model.train()
    assert mx.abs(model(TOKENS) - model(TOKENS)).max().item() > 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_reach_an_adapter_on_a_quantised_base(bits):
    model = tiny_model()
    nn.quantize(model, 32, bits)
    base = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    adapter = add_lora(model, LoraConfig(rank=2))
    shake(adapter)
    _, gradients = nn.value_and_grad(model, lambda: model(TOKENS).square().mean())()
    assert set(flat(gradients)) == set(adapter.arrays())
    assert all(mx.abs(g).max().item() > 0 for g in flat(gradients).values())
    adapter.deactivate()
    assert flat(model.parameters()).keys() == base.keys()
    for name, array in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(array, base[name])


def test_full_tuning_has_no_base_to_go_back_to():
    model = tiny_model()
    tuning = FullTuning(model)
    assert set(flat(model.trainable_parameters())) == set(flat(model.parameters()))
    with pytest.raises(RuntimeError, match="no base to go back to"), tuning.disabled():
        pass
    nn.quantize(model, 32, 4)
    with pytest.raises(UserError, match="quantised model cannot be fully fine-tuned"):
        FullTuning(model)
