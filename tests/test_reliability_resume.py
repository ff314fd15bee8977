"""Exact resume: a run killed anywhere, several times over, ends as one that never was.

MLX_RLHF_KILLS=20 is the long version; MLX_RLHF_KILL_SEED repeats the kills of a failed one.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from reliable_runs import KILLS, Server, command, differences, left_by, touches, words

SEED = int(os.environ.get("MLX_RLHF_KILL_SEED", time.time_ns() % 10**6))

COMMON = "--output-dir run --save-file out.npz --lora-rank 2 --lora-layers 2 --save-every 2"
SFT = words(
    f"--train --data DATA {COMMON} --iters 8 --batch-size 4 --gradient-accumulation-steps 2 "
    "--lora-dropout 0.2 --learning-rate 3e-3 --lr-schedule cosine --warmup-steps 2 "
    "--steps-per-eval 3 --val-batches 1 --save-best --sample-prompts 0 8"
)
REWARD = words(
    f"--train --reward-model --data DATA --data-base reward_function_increasing_mult_2_ {COMMON} "
    "--iters 6 --batch-size 8 --lora-dropout 0.2 --learning-rate 3e-3 --steps-per-eval 4 "
    "--val-batches 1 --normalize-samples 8"
)
PPO = words(
    f"--ground_truth_reward --data DATA {COMMON} --num-steps 6 --batch-size 4 --mini-batch-size 2 "
    "--ppo-epochs 2 --max-new-tokens 8 --min-response-length 4 --adap-kl-ctrl --horizon 50 "
    "--init-kl-coef 0.2 --use-score-scaling --use-score-norm --value-head-init-std 0.1 "
    "--eval-every 3 --eval-prompts 4 --eval-samples 1"
)
RUNS = {"sft": ("sft.py", SFT), "reward": ("sft.py", REWARD), "ppo": ("ppo_training.py", PPO)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def reference(server, tmp_path_factory):
    """What each of RUNS leaves when nothing stops it, and how often it touches a file."""
    found = {}

    def leave(name: str) -> tuple[dict, int]:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            script, line = RUNS[name]
            ended = server.run(script, line, folder, kill_at=0)
            assert ended.code == 0, ended.err
            found[name] = left_by(folder / "run", "out.npz"), touches(ended)
        return found[name]

    return leave


def resume_line(folder: Path, line: list[str]) -> list[str]:
    """The words that go on with the run in `folder`, or begin it where it has no options yet."""
    begun = (folder / "run" / "config.json").exists()
    return ["--resume", "run"] if begun else line


def finish(server: Server, script: str, line: list[str], folder: Path) -> dict:
    ended = server.run(script, resume_line(folder, line), folder)
    assert ended.code == 0, ended.err
    return left_by(folder / "run", "out.npz")


# ------------------------------------------------------------------------------ the same


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_the_same_command_twice_leaves_the_same_bytes(reference, tmp_path, name):
    """Once from the command line, once in a fork; sets of strings are in another order."""
    script, line = RUNS[name]
    ended = command(script, line, tmp_path, PYTHONHASHSEED="1")
    assert ended.code == 0, ended.err
    once, again = reference(name)[0], left_by(tmp_path / "run", "out.npz")
    # Imports draw from Python's generator, and the fork has them behind it before it is seeded.
    imports = [f"{which}/state/rng/python[1] of 3 and 3" for which in ("best", "last")]
    assert set(differences(once, again)) <= set(imports)
    assert len(once["metrics"]) > 8 and once["out.npz"] == again["out.npz"]


# ------------------------------------------------------------------------------ kills


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_anywhere_ends_with_the_same_bytes(server, reference, tmp_path, name):
    """Killed at a touch of a file (in checkpoints, mostly) or at any time; then gone on with."""
    (script, line), (expected, count) = RUNS[name], reference(name)
    pick, kills, attempts = random.Random(SEED), 0, 0
    print("MLX_RLHF_KILL_SEED", SEED)
    while kills < KILLS:
        attempts += 1
        assert attempts < 4 * KILLS + 10, "the runs end before they are killed"
        kill_at = pick.randint(1 + count // 3 * (kills == 0), count * 2 // 3)
        words_now = resume_line(tmp_path, line)
        if pick.random() < 0.5:
            ended = server.run(script, words_now, tmp_path, kill_at=kill_at)
        else:
            running = server.start(script, words_now, tmp_path)
            running.wait_for_file(tmp_path / "run" / "metrics.jsonl")
            time.sleep(pick.uniform(0, 0.3))
            running.signal(signal.SIGKILL)
            ended = running.wait()
        assert ended.code in (0, -signal.SIGKILL), ended.err
        kills += ended.code != 0
        if ended.code == 0:
            assert differences(expected, left_by(tmp_path / "run", "out.npz")) == []
            shutil.rmtree(tmp_path / "run")
    assert differences(expected, finish(server, script, line, tmp_path)) == []


KINDS = {
    "soft prompt": ["--prompt-tuning", "--num-prompt-tokens", "3", "--learning-rate", "0.05"],
    "full": ["--fine-tune-type", "full", "--learning-rate", "1e-3"],
    "dora": ["--fine-tune-type", "dora", "--lora-rank", "2", "--optimizer", "muon"],
}
SHORT = words("--data DATA --output-dir run --save-file out.npz --save-every 1 --batch-size 4")
SHORT_RUNS = {
    "sft": ("sft.py", ["--train", "--iters", "4", "--steps-per-eval", "0", *SHORT]),
    "ppo": (
        "ppo_training.py",
        ["--ground_truth_reward", "--num-steps", "3", "--max-new-tokens", "4", "--ppo-epochs", "1",
         "--eval-every", "0", *SHORT],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT_RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tuning_resumes_exactly(server, tmp_path, name, kind):
    script, line = SHORT_RUNS[name]
    line = line + KINDS[kind]
    (whole := tmp_path / "whole").mkdir()
    (broken := tmp_path / "broken").mkdir()
    ended = server.run(script, line, whole, kill_at=0)
    assert ended.code == 0, ended.err
    kill_at = random.Random(SEED).randint(touches(ended) // 2, touches(ended) * 3 // 4)
    assert server.run(script, line, broken, kill_at=kill_at).code == -signal.SIGKILL
    assert list((broken / "run" / "checkpoints").glob("step-*"))
    expected = left_by(whole / "run", "out.npz")
    assert differences(expected, finish(server, script, line, broken)) == []
