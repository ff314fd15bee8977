"""Adapters know their base by its weights: another one of the same shapes is refused."""

import json
import os
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import pytest
from files import tree
from fuse_setup import fuse, make_adapter
from reliable_runs import DATA, shared_server, words

import fuse as fuse_script
import ppo_training
import score
import sft
import talk_to_model
from chat.speaker import Loader
from errors import UserError
from models import base_fingerprint as module
from models.adapter_files import (
    load_adapter,
    read_adapter,
    save_adapter,
)
from models.array_files import write_arrays, write_json
from models.base_fingerprint import KEY, base_fingerprint
from models.load import load_model
from models.reward_model import RewardModel, load_reward_model, save_reward_head

DIGITS = DATA / "digits_model"


def rewritten(folder: Path, change=lambda weights: weights, **metadata) -> Path:
    """A copy of the embedded model, its weights changed and written anew."""
    shutil.copytree(DIGITS, folder, dirs_exist_ok=True)
    weights = change(dict(mx.load(str(folder / "model.safetensors"))))
    file = str(folder / "model.safetensors")
    mx.save_safetensors(file, weights, metadata={"format": "pt", **metadata})
    return folder


def times(name: str, factor: float):
    return lambda weights: {**weights, name: weights[name] * factor}


# ------------------------------------------------------------------------------ the fingerprint


@pytest.mark.parametrize(
    "options",
    [{"dtype": "stored"}, {"dtype": "bfloat16"}, {"quantize": 4}, {"quantize": 8}],
    ids=str,
)
def test_how_a_model_is_loaded_does_not_count(options):
    assert load_model(**options).fingerprint == base_fingerprint(DIGITS)
    assert len(base_fingerprint(DIGITS)) == 16


def test_shards_order_and_metadata_do_not_count(tmp_path):
    expected = base_fingerprint(DIGITS)

    def backwards(weights):
        return dict(reversed(weights.items()))

    assert base_fingerprint(rewritten(tmp_path / "a", backwards, source="elsewhere")) == expected
    folder = rewritten(tmp_path / "b")
    weights = list(mx.load(str(folder / "model.safetensors")).items())
    (folder / "model.safetensors").rename(tmp_path / "whole.safetensors")
    for number in (1, 2, 3):
        file = folder / f"model-0000{number}-of-00003.safetensors"
        mx.save_safetensors(str(file), dict(weights[number - 1 :: 3]))
    assert base_fingerprint(folder) == load_model(folder).fingerprint == expected


def test_a_model_that_mlx_lm_writes_anew_is_the_same(tmp_path):
    from mlx_lm.utils import save_model

    save_model(tmp_path / "again", load_model(dtype="stored").model)
    assert base_fingerprint(tmp_path / "again") == base_fingerprint(DIGITS)


def test_every_tensor_counts(tmp_path):
    names = list(mx.load(str(DIGITS / "model.safetensors")))
    found = {base_fingerprint(DIGITS)}
    for name in names:
        found.add(base_fingerprint(rewritten(tmp_path / "m", times(name, 1.01))))
    assert len(found) == len(names) + 1


def test_names_types_and_shapes_count(tmp_path):
    norm = "model.norm.weight"
    changes = [
        lambda w: {**w, "extra": mx.zeros(1)},
        lambda w: {("other" if name == norm else name): a for name, a in w.items()},
        lambda w: {**w, norm: w[norm].reshape(8, 8)},
        lambda w: {**w, norm: w[norm].view(mx.int32)},  # the same bytes
    ]
    found = [base_fingerprint(rewritten(tmp_path / "m", change)) for change in changes]
    assert len({base_fingerprint(DIGITS), *found}) == len(changes) + 1


def test_a_fused_adapter_of_one_layer_makes_a_new_base(tmp_path):
    make_adapter(tmp_path / "a.npz", "lora", keys=["self_attn.q_proj"], num_layers=1)
    fuse(tmp_path, "--adapter-file", "a.npz", "--save-path", "fused")
    assert load_model(tmp_path / "fused").fingerprint != load_model().fingerprint


def test_little_is_read_of_a_large_model(tmp_path, monkeypatch):
    """Two tensors of 8 GB in a file full of holes; the ends of each count."""
    size = 2**33
    entries = {
        name: {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate("ab")
    }
    header = json.dumps(entries).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    data = file.stat().st_size
    os.truncate(file, data + 2 * size)
    read = []

    def counting(descriptor, count, place, inner=os.pread):
        read.append(count)
        return inner(descriptor, count, place)

    monkeypatch.setattr(module.os, "pread", counting)
    found = {base_fingerprint(tmp_path)}
    assert sum(read) == 2 * 8 * 512
    for place in (0, size - 1, size, 2 * size - 1):
        with open(file, "r+b") as stream:
            stream.seek(data + place)
            stream.write(b"x")
        found.add(base_fingerprint(tmp_path))
    assert len(found) == 5


def test_folders_without_weights_that_can_be_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert base_fingerprint(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40))
    with pytest.raises(UserError, match="not a sound safetensors file"):
        base_fingerprint(tmp_path)


