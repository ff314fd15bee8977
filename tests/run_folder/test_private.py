"""What lies in a marked folder is told to nobody: loggers get numbers, far services nothing."""

import json
import stat
from pathlib import Path

import pytest
from short_runs import run

import group_training
import ppo_training
import score
import sft
from run_folder.loggers import LOGGERS
from run_folder.private import MARKER, mark_private, marked_above

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
