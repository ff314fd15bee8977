"""score.py --best-of: answers weighed by reward, and how far the best of n lies from the model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import score as score_script
from data_utils import Record, read_records
from errors import UserError
from rewards.best_of import trainable

# Two say 4; the best answer says 5, and the best response nothing.
WEIGHED = [
    ("so <answer>4</answer>", 0.5),
    ("it is <answer>4.0</answer>", 0.6),
    ("<answer>5</answer>", 0.9),
    ("no idea", 0.95),
]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def given(prompts, responses, worth):\n    return worth\n")


def best(*words: str, rows=WEIGHED) -> str:
    """The response to the one prompt that score.py picks."""
    made = [{"prompt": "2 + 2", "response": text, "worth": worth} for text, worth in rows]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    line = "--input in.jsonl --reward-function mine.py:given --best-of --output out.jsonl --force"
    assert score_script.main([*line.split(), *words]) == 0
    (row,) = map(json.loads, Path("out.jsonl").read_text().splitlines())
    return row["completion"]


def test_equal_answers_add_up_their_rewards(capsys):
    """0.5 + 0.6 for 4 are more than 0.9 for 5; of those that say 4 the best one is taken."""
    assert best("--weigh-answers", "reward", "--answer-from", "tag") == "it is <answer>4.0</answer>"
    out = capsys.readouterr().out
    assert "answers weighed by reward" in out and "KL" not in out
    assert best() == "no idea"


def test_softmax_weights_are_exponentials_of_scores_of_any_sign():
    low = [(text, 10 * worth - 20) for text, worth in WEIGHED]
    with pytest.raises(UserError, match="a score of -15: answers that are given often would lose"):
        best("--weigh-answers", "reward", rows=low)
    softmax = ("--weigh-answers", "softmax", "--answer-from", "tag")
    assert best(*softmax, rows=low) == "<answer>5</answer>"  # e^9 against e^5 + e^6
    near = [(text, worth - 2) for text, worth in WEIGHED]
    assert best(*softmax, rows=near) == "it is <answer>4.0</answer>"  # e^.9 against e^.5 + e^.6


def test_without_any_answer_all_are_one_group():
    rows = [("none", 0.2), ("nothing", 0.4)]
    assert best("--weigh-answers", "reward", "--answer-from", "tag", rows=rows) == "nothing"
    # With "auto" the whole text is the answer where there is no other.
    rows = [("Yes.", 0.3), ("yes", 0.3), ("no", 0.5)]
    assert best("--weigh-answers", "reward", rows=rows) == "Yes."


def test_the_kl_of_the_best_of_n_is_log_n_less_a_little(capsys):
    """log n - (n - 1)/n; by hand for 4: 1.3863 - 0.75."""
    best()
    assert "KL from the model at most 0.636 nats" in capsys.readouterr().out
    best(rows=WEIGHED[:1])
    assert "KL from the model at most 0 nats" in capsys.readouterr().out


@pytest.mark.parametrize("samples, left_out", [(64, False), (1, True)])
def test_what_is_picked_is_a_row_that_sft_reads(samples, left_out, capsys):
    """At this temperature a token in a hundred is the end: many responses say nothing, and this
    reward likes nothing best."""
    Path("mine.py").write_text(
        "def brief(prompts, responses):\n    return [-len(text) for text in responses]\n"
    )
    rows = [json.dumps({"prompt": f"8 {number}"}) + "\n" for number in range(100)]
    Path("prompts.jsonl").write_text("".join(rows[: 100 if left_out else 4]))
    line = "--prompts prompts.jsonl --temp 100 --max-new-tokens 1 --best-of --output out.jsonl"
    words = f"{line} --reward-function mine.py:brief --samples {samples} --batch-size 64"
    assert score_script.main(words.split()) == 0
    records = read_records("out.jsonl")
    said = capsys.readouterr()
    assert all(record.completion for record in records)
    assert ("prompts left out: no response to them has any text" in said.err) == left_out
    assert (len(records) < 100) if left_out else len(records) == 4


def test_a_nul_is_not_picked():
    texts = ["", "a\0", " b", " \n"]
    records = [Record("prompt_completion", "x:1", {}, prompt="p", completion=t) for t in texts]
    pairs = [SimpleNamespace(record=record) for record in records]
    assert [pair.record.completion for pair in trainable(pairs)] == [" b"]
    with pytest.raises(UserError, match="no response has any text"):
        trainable(pairs[:2])


def test_weighing_without_picking_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        score_script.main("--input x --ground-truth-reward --weigh-answers reward".split())
    assert end.value.code == 2
    assert "--weigh-answers reward has no effect without --best-of" in capsys.readouterr().err
