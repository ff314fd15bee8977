"""What every training script does around its loop, with a script that has nothing of its own."""

import fast_blas  # noqa: F401  isort: skip

import json
import os
import signal

import pytest

from command_line.parser import Parser
from command_line.shared_flags import (
    add_model_arguments,
    add_run_arguments,
    model_options,
    schedule_options,
)
from errors import UserError
from run_folder.run_config import MADE_BY
from training.launch import run_training, start


class CountingLoop:
    """A loop whose steps are numbers; it stops where it is told to."""

    def __init__(self, run, steps, stop_at=None):
        self.run_folder, self.steps, self.stop_at, self.step = run, steps, stop_at, 0
        self.resumed = None

    def resume(self, path, *, force):
        self.resumed = (path, force)
        self.run_folder.load_state_dict({})

    def run(self, stop, kind):
        self.kind = kind
        while self.step < self.steps and not stop.requested:
            self.step += 1
            self.run_folder.log(self.step, {"number": self.step})
            if self.step == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)


def third_script(words, steps=3, stop_at=None, finished=None):
    """All that a script needs beside its arguments and its loop."""
    parser = Parser(script="sft.py", description="a third script")
    parser.add_argument("--save-file", default="out")
    parser.add_argument("--steps-per-report", type=int, default=1)
    add_model_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args(words)
    loops = []

    def make_loop(run):
        loops.append(CountingLoop(run, steps, stop_at))
        return loops[0]

    def finish(run, loop):
        (finished if finished is not None else []).append(loop.step)
        run.finish({"steps": loop.step})

    said = "{0.steps} steps".format
    run_training(args, "sft", make_loop, said, finish)
    return loops[0]


def test_a_run_ends_with_what_finish_leaves(tmp_path, capsys):
    finished = []
    loop = third_script(["--output-dir", str(tmp_path / "run")], finished=finished)
    assert finished == [3] and loop.kind == "sft" and loop.resumed is None
    told = "; ".join(filter(None, ["3 steps", fast_blas.told()]))
    assert f"{tmp_path / 'run'}: {told}\n" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["finished"] and summary["steps"] == 3
    config = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert config["options"]["seed"] == 0 and config["machine"]["blas"] == fast_blas.NAME


def test_a_stopped_run_says_how_to_go_on_and_is_gone_on_with(tmp_path, capsys):
    finished, folder = [], str(tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        third_script(["--output-dir", folder], stop_at=2, finished=finished)
    assert ended.value.code == 128 + signal.SIGTERM and not finished
    assert f"python sft.py --resume {folder}" in capsys.readouterr().out
    loop = third_script(["--resume", folder], finished=finished)
    assert loop.resumed == (None, False) and finished == [3]  # no checkpoint: from the start


def test_a_disk_that_refuses_the_end_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def full(run, loop):
        raise OSError(28, "No space left on device")

    parser = Parser(script="sft.py", description="a third script")
    parser.add_argument("--save-file", default="out")
    add_run_arguments(parser)
    args = parser.parse_args(["--output-dir", "run"])
    with pytest.raises(UserError, match="^out: cannot write: No space left on device"):
        run_training(args, "sft", lambda run: CountingLoop(run, 1), lambda loop: "", full)


def test_every_kind_of_run_names_its_script():
    assert all(script.endswith(".py") for script in MADE_BY.values())


def test_start_seeds_and_loads(capsys):
    import random

    parser = Parser(script="sft.py", description="")
    parser.add_argument("--steps-per-report", type=int, default=7)
    add_model_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args(["--seed", "5", "--dtype", "float32"])
    loaded = start(args.seed, args.memory_limit, **model_options(args))
    numbers = random.random()
    start(5, None, **model_options(args))
    assert random.random() == numbers and loaded.name == "data/digits_model"
    assert schedule_options(args)["report_every"] == 7
