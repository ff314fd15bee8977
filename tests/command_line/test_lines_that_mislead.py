"""Lines on the terminal and in files that said something else than what is so."""

import importlib
import json
import re

import pytest
from files import ROOT
from script_table import SHORT, training_scripts
from tiny import tiny_model_folder

import ppo_training
import preference_training
import score
import sft
from command_line.ppo_flags import parse_arguments as ppo_arguments
from command_line.sft_flags import parse_arguments as sft_arguments
from errors import UserError
from publishing.card import METHODS
from run_folder.run_config import MADE_BY

PAIRS = [{"prompt": f"q {i}", "chosen": f"the a{i}", "rejected": f"no {i}"} for i in range(6)]
TRAIN = ["--train", "--iters", "2", "--lora-rank", "2", "--save-every", "0"]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("pairs.jsonl", PAIRS)
    write(
        "chat.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "hello"},
                    {"role": "assistant", "content": "good day"},
                ]
            }
        ]
        * 5,
    )
    write("numbers.jsonl", [{"text": "8 20 22 30"}, {"text": "4 18 33"}, {"text": "1 2 3"}])
    write(
        "answers.jsonl",
        [{"prompt": "what", "response": f"a {i}", "label": i > 2} for i in range(5)],
    )


def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


# ------------------------------------------------------------------------------ cards


def test_every_kind_of_run_has_a_method_for_its_card():
    assert set(METHODS) == set(MADE_BY)


# ------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("rows", ["chat.jsonl", "pairs.jsonl", "answers.jsonl", "letters.jsonl"])
def test_a_forgotten_model_is_said(capsys, rows):
    kind = {"pairs.jsonl": ["--reward-model"]}.get(rows, [])
    if rows == "answers.jsonl":
        write(rows, [{"instruction": "Say it", "response": "Said."}] * 3)
    turns = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]
    write("letters.jsonl", [{"messages": turns}] * 3)
    sft.main([*TRAIN, *kind, "--train-file", rows, "--output-dir", "run"])
    assert "no --model" in capsys.readouterr().err


def test_numbers_and_a_given_model_are_not_warned_of(tmp_path, capsys):
    sft.main([*TRAIN, "--train-file", "numbers.jsonl", "--output-dir", "run"])
    base = tiny_model_folder(tmp_path / "base")
    sft.main(["--model", str(base), *TRAIN, "--train-file", "chat.jsonl", "--output-dir", "b"])
    assert "no --model" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["iters: 3\nsteps: 4\n", '{"steps": 4, "iters": 3}', "steps: 4\niters: 3\n"]
)
def test_two_names_of_one_flag_in_a_file_must_agree(text, capsys):
    name = "c.json" if text[0] == "{" else "c.yaml"
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    with pytest.raises(SystemExit):
        sft_arguments(["--train", "--train-file", "chat.jsonl", "--config", name])
    assert "are one flag and say different things; remove one" in capsys.readouterr().err
    with open(name, "w", encoding="utf-8") as file:
        file.write(text.replace("4", "3"))
    assert sft_arguments(["--train", "--train-file", "chat.jsonl", "--config", name]).iters == 3


# ------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("batch", [2, 3, 6])
def test_tokens_of_a_reward_model_are_tokens(tmp_path, batch):
    base = tiny_model_folder(tmp_path / "base")
    sft.main(
        [
            "--model",
            str(base),
            "--train",
            "--epochs",
            "1",
            "--lora-rank",
            "2",
            "--reward-model",
            "--train-file",
            "pairs.jsonl",
            "--output-dir",
            "run",
            "--batch-size",
            str(batch),
        ]
    )
    rows = [json.loads(line) for line in open("run/metrics.jsonl")]
    from data_utils import read_records
    from models.load import load_model
    from models.reading import trained_reading
    from rewards.reward_rows import tokenise_reward_rows

    tokenizer = load_model(base).tokenizer
    done = tokenise_reward_rows(
        read_records("pairs.jsonl"), tokenizer, trained_reading(tokenizer), max_length=99
    )
    assert rows[-1]["train/tokens_total"] == sum(map(sum, done.sequences))


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 2), (2, 2), (1, 4)])
def test_epochs_are_printed_as_asked_for(capsys, batch, accumulation):
    write("five.jsonl", [{"text": f"{i} {i + 2} {i + 4}"} for i in range(5)])
    sft.main(
        [
            "--train",
            "--epochs",
            "1",
            "--train-file",
            "five.jsonl",
            "--batch-size",
            str(batch),
            "--gradient-accumulation-steps",
            str(accumulation),
            "--output-dir",
            "run",
            "--lora-rank",
            "2",
        ]
    )
    assert "(1.0 epochs)" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--steps", "7"], ["--steps=7"]])
