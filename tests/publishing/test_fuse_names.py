"""A fused folder has the names and shapes that transformers expects, whatever the base's form."""

import json

import mlx.core as mx
import pytest
from fuse_setup import fuse, make_adapter
from tiny import tiny_model_folder

from errors import UserError
from models import family_names
from models.file_checks import safetensors_header
from models.load import load_model
from models.model_folders import write_model

# architecture -> some names and shapes as transformers 5 writes them (E experts of 4)
EXPECTED = {
    "mixtral": {
        "model.layers.1.block_sparse_moe.experts.3.w1.weight": [64, 32],
        "model.layers.1.block_sparse_moe.experts.3.w2.weight": [32, 64],
        "model.layers.1.block_sparse_moe.experts.3.w3.weight": [64, 32],
    },
    "olmoe": {
        "model.layers.0.mlp.experts.0.gate_proj.weight": [64, 32],
        "model.layers.1.mlp.experts.3.down_proj.weight": [32, 64],
    },
    "qwen2_moe": {
        "model.layers.0.mlp.experts.2.up_proj.weight": [32, 32],
        "model.layers.1.mlp.shared_expert.up_proj.weight": [32, 32],
    },
    "qwen3_moe": {"model.layers.1.mlp.experts.1.down_proj.weight": [32, 32]},
    "gpt_oss": {
        "model.layers.1.mlp.experts.gate_up_proj": [4, 32, 128],
        "model.layers.1.mlp.experts.gate_up_proj_bias": [4, 128],
        "model.layers.1.mlp.experts.down_proj": [4, 64, 32],
    },
    "gpt_neox": {
        "gpt_neox.layers.1.attention.dense.weight": [32, 32],
        "gpt_neox.embed_in.weight": [296, 32],
        "embed_out.weight": [296, 32],
    },
    "gpt2": {"h.1.attn.c_attn.weight": [32, 96], "wte.weight": [296, 32]},
    "opt": {
        "model.decoder.layers.1.fc1.weight": [64, 32],
        "model.decoder.embed_tokens.weight": [296, 32],
    },
    "mamba": {"backbone.layers.1.mixer.conv1d.weight": [64, 1, 4]},
    "lfm2": {"model.layers.0.conv.conv.weight": [32, 1, 3]},
}


def shapes(folder) -> dict[str, list[int]]:
    files = folder.glob("model*.safetensors")
    return {n: e["shape"] for file in files for n, e in safetensors_header(file).items()}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_names_and_shapes_of_the_family(architecture, tmp_path):
    """From a base in mlx-lm's form, and again from what was written."""
    base = tiny_model_folder(tmp_path / "base", architecture=architecture)
    before = shapes(base)
    assert not EXPECTED[architecture].items() <= before.items()
    make_adapter(tmp_path / "a.npz", "lora", base)
    fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "fused")
    written = shapes(tmp_path / "fused")
    assert EXPECTED[architecture].items() <= written.items()
    assert not [name for name in written if "switch_mlp" in name]
    make_adapter(tmp_path / "b.npz", "lora", tmp_path / "fused")
    fuse(tmp_path, "--adapter-file", "b.npz", "--save-path", "again")
    assert shapes(tmp_path / "again") == written


@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "qwen2_moe"])
def test_what_transformers_would_fill_with_random_numbers_is_refused(
    architecture, tmp_path, monkeypatch
):
    base = tiny_model_folder(tmp_path / "base", architecture=architecture)
    loaded = load_model(base, dtype="stored")
    write_model(_made(tmp_path / "theirs"), loaded)
    loaded = load_model(tmp_path / "theirs", dtype="stored")
    whole = family_names.family_weights(loaded)
    expert = next(name for name in whole if ".experts.1." in name)
    cases = {
        "stacked": {n.replace("experts.", "switch_mlp."): a for n, a in whole.items()},
        "lost": {n: a for n, a in whole.items() if n != expert},
        "turned": {**whole, expert: mx.zeros((48, 16))},
        "renamed": {n.replace("q_proj", "query"): a for n, a in whole.items()},
    }
    for name, arrays in cases.items():
        folder = _made(tmp_path / name)
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)
        with pytest.raises(UserError, match="random numbers"):
            family_names.check_names(folder, loaded)
    mx.save_safetensors(str(_made(tmp_path / "whole") / "model.safetensors"), whole)
    family_names.check_names(tmp_path / "whole", loaded)


def _made(folder):
    folder.mkdir()
    return folder


def test_quantised_weights_are_mlx_s_and_it_is_said(tmp_path):
    base = tiny_model_folder(tmp_path / "base", architecture="mixtral")
    write_model(_made(tmp_path / "four"), load_model(base, quantize=4, dtype="stored"))
    make_adapter(tmp_path / "a.npz", "lora", tmp_path / "four")
    out = fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "fused")
    assert "transformers cannot read MLX's quantised weights" in out
    out = fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "plain", "--dequantize")
    assert "transformers cannot" not in out
    assert EXPECTED["mixtral"].items() <= shapes(tmp_path / "plain").items()
    assert "quantization" not in json.loads((tmp_path / "plain" / "config.json").read_text())
