"""Model folders and adapters that are hostile or do not fit, beyond those of test_hostile_files:
refused with the reason, in no time, and by the scripts before anything is written.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from reliable_runs import DATA, shared_server, words

from errors import UserError
from models.load import load_model


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the embedded model that may be spoilt."""
    return shutil.copytree(DATA / "digits_model", tmp_path / "model")


def change(file: Path, **settings) -> None:
    """Set entries of a JSON file; None removes them."""
    found = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({name: v for name, v in found.items() if v is not None}))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CONFIGS = [
    ({"num_hidden_layers": 10**7}, "asks for 1e+07 layers, and all weights together are 20"),
    ({"num_attention_heads": 0}, "division by zero"),
    ({"vocab_size": 10**12}, "outside the supported range"),
    ({"hidden_size": 10**9}, "received shape (469, 64)"),
    ({"model_type": "../../etc"}, "not supported"),
    ({"model_type": ["llama"]}, "cannot be loaded"),
    ({"model_type": "base"}, "cannot be loaded"),
    ({"quantization": "x"}, "cannot be loaded"),
    ({"architectures": 5, "num_hidden_layers": "2"}, "cannot be loaded"),
]


@pytest.mark.parametrize("settings, why", CONFIGS, ids=[str(s) for s, _ in CONFIGS])
def test_configurations_that_ask_for_the_impossible(model, settings, why):
    change(model / "config.json", **settings)
    assert why in refusal(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "5", "[]", '"auto_map"', "{", "\x00"])
def test_settings_that_are_no_settings(model, name, text):
    (model / name).write_text(text)
    assert name in refusal(model)


def test_modules_of_the_tokenizer_come_from_one_place_alone(model):
    for setting in ("chat_template_type", "tool_parser_type"):
        change(model / "tokenizer_config.json", **{setting: "....os"})
        assert "cannot be loaded" in refusal(model)
        change(model / "tokenizer_config.json", **{setting: None})


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    assert f"{name}: is no regular file" in refusal(model)


# ------------------------------------------------------------------------------ tokenizers


def test_a_tokenizer_without_an_end_is_refused(model):
    for name in ("config.json", "generation_config.json"):
        change(model / name, eos_token_id=None)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        change(model / name, eos_token=None)
    assert "names no end-of-sequence token" in refusal(model)


def test_a_tokenizer_without_padding_is_no_obstacle(model):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        change(model / name, pad_token=None)
    change(model / "config.json", pad_token_id=None)
    assert load_model(model).tokenizer.pad_token is None
    line = "--train --data DATA --model model --iters 1 --steps-per-eval 0 --batch-size 4"
    ended = shared_server().run("sft.py", words(line), model.parent)
    assert ended.code == 0, ended.err
    line = "--ground_truth_reward --data DATA --model model --num-steps 1 --batch-size 4"
    ended = shared_server().run("ppo_training.py", words(f"{line} --eval-every 0"), model.parent)
    assert ended.code == 0, ended.err


def test_tokens_that_the_model_has_no_row_for_are_refused(model):
    vocabulary = json.loads((model / "tokenizer.json").read_text())
    word = list(vocabulary["model"]["vocab"])[100]
    vocabulary["model"]["vocab"][word] = 10**6
    (model / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "the tokenizer counts to 1000000, and the model has 469" in refusal(model)


def test_an_end_that_is_no_token_is_refused(model):
    change(model / "config.json", eos_token_id=[2, 1000])
    (model / "generation_config.json").unlink()
    assert "1000 ends a text and is none of the model's 469" in refusal(model)


# ------------------------------------------------------------------------------ through the scripts


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def adapter(folder: Path, width: int = 64) -> None:
    arrays = {}
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.q_proj"
        arrays |= {f"{name}.lora_a": mx.zeros((width, 4)), f"{name}.lora_b": mx.zeros((4, width))}
    mx.savez(str(folder / "a.npz"), **arrays)


def code_in_model(folder: Path) -> None:
    adapter(folder)
    trap = f"import os\nos.mkdir({str(folder / 'sprung')!r})\n"
    (folder / "model" / "evil.py").write_text(trap)
    change(folder / "model" / "config.json", model_file="evil.py")


def pickled_adapter(folder: Path) -> None:
    (folder / "a.npz").write_bytes(pickle.dumps(Trap(folder / "sprung")))


def adapter_of_another_shape(folder: Path) -> None:
    adapter(folder, 128)


def adapter_outside(folder: Path) -> None:
    (folder / "a.npz").symlink_to("/dev/zero")


HOSTILE = {
    "code": (code_in_model, "code of its own (model_file)"),
    "pickle": (pickled_adapter, "not a sound .npz"),
    "shape": (adapter_of_another_shape, "(128, 4) in the file and (64, 4) in the model"),
    "endless": (adapter_outside, "a.npz: no such file"),
}
SCRIPTS = {
    "sft.py": "--train --data DATA --model model --resume-adapter-file a.npz",
    "ppo_training.py": "--ground_truth_reward --data DATA --model model --resume-file a.npz",
    "talk_to_model.py": "--model model --resume-file a.npz hello",
    "label.py": "--prompts DATA/samples/prompts.jsonl --web --model model --resume-file a.npz",
    "fuse.py": "--model model --adapter-file a.npz --save-path fused",
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_no_script_falls_for_it(tmp_path, model, script, kind):
    make, why = HOSTILE[kind]
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    ended = shared_server().run(script, words(SCRIPTS[script]), tmp_path)
    assert ended.code == 2, ended.err
    assert why in ended.error
    after = [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in p.parts]
    assert after == before
