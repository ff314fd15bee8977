"""fuse.py: what is fused computes what was trained, in every form; nothing is overwritten."""

import errno
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from fuse_setup import fuse, fuse_process, greedy, largest, logits, make_adapter, make_tuning
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load
from tiny import tiny_model_folder

from errors import UserError
from models.adapter_files import read_adapter, save_adapter, save_head
from models.comparing import check_sequences
from models.fusing import Blend, blended, fuse_adapters
from models.load import load_model
from models.model_folders import check_free
from models.parts import load_parts
from models.reward_model import RewardModel, load_reward_model, save_reward_head
from publishing import export as export_module
from publishing.card_facts import CardChoices
from publishing.export import Check, export

FILES = {
    "lora": "lora.npz",
    "lora_file": "lora.safetensors",
    "dora": "dora_folder",
    "full": "full.npz",
}


def export_in_process(folder: Path, files, weights=None, **options):
    """What fuse.py does, without a process of its own."""
    model, dtype = options.pop("model", None), options.pop("dtype", "stored")
    files, weights = [str(file) for file in files], weights or [1.0] * len(files)
    parts = load_parts(model, files, weights, dtype=dtype)
    sequences = check_sequences(parts.base.tokenizer, parts.base.config["vocab_size"])
    check = Check(sequences, parts.outputs(sequences))
    form = options.pop("form", "model")
    return export(parts, folder, form, check, CardChoices("test"), **options)


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------------------ one adapter


@pytest.mark.parametrize("name", FILES)
def test_fused_computes_what_base_and_adapter_do(tmp_path, name):
    kind = name.partition("_")[0]
    loaded, tuning = make_adapter(tmp_path / FILES[name], kind)
    expected, texts = logits(loaded.model, loaded.tokenizer), greedy(loaded)
    run = fuse_process if name in ("lora", "full") else fuse
    out = run(tmp_path, "--adapter-file", FILES[name], "--save-path", "./fused/")
    model, tokenizer = mlx_lm_load(str(tmp_path / "fused"))
    assert largest(expected, logits(model, tokenizer)) < 1e-4
    assert greedy(load_model(tmp_path / "fused")) == texts
    base = load_model(dtype="stored")
    assert largest(expected, logits(base.model, base.tokenizer)) > 0.1  # the adapter did something
    said = float(out.split("fused against unfused: ")[1].split(";")[0])
    assert 0 <= said < 1e-4
    assert "python ppo_training.py --model fused" in out
    assert not left_behind(tmp_path)


def test_fused_folder_is_whole(tmp_path):
    make_adapter(tmp_path / "lora.npz", "lora")
    fuse(tmp_path, "--adapter-file", "lora.npz", "--save-path", "fused")
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == ["LlamaForCausalLM"]
    names = {path.name for path in (tmp_path / "fused").iterdir()}
    assert {
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "README.md",
    } <= names
    assert (tmp_path / "fused" / "tokenizer.json").read_bytes() == (
        load_model().path / "tokenizer.json"
    ).read_bytes()
    # The base is the one that the adapter names; another one is used where --model says so.
    other = tiny_model_folder(tmp_path / "other")
    line = ["--model", other, "--adapter-file", "lora.npz", "--save-path", "x"]
    assert "is another base" in fuse(tmp_path, *line, status=2)
    err = fuse(tmp_path, *line, "--any-base", status=2)
    assert "does not fit the model" in err and "(64, 4)" in err and not (tmp_path / "x").exists()


def test_large_models_are_sharded_and_still_compared(tmp_path, monkeypatch):
    def halves(weights):  # mlx-lm cuts at 5 GB
        names = list(weights)
        return [{n: weights[n] for n in part} for part in (names[::2], names[1::2])]

    monkeypatch.setattr("mlx_lm.utils.make_shards", halves)
    make_adapter(tmp_path / "lora.npz", "lora")
    export_in_process(tmp_path / "fused", [tmp_path / "lora.npz"])
    assert len(list((tmp_path / "fused").glob("model-*-of-00002.safetensors"))) == 2
    (tmp_path / "fused" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="Missing"):
        load_model(tmp_path / "fused")


