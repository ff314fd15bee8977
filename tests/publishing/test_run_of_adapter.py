"""An adapter records the run that made it, so that a model card finds it from anywhere."""

import json
import os
import shutil
from pathlib import Path

import pytest

import fuse
import group_training
import ppo_training
import preference_training
import sft
from models.adapter_description import read_description
from publishing.run_facts import find_run

SHORT = "--save-every 0 --seed 1"
SFT = f"--train --iters 1 --batch-size 2 --steps-per-eval 0 {SHORT}"
PAIRS = "--data-base preference_increasing_mult_2_"
ROLLOUT = f"--ground-truth-reward --batch-size 2 --num-steps 1 --max-new-tokens 2 {SHORT}"
DATA = Path(__file__).resolve().parents[2] / "data"
SCRIPTS = {
    "sft": (sft, SFT, "sft.py"),
    "reward model": (sft, f"{SFT} --reward-model {PAIRS}", "sft.py"),
    "preference": (preference_training, f"{SFT} {PAIRS}", "preference_training.py"),
    "ppo": (
        ppo_training,
        f"{ROLLOUT} --mini-batch-size 2 --eval-every 0",
        "ppo_training.py",
    ),
    "group": (group_training, f"{ROLLOUT} --num-generations 2 --eval-every 0", "group_training.py"),
}


def train(script, words, *more):
    script.main([*words.split(), "--data", str(DATA), *map(str, more)])


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_card_names_the_script_and_the_options(kind, tmp_path, monkeypatch):
    """Run folder, adapter and the folder that is worked in are three places; then both move."""
    script, words, name = SCRIPTS[kind]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    train(script, words, "--output-dir", "../logs/run7", "--save-file", "../kept/a.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "kept", tmp_path / "moved")
    fuse.main(["--adapter-file", "../moved/a.npz", "--save-path", "model"])
    card = Path("model/README.md").read_text()
    assert f"(`{name}`" in card and "\nseed: 1\n" in card
    assert "\nOptions that differ from the defaults:\n" in card
    options = card.split("defaults:\n\n```\n")[1].split("```")[0].splitlines()
    names = {line.partition(":")[0] for line in options}
    assert {"data", "seed"} <= names and not {"optimizer", "lora_rank"} & names
    config = json.loads((tmp_path / "logs" / "run7" / "config.json").read_text())
    assert set(config["differing"]) >= names  # settled ones too, such as the rate
    assert "learning_rate" in names
    assert read_description(tmp_path / "moved" / "a.npz")["run"] == os.path.join(
        "..", "logs", "run7"
    )


def test_the_ways_to_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(sft, SFT, "--output-dir", "run", "--save-file", "adapter")  # a folder
    assert find_run("adapter").resolve() == tmp_path / "run"
    train(sft, SFT, "--output-dir", "in", "--save-file", "in/a.npz")
    assert find_run("in/a.npz") == tmp_path / "in"
    # The folder was used again: what it tells now is of another adapter.
    train(sft, SFT, "--output-dir", "run", "--save-file", "b.npz", "--overwrite")
    assert find_run("adapter") is None and find_run("b.npz").resolve() == tmp_path / "run"
    # In runs/ the time is the name, which the bytes of an adapter do not depend on.
    train(sft, SFT, "--save-file", "c.npz")
    assert "run" not in read_description("c.npz") and find_run("c.npz").parent.name == "runs"
    assert find_run("missing.npz") is None
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps({**config, "script": 3}))
    assert find_run("b.npz") is None
