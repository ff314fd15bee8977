"""Ctrl-C and SIGTERM on real runs, two runs in one folder, and the limits of memory."""

import signal

import pytest
from reliable_runs import (
    NOW,
    RUNS,
    SLOW,
    Server,
    differences,
    left_by,
    metrics,
    shared_server,
    whole,
)

from run_folder.checkpoint_folder import latest_checkpoint
from training.checkpoints import load_checkpoint


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


# ------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_signals_finish_the_step_save_and_say_how_to_go_on(server, tmp_path, name):
    """Stopped by Ctrl-C in the first validation, then by SIGTERM in a step, then left alone."""
    script, line = RUNS[name]
    run, slow = tmp_path / "run", SLOW.format(seconds=0.2)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        running = server.start(script, line, tmp_path, prelude=slow)
        if number == signal.SIGINT:
            running.wait_for(NOW)
        else:
            rows = (run / "metrics.jsonl").stat().st_size
            running.wait_for_file(run / "metrics.jsonl", rows + 1)
        running.signal(number)
        ended = running.wait()
        assert ended.code == code, ended.err
        assert f"python {script} --resume run" in ended.out and "Traceback" not in ended.err
        assert "once more stops at once" in ended.err
        saved = load_checkpoint(latest_checkpoint(run / "checkpoints"))
        assert saved.step == metrics(run)[-1]["step"]
        assert not (run / "summary.json").exists() and not (tmp_path / "out.npz").exists()
        line = ["--resume", "run"]
    ended = server.run(script, line, tmp_path)
    assert ended.code == 0, ended.err
    assert differences(whole(name)[0], left_by(run, "out.npz")) == []


def test_a_second_signal_stops_at_once_and_loses_no_checkpoint(server, tmp_path):
    script, line = RUNS["sft"]
    running = server.start(script, line, tmp_path, prelude=SLOW.format(seconds=60))
    running.wait_for(NOW)
    running.signal(signal.SIGINT)
    running.wait_for("once more stops at once")
    running.signal(signal.SIGINT)
    assert running.wait().code == -signal.SIGINT
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is None


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


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_memory_limit_ends_in_advice_and_a_checkpoint(server, tmp_path, name):
    script, line = RUNS[name]
    ended = server.run(script, [*line, "--memory-limit", "0.0001", "--save-every", "100"], tmp_path)
    assert ended.code == 2
    assert "--memory-limit" in ended.error and "lower --batch-size" in ended.error
    assert load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints")).step == 1
    ended = server.run(
        script, ["--resume", "run", "--memory-limit", "8", "--save-every", "2"], tmp_path
    )
    assert ended.code == 0, ended.err
    assert differences(whole(name)[0], left_by(tmp_path / "run", "out.npz")) == []


@pytest.mark.parametrize("name", ["ppo"])
def test_running_out_of_memory_says_which_flags_to_lower(server, tmp_path, name):
    """As MLX says it on a GPU; on the Linux CPU it crashes, which a resumed run survives too."""
    script, line = RUNS[name]
    prelude = """
import mlx_ppo_trainer, mlx_sft_trainer
left = [2]
def full(inner):
    def step(*words):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("[malloc] Unable to allocate 17179869184 bytes.")
        return inner(*words)
    return step
for trainer in (mlx_ppo_trainer.PPOTrainer, mlx_sft_trainer.SupervisedTrainer):
    trainer.step = full(trainer.step)
"""
    ended = server.run(script, [*line, "--save-every", "1"], tmp_path, prelude=prelude)
    assert ended.code == 2
    assert ended.error.startswith("out of memory") and "lower --batch-size" in ended.error
    assert load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints")).step == 1
    ended = server.run(script, ["--resume", "run", "--save-every", "2"], tmp_path)
    assert ended.code == 0, ended.err
    assert differences(whole(name)[0], left_by(tmp_path / "run", "out.npz")) == []