def test_steps_are_another_name_of_iters_and_num_steps(words):
    args = sft_arguments(["--train", *words])
    assert args.iters == 7 and args.steps_per_report == 10
    args = ppo_arguments(["--ground-truth-reward", *words])
    assert args.num_steps == 7 and args.steps_per_report == 5


@pytest.mark.parametrize("words", [["--steps", "7"], ["--steps=7"]])
@pytest.mark.parametrize("name", training_scripts())
def test_steps_are_the_length_of_a_run_in_every_training_script(capsys, name, words):
    script = importlib.import_module(name.removesuffix(".py"))
    line = next(short.line for short in SHORT.values() if short.script == name)
    usual = script.parse_arguments(line)
    (length,) = {"iters", "num_steps"} & {*vars(usual)}
    at = line.index("--" + length.replace("_", "-"))
    args = script.parse_arguments([*line[:at], *line[at + 2 :], *words])
    assert (getattr(args, length), getattr(usual, length)) == (7, 2)
    assert args.steps_per_report == usual.steps_per_report
    with pytest.raises(SystemExit):  # what could be several is asked about
        script.parse_arguments([*line, "--step", "7"])
    assert "--steps, " in capsys.readouterr().err


def test_accuracy_stands_beside_the_pairs_that_it_is_over(capsys):
    score.main(["--input", "pairs.jsonl", "--length-reward", "10"])
    (line,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("score ")]
    assert re.search(r"accuracy \S+ +pairs 6\b", line)
    score.main(["--input", "answers.jsonl", "--length-reward", "10"])
    (line,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("score ")]
    assert re.search(r"pairs 6\b", line)  # 2 good ones x 3 bad ones
    sft.main(
        [
            *TRAIN,
            "--reward-model",
            "--train-file",
            "pairs.jsonl",
            "--validation-file",
            "pairs.jsonl",
            "--output-dir",
            "run",
        ]
    )
    assert re.search(r"accuracy \S+  pairs 6", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["train.jsonl"], "could be ''$"),
        (["train.jsonl", "other_train.jsonl"], "could be '' or other_$"),
        (["train.json", "b_train.csv", "a_train.jsonl"], "could be '' or a_ or b_$"),
    ],
)
def test_an_empty_data_base_is_shown_as_one(tmp_path, names, shown):
    for name in names:
        write(name, [{"text": "1 2 3"}])
    with pytest.raises(UserError, match=shown):
        sft.main([*TRAIN, "--data", str(tmp_path), "--data-base", "none_"])


def test_ppo_says_so_too(capsys, tmp_path):
    write("mine.jsonl", [{"prompt": "hello world"}] * 2)
    (tmp_path / "mine.py").write_text("def one(prompts, responses):\n    return [1.0, 2.0]\n")
    ppo_training.main(
        [
            "--train-file",
            "mine.jsonl",
            "--reward-function",
            "mine.py:one",
            "--batch-size",
            "2",
            "--num-steps",
            "1",
            "--max-new-tokens",
            "3",
            "--eval-every",
            "0",
            "--output-dir",
            "run",
        ]
    )
    assert "no --model" in capsys.readouterr().err


@pytest.mark.parametrize("words, pairs", [("", 15), ("--val-batches 2", 8), ("--val-batches 1", 4)])
def test_the_accuracy_of_preferences_says_over_how_many_pairs(words, pairs, tmp_path, capsys):
    line = (
        f"--train --data {ROOT}/data --data-base preference_increasing_mult_2_ --iters 1 "
        f"--max-rows 15 --output-dir {tmp_path}/run --save-file {tmp_path}/out.npz {words}"
    )
    preference_training.main(line.split())
    said = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("validation: "))
    assert re.search(rf"rewards/accuracies \S+  pairs {pairs}  ", said), said
