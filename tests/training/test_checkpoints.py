"""Checkpoints: whole or not there, through kills, full disks and altered files; exact resume."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from errors import UserError
from run_folder.checkpoint_folder import (
    Metric,
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    problem,
)
from run_folder.run_config import with_sum
from run_folder.stopping import AGAIN, resume_command
from training.checkpoints import load_checkpoint, save_checkpoint
from training.streams import rng_state, seed_everything, set_rng_state

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("MLX_RLHF_KILLS", "3"))  # 20 in the long version


def arrays_of(step: int) -> dict:
    return {
        "adapters": {"layers.0.lora_a": mx.full((4, 3), step), "half": mx.ones(2, mx.bfloat16)},
        "optimizer": {"step": mx.array(step, dtype=mx.uint64)},
        "nothing": {},
    }


def save(folder: Path, step: int, **options) -> Path:
    return save_checkpoint(folder, step, arrays_of(step), {"step_again": step}, **options)


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


# ------------------------------------------------------------------------------ round trip


def test_what_is_saved_comes_back(tmp_path):
    saved = load_checkpoint(save(tmp_path, 7))
    assert saved.step == 7 and saved.state["step_again"] == 7
    assert set(saved.arrays) == {"adapters", "optimizer", "nothing"} and not saved.arrays["nothing"]
    for group, members in arrays_of(7).items():
        for name, array in members.items():
            again = saved.arrays[group][name]
            assert again.dtype == array.dtype and mx.array_equal(again, array).item()
    kinds = {path.suffix for path in saved.path.iterdir()}
    assert kinds == {".safetensors", ".json"}


def test_loaded_arrays_outlive_their_file(tmp_path):
    path = save(tmp_path, 7)
    saved = load_checkpoint(path)
    for file in path.iterdir():
        file.write_bytes(b"")
    assert saved.arrays["adapters"]["layers.0.lora_a"].tolist() == [[7.0] * 3] * 4


def test_all_three_generators_go_on_where_they_were():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(), mx.random.normal().item()

    seed_everything(3)
    first = draw()
    seed_everything(3)
    assert draw() == first
    state = json.loads(json.dumps(rng_state()))
    expected = draw(), draw()
    set_rng_state(state)
    assert (draw(), draw()) == expected


def test_compiled_functions_see_a_restored_generator():
    noise = mx.compile(
        lambda: mx.random.uniform(shape=(3,)), inputs=mx.random.state, outputs=mx.random.state
    )
    seed_everything(0)
    state, expected = rng_state(), noise().tolist()
    assert noise().tolist() != expected
    set_rng_state(state)
    assert noise().tolist() == expected


# ------------------------------------------------------------------------------ which are kept


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, loss in enumerate((0.5, 0.2, 0.4, 0.3, float("nan")), 1):
        save(tmp_path, step, keep=2, metric=Metric("valid/loss", loss))
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert best_checkpoint(tmp_path).name == "step-00000002"
    assert json.loads((tmp_path / "best.json").read_text())["value"] == 0.2


def test_the_best_may_be_the_highest(tmp_path):
    for step, score in enumerate((0.1, 0.9, 0.5), 1):
        save(tmp_path, step, keep=1, metric=Metric("score", score, higher_is_better=True))
    assert best_checkpoint(tmp_path).name == "step-00000002"
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_old_ones_go_only_when_the_new_one_is_in_place(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000001"] and problem(tmp_path / "step-00000001") is None
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_same_step_again_is_left_as_it_is_and_another_gets_a_name_of_its_own(tmp_path):
    path = save(tmp_path, 5)
    before = path.stat().st_ino
    assert save(tmp_path, 5) == path and path.stat().st_ino == before
    for number in (2, 3, 4):
        other = save_checkpoint(tmp_path, 5, {"a": {"x": mx.array(number)}}, {}, keep=2)
        assert other.name == f"step-00000005-{number}"
        assert latest_checkpoint(tmp_path) == other
    assert names(tmp_path) == ["step-00000005-3", "step-00000005-4"]


def test_a_broken_one_of_the_same_step_is_replaced(tmp_path):
    path = save(tmp_path, 5)
    (path / "adapters.safetensors").write_bytes(b"half")
    assert save(tmp_path, 5) == path and problem(path) is None


# ------------------------------------------------------------------------------ torn and altered


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["adapters.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, capsys, damage, name):
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    warning = capsys.readouterr().err
    assert "step-00000002" in warning and name in warning
    with pytest.raises(UserError, match=name):
        load_checkpoint(tmp_path / "step-00000002")


def test_a_manifest_that_leaves_the_folder_is_refused(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../outside.safetensors"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(with_sum(manifest)))
    assert "manifest.json" in problem(path)


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "step-x").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_left_overs_of_a_killed_process_are_cleared(tmp_path):
    (tmp_path / ".tmp-step-00000009-1").mkdir()
    save(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]


def test_nan_never_gets_into_a_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match="adapters/b"):
        save_checkpoint(tmp_path, 1, {"adapters": {"b": mx.array([1.0, float("nan")])}}, {})
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------ the disk


def python(code: str, *words: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    code = """
        import resource, signal, sys
        import mlx.core as mx
        from command_line.exits import run_main
        from training.checkpoints import save_checkpoint
        def main():
            save_checkpoint(sys.argv[1], 1, {"a": {"x": mx.ones(10)}}, {})
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            save_checkpoint(sys.argv[1], 2, {"a": {"x": mx.ones(100_000)}}, {})
        run_main(main)
    """
    process = python(code, str(tmp_path))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: ") and "cannot write" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert problem(tmp_path / "step-00000001") is None


def test_a_run_folder_that_has_vanished_is_not_made_again(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        save(tmp_path / "gone" / "checkpoints", 1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save(tmp_path / "file" / "checkpoints", 1)


# ------------------------------------------------------------------------------ kills

EVERY_STAGE = """
    import os, shutil, signal, sys
    import mlx.core as mx
    from run_folder.checkpoint_folder import Metric
    from training.checkpoints import save_checkpoint
    folder = sys.argv[1]

    def save(step):
        arrays = {"a": {"x": mx.array([step])}}
        save_checkpoint(folder, step, arrays, {"n": step}, keep=1, metric=Metric("m", 9 - step))

    def killed_at(count):
        if os.fork() == 0:
            left = [count]
            def watch(event, words):
                if event.startswith(("open", "os.", "shutil.")):
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
            if count == 0:
                save(1)
            else:
                sys.addaudithook(watch)
                save(2)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.wait()[1]) != 0

    count = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        killed_at(0)
        count += 1
        if not killed_at(count):
            break
        os.rename(folder, f"{folder}-{count}")
