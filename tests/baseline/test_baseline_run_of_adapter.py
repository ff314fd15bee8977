"""The twin's adapters record the run that made them, so a model card finds it from anywhere."""

import shutil
from pathlib import Path

import pytest
from baseline_setup import DIGITS, ROOT
from pytorch_ppo_training import main as ppo_main
from pytorch_sft import main as sft_main

import fuse
from models.adapter_description import read_description
from publishing.run_facts import find_run

pytestmark = pytest.mark.torch
SFT = "--train --iters 1 --batch-size 2 --steps-per-eval 0 --save-every 0 --seed 1"
PPO = "--num-steps 1 --batch-size 4 --mini-batch-size 4 --max-new-tokens 2 --eval-every 0 --seed 1"
KINDS = {
    "sft": (sft_main, SFT, "a.npz", "pytorch_baseline/pytorch_sft.py"),
    "reward model": (
        sft_main,
        f"{SFT} --reward-model --data-base preference_increasing_mult_2_",
        "a.safetensors",
        "pytorch_baseline/pytorch_sft.py",
    ),
    "soft prompt": (
        sft_main,
        f"{SFT} --prompt-tuning --num-prompt-tokens 2",
        "a",
        "pytorch_baseline/pytorch_sft.py",
    ),
    "ppo": (
        ppo_main,
        f"{PPO} --ground-truth-reward --save-every 0",
        "a.npz",
        "pytorch_baseline/pytorch_ppo_training.py",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_names_the_script_and_the_options(kind, tmp_path, monkeypatch):
    """Run folder, adapter and the folder that is worked in are three places; then both move."""
    script, words, name, told = KINDS[kind]
    for folder in ("work", "elsewhere"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    more = ["--model", str(DIGITS), "--data", str(ROOT / "data"), "--output-dir", "../logs/run7"]
    script([*words.split(), *more, "--save-file", f"../kept/{name}"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "kept", tmp_path / "moved")
    adapter = Path("..", "moved", name)
    up = ".." if adapter.is_file() else "../.."
    assert read_description(adapter)["run"] == f"{up}/logs/run7"
    assert find_run(adapter).resolve() == tmp_path / "logs" / "run7"
    where = ["--adapter-file", str(adapter), "--save-path", "model"]
    fuse.main(["--model", str(DIGITS), *where])
    card = Path("model/README.md").read_text()
    assert f"(`{told}`" in card and "\nseed: 1\n" in card


def test_in_runs_the_time_is_the_name(tmp_path, monkeypatch):
    """There a card looks anyway, and the same command twice makes the same adapter."""
    monkeypatch.chdir(tmp_path)
    more = ["--model", str(DIGITS), "--data", str(ROOT / "data"), "--save-file", "a.npz"]
    sft_main([*SFT.split(), *more])
    assert "run" not in read_description("a.npz")
    assert find_run("a.npz").parent.name == "runs"
