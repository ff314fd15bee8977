"""Adapters say what they were trained on; settings that are not understood and NaN are refused."""

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from adapters import peft_arrays, write_peft
from fuse_setup import fuse, largest, logits, make_adapter, make_tuning

from errors import UserError
from models.adapter_files import load_adapter, read_adapter, read_head, save_adapter, save_head
from models.load import load_model
from models.parts import load_parts

Q = {"0.self_attn.q_proj": (4, 64, 64)}


# ------------------------------------------------------------------------------ quantisation


def quantized_adapter(path, bits):
    loaded = load_model(quantize=bits)
    tuning = make_tuning(loaded, "lora")
    save_adapter(path, tuning, loaded)
    return loaded, tuning


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_records_the_rounding_of_its_base(bits, tmp_path):
    loaded, _ = quantized_adapter(tmp_path / "a.npz", bits)
    expected = logits(loaded.model, loaded.tokenizer)
    assert read_adapter(tmp_path / "a.npz")[1]["base_quantization"]["bits"] == bits
    with pytest.warns(UserWarning, match=f"rounded to {bits} bits.*--quantize {bits} gives"):
        load_adapter(load_model(), tmp_path / "a.npz")
    with pytest.warns(UserWarning, match=f"rounded to {bits} bits"):
        load_adapter(load_model(quantize=12 - bits), tmp_path / "a.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(load_model(quantize=bits), tmp_path / "a.npz")
    line = ("--adapter-file", "a.npz", "--save-path")
    fuse(tmp_path, *line, "what_was_trained", "--quantize", bits, "--dequantize")
    fused = load_model(tmp_path / "what_was_trained", dtype="stored")
    assert largest(expected, logits(fused.model, fused.tokenizer)) < 1e-4
    with pytest.warns(UserWarning, match=f"--quantize {bits}"):
        fuse(tmp_path, *line, "elsewhere")
    other = load_model(tmp_path / "elsewhere", dtype="stored")
    assert largest(expected, logits(other.model, other.tokenizer)) > (1e-2 if bits == 4 else 1e-3)
    fuse(tmp_path, *line, "small", "--quantize", bits)
    small = json.loads((tmp_path / "small" / "config.json").read_text())
    assert small["quantization"]["bits"] == bits


def test_an_adapter_of_whole_weights_on_rounded_ones_is_said(tmp_path):
    make_adapter(tmp_path / "a.npz", "lora")
    with pytest.warns(UserWarning, match="weights as they are stored"):
        load_adapter(load_model(quantize=4), tmp_path / "a.npz")


def test_quantize_that_changes_nothing_is_refused(tmp_path):
    make_adapter(tmp_path / "a.npz", "lora")
    words = ("--adapter-file", "a.npz", "--save-path", "x", "--quantize", 4)
    assert "no effect" in fuse(tmp_path, *words, "--format", "peft", status=2)
    assert "add --dequantize" in fuse(tmp_path, *words, "--format", "gguf", status=2)
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------ PEFT


@pytest.mark.parametrize(
    "name, value",
    [
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"rank": 2}),
        ("bias", "lora_only"),
        ("alora_invocation_tokens", [3]),
        ("arrow_config", {"top_k": 2}),
        ("lora_bias", True),
        ("invented_next_year", 0.5),
        ("init_lora_weights", "lora_ga"),
        ("fan_in_fan_out", True),
        ("velora_config", {"rank": 1}),
        ("ensure_weight_tying", True),
    ],
)
def test_settings_that_are_not_understood_are_refused(name, value, tmp_path):
    write_peft(tmp_path / "a", peft_arrays(Q), **{name: value})
    with pytest.raises(UserError, match=name):
        load_adapter(load_model(), tmp_path / "a")


def test_settings_that_change_nothing_are_taken(tmp_path):
    """All that peft 0.21.2 writes by default, and what concerns training alone."""
    written = {
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "peft_version": "0.21.2",
        "revision": None,
        "base_model_name_or_path": "USER/NAME",
        "inference_mode": True,
        "target_modules": ["q_proj"],
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "bias": "none",
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "trainable_token_indices": None,
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "use_dora": False,
        "velora_config": None,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "qalora_group_size": 16,
        "monteclora_config": None,
        "layer_replication": None,
        "lora_bias": False,
        "target_parameters": None,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
        "ensure_weight_tying": False,
    }
    write_peft(tmp_path / "a", peft_arrays(Q), **written)
    assert load_adapter(load_model(), tmp_path / "a").kind == "lora"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 16}, "has rank 4, and adapter_config.json says 16"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank 4, and adapter_config.json says 2"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
    ],
)
def test_arrays_that_are_not_what_the_settings_say_are_refused(tmp_path, settings, says):
    write_peft(tmp_path / "a", peft_arrays(Q), **settings)
    with pytest.raises(UserError, match=f"self_attn.q_proj {says}"):
        load_adapter(load_model(), tmp_path / "a")


def test_prompt_tuning_is_looked_at_too(tmp_path):
    rows = {"prompt_embeddings": mx.ones((2, 64))}
    settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
    write_peft(tmp_path / "a", rows, **settings)
    assert load_adapter(load_model(), tmp_path / "a").kind == "prompt"
    write_peft(tmp_path / "b", rows, **settings, num_transformer_submodules=2)
    with pytest.raises(UserError, match="num_transformer_submodules 2"):
        load_adapter(load_model(), tmp_path / "b")


# ------------------------------------------------------------------------------ NaN


@pytest.mark.parametrize("kind", ["lora", "dora", "prompt", "full"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ""])
def test_adapters_with_nan_are_refused(kind, suffix, tmp_path):
    loaded = load_model()
    tuning = make_tuning(loaded, kind)
    arrays = tuning.arrays()
    name = sorted(arrays)[-1]
    broken = np.array(arrays[name])
    broken.flat[5] = np.nan
    tuning.load_arrays = None
    tuning.arrays = lambda: {**arrays, name: mx.array(broken)}
    save_adapter(tmp_path / f"a{suffix}", tuning, loaded)
    with pytest.raises(UserError, match=f"1 of the {broken.size} values of {name} are NaN"):
        load_adapter(load_model(), tmp_path / f"a{suffix}")
    with pytest.raises(UserError, match="NaN"):
        load_parts(None, [str(tmp_path / f"a{suffix}")], [1.0])


def test_peft_adapters_and_heads_with_nan_are_refused(tmp_path):
    arrays = peft_arrays(Q)
    name = next(name for name in arrays if "lora_B" in name)
    arrays[name][0, 0] = mx.inf
    write_peft(tmp_path / "a", arrays)
    with pytest.raises(UserError, match="NaN or infinite"):
        load_adapter(load_model(), tmp_path / "a")
    for head in ("reward_head", "value_head"):
        weight = {"weight": mx.array([[1.0, mx.nan]]), "bias": mx.zeros((1,))}
        save_head(tmp_path / "b.npz", head, weight, {})
        with pytest.raises(UserError, match="1 of the 2 values of weight are NaN"):
            read_head(tmp_path / "b.npz", head)