"""


def test_a_kill_at_every_single_step_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    """The second of two saves is killed at its first touch of the disk, its second, and so on."""
    process = python(EVERY_STAGE, str(tmp_path / "f"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    folders = sorted(tmp_path.glob("f-*"), key=lambda path: int(path.name[2:]))
    assert len(folders) > 15
    found = []
    for folder in folders:
        assert [problem(path) for path in list_checkpoints(folder)] in ([None], [None, None])
        best, last = best_checkpoint(folder), load_checkpoint(latest_checkpoint(folder))
        assert best is not None and best.exists()
        assert last.state["n"] == last.step == last.arrays["a"]["x"].item()
        found.append(last.step)
    # The old one up to the rename, the new one from there on.
    assert found == sorted(found) and set(found) == {1, 2}


WRITER = """
    import sys
    import mlx.core as mx
    from run_folder.checkpoint_folder import latest_checkpoint
    from training.checkpoints import load_checkpoint, save_checkpoint
    folder = sys.argv[1]
    last = latest_checkpoint(folder)
    step = load_checkpoint(last).step if last else 0
    print("ready", flush=True)
    while True:
        step += 1
        arrays = {name: {"x": mx.full((250, 1000), step)} for name in "abc"}
        save_checkpoint(folder, step, arrays, {"n": step}, keep=2)
        print(step, flush=True)
