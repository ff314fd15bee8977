"""pytorch_sft.py and pytorch_ppo_training.py where something goes wrong: as the MLX side does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from baseline_setup import DIGITS, ROOT, torch
from files import tree
from pytorch_backend import PyTorchBackend
from pytorch_files import write_arrays
from pytorch_ppo_training import main as ppo_main
from pytorch_sft import main as sft_main

import sft
from errors import UserError
from run_folder.checkpoint_folder import list_checkpoints
from run_folder.run import read_rows

pytestmark = pytest.mark.torch
SMALL = ["--batch-size", "4", "--max-rows", "24", "--steps-per-eval", "0"]
PPO = [
    "--num-steps",
    "4",
    "--batch-size",
    "4",
    "--max-new-tokens",
    "4",
    "--eval-every",
    "0",
    "--ground-truth-reward",
]


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def train(run: Path, *words) -> Path:
    """A small training of its own, its adapter beside the run folder."""
    line = ["--train", *SMALL, "--output-dir", run, "--save-file", f"{run}.npz", *words]
    sft_main([str(word) for word in line])
    return run


def steps(run: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in list_checkpoints(run / "checkpoints")]


def train_rows(run: Path) -> list[int]:
    return [row["step"] for row in read_rows(run) if "train/loss" in row]


# ---- going back --------------------------------------------------------------------------------


def test_a_run_that_goes_back_leaves_the_newer_checkpoints_behind(tmp_path, monkeypatch):
    run = train(tmp_path / "run", "--iters", 6, "--save-every", 2, "--keep-checkpoints", 3)
    whole = (tmp_path / "run.npz").read_bytes()
    with monkeypatch.context() as patch:  # it stops after its first checkpoint
        patch.setattr("training.supervised_loop.Loop.stopped_early", lambda loop, _: loop.step == 3)
        words = ["--resume", str(run / "checkpoints" / "step-00000002"), "--save-every", "1"]
        sft_main([*words, "--keep-checkpoints", "3"])
    assert steps(run) == [2, 3] and train_rows(run) == [1, 2, 3]
    assert sorted(path.name for path in (run / "checkpoints").glob("aside-*"))[0].endswith("04")
    sft_main(["--resume", str(run)])
    assert train_rows(run) == [1, 2, 3, 4, 5, 6] and (tmp_path / "run.npz").read_bytes() == whole


def test_a_torn_checkpoint_is_passed_over(tmp_path, capfd):
    run = train(tmp_path / "run", "--iters", 6, "--save-every", 3)
    whole = (tmp_path / "run.npz").read_bytes()
    newest = list_checkpoints(run / "checkpoints")[-1]
    with pytest.raises(UserError, match="step-9: there is no such checkpoint"):
        sft_main(["--resume", str(newest.with_name("step-9"))])
    (newest / "state.pt").write_bytes(b"garbage")
    with pytest.raises(UserError, match="state.pt is torn or was altered; this checkpoint cannot"):
        sft_main(["--resume", str(newest)])
    sft_main(["--resume", str(run)])
    assert "state.pt is torn or was altered; using the one before it" in capfd.readouterr().err
    assert train_rows(run) == [*range(1, 7)] and (tmp_path / "run.npz").read_bytes() == whole


def test_other_weights_than_the_checkpoint_holds_are_refused(tmp_path):
    """--force-resume lets the options differ; the folder stays as it was."""
    run = train(tmp_path / "run", "--iters", 1)
    before = tree(tmp_path)
    for words in (["--lora-rank", "3"], ["--fine-tune-type", "full"]):
        with pytest.raises(UserError, match="holds other weights than are trained now"):
            sft_main(["--resume", str(run), "--iters", "2", "--force-resume", *words])
    assert tree(tmp_path) == before


def test_what_is_no_state_is_refused_in_a_line(tmp_path, monkeypatch):
    """Where the sums are right, too: nothing pickled is run."""
    torch.save(Path("x"), tmp_path / "state.pt")
    monkeypatch.setattr("pytorch_backend.problem", lambda path: None)
    with pytest.raises(UserError, match="cannot be read: Weights only load failed"):
        PyTorchBackend(torch.device("cpu")).load_checkpoint(tmp_path)


def test_a_run_that_stopped_early_has_ended(tmp_path):
    words = ["--iters", 12, "--steps-per-eval", 1, "--learning-rate", 0.3]
    run = train(tmp_path / "run", *words, "--early-stopping-patience", 2)
    rows, adapter = read_rows(run), (tmp_path / "run.npz").read_bytes()
    assert 2 <= train_rows(run)[-1] < 12
    sft_main(["--resume", str(run)])
    assert read_rows(run) == rows and (tmp_path / "run.npz").read_bytes() == adapter


def test_the_validation_before_training_is_made_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("training.supervised_loop.Loop.stopped_early", lambda *_: True)
        run = train(tmp_path / "run", "--iters", 2, "--steps-per-eval", 2)
    sft_main(["--resume", str(run)])
    assert [row["step"] for row in read_rows(run) if "valid/loss" in row] == [0, 2]


# ---- numbers that are not finite ---------------------------------------------------------------


def test_a_run_that_trained_nothing_saves_nothing(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(DIGITS, base)
    weights = mx.load(str(base / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(UserError, match="so all 3 were skipped and nothing was trained"):
        train(tmp_path / "run", "--iters", 3, "--model", base)
    assert not (tmp_path / "run.npz").exists()
    words = ["--model", str(base), "--save-file", str(tmp_path / "ppo.npz")]
    with pytest.raises(UserError, match="not finite|NaN"):
        ppo_main([*PPO, *words, "--output-dir", str(tmp_path / "ppo")])
    assert not (tmp_path / "ppo.npz").exists()


def test_the_checkpoints_before_a_bad_streak_are_kept(tmp_path):
    words = ["--iters", 9, "--learning-rate", 1e30, "--save-every", 1, "--max-bad-steps", 4]
    with pytest.raises(UserError, match="in 4 steps in a row .* goes on from step-00000002"):
        train(tmp_path / "run", *words)
    assert steps(tmp_path / "run") == [1, 2]


def test_a_ppo_run_ends_although_a_step_had_no_number(tmp_path, monkeypatch):
    rows = [{"step": 1, "objective/kl": None}, {"step": 2, "objective/kl": 0.5}]
    monkeypatch.setattr("training.results.read_rows", lambda folder: rows)
    monkeypatch.setattr("reports.training_plots.plot_ppo", lambda rows, path, **_: path)
    run = tmp_path / "run"
    ppo_main([*PPO, "--output-dir", str(run), "--save-file", str(tmp_path / "a.npz")])
    assert json.loads((run / "summary.json").read_text())["kl"] == 0.5


def test_the_first_validation_may_be_nan(tmp_path, monkeypatch):
    from pytorch_sft_trainer import SFTTrainer

    losses = iter([np.nan, 3.0, 2.0])
    monkeypatch.setattr(SFTTrainer, "evaluate", lambda *_: {"loss": next(losses, 2.5)})
    run = train(tmp_path / "run", "--iters", 2, "--steps-per-eval", 1)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_valid_loss"] == 2.0


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that takes no file, root's too")
@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a"])
def test_the_disk_s_refusal_is_one_line(tmp_path, name):
    run, elsewhere = tmp_path / "run", tmp_path / name
    with pytest.raises(UserError, match="cannot write"):
        train(run, "--iters", 1, "--save-file", f"/proc/{name}")
    assert not (run / "checkpoints").exists() or not steps(run)  # known before any training
    train(tmp_path / "again", "--iters", 1, "--save-file", str(elsewhere))
    assert elsewhere.exists()


def test_the_same_arrays_are_the_same_bytes(tmp_path):
    """The library orders several metadata by chance, in every file anew."""
    described = {"reward_head": {"pooling": "mean", "gain": 1.0, "offset": 0.0}}
    found = set()
    for number in range(8):
        file = tmp_path / f"{number}.safetensors"
        write_arrays(file, {"weight": torch.ones(2), "bias": torch.zeros(1)}, described)
        found.add(file.read_bytes())
    assert len(found) == 1


# ---- what is reported --------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["reward_function", "preference"])
def test_held_out_rows_as_the_mlx_side_reports_them(tmp_path, data, capsys):
    """Of scores that are normalised, where rewards and log odds are not."""
    base = f"{data}_increasing_mult_2_"
    words = ["--reward-model", "--data-base", base, "--iters", 2, "--normalize-samples", 8]
    run = train(tmp_path / "run", *words)
    line = [
        "--test",
        "--reward-model",
        "--data-base",
        base,
        "--resume-adapter-file",
        f"{run}.npz",
        "--test-file",
        f"data/{base}valid.jsonl",
        "--max-rows",
        "24",
    ]
    reports = []
    for main in (sft_main, sft.main):
        capsys.readouterr()
        main(line)
        printed = capsys.readouterr().out
        reports.append(printed[printed.index("held-out rows: ") :].splitlines()[0])
    assert reports[0] == reports[1]
    summary = json.loads((run / "summary.json").read_text())
    found = {key[8:]: value for key, value in summary.items() if key[:8] == "heldout/"}
    found = [f"{k} {v:.0f}" if k == "pairs" else f"{k} {v:.3f}" for k, v in found.items()]
    assert reports[0] == "held-out rows: " + "  ".join(found)


def test_samples_come_from_prompts_in_their_template(tmp_path):
    data = ["--train-file", "data/samples/prompt_completion.jsonl", "--iters", 1]
    words = [*data, "--sample-prompts", "2 4", "--steps-per-eval", 1, "--learning-rate", 0]
    words += ["--validation-file", data[1], "--batch-size", 1]
    plain = train(tmp_path / "plain", *words)
    inside = train(tmp_path / "inside", *words, "--prompt-template", "10 20 {prompt}")
    first, second = (read_rows(run / "samples.jsonl")[0] for run in (plain, inside))
    assert first["prompt"] == second["prompt"] and first["response"] != second["response"]


@pytest.mark.parametrize("words", [(), ("--prompt-tuning",), ("--reward-model",)])
@pytest.mark.parametrize("target", ["made.npz", "made"])
def test_what_comes_next_takes_what_was_written(tmp_path, words, target, capsys):
    words = [*words, "--save-file", tmp_path / target]
    if "--reward-model" in words:
        words += ["--data-base", "reward_function_increasing_mult_2_"]
    train(tmp_path / "run", "--iters", 1, *words)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("next: python ")]
    script, *rest = line.removeprefix("next: python ").split()
    rest = [str(tmp_path / "mine") if word == "my_model/" else word for word in rest]
    if script == "ppo_training.py":
        rest += ["--num-steps", "1", "--batch-size", "4", "--eval-every", "0", "--output-dir"]
        rest += [str(tmp_path / "ppo"), "--save-file", str(tmp_path / "ppo.npz")]
    if script == "talk_to_model.py":
        rest += ["--max-tokens", "2", "8"]
    run = subprocess.run([sys.executable, script, *rest], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
