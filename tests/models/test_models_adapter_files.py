"""Files of adapters and heads, which describe themselves."""

import json
import time

import mlx.core as mx
import numpy as np
import pytest
from adapters import TOKENS, shake
from tiny import bare, flat, tiny_model, tiny_model_folder

from errors import UserError
from models.adapter_description import HEADS
from models.adapter_files import (
    head_path,
    load_adapter,
    read_adapter,
    read_head,
    save_adapter,
    save_head,
)
from models.array_files import write_arrays
from models.load import load_model
from models.lora import LoraConfig, add_lora
from models.soft_prompt import SoftPrompt
from models.tuning import FullTuning

PLACES = ["peft.npz", "peft.safetensors", "folder"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_comes_back_as_it_was(tmp_path, place, use_dora):
    model = tiny_model()
    config = LoraConfig(3, 2.5, 0.1, ["q_proj", "mlp.up_proj"], num_layers=1, use_dora=use_dora)
    adapter = add_lora(model, config)
    shake(adapter)
    path = tmp_path / "new" / place
    for file in save_adapter(path, adapter, bare(model, "some/base")):
        assert file.is_file()
    arrays, described = read_adapter(path)
    assert described == {
        "base_quantization": None,
        "fine_tune_type": "dora" if use_dora else "lora",
        "num_layers": 1,
        "lora_parameters": {
            "rank": 3,
            "scale": 2.5,
            "dropout": 0.1,
            "keys": ["mlp.up_proj", "self_attn.q_proj"],
        },
        "model": "some/base",
    }
    assert arrays.keys() == adapter.arrays().keys()
    other = tiny_model()
    loaded = load_adapter(bare(other), path)
    np.testing.assert_array_equal(other(TOKENS), model(TOKENS))
    assert set(loaded.layers) == set(adapter.layers)
    assert set(flat(other.trainable_parameters())) == set(adapter.arrays())


@pytest.mark.parametrize("place", PLACES)
def test_a_soft_prompt_comes_back_as_it_was(tmp_path, place):
    model = tiny_model()
    prompt = SoftPrompt(model, 3)
    save_adapter(tmp_path / place, prompt, bare(model))
    assert read_adapter(tmp_path / place)[1]["num_prompt_tokens"] == 3
    other = tiny_model()
    loaded = load_adapter(bare(other), tmp_path / place)
    tokens = mx.array([[*loaded.prefix, 5, 9]])
    np.testing.assert_array_equal(other(tokens), model(tokens))


@pytest.mark.parametrize("place", PLACES)
def test_full_weights_come_back_as_they_were(tmp_path, place):
    model = tiny_model(seed=1)
    save_adapter(tmp_path / place, FullTuning(model), bare(model))
    other = tiny_model(seed=2)
    load_adapter(bare(other), tmp_path / place)
    np.testing.assert_array_equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("use_dora", [False, True])
def test_mlx_lms_own_loader_takes_our_folder(tmp_path, use_dora):
    import mlx_lm

    folder = tiny_model_folder(tmp_path / "model")
    loaded = load_model(folder)
    adapter = add_lora(loaded.model, LoraConfig(rank=2, num_layers=1, use_dora=use_dora))
    shake(adapter)
    save_adapter(tmp_path / "adapter", adapter, loaded)
    save_head(tmp_path / "adapter", "value_head", {"weight": mx.ones((1, 32))}, {})
    model, _ = mlx_lm.load(str(folder), adapter_path=str(tmp_path / "adapter"))
    np.testing.assert_allclose(model(TOKENS), loaded.model(TOKENS), atol=1e-6)


def test_we_take_the_folder_that_mlx_lm_writes(tmp_path):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = tiny_model()
    settings = {"rank": 2, "scale": 5.0, "dropout": 0.0}
    linear_to_lora_layers(model, 1, settings)
    model.layers[1].self_attn.q_proj.lora_b = mx.ones((2, 32))
    arrays = {k: v for k, v in flat(model.parameters()).items() if "lora_" in k}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = tiny_model()
    load_adapter(bare(other), tmp_path)
    np.testing.assert_array_equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("place", PLACES)
def test_equal_arrays_make_equal_bytes_in_whatever_order(tmp_path, place):
    model = tiny_model()
    adapter = add_lora(model, LoraConfig(rank=2))
    arrays = adapter.arrays()
    first = {f.name: f.read_bytes() for f in save_adapter(tmp_path / place, adapter, bare(model))}
    if place.endswith(".npz"):
        time.sleep(2.1)  # zip archives keep times to 2 seconds
    adapter.arrays = lambda: dict(reversed(arrays.items()))
    again = {f.name: f.read_bytes() for f in save_adapter(tmp_path / place, adapter, bare(model))}
    assert first == again
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(first)


def test_the_same_seed_makes_the_same_bytes(tmp_path):
    files = []
    for name in "ab":
        mx.random.seed(7)
        model = tiny_model()
        adapter = add_lora(model, LoraConfig(rank=2))
        files += save_adapter(tmp_path / f"{name}.safetensors", adapter, bare(model))
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"x": mx.ones(3)}, {})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_arrays(path, {"x": mx.zeros(3)}, {"described": object()})
    assert path.read_bytes() == before