# ------------------------------------------------------------------------------ in adapters


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """`one` and `two`, of the same shapes; what was trained on `one`; `own.npz`, on `two`."""
    folder = tmp_path_factory.mktemp("bases")
    rewritten(folder / "one", times("model.layers.0.mlp.up_proj.weight", 0.9))
    rewritten(folder / "two", times("model.layers.1.self_attn.q_proj.weight", 1.1))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # so that adapters name their base as "one"
        make_adapter(Path("a.npz"), "lora")
        for model, path, kind in (
            ("one", "a.npz", "lora"),
            ("one", "dora.safetensors", "dora"),
            ("one", "lora", "lora"),
            ("one", "prompt", "prompt"),
            ("one", "full.npz", "full"),
            ("two", "own.npz", "lora"),
        ):
            make_adapter(Path(path), kind, model)
        loaded, tuning = make_adapter(Path("reward.npz"), "lora", "one")
        save_reward_head("reward.npz", RewardModel(loaded.model, tuning=tuning))
    return folder


PATHS = ["a.npz", "dora.safetensors", "lora", "prompt", "full.npz"]


@pytest.mark.parametrize("path", PATHS)
def test_an_adapter_records_its_base(bases, path):
    described = read_adapter(bases / path)[1]
    assert (described["model"], described[KEY]) == ("one", base_fingerprint(bases / "one"))


@pytest.mark.parametrize("path", PATHS)
def test_an_adapter_goes_on_its_own_base_alone(bases, path):
    for options in ({}, {"dtype": "bfloat16"}, {"quantize": 4}):
        if path != "full.npz" or "quantize" not in options:
            load_adapter(load_model(bases / "one", **options), bases / path)
    other = load_model(bases / "two")
    if path == "full.npz":  # it replaces every weight, so nothing of a base is left to be wrong
        assert load_adapter(other, bases / path).kind == "full"
        return
    before = dict(other.model.named_modules())
    with pytest.raises(UserError, match="was trained on one .* is another base; give --model one"):
        load_adapter(other, bases / path)
    assert dict(other.model.named_modules()).keys() == before.keys()
    assert load_adapter(other, bases / path, any_base=True).active


@pytest.mark.parametrize("recorded", [None, 5, ["x"], {}])
@pytest.mark.parametrize("path", ["lora", "a.npz"])
def test_an_adapter_without_a_fingerprint_goes_on_any(bases, tmp_path, path, recorded):
    arrays, described = read_adapter(bases / path)
    described.pop(KEY)
    described |= {} if recorded is None else {KEY: recorded}
    if path == "lora":
        shutil.copytree(bases / path, tmp_path / path)
        write_json(tmp_path / path / "adapter_config.json", described)
    else:
        write_arrays(tmp_path / path, arrays, {"adapter_config": described})
    assert load_adapter(load_model(bases / "two"), tmp_path / path).active


def test_a_base_without_a_fingerprint_takes_any_and_leaves_none(bases, tmp_path):
    loaded = load_model(bases / "two")
    loaded.fingerprint = None
    save_adapter(tmp_path / "a", load_adapter(loaded, bases / "lora"), loaded)
    assert KEY not in read_adapter(tmp_path / "a")[1]


def test_the_same_folder_with_other_weights_is_named_as_such(tmp_path):
    folder = rewritten(tmp_path / "m")
    make_adapter(tmp_path / "a", "lora", folder)
    rewritten(folder, times("model.norm.weight", 1.01))
    with pytest.raises(UserError, match="as it was before its weights changed .* put them back"):
        load_adapter(load_model(folder), tmp_path / "a")
    with pytest.raises(UserError, match="as it was before its weights changed .* put them back"):
        Loader(token_format="standard", prompt_template=None).speaker(None, str(tmp_path / "a"))


def test_training_on_with_another_base_records_that_one(bases, tmp_path):
    loaded = load_model(bases / "two")
    tuning = load_adapter(loaded, bases / "lora", any_base=True)
    save_adapter(tmp_path / "a", tuning, loaded)
    assert read_adapter(tmp_path / "a")[1][KEY] == loaded.fingerprint


def test_a_reward_model_and_its_head_go_with_their_base(bases):
    with pytest.raises(UserError, match="reward.npz: was trained on one"):
        load_reward_model(bases / "reward.npz", load_model(bases / "two"))
    load_reward_model(bases / "reward.npz", load_model(bases / "one", quantize=8))


