"""A checkpoint of a run is an adapter folder as well: fused, talked to, scored with, trained on."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from reliable_runs import DATA, shared_server, words

from errors import UserError
from models.adapter_files import load_adapter, read_adapter
from models.load import load_model
from models.reward_model import load_reward_model
from run_folder.checkpoint_folder import problem

LINE = words("--train --iters 4 --save-every 2 --steps-per-eval 0 --data DATA --output-dir run")
KINDS = {
    "lora": "--lora-rank 3 --lora-scale 2",
    "dora": "--fine-tune-type dora",
    "full": "--fine-tune-type full",
    "prompt": "--prompt-tuning --num-prompt-tokens 3",
}


@pytest.fixture(scope="module")
def server():
    return shared_server()


def trained(server, folder: Path, script: str, line: list[str]) -> Path:
    ended = server.run(script, line, folder)
    assert ended.code == 0, ended.err
    return folder / "run" / "checkpoints"


def logits(path: Path, kind: str) -> mx.array:
    base = load_model(dtype="float32")
    tuning = load_adapter(base, path)
    assert tuning.kind == kind
    tokens = [*tuning.prefix, 1, 30, 40, 50]
    return base.model(mx.array([tokens]))[:, -3:]


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_checkpoint_is_what_was_saved(server, tmp_path, kind):
    line = [*LINE, *words(KINDS[kind]), "--save-file", "out.npz"]
    checkpoints = trained(server, tmp_path, "sft.py", line)
    last, saved = checkpoints / "step-00000004", tmp_path / "out.npz"
    # What lies outside of its run says which one that is.
    assert read_adapter(last)[1] | {"run": "run"} == read_adapter(saved)[1]
    for path in (last, last / "adapters.safetensors"):
        assert mx.array_equal(logits(path, kind), logits(saved, kind))
    assert not mx.array_equal(logits(checkpoints / "step-00000002", kind), logits(saved, kind))


def test_what_is_saved_over_a_reward_model_is_none(server, tmp_path):
    """Nor has it the value head of PPO; each head is there as long as its own adapter."""
    save = words("--save-file out.npz --data DATA --batch-size 4")
    reward = words("--reward-model --data-base reward_function_increasing_mult_2_")
    lines = {
        "reward_head": ["sft.py", "--train", "--iters", "1", "--steps-per-eval", "0", *reward],
        "none": ["sft.py", "--train", "--iters", "1", "--steps-per-eval", "0"],
        "value_head": [
            "ppo_training.py",
            *words("--ground_truth_reward --num-steps 1"),
            *words("--max-new-tokens 4 --eval-every 0"),
        ],
    }
    for head in ("reward_head", "none", "value_head", "reward_head", "value_head", "none"):
        script, *line = lines[head]
        ended = server.run(script, [*line, *save], tmp_path)
        assert ended.code == 0, ended.err
        there = [path.name for path in tmp_path.glob("out.*_head.safetensors")]
        assert there == [f"out.{head}.safetensors"] * (head != "none")
    assert "warning: out.value_head.safetensors was removed" in ended.err
    line = words("--input DATA/increasing_mult_2_valid.jsonl --reward-model out.npz --output s")
    ended = server.run("score.py", line, tmp_path)
    assert ended.code == 2 and "out.npz: has no reward head beside it" in ended.error


def test_a_reward_model_with_its_head(server, tmp_path):
    line = words("--reward-model --pooling last --data-base preference_increasing_mult_2_")
    line = [*LINE, *line, "--save-file", "out"]
    last = trained(server, tmp_path, "sft.py", line) / "step-00000004"
    base, texts = load_model(dtype="float32"), [[1, 30, 40, 50, 2], [1, 60, 20, 2]]
    found = load_reward_model(last, base)
    assert found.pooling == "last"
    wanted = load_reward_model(tmp_path / "out", load_model(dtype="float32"))
    assert found.score(texts) == wanted.score(texts)


def test_ppo_goes_on_from_one_and_it_is_fused(server, tmp_path):
    line = [
        "--ground_truth_reward",
        *words("--num-steps 2 --batch-size 4 --save-every 1"),
        *words("--max-new-tokens 4 --eval-every 0 --data DATA --output-dir run"),
    ]
    last = trained(server, tmp_path, "ppo_training.py", line) / "step-00000002"
    more = ["--resume-file", str(last), "--output-dir", "again"]
    ended = server.run("ppo_training.py", [*line[:-2], *more], tmp_path)
    assert ended.code == 0, ended.err
    ended = server.run("fuse.py", ["--adapter-file", str(last), "--save-path", "fused"], tmp_path)
    assert ended.code == 0 and (tmp_path / "fused" / "model.safetensors").exists(), ended.err


def test_it_goes_on_its_own_base_alone_and_a_changed_description_is_seen(server, tmp_path):
    last = trained(server, tmp_path, "sft.py", LINE) / "step-00000004"
    other = load_model(DATA / "digits_model")
    other.fingerprint = "0" * 16
    with pytest.raises(UserError, match="is another base"):
        load_adapter(other, last)
    file = last / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": 1}))
    assert problem(last) == "adapter_config.json is torn or was altered"
