"""pytorch_sft.py and pytorch_ppo_training.py repeat themselves, and resume to the byte."""

import shutil
from pathlib import Path

import pytest
from baseline_runs import losses, other_base, ppo, sft
from baseline_setup import ROOT, close
from files import tree
from pytorch_ppo_training import main as ppo_main
from pytorch_sft import main as sft_main

from errors import UserError
from run_folder.run import Run
from run_folder.run_config import MADE_BY

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("in_root")]

# ---- repeat and resume -------------------------------------------------------------------------


def stopped_after(folder: Path, step: int) -> Path:
    """A copy of a finished run as it stood at a checkpoint."""
    copied = folder.with_name(folder.name + "-stopped")
    shutil.copytree(folder, copied)
    for checkpoint in (copied / "checkpoints").glob("step-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    (copied / "summary.json").unlink()
    return copied


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ["--lora-dropout", "0.2", "--gradient-accumulation-steps", "2", "--optimizer", "adamw"],
        ["--fine-tune-type", "full", "--grad-checkpoint", "--warmup-steps", "1"],
    ],
)
def test_sft_repeats_and_resumes_to_the_byte(words, tmp_path):
    words = [*words, "--save-every", "2", "--keep-checkpoints", "9"]
    first, second = sft(tmp_path / "a", *words), sft(tmp_path / "b", *words)
    assert weights(first) == weights(second) and losses(first) == losses(second)
    stopped = stopped_after(first, 2)
    sft_main(["--resume", str(stopped)])
    assert weights(stopped) == weights(first) and losses(stopped) == losses(first)


def test_ppo_repeats_and_resumes_to_the_byte(tmp_path):
    words = [
        "--save-every",
        "2",
        "--keep-checkpoints",
        "9",
        "--adap-kl-ctrl",
        "--target",
        "0.1",
        "--horizon",
        "50",
        "--use-score-scaling",
        "--min-response-length",
        "3",
    ]
    first, second = ppo(tmp_path / "a", *words), ppo(tmp_path / "b", *words)
    assert weights(first) == weights(second) and losses(first) == losses(second)
    stopped = stopped_after(first, 2)
    ppo_main(["--resume", str(stopped)])
    assert weights(stopped) == weights(first) and losses(stopped) == losses(first)


@pytest.mark.parametrize("main", [sft_main, ppo_main], ids=["sft", "ppo"])
def test_resume_refuses_a_run_of_another_script(main, tmp_path, capsys):
    this = "sft" if main is sft_main else "ppo_training"
    for made, maker in MADE_BY.items():
        Run(made, {"train": True}, output_dir=tmp_path / made).close()
        before = tree(tmp_path)
        if maker != f"pytorch_baseline/pytorch_{this}.py":
            with pytest.raises(SystemExit):
                main(["--resume", str(tmp_path / made)])
            err = capsys.readouterr().err
            assert f"is a run of {maker}, and this is pytorch_baseline/pytorch_{this}.py" in err
            assert f"python {maker} --resume {tmp_path / made}" in err
        assert tree(tmp_path) == before


def test_resume_refuses_other_data(tmp_path):
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("digits_model"))
    run = sft(tmp_path / "a", "--data", str(tmp_path / "data"))
    rows = (tmp_path / "data" / "increasing_mult_2_train.jsonl").read_text().splitlines()
    (tmp_path / "data" / "increasing_mult_2_train.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    before = tree(run)
    with pytest.raises(UserError, match="--force-resume"):
        sft_main(["--resume", str(run), "--iters", "9"])
    assert tree(run) == before  # the options too


def test_resume_refuses_other_weights_of_the_base(tmp_path):
    run = sft(tmp_path / "a", "--model", str(other_base(tmp_path / "m", 1.0)))
    other_base(tmp_path / "m", 1.1)
    with pytest.raises(UserError, match="weights of the model are not what .* --force-resume"):
        sft_main(["--resume", str(run)])
    sft_main(["--resume", str(run), "--force-resume"])


def test_recomputing_activations_changes_no_number(tmp_path):
    plain, recomputed = sft(tmp_path / "a"), sft(tmp_path / "b", "--grad-checkpoint")
    for a, b in zip(losses(plain), losses(recomputed), strict=True):
        close(list(a.values()), list(b.values()), relative=1e-6)
    a, b = ppo(tmp_path / "c"), ppo(tmp_path / "d", "--grad-checkpoint")
    for one, other in zip(losses(a), losses(b), strict=True):
        close(list(one.values()), list(other.values()), relative=1e-5)


def test_memory_limit(tmp_path):
    with pytest.raises(UserError, match="--memory-limit"):
        sft(tmp_path / "a", "--memory-limit", "0.01")