def test_mlx_lm_reads_the_folder(bases):
    from mlx_lm import load

    model, _ = load(str(bases / "one"), adapter_path=str(bases / "lora"))
    assert any("lora_a" in module for module in model.modules())


def test_peft_s_form_has_no_word_that_peft_does_not_know(bases, tmp_path):
    fuse(
        tmp_path,
        "--model",
        bases / "one",
        "--adapter-file",
        bases / "lora",
        "--format",
        "peft",
        "--save-path",
        "peft",
    )
    assert KEY not in json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert load_adapter(load_model(bases / "two"), tmp_path / "peft").active


# ------------------------------------------------------------------------------ in the scripts

SFT = "sft.py --data DATA --model two --batch-size 4"
TRAIN = f"{SFT} --train --iters 1 --steps-per-eval 0"
REWARDS = "--reward-model --data-base reward_function_increasing_mult_2_"
PPO = "ppo_training.py --data DATA --model two --num-steps 1 --batch-size 4 --eval-every 0"
INPUT = "--input DATA/preference_increasing_mult_2_test.jsonl --max-rows 4 --output scores.jsonl"
LINES = {
    "sft": f"{TRAIN} --resume-adapter-file a.npz",
    "sft test": f"{SFT} --test --resume-adapter-file lora",
    "sft prompt": f"{TRAIN} --prompt-tuning --resume-adapter-file prompt",
    "reward model": f"{TRAIN} {REWARDS} --resume-adapter-file reward.npz",
    "reward model test": f"{SFT} --test {REWARDS} --resume-adapter-file reward.npz",
    "ppo": f"{PPO} --ground-truth-reward --resume-file dora.safetensors",
    "ppo prompt": f"{PPO} --ground-truth-reward --prompt-tuning --resume-file prompt",
    "ppo reward": f"{PPO} --reward-model reward.npz",
    "ppo full reward": f"{PPO} --reward-model reward.npz --no-use-peft",
    "fuse": "fuse.py --model two --save-path fused --adapter-file a.npz",
    "fuse several": "fuse.py --model two --save-path fused --adapter-file own.npz a.npz",
    "fuse reward": "fuse.py --model two --save-path fused --adapter-file reward.npz",
    "fuse adapter": "fuse.py --model two --save-path x.npz --format adapter --adapter-file lora",
    "fuse peft": "fuse.py --model two --save-path x --format peft --adapter-file lora",
    "talk": "talk_to_model.py --model two --max-tokens 2 --resume-file a.npz 8",
    "talk prompt": "talk_to_model.py --model two --max-tokens 2 --resume-file prompt 8",
    "compare": "talk_to_model.py --model two --max-tokens 2 --resume-file own.npz --compare lora 8",
    "talk reward": "talk_to_model.py --model two --max-tokens 2 --reward-model reward.npz 8",
    "score": f"score.py --model two --reward-model reward.npz {INPUT}",
}


@pytest.mark.parametrize("name", LINES)
def test_no_script_takes_an_adapter_of_another_base(bases, tmp_path, name):
    shutil.copytree(bases, tmp_path, dirs_exist_ok=True)
    script, *line = words(LINES[name])
    before = tree(tmp_path)
    ended = shared_server().run(script, line, tmp_path)
    assert ended.code == 2, ended.err
    one, two = base_fingerprint(bases / "one"), base_fingerprint(bases / "two")
    said = f"was trained on one (fingerprint {one}), and two ({two}) is another base; give "
    assert f"{said}--model one, or --any-base to use it all the same" in ended.error
    assert tree(tmp_path) == before
    ended = shared_server().run(script, [*line, "--any-base"], tmp_path)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    "script, line, flags",
    [
        (sft, "--train", "--resume-adapter-file"),
        (ppo_training, "--ground-truth-reward", "--resume-file or --reward-model"),
        (fuse_script, "--model m --save-path x --dequantize", "--adapter-file"),
        (talk_to_model, "8", "--resume-file or --compare or --reward-model"),
        (score, "--ground-truth-reward --input x", "--reward-model"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_flag_needs_an_adapter(script, line, flags, capsys):
    script.parse_arguments(line.split())
    with pytest.raises(SystemExit):
        script.parse_arguments([*line.split(), "--any-base"])
    assert capsys.readouterr().err == f"error: --any-base has no effect without {flags}\n"


def test_a_run_that_took_any_base_resumes_so(bases, tmp_path):
    shutil.copytree(bases, tmp_path, dirs_exist_ok=True)
    script, *line = words(f"{LINES['sft']} --any-base --output-dir run --save-file out.npz")
    assert shared_server().run(script, line, tmp_path).code == 0
    ended = shared_server().run(script, ["--resume", "run", "--iters", "2"], tmp_path)
    assert ended.code == 0, ended.err
    assert read_adapter(tmp_path / "out.npz")[1][KEY] == base_fingerprint(bases / "two")
