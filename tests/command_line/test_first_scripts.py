"""Flags of the project's first scripts, each with the meaning that it had there."""

import json
from pathlib import Path

import numpy as np
import pytest
from parsers import SCRIPTS, parser_of
from short_runs import DATA, SMALL, Run, run
from tiny import tiny_model_folder
from tiny_tokenizers import tiny_tokenizer

import ppo_training
import preference_training
import sft
from chat.conversation import Prompting
from command_line.ppo_flags import ends
from command_line.ppo_flags import parse_arguments as parse_ppo
from data import generate_digit_data
from errors import UserError
from models.load import load_model
from models.model_folders import TOKENIZER_FILES
from run_folder.checkpoint_folder import read_best
from talk_to_model import parse_arguments as parse_chat


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_short_flag_stands_for_one_thing():
    meanings: dict[str, set[str]] = {}
    parsers = [parser_of(script) for script in SCRIPTS]
    parsers.append(generate_digit_data.make_parser())
    for parser in parsers:
        for action in parser._actions:
            for name in action.option_strings:
                if not name.startswith("--"):
                    meanings.setdefault(name, set()).add(action.dest)
    meant = {"h": "help", "m": "max_tokens", "c": "max_context", "n": "num_samples"}
    meant |= {"i": "increasing", "d": "decreasing"}
    assert meanings == {f"-{short}": {name} for short, name in meant.items()}


@pytest.mark.parametrize("words", [["-m", "5", "-c", "9"], ["-m5", "-c=9"]])
def test_short_flags_of_the_chat(words):
    settings = parse_chat([*words, "a prompt"]).settings
    assert (settings.max_tokens, settings.max_context) == (5, 9)


def test_short_flags_and_dpo_data_of_the_generator():
    short = ["-n", 30, "-i", "--multiple-of", 2, "--output-dir"]
    long = ["--num-samples", 30, "--increasing", "--multiple-of", 2, "--output-dir"]
    run(generate_digit_data, *short, "one", "--dpo-data")
    run(generate_digit_data, *long, "two", "--kind", "preference")
    one, two = ({p.name: p.read_text() for p in Path(d).iterdir()} for d in ("one", "two"))
    assert one == two and len(one) == 3
    assert generate_digit_data.make_parser().parse_args(["-d"]).decreasing
    both = run(generate_digit_data, "-i", "-d", status=2)
    assert "--increasing" in both and "--decreasing" in both
    clash = run(generate_digit_data, "-i", "--dpo-data", "--kind", "reward", status=2)
    assert "--dpo-data is --kind preference" in clash


def test_other_names():
    assert parse_ppo(["--reward_model_dir", "x"]).reward_model == "x"


def test_resume_file_and_test_batches_of_training():
    first = Run(iters=1)
    again = Run("--resume-file", first.file, iters=1)
    assert np.abs(again.flat() - first.flat()).max() > 0  # it went on from there
    shared = ["--test", "--data", DATA, "--batch-size", 4, "--resume-file", first.file]
    few, cut, whole = (
        run(sft, *shared, *more)
        for more in (["--test-batches", 1], ["--max-rows", 4], ["--max-rows", 12])
    )
    last = [text.split("test: loss ")[1].split()[0] for text in (few, cut, whole)]
    assert last[0] == last[1] != last[2]
    assert "--test-batches: give a number" in run(sft, *shared, "--test-batches", 0, status=2)
    assert "no effect without --test" in run(sft, *SMALL, "--test-batches", 1, status=2)
    pairs = ["--data-base", "preference_increasing_mult_2_", "--max-rows", 8]
    run(preference_training, *shared, *pairs, "--test-batches", 1)


