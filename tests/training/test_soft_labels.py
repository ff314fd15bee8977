"""--soft-labels: pairs count by the probability that the chosen answer is the better one."""

import contextlib
import io
import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import preference_training
import sft
from command_line.exits import run_main
from rl.losses import pairwise_loss
from rl.preference_losses import Pairs, sigmoid

RNG = np.random.default_rng(0)
CHOSEN, REJECTED = RNG.normal(size=(2, 7)).astype(np.float32)
P = RNG.uniform(size=7).astype(np.float32)


def by_hand(difference: np.ndarray, p: np.ndarray) -> np.ndarray:
    return p * np.log1p(np.exp(-difference)) + (1 - p) * np.log1p(np.exp(difference))


def reward_loss(chosen, rejected, p, **options) -> float:
    columns = (mx.array(c) for c in (chosen, rejected))
    loss, _ = pairwise_loss(*columns, probability=None if p is None else mx.array(p), **options)
    return loss.item()


def dpo(p, **options) -> np.ndarray:
    one, zero = mx.ones(7), mx.zeros(7)
    columns = mx.array(CHOSEN), mx.array(REJECTED), one, one, one, zero, zero
    pairs = Pairs(*columns, probability=None if p is None else mx.array(p))
    return np.array(sigmoid(pairs, beta=0.7, **options))


def test_both_losses_are_the_cross_entropy_with_the_probability():
    expected = by_hand(CHOSEN - REJECTED, P)
    assert reward_loss(CHOSEN, REJECTED, P) == pytest.approx(expected.mean(), abs=1e-6)
    weights = np.arange(1, 8, dtype=np.float32)
    found = reward_loss(CHOSEN, REJECTED, P, weights=mx.array(weights))
    assert found == pytest.approx(np.average(expected, weights=weights), abs=1e-6)
    # 1e-6: float32 of numbers around 1.
    np.testing.assert_allclose(
        dpo(P, soft_labels=True), by_hand(0.7 * (CHOSEN - REJECTED), P), atol=1e-6
    )


def test_certainty_is_the_ordinary_loss_and_a_swapped_pair_counts_by_the_rest():
    assert reward_loss(CHOSEN, REJECTED, np.ones(7, np.float32)) == pytest.approx(
        reward_loss(CHOSEN, REJECTED, None), abs=1e-7
    )
    np.testing.assert_allclose(dpo(np.ones(7, np.float32), soft_labels=True), dpo(None), atol=1e-7)
    assert reward_loss(CHOSEN, REJECTED, P) == pytest.approx(
        reward_loss(REJECTED, CHOSEN, 1 - P), abs=1e-6
    )


def test_the_loss_is_least_where_the_difference_is_the_log_odds():
    def loss(difference):
        return pairwise_loss(difference, mx.zeros(1), probability=mx.array([0.8]))[0]

    assert mx.grad(loss)(mx.array([math.log(4)])).item() == pytest.approx(0, abs=1e-6)
    assert mx.grad(loss)(mx.array([1.0])).item() < -1e-3 < 1e-3 < mx.grad(loss)(mx.array([2.0]))


# ------------------------------------------------------------------------------ scripts

ROWS = [
    {"prompt": f"{a} {a + 2}", "chosen": f" {a + 4} {a + 6}", "rejected": f" {a} 7 3", "p": p}
    for a, p in zip(range(2, 34, 2), [0.9, 0.6, 0.75, 0.5] * 4, strict=True)
]


def write(name: str, made) -> None:
    lines = [{k: v for k, v in row.items() if k != "p"} | made(row["p"]) for row in ROWS]
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(script, words: str, status: int = 0) -> str:
    out, err = io.StringIO(), io.StringIO()
    few = "--train --iters 4 --batch-size 8 --learning-rate 1e-3 --save-every 0 --steps-per-eval 0"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as end:
            run_main(lambda: script.main([*few.split(), *words.split()]))
    assert end.value.code == status, out.getvalue() + err.getvalue()
    return err.getvalue()


def losses(folder: str) -> list[float]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for line in lines if "train/loss" in (row := json.loads(line))]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("judged.jsonl", lambda p: {"judge": {"p": p}})
    write("odds.jsonl", lambda p: {"margin": math.log(p / (1 - p))})
    write("certain.jsonl", lambda p: {"judge": {"p": 1.0}})


@pytest.mark.parametrize("script, more", [(sft, "--reward-model "), (preference_training, "")])
def test_training_is_on_the_judge_s_probability_or_a_margin_of_log_odds(script, more):
    for name, flags in (
        ("judged", "--soft-labels"),
        ("odds", "--soft-labels"),
        ("certain", "--soft-labels"),
        ("judged hard", ""),
    ):
        words = f"--train-file {name.split()[0]}.jsonl --output-dir {name.replace(' ', '_')}"
        run(script, f"{more}{flags} {words} --save-file {name.replace(' ', '_')}.npz")
    assert losses("judged") == pytest.approx(losses("odds"), abs=1e-6)
    assert losses("certain") == pytest.approx(losses("judged_hard"), abs=1e-6)
    # The difference of scores, which starts near 0, grows less where less is certain.
    assert losses("judged")[-1] > losses("certain")[-1] + 1e-3


@pytest.mark.parametrize(
    "script, words, said",
    [
        (sft, "--reward-model --soft-labels --train-file plain.jsonl", "--soft-labels needs the"),
        (sft, "--reward-model --soft-labels --train-file wrong.jsonl", "a number from 0 to 1"),
        (sft, "--reward-model --soft-labels --train-file list.jsonl", "the row has 3 answers"),
        (sft, "--reward-model --soft-labels --train-file scores.jsonl", "on rows with a reward"),
        (
            sft,
            "--reward-model --soft-labels --no-margins",
            "--no-margins has no effect with",
        ),
        (sft, "--soft-labels", "--soft-labels has no effect without --reward-model"),
        (preference_training, "--soft-labels --loss-type ipo", "--soft-labels has no effect with"),
        (preference_training, "--soft-labels --algorithm kto", "--soft-labels has no effect with"),
        (preference_training, "--soft-labels --label-smoothing .1", "both say how certain"),
        (preference_training, "--soft-labels --train-file plain.jsonl", "--soft-labels needs the"),
    ],
)
def test_what_has_no_probability_is_refused(script, words, said):
    write("plain.jsonl", lambda p: {})
    write("wrong.jsonl", lambda p: {"judge": {"p": 1.5}})
    Path("list.jsonl").write_text(
        json.dumps({"prompt": "2", "chosen": "4", "rejected": ["3", "5"]}) + "\n"
    )
    Path("scores.jsonl").write_text(json.dumps({"text": "2 4", "reward": 1}) + "\n")
    err = run(script, words, status=2)
    assert err.count("error: ") == 1 and "Traceback" not in err and said in err, err
