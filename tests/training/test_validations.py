"""Validations of a run: each weights once, the last ones too; and what its lines say."""

import json
import re

import numpy as np
import pytest
from files import ROOT

import sft
from mlx_sft_trainer import SupervisedTrainer
from training import results

TINY = "--train --max-rows 12 --batch-size 4 --learning-rate 1e-3 --save-every 0"


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Runs sft.py on twelve rows; (rows of metrics, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    count = iter(range(9))

    def run(line: str):
        folder = f"run{next(count)}"
        words = f"{TINY} --data {ROOT}/data --output-dir {folder} --save-file {folder}.npz {line}"
        assert sft.main(words.split()) == 0
        rows = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row) for row in rows], *capsys.readouterr()

    return run


def validated_steps(monkeypatch) -> list[int]:
    """Grows by the steps after which there is a validation."""
    seen, inner = [], SupervisedTrainer.evaluate

    def evaluate(self, batches):
        seen.append(self.optimizer.step.item())
        return inner(self, batches)

    monkeypatch.setattr(SupervisedTrainer, "evaluate", evaluate)
    return seen


@pytest.mark.parametrize("every, steps", [(2, [0, 2, 4]), (3, [0, 3, 4]), (0, [4])])
def test_no_weights_are_validated_twice(train, monkeypatch, every, steps):
    """The last ones too, whether they are due anyway, or no step is."""
    seen = validated_steps(monkeypatch)
    rows, out, _ = train(f"--steps-per-eval {every} --val-batches 1 --iters 4")
    assert seen == steps
    assert [row["step"] for row in rows if "valid/loss" in row] == steps
    assert out.count("validation: loss") == 1


@pytest.mark.parametrize("start, steps", [("step-00000002", [4]), ("step-00000003", [4])])
def test_a_resumed_run_validates_no_weights_again(train, monkeypatch, capsys, start, steps):
    train("--steps-per-eval 2 --val-batches 1 --iters 4 --save-every 1 --keep-checkpoints 9")
    seen = validated_steps(monkeypatch)
    assert sft.main(["--resume", f"run0/checkpoints/{start}"]) == 0
    out = capsys.readouterr().out
    assert seen == steps and out.count("validation: loss") == 1
    assert f"run0: goes on after step {int(start[-1])}\n" in out


def test_the_last_weights_may_be_the_best(train, monkeypatch):
    found = iter([3.0, 2.0, 1.0])  # of steps 0, 2 and 3
    monkeypatch.setattr(SupervisedTrainer, "evaluate", lambda *_: {"loss": next(found)})
    _, out, _ = train("--steps-per-eval 2 --save-every 1 --save-best --iters 3")
    assert "the best weights are those of step 3" in out and "validation: loss 1" in out


def test_a_validation_of_the_best_weights_is_not_made_again(train, monkeypatch):
    found = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(SupervisedTrainer, "evaluate", lambda *_: {"loss": next(found)})
    _, out, _ = train("--steps-per-eval 2 --save-every 1 --save-best --iters 3")
    assert "the best weights are those of step 2" in out and "validation: loss 1" in out


def test_a_line_shows_the_mean_since_the_last(train):
    rows, _, err = train("--steps-per-eval 0 --steps-per-report 3 --iters 6")
    lines = re.findall(r"sft +(\d)/6  loss ([\d.]+) .*tokens/s (\d+) .*peak [\d.]+ [GM]B", err)
    assert [int(line[0]) for line in lines] == [3, 6]
    rows = [row for row in rows if "train/loss" in row]
    losses = [row["train/loss"] for row in rows]
    weights = np.diff([0, *(row["train/tokens_total"] for row in rows)])
    for (_, shown, rate), part in zip(lines, (slice(0, 3), slice(3, 6)), strict=True):
        mean = np.average(losses[part], weights=weights[part])
        assert float(shown) == pytest.approx(mean, rel=1e-3) and int(rate) > 0


def test_a_reward_model_is_judged_on_the_batches_of_a_validation(train, monkeypatch):
    seen, inner = [], results.agreement

    def agreement(model, rows, plots=None):
        seen.append(len(rows))
        return inner(model, rows, plots)

    monkeypatch.setattr(results, "agreement", agreement)
    reward = "--reward-model --data-base reward_function_increasing_mult_2_ --iters 1"
    train(f"{reward} --steps-per-eval 0 --val-batches 2")
    train(f"{reward} --steps-per-eval 0 --val-batches -1")
    assert seen == [8, 12]
