"""Ctrl-C and SIGTERM on real runs, two runs in one folder, and the limits of memory."""

import signal
import time

import pytest
from reliable_runs import (
    NOW,
    RUNS,
    SHORT,
    SLOW,
    Server,
    differences,
    left_by,
    metrics,
    quick,
    shared_server,
    whole,
    whole_short,
)

from run_folder.checkpoint_folder import latest_checkpoint
from run_folder.stopping import AGAIN
from training.checkpoints import load_checkpoint


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


# ------------------------------------------------------------------------------ signals


# Where a signal arrives.
PLACES = {
    "validation of SFT": ("sft", "mlx_sft_trainer.SupervisedTrainer", "evaluate"),
    "samples at a validation": ("sft", "training.supervised_loop.Loop", "validate"),
    "gradient of SFT": ("sft", "mlx_sft_trainer.SupervisedTrainer", "step"),
    "the reference of all rows": (
        "preference",
        "mlx_preference_tasks.PairTask",
        "reference_logprobs",
    ),
    "gradient of a reward model": ("reward", "mlx_sft_trainer.SupervisedTrainer", "step"),
    "sampling": ("ppo", "mlx_ppo_trainer.PPOTrainer", "generate"),
    "reward": ("ppo", "training.rollout_loop.RolloutLoop", "score"),
    "sampling of groups": ("group", "mlx_group_trainer.GroupTrainer", "generate"),
    "reference": ("ppo", "mlx_ppo_trainer.PPOTrainer", "score_reference"),
    "sampling of ReST": ("rest", "training.grow.Grower", "sample"),
    "evaluation of PPO": ("ppo", "mlx_ppo_trainer.PPOTrainer", "sample_for_evaluation"),
}
AT = """
import importlib, sys, time
owner = "{owner}"
module, _, name = owner.rpartition(".")
owner, left = getattr(importlib.import_module(module), name), [{count}]
inner = getattr(owner, "{function}")
def stands_still(*words, **options):
    left[0] -= 1
    if not left[0]:
        sys.stderr.write("a slow part begins\\n")
        time.sleep(60)
    return inner(*words, **options)
setattr(owner, "{function}", stands_still)
"""


QUICK = ("gradient of SFT", "the reference of all rows", "sampling", "evaluation of PPO")


@pytest.mark.parametrize(
    "place", [p if p in QUICK else pytest.param(p, marks=pytest.mark.long) for p in PLACES]
)
def test_a_signal_gives_up_a_step_that_has_moved_no_weight(server, tmp_path, place):
    """Ctrl-C at the first such place, SIGTERM at the third, then left alone: the same bytes."""
    name, owner, function = PLACES[place]
    script, line = RUNS[name]
    run, rows = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    goes_on = ""
    for number, code, count in ((signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 3)):
        prelude = AT.format(owner=owner, function=function, count=count)
        running = server.start(script, line, tmp_path, prelude=prelude)
        running.wait_for(NOW)
        running.signal(number)
        ended = running.wait()
        assert ended.code == code, ended.err
        assert f"python {script} --resume run" in ended.out and "Traceback" not in ended.err
        assert "is given up; once more stops at once" in ended.err
        last = latest_checkpoint(run / "checkpoints").relative_to(tmp_path)
        assert "its last checkpoint is an adapter as well" in ended.out
        assert f"python talk_to_model.py --resume-file {last}" in ended.out
        assert goes_on in ended.out
        saved = load_checkpoint(latest_checkpoint(run / "checkpoints"))
        updates = [r for r in metrics(run) if not any("valid" in k or "eval" in k for k in r)]
        assert saved.step == len(updates)
        assert rows.stat().st_size == saved.state["run"]["metrics.jsonl"]["bytes"]
        assert not (run / "summary.json").exists() and not (tmp_path / "out.npz").exists()
        where = f"after step {saved.step}" if saved.step else "at the start"
        goes_on = f"run: goes on {where}\n"
        line = ["--resume", "run"]
    ended = server.run(script, line, tmp_path)
    assert ended.code == 0 and goes_on in ended.out, ended.err
    assert differences(whole(name)[0], left_by(run, "out.npz")) == []


