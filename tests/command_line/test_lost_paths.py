"""Relative paths of a run that is resumed elsewhere, or of an adapter's base, say what they are."""

import json

import pytest
from short_runs import run
from tiny import tiny_model_folder

import fuse
import ppo_training
import score
import sft
import talk_to_model


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with runs of relative paths in it."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_model_folder(folder / "base")
        rows = {
            "numbers": {"text": "8 20 22"},
            "prompts": {"prompt": "what is"},
            "pairs": {"prompt": "q", "chosen": "the a", "rejected": "no"},
        }
        for name, row in rows.items():
            with open(f"{name}.jsonl", "w", encoding="utf-8") as file:
                file.write((json.dumps(row) + "\n") * 4)
        with open("mine.py", "w", encoding="utf-8") as file:
            file.write("def one(prompts, responses):\n    return [0.5] * len(responses)\n")
        words = ["--train", "--iters", 1, "--lora-rank", 2, "--steps-per-eval", 0, "--model"]
        rows = str(folder / "numbers.jsonl")
        run(
            sft,
            *words,
            "base",
            "--train-file",
            rows,
            "--output-dir",
            "model",
            "--save-file",
            "a.npz",
        )
        run(sft, *words, folder / "base", "--train-file", "numbers.jsonl", "--output-dir", "rows")
        more = ["--output-dir", "folder", "--data", "sets/mine", "--data-base", ""]
        (folder / "sets" / "mine").mkdir(parents=True)
        (folder / "sets" / "mine" / "train.jsonl").write_text('{"text": "8 20 22"}\n' * 4)
        run(sft, *words, folder / "base", *more)
        more = ["--output-dir", "dataset", "--dataset", "sets/mine/train.jsonl", rows]
        run(sft, *words, folder / "base", *more, "--data", "gone", "--save-file", folder / "d.npz")
        run(
            sft,
            *words,
            "base",
            "--train-file",
            "pairs.jsonl",
            "--output-dir",
            "judge",
            "--reward-model",
            "--save-file",
            "judge.npz",
        )
        run(
            ppo_training,
            "--model",
            folder / "base",
            "--train-file",
            folder / "prompts.jsonl",
            "--reward-function",
            "mine.py:one",
            "--batch-size",
            2,
            "--num-steps",
            1,
            "--max-new-tokens",
            3,
            "--eval-every",
            0,
            "--output-dir",
            "reward",
        )
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("script", "name", "wrong"),
    [
        (sft, "model", "--model base"),
        (sft, "rows", "--train-file numbers.jsonl"),
        (sft, "folder", "--data sets/mine"),
        (sft, "dataset", "--dataset sets/mine/train.jsonl"),
        (ppo_training, "reward", "--reward-function mine.py:one"),
    ],
)
def test_a_resumed_run_says_where_its_paths_begin(
    first, tmp_path, monkeypatch, script, name, wrong
):
    said = run(script, "--resume", first / name, status=2)
    assert said.startswith(f"error: {wrong}: is not in {tmp_path};")
    assert f"relative to the folder {first}, where the run was started" in said
    monkeypatch.chdir(first)
    run(script, "--resume", name)


def test_what_is_written_elsewhere_than_the_run_began_is_said(first, tmp_path, monkeypatch, capsys):
    rows = ["--train-file", str(first / "numbers.jsonl"), "--force-resume"]
    words = ["--resume", str(first / "rows"), *rows]
    args = sft.parse_arguments(words)
    said = capsys.readouterr().err
    assert args.save_file == "peft_weights.npz"
    assert (
        f"--save-file peft_weights.npz is written in {tmp_path}; the run began in {first}" in said
    )
    sft.parse_arguments([*words, "--save-file", "here.npz"])
    monkeypatch.chdir(first)
    sft.parse_arguments(["--resume", "rows"])
    assert "is written in" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows", "folder", "dataset"])
def test_a_run_of_before_says_so_too(first, tmp_path, name):
    file = first / name / "config.json"
    before = file.read_text(encoding="utf-8")
    config = json.loads(before)
    del config["machine"]["folder"]
    file.write_text(json.dumps(config), encoding="utf-8")
    try:
        said = run(sft, "--resume", first / name, status=2)
    finally:
        file.write_text(before, encoding="utf-8")
    assert f"is not in {tmp_path}; it is relative to where the run was started" in said


def test_an_adapter_says_where_its_base_was(first, tmp_path):
    for script, words in (
        (fuse, ["--adapter-file", first / "a.npz", "--save-path", "fused"]),
        (score, ["--input", first / "pairs.jsonl", "--reward-model", first / "judge.npz"]),
        (talk_to_model, ["hello", "--resume-file", first / "a.npz"]),
    ):
        said = run(script, *words, status=2)
        assert "was trained on base, a path relative to" in said and str(tmp_path) in said, said
        assert "--model" in said
        more = ["--model", first / "base"]
        run(script, *words, *more, *(["--max-tokens", 3] if script is talk_to_model else []))