def test_low_precision_base_keeps_its_type_unless_asked(tmp_path):
    base = tiny_model_folder(tmp_path / "base")
    loaded = load_model(base, dtype="bfloat16")
    from models.model_folders import write_model

    (tmp_path / "bf16").mkdir()
    write_model(tmp_path / "bf16", loaded)
    loaded, _ = make_adapter(tmp_path / "lora.npz", "lora", tmp_path / "bf16")
    for dtype in ("stored", "float32"):
        done = export_in_process(tmp_path / dtype, [tmp_path / "lora.npz"], dtype=dtype)
    assert float(done.messages[0].split("unfused: ")[1].split(";")[0]) < 1e-3
    kinds = {
        dtype: {str(a.dtype) for a in mx.load(str(tmp_path / dtype / "model.safetensors")).values()}
        for dtype in ("stored", "float32")
    }
    assert kinds == {"stored": {"mlx.core.bfloat16"}, "float32": {"mlx.core.float32"}}
    assert json.loads((tmp_path / "stored" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("kind", ["lora", "full", "prompt"])
def test_reward_models_fuse_with_head_pooling_and_normalisation(tmp_path, kind, pooling):
    loaded, tuning = make_adapter(tmp_path / "reward.npz", kind)
    reward_model = RewardModel(loaded.model, pooling=pooling, tuning=tuning, gain=3.0, offset=-1.0)
    reward_model.head["bias"] = mx.array([0.5])
    save_reward_head(tmp_path / "reward.npz", reward_model)
    texts = [loaded.tokenizer.encode(text) for text in ("2 4 6", "5 3 1 0", "8")]
    expected = reward_model.score(texts)
    if kind == "lora":
        out = fuse(tmp_path, "--adapter-file", "reward.npz", "--save-path", "reward")
        assert "ppo_training.py --model MODEL --reward-model reward" in out
    else:
        export_in_process(tmp_path / "reward", [tmp_path / "reward.npz"])
    fused = load_reward_model(tmp_path / "reward")
    assert np.allclose(fused.score(texts), expected, atol=1e-4)
    assert (fused.pooling, fused.gain, fused.offset) == (pooling, 3.0, -1.0)
    if kind == "prompt":  # its own tokenizer writes the virtual tokens; they count once
        again = [fused.source.tokenizer.encode(text) for text in ("2 4 6", "5 3 1 0", "8")]
        assert again[0][3:] == texts[0]
        assert np.allclose(fused.score(again), expected, atol=1e-4)


def test_a_fully_trained_reward_model_does_not_overwrite_a_shared_base(tmp_path):
    loaded, tuning = make_adapter(tmp_path / "reward.npz", "full")
    save_reward_head(tmp_path / "reward.npz", RewardModel(loaded.model))
    policy = load_model()
    with pytest.raises(UserError, match="fuse it first"):
        load_reward_model(tmp_path / "reward.npz", policy)


# ------------------------------------------------------------------------------ several adapters


def test_weighted_sum_is_exact(tmp_path):
    """Fused weights are W + sum w_i s_i (B_i A_i), computed here in float64."""
    base = {
        k: np.array(v, dtype=np.float64)
        for k, v in tree_flatten(load_model(dtype="stored").model.parameters())
    }
    weights, expected = [0.7, -0.4], dict(base)
    options = [{"keys": ["q_proj", "down_proj"], "scale": 3.0}, {"num_layers": 1, "rank": 2}]
    for i, (weight, option) in enumerate(zip(weights, options, strict=True)):
        make_adapter(tmp_path / f"{i}.npz", "lora", seed=i, **option)
        arrays, config = read_adapter(tmp_path / f"{i}.npz")
        for name in [n.removesuffix(".lora_a") for n in arrays if n.endswith("lora_a")]:
            a, b = (np.array(arrays[f"{name}.{x}"], dtype=np.float64) for x in ("lora_a", "lora_b"))
            scale = config["lora_parameters"]["scale"]
            expected[f"{name}.weight"] = expected[f"{name}.weight"] + weight * scale * (a @ b).T
    out = fuse(
        tmp_path,
        "--adapter-file",
        "0.npz",
        "1.npz",
        "--adapter-weights",
        0.7,
        -0.4,
        "--save-path",
        "fused",
    )
    fused = mx.load(str(tmp_path / "fused" / "model.safetensors"))
    assert fused.keys() == expected.keys()
    for name, array in fused.items():
        assert np.abs(np.array(array) - expected[name]).max() < 1e-6, name
    changed = {n for n in fused if np.abs(np.array(fused[n]) - base[n]).max() > 1e-4}
    assert any("layers.0.self_attn.q_proj" in n for n in changed)
    assert not any("layers.0.self_attn.k_proj" in n for n in changed)  # in neither adapter
    assert "fused against unfused" in out


def test_dora_counts_as_its_difference_from_the_base(tmp_path):
    """The delta of each adapter is taken from mlx-lm's own fuse()."""
    base = load_model(dtype="stored")
    path = "model.layers.1.mlp.up_proj"
    weight = np.array(base.model.layers[1].mlp.up_proj.weight, dtype=np.float64)
    total, adapters = weight.copy(), []
    for i, (kind, factor) in enumerate((("dora", 0.5), ("lora", 2.0))):
        adapters.append(make_tuning(base, kind, seed=i))
        own = np.array(adapters[-1].layers[path].fuse().weight, dtype=np.float64)
        total += factor * (own - weight)
        adapters[-1].deactivate()
    with blended(base.model, adapters, [0.5, 2.0]):
        assert isinstance(base.model.layers[1].mlp.up_proj, Blend)
        expected = logits(base.model, base.tokenizer)
    assert not isinstance(base.model.layers[1].mlp.up_proj, Blend)
    assert fuse_adapters(base.model, adapters, [0.5, 2.0]) == 14
    assert np.abs(np.array(base.model.layers[1].mlp.up_proj.weight) - total).max() < 1e-6
    assert largest(expected, logits(base.model, base.tokenizer)) < 1e-4


def test_what_cannot_be_combined_is_refused(tmp_path):
    for kind in ("lora", "full", "prompt"):
        make_adapter(tmp_path / f"{kind}.npz", kind)
    make_adapter(tmp_path / "prompt2.npz", "prompt")
    loaded, tuning = make_adapter(tmp_path / "reward.npz", "lora")
    save_reward_head(tmp_path / "reward.npz", RewardModel(loaded.model, tuning=tuning))

    def refused(files, weights):
        with pytest.raises(UserError) as caught:
            load_parts(None, [str(tmp_path / f"{name}.npz") for name in files], weights)
        return str(caught.value)

    assert "fuse it alone" in refused(["lora", "full"], [1, 1])
    assert "weight has to be 1" in refused(["full"], [0.5])
    assert "weight has to be 1" in refused(["prompt"], [0.5])
    assert "two soft prompts" in refused(["prompt", "prompt2"], [1, 1])
    assert "fused alone" in refused(["reward", "lora"], [1, 1])
    assert "no factor" in refused(["lora"], [float("nan")])


# ------------------------------------------------------------------------------ quantised bases


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A 4-bit base of 64 dimensions, on disk."""
    from models.model_folders import write_model

    folder = tmp_path_factory.mktemp("quantized")
    write_model(folder, load_model(quantize=4))
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_quantised_base(tmp_path, quantized, kind):
    loaded, _ = make_adapter(tmp_path / "a.npz", kind, quantized)
    expected = logits(loaded.model, loaded.tokenizer)
    out = fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "q")
    assert "4-bit" in out and "--dequantize" in out
    said = float(out.split("fused against unfused: ")[1].split(";")[0])
    again = load_model(tmp_path / "q", dtype="stored")
    found = largest(expected, logits(again.model, again.tokenizer))
    assert found > 0.01 and said > 0.01  # the cost of rounding again is real, and is said
    assert again.config["quantization"]["bits"] == 4

    out = fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "d", "--dequantize")
    plain = load_model(tmp_path / "d", dtype="stored")
    assert largest(expected, logits(plain.model, plain.tokenizer)) < 1e-4
    assert "quantization" not in json.loads((tmp_path / "d" / "config.json").read_text())
    assert "4-bit" not in out


def test_dequantize_alone(tmp_path, quantized):
    base = load_model(quantized, dtype="stored")
    export_in_process(tmp_path / "d", [], model=str(quantized), dequantize=True)
    plain = load_model(tmp_path / "d", dtype="stored")
    assert not any(hasattr(module, "bits") for module in plain.model.modules())
    assert largest(logits(base.model, base.tokenizer), logits(plain.model, plain.tokenizer)) < 1e-4
    with pytest.raises(UserError, match="not quantised"):
        export_in_process(tmp_path / "e", [], dequantize=True)


# ------------------------------------------------------------------------------ nothing is lost


def test_overwrites_only_when_forced_and_only_models(tmp_path):
    make_adapter(tmp_path / "lora.npz", "lora")
    words = ("--adapter-file", "lora.npz", "--save-path")
    fuse(tmp_path, *words, "fused")
    marker = tmp_path / "fused" / "mine.txt"
    marker.write_text("keep")
    assert "exists already" in fuse(tmp_path, *words, "fused", status=2)
    assert marker.exists()
    fuse(tmp_path, *words, "fused", "--force")
    assert not marker.exists() and (tmp_path / "fused" / "config.json").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    assert "no model or adapter folder" in fuse(tmp_path, *words, "photos", "--force", status=2)
    assert (tmp_path / "photos" / "a.png").exists()
    line = ("--model", "fused", "--any-base", *words, "fused", "--force")
    err = fuse(tmp_path, *line, status=2)
    assert "is the base model itself" in err and (tmp_path / "fused" / "config.json").exists()


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch):
    make_adapter(tmp_path / "lora.npz", "lora")
    export_in_process(tmp_path / "fused", [tmp_path / "lora.npz"])
    before = {p.name: p.read_bytes() for p in (tmp_path / "fused").iterdir()}

    def full_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "write_card", full_disk)
        with pytest.raises(UserError, match="No space left"):
            export_in_process(tmp_path / "fused", [tmp_path / "lora.npz"], force=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "fused").iterdir()} == before
    with monkeypatch.context() as patched:  # a fusion that is wrong does not get its name
        patched.setattr("models.fusing.weight_change", lambda layer, weight: 0.05 + 0 * weight)
        with pytest.raises(UserError, match="does not compute what the unfused model does"):
            export_in_process(tmp_path / "wrong", [tmp_path / "lora.npz"])
    assert not (tmp_path / "wrong").exists() and not left_behind(tmp_path)


def test_mistakes_are_one_line(tmp_path):
    make_adapter(tmp_path / "lora.npz", "lora")
    save_head(tmp_path / "lora.npz", "value_head", {"weight": mx.zeros((1, 64))}, {})

    def says(*words):
        return fuse(tmp_path, *words, status=2)

    words = ("--adapter-file", "lora.npz", "--save-path", "x", "--format", "classifier")
    assert "no reward head" in fuse_process(tmp_path, *words, status=2)
    assert "--save-path" in says("--adapter-file", "lora.npz")
    assert "nothing to do" in says("--save-path", "x")
    assert "no such file" in says("--adapter-file", "absent.npz", "--save-path", "x")
    assert "give 1 numbers" in says(
        "--adapter-file", "lora.npz", "--adapter-weights", 1, 2, "--save-path", "x"
    )
    assert "no effect" in says("--adapter-file", "lora.npz", "--save-path", "x", "--private")
    assert "not a model folder" in says(
        "--model", tmp_path, "--adapter-file", "lora.npz", "--save-path", "x"
    )
    assert not (tmp_path / "x").exists()
    out = fuse(tmp_path, "--adapter-file", "lora.npz", "--save-path", "x")
    assert "value head" in out and not (tmp_path / "x" / "value_head.safetensors").exists()


def test_an_adapter_without_a_base_asks_for_one(tmp_path):
    loaded = load_model(dtype="stored")
    arrays = make_tuning(loaded, "lora").arrays()
    mx.savez(str(tmp_path / "bare.npz"), **arrays)  # as older programs wrote them
    err = fuse(tmp_path, "--adapter-file", "bare.npz", "--save-path", "x", status=2)
    assert "give --model" in err


# ------------------------------------------------------------------------------ mlx-lm adapters


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_folders_of_mlx_lm_go_out_and_in(tmp_path, kind):
    loaded, tuning = make_adapter(tmp_path / "a.npz", kind)
    expected = logits(loaded.model, loaded.tokenizer)
    out = fuse(tmp_path, "--adapter-file", "a.npz", "--format", "adapter", "--save-path", "out")
    assert "mlx_lm.generate" in out and "largest change of a weight in the adapter: 0.0" in out
    model, tokenizer = mlx_lm_load(str(loaded.path), adapter_path=str(tmp_path / "out"))
    assert largest(expected, logits(model, tokenizer)) < 1e-4
    fuse(tmp_path, "--adapter-file", "out", "--format", "adapter", "--save-path", "b.safetensors")
    arrays, config = read_adapter(tmp_path / "b.safetensors")
    assert config["model"] == loaded.name
    assert all(mx.array_equal(arrays[name], a) for name, a in tuning.arrays().items())
    err = fuse(
        tmp_path,
        "--adapter-file",
        "a.npz",
        "--format",
        "adapter",
        "--save-path",
        "b.safetensors",
        status=2,
    )
    assert "exists already" in err


def test_reads_what_mlx_lm_wrote(tmp_path):
    """mlx-lm's own trainer writes no keys: every linear layer of the last blocks is meant."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, tokenizer, config = mlx_lm_load(str(load_model().path), return_config=True)
    model.freeze()
    settings = {"rank": 3, "dropout": 0.0, "scale": 5.0}
    linear_to_lora_layers(model, 1, dict(settings))
    mx.random.seed(0)
    arrays = {
        k: 0.1 * mx.random.normal(v.shape) for k, v in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(arrays.items()), strict=False)
    (tmp_path / "theirs").mkdir()
    mx.save_safetensors(str(tmp_path / "theirs" / "adapters.safetensors"), arrays)
    described = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(described))
    export_in_process(tmp_path / "fused", [tmp_path / "theirs"], model=str(load_model().path))
    fused = load_model(tmp_path / "fused")
    assert largest(logits(model, tokenizer), logits(fused.model, fused.tokenizer)) < 1e-4


def test_an_adapter_written_from_memory_needs_its_description(tmp_path):
    loaded = load_model(dtype="stored")
    save_adapter(tmp_path / "a", make_tuning(loaded, "lora"), loaded)
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        read_adapter(tmp_path / "a")


def test_force_does_not_replace_a_run(tmp_path):
    """A run's folder has a config.json too, and holds checkpoints that nothing brings back."""
    for sign in ("metrics.jsonl", "checkpoints"):
        run = tmp_path / sign
        run.mkdir()
        (run / "config.json").write_text("{}")
        (run / sign).mkdir()
        with pytest.raises(UserError, match="is the folder of a run, so --force does not"):
            check_free(run, force=True)
        assert (run / sign).exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    check_free(tmp_path / "model", force=True)
