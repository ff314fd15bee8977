"""NaN and infinity in scores, losses, gradients and weights: skipped, counted, never saved."""

import json
import math
import random
import shutil
import signal
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from reliable_runs import (
    DATA,
    RUNS,
    Server,
    differences,
    left_by,
    metrics,
    quick,
    shared_server,
    touches,
    whole,
    words,
)

from run_folder.checkpoint_folder import list_checkpoints
from training.checkpoints import load_checkpoint

PPO = [word for word in RUNS["ppo"][1] if word != "--ground_truth_reward"]
REWARDS = """
import math

def sometimes(prompts, responses):
    bad = [math.nan, math.inf, -math.inf, 1e300]
    total = sum(len(text) for text in responses)
    scores = [float(len(text)) for text in responses]
    if total % 2:
        scores[total % len(scores)] = bad[total % 4]
    return scores

def always(prompts, responses):
    return [math.nan for _ in responses]

def never(prompts, responses):
    return [float(len(text)) for text in responses]
"""


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture
def rewards(tmp_path) -> Path:
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path / "rewards.py"


def bad_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "bad_rows.jsonl").read_text().splitlines()]


def all_finite(run: Path) -> bool:
    """Whether every array of every checkpoint is finite."""
    arrays = [
        array
        for path in list_checkpoints(run / "checkpoints")
        for group in load_checkpoint(path).arrays.values()
        for array in group.values()
    ]
    return all(mx.isfinite(array).all().item() for array in arrays)


# ------------------------------------------------------------------------------ scores


