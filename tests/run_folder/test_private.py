"""What lies in a marked folder is told to nobody: loggers get numbers, far services nothing."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from short_runs import DATA, run

import fuse
import group_training
import ppo_training
import score
import sft
from run_folder.loggers import LOGGERS
from run_folder.private import MARKER, beside, mark_private, marked_above

NAME = "Zebedee"  # in every text; no logger may have it
COMMON = ["--lora-rank", 1, "--lora-layers", 1, "--batch-size", 2, "--save-every", 0]
PPO = ["--num-steps", 1, "--max-new-tokens", 3, "--ppo-epochs", 1, "--eval-every", 0]


class Recorder:
    """A logger that keeps what it is sent."""

    library = "json"
    sent: list = []

    def __init__(self, folder, script, config):
        self.sent.append(config)

    def log(self, step, row):
        self.sent.append(row)

    def log_values(self, step, name, values):
        self.sent.append({name: float(sum(values))})

    def log_samples(self, samples, step):
        self.sent.append({"samples": [*samples]})

    def finish(self, samples, summary, plots):
        self.sent.append([*samples, *map(str, plots), summary])


@pytest.fixture
def messages(tmp_path, monkeypatch):
    """A marked folder of prompts and rows, in the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path("my_messages")
    folder.mkdir()
    for split in ("train", "valid"):
        asked = {"prompt": f"8 20 {NAME}", "mine": "22"}
        (folder / f"prompts_{split}.jsonl").write_text(json.dumps(asked) + "\n")
        told = {"prompt": f"8 20 {NAME}", "completion": f"22 {NAME}"}
        (folder / f"{split}.jsonl").write_text((json.dumps(told) + "\n") * 4)
    mark_private(folder)
    monkeypatch.setitem(LOGGERS, "wandb", Recorder)
    monkeypatch.setattr(Recorder, "sent", [])
    return folder


def test_a_folder_counts_with_all_below_it(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    assert marked_above(folder / "b" / "c.jsonl") is None
    mark_private(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert marked_above(folder) == marked_above(folder / "c.npz") == folder
    assert marked_above(tmp_path) is None and marked_above("x" * 5000) is None


@pytest.mark.parametrize("script", [sft, ppo_training], ids=["sft", "ppo"])
def test_a_logger_gets_numbers_alone(messages, script):
    words = [*COMMON, "--log-with", "wandb", "--save-file", "p.npz", "--output-dir", "r"]
    if script is sft:
        words += ["--train", "--data", messages, "--data-base", "", "--iters", 1]
        words += ["--sample-prompts", NAME]
    else:
        words += [*PPO, "--me_chatbot", "--ground_truth_reward", "--reference-samples", 1]
    run(script, *words)
    config, *rows, end = Recorder.sent
    assert len(rows) > 0 and all(
        isinstance(v, int | float | None) for r in rows for v in r.values()
    )
    assert NAME not in json.dumps(Recorder.sent) and "my_messages" not in json.dumps(Recorder.sent)
    assert config["options"]["batch_size"] == 2
    assert end[-1] is not None and len(end) == 1  # the summary, and no sample
    assert NAME in Path("r/samples.jsonl").read_text()
    assert (Path("r") / MARKER).is_file()  # what goes on from this run is private, too


def test_other_runs_send_their_samples(messages):
    (messages / MARKER).unlink()
    words = [*COMMON, *PPO, "--ground_truth_reward", "--log-with", "wandb", "--output-dir", "r"]
    words += ["--data", messages, "--data-base", "prompts_"]
    run(ppo_training, *words, "--save-file", "p.npz")
    assert NAME in json.dumps(Recorder.sent)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (ppo_training, ["--me_chatbot"]),
        (group_training, ["--me_chatbot"]),
        (score, ["--input", "my_messages/train.jsonl"]),
    ],
    ids=["ppo", "group", "score"],
)
def test_a_service_elsewhere_gets_nothing(messages, script, words):
    far = run(script, *words, "--reward-url", "http://example.org/score", status=2)
    assert f"{messages.resolve()} is private, so its texts go to no other machine" in far


