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
from files import tree
from reliable_runs import (
    KILLS,
    RUNS,
    Server,
    command,
    differences,
    left_by,
    quick,
    shared_server,
    touches,
    whole,
    words,
)

import group_training
import ppo_training
import sft
from run_folder.run import Run
from run_folder.run_config import MADE_BY

SEED = int(os.environ.get("MLX_RLHF_KILL_SEED", time.time_ns() % 10**6))


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


def resume_line(folder: Path, line: list[str]) -> list[str]:
    """The words that go on with the run in `folder`, or begin it where it has no options yet."""
    begun = (folder / "run" / "config.json").exists()
    return ["--resume", "run"] if begun else line


def finish(server: Server, script: str, line: list[str], folder: Path) -> dict:
    ended = server.run(script, resume_line(folder, line), folder)
    assert ended.code == 0, ended.err
    return left_by(folder / "run", "out.npz")


# ------------------------------------------------------------------------------ the same


@pytest.mark.parametrize("name", quick("sft", ["preference", "ppo", "group"]))
def test_the_same_command_twice_leaves_the_same_bytes(tmp_path, name):
    """Once from the command line, once in a fork; sets of strings are in another order."""
    script, line = RUNS[name]
    ended = command(script, line, tmp_path, PYTHONHASHSEED="1")
    assert ended.code == 0, ended.err
    once, again = whole(name)[0], left_by(tmp_path / "run", "out.npz")
    # Imports draw from Python's generator, and the fork has them behind it before it is seeded.
    imports = [f"{which}/state/rng/python[1] of 3 and 3" for which in ("best", "last")]
    assert set(differences(once, again)) <= set(imports)
    assert len(once["metrics"]) > 8 and once["out.npz"] == again["out.npz"]


# ------------------------------------------------------------------------------ kills


@pytest.mark.parametrize("name", quick("sft ppo", RUNS))
def test_a_run_killed_anywhere_ends_with_the_same_bytes(server, tmp_path, name):
    """Killed at a touch of a file (in checkpoints, mostly) or at any time; then gone on with."""
    (script, line), (expected, count) = RUNS[name], whole(name)
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
    "the last block": ["--lora-layers", "1"],  # what the frozen one gives is kept, for a step
}
SHORT = words("--data DATA --output-dir run --save-file out.npz --save-every 1 --batch-size 4")
SHORT_RUNS = {
    "sft": ("sft.py", ["--train", "--iters", "4", "--steps-per-eval", "0", *SHORT]),
    "ppo": (
        "ppo_training.py",
        [
            "--ground_truth_reward",
            "--num-steps",
            "3",
            "--max-new-tokens",
            "4",
            "--ppo-epochs",
            "1",
            "--eval-every",
            "0",
            *SHORT,
        ],
    ),
}


