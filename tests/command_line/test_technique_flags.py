"""Flags of docs/techniques.md: what says nothing or contradicts itself is one line."""

import json
import re

import pytest
from files import ROOT

import group_training
import ppo_training
import preference_training
import score
import sft
from command_line.exits import run_main

PPO = "--ground_truth_reward "
SCORE = "--input x.jsonl --ground_truth_reward "


def refused(script, line: str, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        run_main(lambda: script.parse_arguments(line.split()))
    assert end.value.code == 2
    (said,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return said


@pytest.mark.parametrize(
    "script, start", [(ppo_training, PPO), (group_training, PPO), (score, SCORE)]
)
@pytest.mark.parametrize(
    "line, said",
    [
        ("--adlf-alpha 1.5 --use-fluency-reward", "alpha 1.5: give a number from 0 to 1"),
        ("--adlf-alpha nan --use-fluency-reward", "alpha"),
        ("--adlf-alpha 0.3", "a share of nothing"),
        ("--use-fluency-reward", "no effect at --adlf-alpha 0"),
        ("--use-multi-objective --score-range 0 1", "no effect at --adlf-alpha 0"),
        ("--score-range 0 1", "no effect at --adlf-alpha 0"),
        ("--adlf-alpha 0.3 --use-fluency-reward --score-range 1 1", "the first must be the lower"),
        ("--adlf-alpha 0.3 --use-multi-objective", "needs --score-range"),
        (
            "--adlf-alpha 0.3 --use-multi-objective --score-range 0 1 --fluency-weight 0 "
            "--faithfulness-weight 0 --quality-weight 0",
            "all 0",
        ),
        (
            "--adlf-alpha 0.3 --use-multi-objective --score-range 0 1 --fluency-weight -1",
            "not below 0",
        ),
        (
            "--adlf-alpha 0.3 --use-multi-objective --score-range 0 1 --use-length-penalty",
            "no effect with --use-multi-objective",
        ),
        ("--adlf-alpha 0.3 --use-coherence-reward --length-target 9", "no effect without"),
        ("--adlf-alpha 0.3 --use-length-penalty --length-target 0", "below 1"),
        ("--adlf-alpha 0.3 --use-length-penalty --quality-weight 1", "no effect without"),
        ("--adlf-alpha 0.3 --use-length-penalty --faithfulness-model x", "no effect without"),
    ],
)
def test_composite_rewards(script, start, line, said, capsys):
    assert re.search(re.escape(said), refused(script, start + line, capsys))


@pytest.mark.parametrize(
    "script, line, said",
    [
        (sft, "--train --use-curriculum --packing", "drop one of them"),
        (sft, "--train --use-curriculum --dataset x --streaming", "drop one"),
        (sft, "--train --use-curriculum --curriculum-start 0", "above 0, to 1"),
        (sft, "--train --use-curriculum --curriculum-steps 0", "below 1"),
        (sft, "--train --curriculum-by loss", "no effect without --use-curriculum"),
        (sft, "--test --resume-adapter-file x.npz --use-curriculum", "without --train"),
        (preference_training, "--train --use-curriculum --curriculum-start 2", "above 0, to 1"),
        (ppo_training, PPO + "--curriculum-steps 7", "no effect without --use-curriculum"),
        (group_training, PPO + "--use-curriculum --curriculum-start -1", "above 0, to 1"),
    ],
)
def test_curriculum(script, line, said, capsys):
    assert re.search(re.escape(said), refused(script, line, capsys))


@pytest.mark.parametrize(
    "line, said",
    [
        ("--train --use-contrastive --batch-size 3", "is below 4"),
        ("--train --use-contrastive --batch-size 8 --packing", "no effect with --packing"),
        ("--train --use-contrastive --batch-size 8 --reward-model", "no effect with --reward"),
        ("--train --contrastive-temp 1", "no effect without --use-contrastive"),
        ("--train --use-contrastive --batch-size 8 --contrastive-temp 0", "above 0"),
        ("--train --use-contrastive --batch-size 8 --contrastive-weight -1", "not below 0"),
    ],
)
def test_contrastive(line, said, capsys):
    assert re.search(re.escape(said), refused(sft, line, capsys))


def test_contrastive_without_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = f"--train --data {ROOT}/data --use-contrastive --batch-size 8 --output-dir run"
    with pytest.raises(SystemExit) as end:
        run_main(lambda: sft.main(line.split()))
    assert end.value.code == 2 and "kinds of label" in capsys.readouterr().err


@pytest.mark.parametrize(
    "scores, said", [([1, 2, 1], "3 rows are below 4"), ([1, 2, 3, 4, 5], "no two rows")]
)
def test_contrastive_with_too_few_rows(scores, said, tmp_path, monkeypatch, capsys):
    """Of which a batch is made, or that could be drawn together."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "2 4", "completion": " 6", "meta_eval_score": score} for score in scores]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = "--train --train-file rows.jsonl --use-contrastive --batch-size 8 --output-dir run"
    with pytest.raises(SystemExit) as end:
        run_main(lambda: sft.main(line.split()))
    assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, line, said",
    [
        (sft, "--train --score-template x", "no effect without --use-decision-transformer"),
        (sft, "--train --use-decision-transformer --score-template x", "must hold {score}"),
        (sft, "--train --use-decision-transformer --reward-model", "no effect with"),
        (sft, "--train --use-decision-transformer --prompt-template {prompt}", "drop one"),
    ],
)
def test_conditioning(script, line, said, capsys):
    assert re.search(re.escape(said), refused(script, line, capsys))


@pytest.mark.parametrize(
    "line, said",
    [
        ("--train --critique-weight 0.1", "no effect without --use-self-critique"),
        ("--train --use-self-critique --critique-weight 1.1", "from 0 to 1"),
        ("--train --use-self-critique --critique-template x", "must hold the fields"),
        ("--train --use-self-critique --reward-model", "drop one"),
    ],
)
def test_self_critique(line, said, capsys):
    assert re.search(re.escape(said), refused(sft, line, capsys))


def test_a_range_in_a_file_of_options_is_a_list_of_two(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = PPO + "--adlf-alpha 0.3 --use-fluency-reward --config options.yaml"
    (tmp_path / "options.yaml").write_text("score_range: [0, 5]\n")
    assert ppo_training.parse_arguments(line.split()).score_range == [0, 5]
    for wrong in ("[0, 1, 2]", "[3]", "3", "[a, b]"):
        (tmp_path / "options.yaml").write_text(f"score_range: {wrong}\n")
        assert "score_range" in refused(ppo_training, line, capsys)