def test_me_chatbot_needs_the_folder_of_messages(messages):
    words = ["--ground_truth_reward", "--me-chatbot"]
    wrong = run(ppo_training, *words, "--data", "elsewhere", status=2)
    assert "elsewhere is no folder of messages: python data/imessage.py" in wrong
    both = run(ppo_training, *words, "--train-file", "x.jsonl", status=2)
    assert "leave out --train-file" in both


SAVED = {
    "file": ["me.npz"],
    "safetensors": ["kept/me.safetensors"],
    "folder": ["me"],
    "fused": ["me.npz", "--fused-dir", "my_model"],
}


@pytest.mark.parametrize("kind", SAVED)
def test_what_is_saved_elsewhere_is_private_too(messages, kind):
    words = [*COMMON, "--train", "--data", messages, "--data-base", "", "--iters", 1]
    before = os.umask(0o022)
    try:
        run(sft, *words, "--output-dir", "r", "--save-file", *SAVED[kind])
        assert os.umask(0o022) == 0o022  # the run gave it back
    finally:
        os.umask(before)
    made = [Path(SAVED[kind][0]), *([Path("my_model")] if kind == "fused" else [])]
    for path in made:
        assert marked_above(path) == path.resolve()
        files = [path, beside(path)] if path.is_file() else [*path.rglob("*.*")]
        assert files and all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
        if path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
    folders = [Path("r"), Path("r/plots")]
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
    for file in Path("r").rglob("*"):
        assert (
            file.is_dir() or file.name == ".lock" or stat.S_IMODE(file.stat().st_mode) == 0o600
        ), file


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (ppo_training, ["--resume-file", "me.npz"]),
        (group_training, ["--resume-file", "me.npz"]),
        (score, ["--prompts", "numbers.jsonl", "--model", "my_model"]),
    ],
    ids=["ppo", "group", "score"],
)
def test_what_was_trained_on_it_is_followed(messages, script, words):
    """By its mark alone: its run and the messages are gone."""
    trained = ["--train", "--data", messages, "--data-base", "", "--iters", 1, "--output-dir", "r"]
    run(sft, *COMMON, *trained, "--save-file", "me.npz", "--fused-dir", "my_model")
    for folder in ("r", messages):
        shutil.rmtree(folder)
    Path("numbers.jsonl").write_text('{"prompt": "8 20"}\n')
    if script is not score:
        words = [*words, "--train-file", "numbers.jsonl", "--log-with", "wandb", *COMMON, *PPO]
        words += ["--ground-truth-reward", "--save-file", "p.npz", "--output-dir", "again"]
        words += ["--num-generations", 2] if script is group_training else []
        run(script, *words)
        config, *_ = Recorder.sent
        assert "resume_file" not in config["options"] and beside(Path("p.npz")).is_file()
        return
    far = run(script, *words, "--reward-url", "http://example.org/score", status=2)
    assert f"{Path('my_model').resolve()} is private" in far


def train_on_digits(saved: str) -> None:
    """A run on what is not private."""
    words = ["--train", "--data", DATA, "--iters", 1, "--output-dir", "o", "--save-file", saved]
    run(sft, *COMMON, *words)


def test_a_fused_model_is_private_and_an_upload_is_warned_of(messages, capsys):
    trained = ["--train", "--data", messages, "--data-base", "", "--iters", 1]
    run(sft, *COMMON, *trained, "--output-dir", "r", "--save-file", "me.npz")
    run(fuse, "--adapter-file", "me.npz", "--save-path", "my_model")
    assert marked_above("my_model") == Path("my_model").resolve()
    fuse.main(["--model", "my_model", "--upload-repo", "me/mine", "--dry-run"])
    said = capsys.readouterr()
    assert "me/mine: this was trained on private texts" in said.err
    assert MARKER not in said.out  # nor is the mark sent
    train_on_digits("other.npz")
    run(fuse, "--adapter-file", "other.npz", "--save-path", "open")
    assert marked_above("open") is None


def test_the_mark_goes_with_the_file_that_it_was_for(messages):
    trained = ["--train", "--data", messages, "--data-base", "", "--iters", 1]
    run(sft, *COMMON, *trained, "--output-dir", "r", "--save-file", "me.npz")
    assert marked_above("me.npz")
    train_on_digits("me.npz")
    assert marked_above("me.npz") is None