def test_bfloat16_survives_a_npz_as_float32(tmp_path):
    write_arrays(tmp_path / "a.npz", {"x.lora_a": mx.array([1.5, -2.25], dtype=mx.bfloat16)}, {})
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file["x.lora_a"].tolist() == [1.5, -2.25]


def test_a_file_without_a_description_is_read_off_its_names_and_shapes(tmp_path):
    model = tiny_model()
    adapter = add_lora(model, LoraConfig(rank=3, num_layers=1, keys=["q_proj"]))
    shake(adapter)
    mx.savez(str(tmp_path / "old.npz"), **adapter.arrays())
    other = tiny_model()
    load_adapter(bare(other), tmp_path / "old.npz")
    np.testing.assert_array_equal(other(TOKENS), model(TOKENS))


def test_an_adapter_for_another_model_lists_what_does_not_fit(tmp_path):
    model = tiny_model()
    save_adapter(tmp_path / "a.npz", add_lora(model, LoraConfig(rank=2)), bare(model))
    with pytest.raises(UserError) as caught:
        load_adapter(bare(tiny_model(hidden_size=16)), tmp_path / "a.npz")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.npz'}: does not fit the model: ")
    for layer in (0, 1):
        assert (
            f"layers.{layer}.self_attn.q_proj.lora_a is (32, 2) in the file and (16, 2)" in message
        )


@pytest.mark.parametrize(
    "config, said",
    [
        ({"fine_tune_type": "lora"}, "lora_parameters"),
        ({"fine_tune_type": "prefix"}, "none of lora, dora, full, prompt"),
        ({"fine_tune_type": "prompt"}, "num_prompt_tokens"),
        ({"lora_parameters": {"rank": "many", "scale": 1}}, "not usable"),
        ({"lora_parameters": {"rank": 2**31, "scale": 1}}, "not usable"),
        ({"lora_parameters": {"rank": 2, "scale": 10**400}}, "not usable"),
        ({"fine_tune_type": "prompt", "num_prompt_tokens": 2**31}, "not usable"),
        ([1, 2], "holds no JSON object"),
    ],
)
def test_an_unusable_description_is_one_line(tmp_path, config, said):
    write_arrays(tmp_path / "adapters.safetensors", {"x.lora_a": mx.ones((2, 2))}, {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if config and "fine_tune_type" in config and config["fine_tune_type"] == "prompt":
        write_arrays(tmp_path / "soft_prompt.safetensors", {"soft_prompt": mx.ones((2, 2))}, {})
    with pytest.raises(UserError, match=said) as caught:
        load_adapter(bare(tiny_model()), tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_adapter(tmp_path / "none.npz")
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        read_adapter(tmp_path)
    (tmp_path / "adapter.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="is a .npz or .safetensors file, or a folder"):
        read_adapter(tmp_path / "adapter.bin")
    write_arrays(tmp_path / "other.npz", {"x": mx.ones(2)}, {})
    with pytest.raises(UserError, match="holds no adapter"):
        read_adapter(tmp_path / "other.npz")


@pytest.mark.parametrize(
    "place, head",
    [("a.npz", "a.value_head.safetensors"), ("folder", "folder/value_head.safetensors")],
)
def test_heads_lie_beside_an_adapter(tmp_path, place, head):
    path = tmp_path / place
    assert head_path(path, "value_head") == tmp_path / head
    assert read_head(path, "value_head") is None
    save_head(path, "value_head", {"weight": mx.arange(3)}, {"pooling": "last"})
    arrays, described = read_head(path, "value_head")
    assert arrays["weight"].tolist() == [0, 1, 2] and described == {"pooling": "last"}


def save_with(head: str | None, path) -> None:
    """An adapter, and a head that is saved with it."""
    model = tiny_model()
    save_adapter(path, add_lora(model, LoraConfig(rank=2)), bare(model), head=head)
    if head is not None:
        save_head(path, head, {"weight": mx.ones(2)}, {})


def heads_at(path) -> list[str]:
    return [name for name in HEADS if head_path(path, name).exists()]


@pytest.mark.parametrize("place", PLACES)
def test_the_heads_of_an_adapter_go_with_it(tmp_path, place, recwarn):
    """One of the same kind is written anew; of another one that goes the user is told."""
    path, other = tmp_path / place, tmp_path / f"other-{place}"
    for head in ("reward_head", "reward_head", None, "value_head"):
        save_with(head, path)
        assert heads_at(path) == [head] * (head is not None)
    save_with("reward_head", other)
    assert len(recwarn) == 1 and "reward_head.safetensors was removed" in str(recwarn[0].message)
    with pytest.warns(UserWarning, match="value_head.safetensors was removed: it belonged to the"):
        save_with("reward_head", path)
    assert heads_at(path) == heads_at(other) == ["reward_head"]


def test_a_head_that_may_belong_elsewhere_stays(tmp_path, recwarn):
    """To the other file of the same name, or to a fused model in whose folder an adapter is put."""
    save_with("reward_head", tmp_path / "a.npz")
    save_with(None, tmp_path / "a.safetensors")
    save_head(tmp_path / "fused", "reward_head", {"weight": mx.ones(2)}, {})
    (tmp_path / "fused" / "config.json").write_text("{}")
    save_with(None, tmp_path / "fused")
    assert heads_at(tmp_path / "a.npz") == heads_at(tmp_path / "fused") == ["reward_head"]
    assert not recwarn.list