"""


def test_a_kill_in_the_middle_of_writing_costs_no_whole_checkpoint(tmp_path):
    """Nearly all of this process's time goes into writing, so that is where it is hit."""
    pause = random.Random()
    for _ in range(KILLS):
        process = python(WRITER, str(tmp_path))
        assert process.stdout.readline() == "ready\n"
        time.sleep(pause.uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        done = [int(line) for line in process.communicate()[0].split()]
        if not done and latest_checkpoint(tmp_path) is None:
            continue
        saved = load_checkpoint(latest_checkpoint(tmp_path))
        assert saved.step >= max(done, default=0)
        assert all(problem(path) is None for path in list_checkpoints(tmp_path))
        for group in "abc":
            x = saved.arrays[group]["x"]
            assert x.shape == (250, 1000) and (x == saved.step).all().item()
        assert saved.state["n"] == saved.step


TRAINER = """
    import fast_blas, sys
    import mlx.core as mx, mlx.nn as nn, numpy as np, random
    from mlx.utils import tree_flatten
    from command_line.exits import run_main
    from command_line.parser import Parser
    from run_folder.checkpoint_folder import *
    from training.checkpoints import *
    from command_line.shared_flags import *
    from run_folder.run import Run
    from training.optimizers import *
    from run_folder.run_config import checkpoint_asked_for
    from training.streams import *
    from run_folder.stopping import GracefulStop

    def main():
        parser = Parser(prog="toy.py")
        add_run_arguments(parser, save_every=3)
        add_optimizer_arguments(parser, learning_rate=0.05, optimizer="adam")
        parser.add_argument("--steps", type=int, default=40, help="updates")
        parser.add_argument("--nap", type=float, default=0.0, help="seconds in a step")
        args = parser.parse_args()
        resume = args.resume is not None
        with Run("toy", vars(args), output_dir=args.output_dir, resume=resume) as run, \\
                GracefulStop() as stop:
            seed_everything(args.seed)
            model = nn.Sequential(nn.Linear(4, 300), nn.Linear(300, 1))
            optimizer = build_optimizer(**optimizer_options(args), steps=args.steps)
            optimizer.init(model.trainable_parameters())
            start = 0
            if resume:
                path = checkpoint_asked_for(args.resume) or latest_checkpoint(run.checkpoints)
                saved = load_checkpoint(path) if path else None
                run.load_state_dict(saved.state["run"] if saved else {})
                if saved:
                    start = saved.step
                    model.load_weights(list(saved.arrays["model"].items()))
                    arrays = saved.arrays["optimizer"]
                    restore_optimizer(optimizer, arrays, model.trainable_parameters())
                    set_rng_state(saved.state["rng"])

            def save(step, loss):
                arrays = {
                    "model": dict(tree_flatten(model.parameters())),
                    "optimizer": optimizer_arrays(optimizer),
                }
                state = {"run": run.state_dict(), "rng": rng_state()}
                metric = Metric("loss", loss)
                save_checkpoint(run.checkpoints, step, arrays, state, keep=2, metric=metric)

            for step in range(start + 1, args.steps + 1):
                x = mx.random.normal((8, 4)) * random.random() + float(np.random.rand())
                loss, gradients = nn.value_and_grad(model, lambda x: mx.square(model(x)).mean())(x)
                optimizer.update(model, gradients)
                mx.eval(model, optimizer.state)
                run.log(step, {"loss": loss})
                run.log_samples(step, [{"response": "x" * step}])
                print(step, flush=True)
                if args.nap: __import__("time").sleep(args.nap)
                if step % args.save_every == 0 or step == args.steps or stop.requested:
                    save(step, loss.item())
                if stop.requested:
                    break
            if not stop.requested:
                run.finish({"steps": args.steps})
        stop.exit_if_requested("toy.py", run.folder)
    run_main(main)
"""


def result_of(run: Path) -> dict[str, bytes]:
    """The bytes that a run ends with: last checkpoint, best one, metrics and samples."""
    last = latest_checkpoint(run / "checkpoints")
    files = {file.name: file.read_bytes() for file in sorted(last.iterdir())}
    files |= {name: (run / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    return files | {"best": (run / "checkpoints" / "best.json").read_bytes()}


def test_a_run_killed_at_random_points_ends_with_the_same_bytes(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["--lr-schedule", "cosine", "--steps", str(20 * KILLS), "--nap", "0.005"]
    assert python(TRAINER, "--output-dir", str(whole), *options).wait(60) == 0
    words, kills = ["--output-dir", str(broken), *options], 0
    while kills < KILLS:
        process = python(TRAINER, *words)
        for _ in range(random.randint(2, 12)):
            process.stdout.readline()
        time.sleep(random.uniform(0.0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        words = ["--resume", str(broken)]
    assert (broken / "metrics.jsonl").read_bytes() != (whole / "metrics.jsonl").read_bytes()
    process = python(TRAINER, *words)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert result_of(broken) == result_of(whole)
    assert json.loads((broken / "summary.json").read_text())["finished"] is True


# ------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number, code):
    folder = tmp_path / "a run"
    words = ["--output-dir", str(folder), "--nap", "0.1", "--save-every", "1000"]
    process = python(TRAINER, *words)
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert resume_command("toy.py", folder) in out and f"--resume '{folder}'" in out
    last = load_checkpoint(latest_checkpoint(folder / "checkpoints"))
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert last.step == json.loads(rows[-1])["step"] >= 2
    assert "once more stops at once" in err and "Traceback" not in err
    assert not (folder / "summary.json").exists()


def test_a_second_signal_stops_at_once(tmp_path):
    process = python(TRAINER, "--output-dir", str(tmp_path / "r"), "--nap", "30")
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert "stopping" in process.stderr.readline() + process.stderr.readline()
    time.sleep(2 * AGAIN)  # sooner, it would be the same one again
    process.send_signal(signal.SIGINT)
    # By the system, or by the thread that answers signals, whichever is first.
    assert process.wait(5) in (-signal.SIGINT, 128 + signal.SIGINT)
    process.communicate()