@pytest.mark.long
def test_a_signal_gives_up_the_last_evaluation(server, tmp_path):
    """It comes after the last step, and only the files are missing."""
    name, owner, function = PLACES["validation of SFT"]
    script, line = RUNS[name]
    prelude = AT.format(owner=owner, function=function, count=4)
    running = server.start(script, line, tmp_path, prelude=prelude)
    running.wait_for(NOW)
    running.signal(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 143 and "--resume run" in ended.out, ended.err
    assert not (tmp_path / "run" / "summary.json").exists()
    ended = server.run(script, ["--resume", "run"], tmp_path)
    assert ended.code == 0, ended.err
    assert differences(whole(name)[0], left_by(tmp_path / "run", "out.npz")) == []


IN_UPDATE = """
import sys, time, mlx.optimizers
inner, said = mlx.optimizers.Optimizer.update, []
def slow(self, *words):
    inner(self, *words)
    if not said:
        said.append(sys.stderr.write("a slow part begins\\n"))
        time.sleep({seconds})
mlx.optimizers.Optimizer.update = slow
"""


@pytest.mark.parametrize("name", ["sft", pytest.param("reward", marks=pytest.mark.long), "ppo"])
def test_a_signal_during_the_update_finishes_the_step(server, tmp_path, name):
    script, line = RUNS[name]
    run = tmp_path / "run"
    for done, (number, code) in enumerate(((signal.SIGINT, 130), (signal.SIGTERM, 143)), 1):
        running = server.start(script, line, tmp_path, prelude=IN_UPDATE.format(seconds=0.5))
        running.wait_for(NOW)
        running.signal(number)
        ended = running.wait()
        assert ended.code == code, ended.err
        assert "stopping after this step; once more stops at once" in ended.err
        assert load_checkpoint(latest_checkpoint(run / "checkpoints")).step == done
        line = ["--resume", "run"]
    ended = server.run(script, line, tmp_path)
    assert ended.code == 0, ended.err
    assert differences(whole(name)[0], left_by(run, "out.npz")) == []


DEVICE = """
import sys, time, mlx.core as mx, mlx_sft_trainer
def long(self, batches):
    a = mx.random.normal((2000, 2000))
    mx.eval(a)
    sys.stderr.write("a slow part begins\\n")
    for _ in range({products}):
        a = a @ a
    mx.eval(a)
    sys.stderr.write("the device is done\\n")
mlx_sft_trainer.SupervisedTrainer.step = long
"""


def test_a_signal_is_said_to_be_heard_while_the_device_computes(server, tmp_path):
    """Python's own handler has to wait for MLX; the answer comes before, and so does the end."""
    script, line = RUNS["sft"]
    line = line[: line.index("--steps-per-eval")] + ["--steps-per-eval", "0"]
    running = server.start(script, line, tmp_path, prelude=DEVICE.format(products=4))
    running.wait_for(NOW)
    running.signal(signal.SIGINT)
    running.wait_for("is given up")
    assert "the device is done" not in running.err.read_text()
    assert running.wait().code == 130
    running = server.start(
        script, ["--resume", "run"], tmp_path, prelude=DEVICE.format(products=2000)
    )
    running.wait_for(NOW)
    running.signal(signal.SIGTERM)
    running.wait_for("is given up")
    time.sleep(2 * AGAIN)
    running.signal(signal.SIGTERM)
    assert running.wait().code in (143, -signal.SIGTERM)


def test_a_second_signal_stops_at_once_and_loses_no_checkpoint(server, tmp_path):
    script, line = RUNS["sft"]
    running = server.start(script, line, tmp_path, prelude=IN_UPDATE.format(seconds=600))
    running.wait_for(NOW)
    running.signal(signal.SIGINT)
    running.wait_for("once more stops at once")
    time.sleep(2 * AGAIN)  # sooner, it would be the same one again
    running.signal(signal.SIGINT)
    # By the system, or by the thread that answers signals, whichever is first.
    assert running.wait().code in (-signal.SIGINT, 128 + signal.SIGINT)
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is None


@pytest.mark.parametrize("name", quick("group", ["sft", "ppo", "preference", "rest"]))
def test_a_signal_that_comes_twice_at_once_is_one(server, tmp_path, name):
    """`timeout` and service managers signal every process of a group, and a parent hands it on."""
    script, line = RUNS[name]
    prelude = IN_UPDATE.format(seconds=0.5)
    prelude += "import run_folder.stopping\nrun_folder.stopping.AGAIN = 2.0\n"  # a busy machine's
    running = server.start(script, line, tmp_path, prelude=prelude)
    running.wait_for(NOW)
    running.signal(signal.SIGTERM)
    running.wait_for("once more stops at once")  # so it has been handled, and the next is another
    running.signal(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 143 and "--resume run" in ended.out, ended.err
    assert load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints")).step == 1


def test_ctrl_c_before_the_loop_ends_in_one_line(server, tmp_path):
    script, line = RUNS["ppo"]
    prelude = """
import sys, time, models.load
def load_model(*words, **options):
    sys.stderr.write("loading\\n")
    time.sleep(60)
models.load.load_model = load_model
"""
    running = server.start(script, line, tmp_path, prelude=prelude)
    running.wait_for("loading")
    running.signal(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130 and ended.error == "interrupted"
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ two runs


def test_a_second_run_in_a_folder_is_refused_and_a_dead_one_leaves_no_lock(server, tmp_path):
    script, line = RUNS["sft"]
    run = tmp_path / "run"
    running = server.start(script, line, tmp_path, prelude=SLOW.format(seconds=0.5))
    running.wait_for_file(run / "metrics.jsonl")
    before = (run / "config.json").read_bytes()
    for words_now in (line, ["--resume", "run"], [*line, "--overwrite"]):
        refused = server.run(script, words_now, tmp_path)
        assert refused.code == 2
        assert f"is being written here by process {running.pid}" in refused.error
    assert (run / "config.json").read_bytes() == before
    running.signal(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    ended = server.run(script, ["--resume", "run"], tmp_path)
    assert ended.code == 0, ended.err
    assert differences(whole("sft")[0], left_by(run, "out.npz")) == []


# ------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("name", quick("sft ppo", ["reward", "preference", "group"]))
def test_a_memory_limit_ends_in_advice_and_a_checkpoint(server, tmp_path, name):
    script, line = SHORT[name].script, SHORT[name].line
    ended = server.run(script, [*line, "--memory-limit", "0.0001", "--save-every", "100"], tmp_path)
    assert ended.code == 2
    assert "--memory-limit" in ended.error and "lower --batch-size" in ended.error
    assert load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints")).step == 1
    ended = server.run(
        script, ["--resume", "run", "--memory-limit", "8", "--save-every", "1"], tmp_path
    )
    assert ended.code == 0, ended.err
    assert differences(whole_short(name)[1], left_by(tmp_path / "run", "out.npz")) == []


def test_running_out_of_memory_says_which_flags_to_lower(server, tmp_path):
    """As MLX says it on a GPU; on the Linux CPU it crashes, which a resumed run survives too."""
    script, line = SHORT["ppo"].script, SHORT["ppo"].line
    prelude = """
import mlx_ppo_trainer, mlx_sft_trainer
left = [2]
def full(inner):
    def step(*words, **options):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("[malloc] Unable to allocate 17179869184 bytes.")
        return inner(*words, **options)
    return step
ppo, sft = mlx_ppo_trainer.PPOTrainer, mlx_sft_trainer.SupervisedTrainer
ppo.update, sft.step = full(ppo.update), full(sft.step)
"""
    ended = server.run(script, [*line, "--save-every", "1"], tmp_path, prelude=prelude)
    assert ended.code == 2
    assert ended.error.startswith("out of memory") and "lower --batch-size" in ended.error
    assert load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints")).step == 1
    ended = server.run(script, ["--resume", "run"], tmp_path)
    assert ended.code == 0, ended.err
    assert differences(whole_short("ppo")[1], left_by(tmp_path / "run", "out.npz")) == []