def test_a_score_that_is_not_finite_costs_its_step_alone(server, tmp_path, rewards):
    """The KL coefficient and the moments stay sound, and a kill changes nothing."""
    line = [
        *PPO,
        "--reward-function",
        "rewards.py:sometimes",
        "--max-bad-steps",
        "100",
        "--num-steps",
        "10",
        "--ppo-epochs",
        "1",
        "--lr-schedule",
        "constant",
    ]
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        shutil.copy(rewards, folder)
    ended = server.run("ppo_training.py", line, tmp_path / "one", kill_at=0)
    assert ended.code == 0, ended.err
    run = tmp_path / "one" / "run"
    rows = [row for row in metrics(run) if "ppo/not_finite" in row]
    skipped = [row for row in rows if row["ppo/not_finite"]]
    taken = [row for row in rows if not row["ppo/not_finite"]]
    assert len(rows) == 10 and skipped and taken
    assert all(row["env/reward_mean"] is None for row in skipped)
    assert all(math.isfinite(row["objective/kl_coef"]) for row in taken)
    written = bad_rows(run)
    assert len(written) == 4 * len(skipped)
    assert {row["step"] for row in written} == {row["step"] for row in skipped}
    assert all(row["reason"] == "score not finite" for row in written)
    assert any(row["score"] is None for row in written)
    assert all(row["prompt"] and row["response_tokens"] for row in written)
    assert all_finite(run)
    kill_at = random.Random(7).randint(touches(ended) // 3, touches(ended) * 2 // 3)
    killed = server.run("ppo_training.py", line, tmp_path / "two", kill_at=kill_at)
    assert killed.code == -signal.SIGKILL
    ended = server.run("ppo_training.py", ["--resume", "run"], tmp_path / "two")
    assert ended.code == 0, ended.err
    again = left_by(tmp_path / "two" / "run", "out.npz")
    assert differences(left_by(run, "out.npz"), again) == []


def test_too_many_bad_steps_in_a_row_stop_the_run_with_a_way_back(server, tmp_path, rewards):
    line = [*PPO, "--reward-function", "rewards.py:always", "--max-bad-steps", "3"]
    ended = server.run("ppo_training.py", line, tmp_path)
    assert ended.code == 2
    assert "was NaN or infinite in 3 steps in a row" in ended.error
    last = bad_rows(tmp_path / "run")[-1]
    assert f"; the last: prompt {last['prompt']!r}, response {last['response']!r})" in ended.error
    assert "--resume run goes on from step-00000001" in ended.error
    run = tmp_path / "run"
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000001"]
    assert all_finite(run) and not (tmp_path / "out.npz").exists()
    ended = server.run("ppo_training.py", ["--resume", "run"], tmp_path)
    assert ended.code == 2 and "3 steps in a row" in ended.error
    other = ["--resume", "run", "--force-resume", "--reward-function", "rewards.py:never"]
    ended = server.run("ppo_training.py", other, tmp_path)
    assert ended.code == 0, ended.err
    assert all_finite(run) and (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("save_every", [2, 0])
def test_a_run_whose_steps_were_all_skipped_saves_nothing(server, tmp_path, rewards, save_every):
    """Fewer of them than --max-bad-steps."""
    line = [*PPO, "--reward-function", "rewards.py:always", "--num-steps", "2"]
    ended = server.run("ppo_training.py", [*line, "--save-every", str(save_every)], tmp_path)
    assert ended.code == 2 and "so all 2 were skipped and nothing was trained" in ended.error
    last = bad_rows(tmp_path / "run")[-1]
    assert f"; the last: prompt {last['prompt']!r}, response {last['response']!r})" in ended.error
    assert "--resume run goes on from " in ended.error
    assert not list(tmp_path.glob("out*")) and not (tmp_path / "run" / "summary.json").exists()
    other = ["--resume", "run", "--force-resume", "--reward-function", "rewards.py:never"]
    ended = server.run("ppo_training.py", other, tmp_path)
    assert ended.code == 0, ended.err
    assert all_finite(tmp_path / "run") and (tmp_path / "out.npz").exists()


ALL_BAD = """
import mlx.core as mx, training.update
clip = training.update.clip_gradients
def clip_gradients(gradients, largest):
    return clip(training.update.tree_map(lambda g: g * mx.nan, gradients), largest)
training.update.clip_gradients = clip_gradients
"""


def test_supervised_training_without_one_sound_update_saves_nothing(server, tmp_path):
    script, line = RUNS["sft"]
    line = [*line, "--iters", "3", "--max-bad-steps", "4"]
    ended = server.run(script, line, tmp_path, prelude=ALL_BAD)
    assert ended.code == 2 and "so all 3 were skipped and nothing was trained" in ended.error
    assert not list(tmp_path.glob("out*"))


# ------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def infinite_model(tmp_path_factory) -> Path:
    """The embedded model with one infinity in it."""
    folder = tmp_path_factory.mktemp("infinite") / "model"
    shutil.copytree(DATA / "digits_model", folder)
    file = str(folder / "model.safetensors")
    arrays = mx.load(file)
    name = next(name for name in sorted(arrays) if "mlp.up_proj" in name)
    arrays[name][0, 0] = math.inf
    mx.save_safetensors(file, dict(arrays), metadata={"format": "mlx"})
    return folder


FULL = words("--train --data DATA --output-dir run --save-file out.npz --fine-tune-type full")
BAD = {
    "sft, rate 1e30": ("sft.py", [*RUNS["sft"][1], "--learning-rate", "1e30"]),
    "ppo, rate 1e38": ("ppo_training.py", [*RUNS["ppo"][1], "--learning-rate", "1e38"]),
    "sft, infinite model": ("sft.py", [*RUNS["sft"][1], "--model", "MODEL"]),
    "reward, infinite model": ("sft.py", [*RUNS["reward"][1], "--model", "MODEL"]),
    "full, infinite model": ("sft.py", [*FULL, "--model", "MODEL"]),
    "ppo, infinite model": ("ppo_training.py", [*RUNS["ppo"][1], "--model", "MODEL"]),
}


@pytest.mark.parametrize("cause", BAD)
def test_nan_is_never_saved(server, tmp_path, infinite_model, cause):
    script, line = BAD[cause]
    line = [str(infinite_model) if word == "MODEL" else word for word in line]
    ended = server.run(script, line, tmp_path)
    assert ended.code == 2
    assert "NaN or infin" in ended.error
    # Internal rewards look at the reference before there is anything to resume.
    assert "--resume run" in ended.error or "of the reference model" in ended.error
    assert all_finite(tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} <= {"run"}


# One gradient of the run is NaN.
ONE_BAD = """
import mlx.core as mx, training.update
clip, calls = training.update.clip_gradients, [0]
def clip_gradients(gradients, largest):
    calls[0] += 1
    if calls[0] == 4:
        gradients = training.update.tree_map(lambda g: g * mx.nan, gradients)
    return clip(gradients, largest)
training.update.clip_gradients = clip_gradients
"""


@pytest.mark.parametrize("name", quick("sft", ["reward"]))
def test_one_bad_gradient_is_skipped_counted_and_its_rows_kept(server, tmp_path, name):
    script, line = RUNS[name]
    line = [*line, "--save-every", "1", "--keep-checkpoints", "100"]
    ended = server.run(script, line, tmp_path, prelude=ONE_BAD)
    assert ended.code == 0, ended.err
    run, before = tmp_path / "run", whole(name)[0]["metrics"]
    rows = {row["step"]: row for row in metrics(run) if "train/loss" in row}
    assert rows[3]["train/skipped_total"] == 0 and rows[max(rows)]["train/skipped_total"] == 1
    assert f"was NaN or infinite in 1 of {max(rows)} steps, which were skipped" in ended.err
    assert rows[4]["train/grad_norm"] is None
    assert [row for row in metrics(run) if row["step"] < 4] == [r for r in before if r["step"] < 4]
    weights = {}
    for path in list_checkpoints(run / "checkpoints"):
        saved = load_checkpoint(path)
        weights[saved.step] = np.concatenate(
            [np.array(array).ravel() for _, array in sorted(saved.arrays["adapters"].items())]
        )
    assert np.array_equal(weights[3], weights[4]) and not np.array_equal(weights[4], weights[5])
    # Rows of the fourth update: those of its batches, as token ids.
    batch = 8
    assert len(bad_rows(run)) == batch and all(row["step"] == 4 for row in bad_rows(run))
    assert all(row["tokens"] for row in bad_rows(run))
    assert all_finite(run)