def test_the_context_of_a_chat_is_cut_from_its_beginning():
    prompting = Prompting(tiny_tokenizer(bos=False, template="chatml", wrapped=True))
    turns = [("system", "be kind"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    turns += [("assistant", "four"), ("user", "five")]
    said = [{"role": role, "content": text} for role, text in turns]
    whole = prompting.tokens(said)[0]
    assert prompting.recent(said, None, None)[0] == whole
    assert prompting.recent(said, None, len(whole))[0] == whole
    with pytest.warns(UserWarning, match="what is older is left out"):
        part = prompting.recent(said, None, len(whole) - 1)[0]
    assert part == prompting.tokens([said[0], *said[3:]])[0]
    with pytest.warns(UserWarning), pytest.raises(UserError, match="the last prompt alone has"):
        prompting.recent(said, None, 3)
    plain = Prompting(load_model().tokenizer)
    text = [{"role": "user", "content": "8 20 22 24"}]
    bos, *rest = plain.tokens(text)[0]
    with pytest.warns(UserWarning):
        assert plain.recent(text, None, 3)[0] == [bos, *rest[-2:]]


def test_a_tokenizer_of_another_folder():
    tiny_model_folder(Path("whole"), template="chatml")
    tiny_model_folder(Path("bare"), template="chatml")
    for pattern in TOKENIZER_FILES:
        for file in Path("bare").glob(pattern):
            file.unlink()
    words = [*SMALL, "--iters", 1, "--model", "bare", "--fused-dir", "fused"]
    assert "cannot be loaded" in run(sft, *words, status=2)
    said = run(sft, *words, "--tokenizer", "whole", "--save-file", "t.npz")
    assert "--tokenizer whole" in said
    fused, whole = load_model("fused").tokenizer, load_model("whole").tokenizer
    assert fused.get_vocab() == whole.get_vocab()
    assert fused.chat_template == whole.chat_template


PPO = ["--ground_truth_reward", "--data", DATA, "--batch-size", 4, "--num-steps", 3]
PPO += ["--lora-rank", 1, "--lora-layers", 1, "--max-new-tokens", 6, "--eval-every", 0]


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_reference_samples_and_compare_steps_of_ppo():
    words = ["--reference-samples", 2, "--compare-steps", 1, "--keep-checkpoints", 1]
    run(ppo_training, *PPO, *words, "--output-dir", "r", "--save-file", "p.npz")
    scores = [row["ppo/mean_scores"] for row in rows("r/metrics.jsonl")]
    assert all(0 <= row["reference/score"] <= 1 for row in rows("r/metrics.jsonl"))
    best = read_best("r/checkpoints")
    assert (best["metric"], best["value"]) == ("train/score", pytest.approx(max(scores)))
    assert best["checkpoint"] == f"step-{scores.index(max(scores)) + 1:08d}"
    shown = rows("r/samples.jsonl")
    assert all({"reference_response", "reference_score"} <= row.keys() for row in shown)
    # The policy draws the same numbers as without them.
    run(ppo_training, *PPO, "--output-dir", "q", "--save-file", "q.npz")
    assert [row["ppo/mean_scores"] for row in rows("q/metrics.jsonl")] == scores
    assert "reference_response" not in rows("q/samples.jsonl")[0]


def test_ignore_eos_reaches_every_drawn_length():
    words = [*PPO, "--min-response-length", 3, "--samples-per-step", 4]
    run(ppo_training, *words, "--ignore-eos", "--output-dir", "r", "--save-file", "p.npz")
    run(ppo_training, *words, "--output-dir", "q", "--save-file", "q.npz")
    lengths = [
        [row["tokens/responses_len_mean"] for row in rows(f"{folder}/metrics.jsonl")]
        for folder in "rq"
    ]
    assert all(3 <= length <= 6 for length in lengths[0])
    assert all(long >= short for long, short in zip(*lengths, strict=True))
    args = parse_ppo([*map(str, PPO), "--ignore-eos"])
    assert ends(args, load_model().tokenizer) == set()
    assert "--stop a has no effect with --ignore-eos" in run(
        ppo_training, *PPO, "--ignore-eos", "--stop", "a", status=2
    )
