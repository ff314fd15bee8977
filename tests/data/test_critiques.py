"""Reasons for scores as critiques to train: the rows, and their share of the loss."""

import json

import numpy as np
import pytest
from files import ROOT

import sft
from command_line.exits import run_main
from data_loading.critiques import CRITIQUE, check_critique_template, critique_of
from data_utils import Record, TextRow, make_batch
from errors import UserError
from mlx_sft_trainer import LanguageModelTask, evaluate
from models.load import load_model
from models.tuning import Tuning


def test_a_critique_asks_about_the_answer_and_gives_reason_and_score():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": " Because."},
    ]
    fields = {"score_reason": "Says nothing. "}
    row = critique_of(Record("conversation", "f:3", fields, messages=turns, reward=1.5), CRITIQUE)
    assert row.prompt == CRITIQUE.format(prompt="Be brief.\n\nWhy?", response="Because.")
    assert (row.completion, row.where) == (" Says nothing. Score: 1.5", "f:3 critique")
    for other in ({}, {"score_reason": " "}, {"score_reason": 3}):
        assert critique_of(Record("conversation", "", other, messages=turns, reward=1), "") is None
    assert critique_of(Record("conversation", "", fields, messages=turns), "") is None  # no score


@pytest.mark.parametrize(
    "template",
    [
        "{prompt}",
        "{response} {prompt} {x}",
        "{prompt} {response",
        "",
        "{prompt:20000} {response}",
        "{prompt:9999999999999} {response}",
    ],
)
def test_templates_without_their_fields(template):
    with pytest.raises(UserError, match="--critique-template"):
        check_critique_template("--critique-template", template, "prompt", "response")


def test_the_weight_of_a_row_is_that_of_its_targets():
    loaded = load_model(None)
    task = LanguageModelTask(loaded.model, Tuning())
    rows = [TextRow([1, 20, 31, 42], [0, 1, 1, 1]), TextRow([1, 50, 60], [0, 1, 1])]
    alone = [evaluate(task, [make_batch([row])])["loss"] for row in rows]
    rows[0].weight, rows[1].weight = 0.5, 2.0
    both = evaluate(task, [make_batch(rows)])["loss"]
    expected = (0.5 * 3 * alone[0] + 2 * 2 * alone[1]) / (0.5 * 3 + 2 * 2)
    assert both == pytest.approx(expected, rel=1e-5)


def run(tmp_path, name: str, more: str) -> list[dict]:
    line = (
        f"--train --train-file {ROOT}/data/conversations.jsonl --max-rows 12 --iters 2 "
        "--batch-size 40 --mask-prompt --max-length 200 --too-long cut --steps-per-eval 0 "
        f"--learning-rate 0 --output-dir {name} {more}"
    )
    sft.main(line.split())
    rows = [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
    return [row["train/loss"] for row in rows]


def test_over_all_rows_the_loss_is_the_share_of_each(tmp_path, monkeypatch):
    """Whole epochs in one batch: critiques alone, answers alone, and both by their weights."""
    monkeypatch.chdir(tmp_path)
    plain = run(tmp_path, "plain", "")
    none = run(tmp_path, "none", "--use-self-critique --critique-weight 0")
    assert plain == none
    whole = run(tmp_path, "whole", "--use-self-critique --critique-weight 1")
    some = run(tmp_path, "some", "--use-self-critique --critique-weight 0.25")
    np.testing.assert_allclose(some, 0.75 * np.array(plain) + 0.25 * np.array(whole), rtol=1e-4)
    assert abs(whole[0] - plain[0]) > 0.01


def test_rows_without_reasons_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_main(lambda: sft.main(f"--train --data {ROOT}/data --use-self-critique".split()))
    assert end.value.code == 2
    assert "no row has a score_reason" in capsys.readouterr().err