@pytest.mark.parametrize("name", SHORT_RUNS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tuning_resumes_exactly(server, tmp_path, name, kind):
    script, line = SHORT_RUNS[name]
    line = line + KINDS[kind]
    (unbroken := tmp_path / "unbroken").mkdir()
    (broken := tmp_path / "broken").mkdir()
    ended = server.run(script, line, unbroken, kill_at=0)
    assert ended.code == 0, ended.err
    kill_at = random.Random(SEED).randint(touches(ended) // 2, touches(ended) * 3 // 4)
    assert server.run(script, line, broken, kill_at=kill_at).code == -signal.SIGKILL
    assert list((broken / "run" / "checkpoints").glob("step-*"))
    expected = left_by(unbroken / "run", "out.npz")
    assert differences(expected, finish(server, script, line, broken)) == []


# ------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("made", MADE_BY)
@pytest.mark.parametrize(
    "script", [sft, ppo_training, group_training], ids=lambda script: script.__name__
)
def test_a_run_of_another_script_is_refused(tmp_path, capsys, script, made):
    """Given as a folder or as one of its checkpoints; the right command is named."""
    folder = tmp_path / "a run"
    Run(made, {"train": True, "ground_truth_reward": True}, output_dir=folder).close()
    for path in (folder, folder / "checkpoints" / "step-00000001"):
        if MADE_BY[made] == f"{script.__name__}.py":
            assert script.parse_arguments(["--resume", str(path)]).output_dir == str(folder)
            continue
        with pytest.raises(SystemExit) as end:
            script.parse_arguments(["--resume", str(path)])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1
        assert f"{folder}: is a run of {MADE_BY[made]}, and this is {script.__name__}.py" in err
        assert err.endswith(f"go on with it by: python {MADE_BY[made]} --resume '{path}'\n")


def test_the_run_of_another_script_stays_as_it_is(server, tmp_path):
    script, line = SHORT_RUNS["sft"]
    assert server.run(script, line, tmp_path).code == 0
    before = tree(tmp_path)
    last = "run/checkpoints/step-00000004"
    for more in (["--resume", "run"], ["--resume", last, "--num-steps", "9", "--force-resume"]):
        ended = server.run("ppo_training.py", [*more, "--ground_truth_reward"], tmp_path)
        assert ended.code == 2 and "run: is a run of sft.py, and this is ppo_tr" in ended.error
    assert tree(tmp_path) == before


def short_end(server: Server, folder: Path) -> None:
    """3 batches in updates of 2: the second update is of 1, where 2 epochs have 2, 2, 2."""
    line = ["--train", "--max-rows", "12", "--steps-per-eval", "0", *SHORT]
    line += ["--gradient-accumulation-steps", "2", "--epochs", "1"]
    assert server.run("sft.py", line, folder).code == 0


LAST = "run/checkpoints/step-00000001"
REFUSED = {
    "--resume run --epochs 2": "--epochs: the run that is resumed ended in an update of fewer than",
    "--resume run --iters 20": "--iters: the run that is resumed ended in an update of fewer than",
    f"--resume {LAST} --lora-rank 3 --force-resume": "checkpoint: does not fit the model",
}


def test_a_refused_resume_leaves_the_run_as_it_was(server, tmp_path):
    """Its options too: a plain --resume would go by them."""
    short_end(server, tmp_path)
    before = tree(tmp_path)
    for line, said in REFUSED.items():
        ended = server.run("sft.py", line.split(), tmp_path)
        assert ended.code == 2 and said in ended.error, ended.err
        assert tree(tmp_path) == before, line
    assert server.run("sft.py", ["--resume", "run"], tmp_path).code == 0


def test_iters_replace_the_epochs_of_the_run_that_is_resumed(server, tmp_path):
    """And epochs its iters; the longer run ends as if it had been asked for at once."""
    line = ["--train", "--max-rows", "12", "--steps-per-eval", "0", *SHORT]
    ends = {}
    for name, first, then in (
        ("iters", "epochs 1", "iters 5"),
        ("epochs", "iters 2", "epochs 2"),
        ("at once", "iters 5", None),
    ):
        (folder := tmp_path / name).mkdir()
        ended = server.run("sft.py", [*line, *f"--{first}".split()], folder)
        assert ended.code == 0, ended.err
        if then is not None:
            ended = server.run("sft.py", ["--resume", "run", *f"--{then}".split()], folder)
            assert ended.code == 0, ended.err
        ends[name] = left_by(folder / "run", "out.npz")
    assert ends["epochs"]["summary"]["steps"] == 6
    assert differences(ends["iters"], ends["at once"]) == []


def test_a_change_of_length_is_refused_where_the_learning_rate_depends_on_it(server, tmp_path):
    line = ["--train", "--max-rows", "12", "--steps-per-eval", "0", *SHORT, "--epochs", "1"]
    assert server.run("sft.py", [*line, "--lr-schedule", "linear"], tmp_path).code == 0
    ended = server.run("sft.py", ["--resume", "run", "--iters", "50"], tmp_path)
    assert ended.code == 2 and "--iters: the rates of --lr-schedule linear depend" in ended.error


def test_an_end_that_a_longer_run_would_not_have_is_not_gone_on_from(server, tmp_path):
    short_end(server, tmp_path)
    before = left_by(tmp_path / "run", "out.npz")
    assert server.run("sft.py", ["--resume", "run"], tmp_path).code == 0  # as long as it was
    assert differences(before, left_by(tmp_path / "run", "out.npz")) == []
    # From before the short update:
    ended = server.run("sft.py", ["--resume", LAST, "--epochs", "2"], tmp_path)
    assert ended.code == 0, ended.err
    assert left_by(tmp_path / "run", "out.npz")["summary"]["steps"] == 3
