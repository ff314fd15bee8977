"""Reward models by sft.py --reward-model: losses, batches, pooling, reports, normalisation."""

import contextlib
import io
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT
from tiny import tiny_model

import fuse
import sft
import training.sample_texts
from command_line.exits import run_main
from data_utils import PreferenceRow, ScalarRow, make_batch, read_records, tokenise_scalar
from mlx_sft_trainer import RewardModelTask
from models.load import load_model
from models.reward_model import load_reward_model
from models.tuning import Tuning
from reports import reward_evaluation
from reports import training_plots as plots
from reports.reward_evaluation import evaluate_scores
from reports.reward_report import preference_report, ranks, regression_report

DATA = ROOT / "data"
ORACLE = {k: mx.array(v) for k, v in np.load(ROOT / "tests/oracles/reward_model.npz").items()}
SMALL = [
    "--reward-model",
    "--train",
    "--data",
    DATA,
    "--batch-size",
    8,
    "--steps-per-eval",
    0,
    "--save-every",
    0,
]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(*words, name="rm", status=0) -> str:
    """A short training of a reward model; what it printed, or its error."""
    out, err = io.StringIO(), io.StringIO()
    words = [*SMALL, "--save-file", f"{name}.npz", "--output-dir", name, *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as end:
            run_main(lambda: sft.main([str(word) for word in words]))
    assert end.value.code == status, out.getvalue() + err.getvalue()
    return err.getvalue() if status else out.getvalue()


def rows(name="rm") -> list[dict]:
    return [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]


def summary(name="rm") -> dict:
    return json.loads(Path(name, "summary.json").read_text())


class Table:
    """Stands for a reward model: the score of a text is that of its first token in a table."""

    def __init__(self, scores: mx.array):
        self.scores, self.calls = scores, []
        self.model, self.tuning = tiny_model(), Tuning()

    def __call__(self, tokens: mx.array, lengths: mx.array) -> mx.array:
        self.calls.append(tokens.shape)
        return self.scores[tokens[:, 0]]


# ------------------------------------------------------------------------------ losses


@pytest.mark.parametrize(
    ("name", "margins", "centering"),
    [("loss", False, 0.0), ("loss_margin", True, 0.0), ("loss_center0.01", False, 0.01)],
)
def test_preference_rows_give_the_losses_of_the_oracle(name, margins, centering):
    chosen, rejected = ORACLE["in/rm_chosen"], ORACLE["in/rm_rejected"]
    pairs = [
        PreferenceRow([[i, 7], [16 + i, 7, 8]], [0, 1], float(margin))
        for i, margin in enumerate(ORACLE["in/rm_margin"].tolist())
    ]
    table = Table(mx.concatenate([chosen, rejected]))
    task = RewardModelTask(table, centering=centering, use_margin=margins)
    loss, sums = task.loss(task.arrays(make_batch(pairs)))
    assert (loss / sums["weight"]).item() == pytest.approx(ORACLE[f"rm/{name}"].item(), rel=1e-6)
    accuracy = (sums["accuracy"] / sums["weight"]).item()
    assert accuracy == pytest.approx(ORACLE["rm/accuracy"].item())
    assert table.calls == [(32, 3)]  # chosen and rejected in one forward pass


def test_a_ranked_list_counts_like_one_pair():
    ranked = PreferenceRow([[0], [1], [2]], [0, 1, 1])  # two pairs; the tie is none
    pair = PreferenceRow([[3], [4]], [0, 1])
    table = Table(mx.array([0.3, -0.2, 0.5, 1.0, -1.0]))
    task = RewardModelTask(table)
    loss, sums = task.loss(task.arrays(make_batch([ranked, pair])))

    def log_loss(difference):
        return np.log1p(np.exp(-difference))

    expected = (log_loss(0.5) + log_loss(-0.2)) / 2 + log_loss(2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert sums["weight"].item() == 2 and sums["accuracy"].item() == pytest.approx(1.5)
    assert table.calls == [(5, 1)]


def test_batches_add_up_to_the_mean_over_rows():
    table = Table(mx.array([0.5, -1.0, 2.0]))
    task = RewardModelTask(table)
    scalars = [ScalarRow([i], reward) for i, reward in enumerate((1.0, 0.0, 1.5))]
    errors = np.array([0.5, 1.0, 0.5]) ** 2
    whole, sums = task.loss(task.arrays(make_batch(scalars)))
    assert (whole / sums["weight"]).item() == pytest.approx(errors.mean(), rel=1e-6)
    parts = [task.loss(task.arrays(make_batch(part))) for part in (scalars[:2], scalars[2:])]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-6)
    assert sum(s["weight"].item() for _, s in parts) == 3


# ------------------------------------------------------------------------------ what it trains on


def test_rewards_and_conversation_scores_are_regressed_on():
    out = train(
        "--data-base",
        "reward_function_increasing_mult_2_",
        "--iters",
        30,
        "--learning-rate",
        5e-3,
        "--max-rows",
        200,
    )
    losses = [row["train/loss"] for row in rows() if "train/loss" in row]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    found = summary()
    assert {"heldout/pearson", "heldout/spearman", "heldout/loss", "heldout/accuracy"} <= set(found)
    assert found["heldout/pearson"] > 0.3 and "held-out rows: pearson" in out
    assert "\nnext: python ppo_training.py --reward-model rm.npz " in out
    talks = Path("talks.jsonl")
    lines = (DATA / "samples" / "conversation.jsonl").read_text() * 4
    talks.write_text(lines)
    train(
        "--train-file",
        talks,
        "--validation-file",
        talks,
        "--iters",
        1,
        "--seed",
        1,
        "--learning-rate",
        1e-9,
        name="talks",
    )
    (row,) = [row for row in rows("talks") if "train/loss" in row]
    # Eight rows, one batch: rewards 5 and 0, four times each, against the scores before the update.
    records = list(read_records(talks))
    texts = [row.tokens for row in tokenise_scalar(records, load_model().tokenizer).rows]
    scores = np.array(load_reward_model("talks.npz", load_model()).score(texts))
    expected = np.mean((scores - np.array([5.0, 0.0] * 4)) ** 2)
    assert row["train/loss"] == pytest.approx(expected, abs=1e-3)


def test_pairs_margins_and_centring_change_what_is_learned():
    base = (
        "--data-base",
        "preference_increasing_mult_2_",
        "--iters",
        4,
        "--max-rows",
        16,
        "--learning-rate",
        1e-2,
    )
    plain = train(*base, name="plain")
    assert "accuracy" in plain
    heads = {}
    for name, words in {
        "plain": (),
        "unmargined": ("--no-margins",),
        "centred": ("--centering", 0.5),
        "last": ("--pooling", "last"),
    }.items():
        train(*base, *words, name=f"m{name}")
        heads[name] = np.array(mx.load(f"m{name}.reward_head.safetensors")["weight"])
    values = list(heads.values())
    for i, one in enumerate(values):
        assert all(np.abs(one - other).max() > 1e-6 for other in values[:i])
    found = summary("mplain")
    assert {"heldout/accuracy", "heldout/loss", "heldout/pearson"} <= set(found)
    for name in ("calibration", "scores", "loss"):
        assert Path("mplain", "plots", f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_both_responses_of_a_pair_count_in_what_is_said_of_its_length(tmp_path):
    path, short, long = tmp_path / "pairs.jsonl", " 2", " 7" * 62
    pair = json.dumps({"prompt": "2", "chosen": short, "rejected": long})
    path.write_text(f"{pair}\n" * 40)
    out = train("--train-file", path, "--iters", 1)
    low, high = 4, 65  # with <s> and </s>
    assert f"tokens a prompt with a response: {low} to {high}, mean {(low + high) / 2}, " in out
    assert f"padding efficiency {(low + high) / (2 * high):.2f}, " in out


def test_ranked_responses_train():
    line = {"prompt": "8 20", "responses": [" 22 24", " 22 7", " 7 7"]}
    Path("ranked.jsonl").write_text((json.dumps(line) + "\n") * 8)
    train(
        "--train-file",
        "ranked.jsonl",
        "--validation-file",
        "ranked.jsonl",
        "--iters",
        20,
        "--learning-rate",
        1e-2,
        name="ranked",
    )
    assert summary("ranked")["heldout/accuracy"] == 1
    tokenizer = load_model().tokenizer
    texts = [tokenizer.encode("8 20" + t) + [tokenizer.eos_token_id] for t in line["responses"]]
    scores = load_reward_model("ranked.npz", load_model()).score(texts)
    assert scores[0] > scores[1] > scores[2]


# ------------------------------------------------------------------------------ normalisation


def test_normalisation_is_on_samples_of_the_base_and_is_stored(monkeypatch):
    seen = []
    original = training.sample_texts.normalise

    def kept(model, texts):
        seen.extend(texts)
        original(model, texts)

    words = (
        "--data-base",
        "reward_function_increasing_mult_2_",
        "--max-rows",
        24,
        "--iters",
        6,
        "--learning-rate",
        1e-2,
    )
    with monkeypatch.context() as patch:
        patch.setattr(training.sample_texts, "normalise", kept)
        train(*words, "--normalize-samples", 20)
    assert len(seen) == 20
    loaded = load_model()
    adapter = load_reward_model("rm.npz", loaded)
    scores = np.array(adapter.score(seen))
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, abs=1e-4)
    fuse.main(["--adapter-file", "rm.npz", "--save-path", "fused"])
    fused = load_reward_model("fused")
    assert fused.score(seen) == pytest.approx(scores.tolist(), abs=1e-4)
    # The loss is that of predicted rewards, whatever the scale of the scores.
    normalised = summary()
    train(*words, name="plain")
    assert normalised["heldout/loss"] == pytest.approx(summary("plain")["heldout/loss"], rel=1e-4)
    assert normalised["heldout/score_std"] != pytest.approx(summary("plain")["heldout/score_std"])


def test_what_was_trained_is_there_even_if_normalising_fails(monkeypatch):
    monkeypatch.setattr("models.reward_model.RewardModel.score", lambda *_, **__: [0.5] * 9)
    error = train(
        "--data-base",
        "reward_function_increasing_mult_2_",
        "--max-rows",
        8,
        "--iters",
        1,
        "--normalize-samples",
        9,
        status=2,
    )
    assert "all samples have the same score" in error
    assert Path("rm.npz").exists() and Path("rm.reward_head.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fine-tune-type", "full", "--normalize-samples", 9], "of which --fine-tune-type full"),
        (["--normalize-samples", 1], "--normalize-samples: 1 is below 2"),
        (["--sample-prompts", "8 20", "--steps-per-eval", 1], "no effect with --reward-model"),
        (["--train-file", DATA / "samples" / "prompt_completion.jsonl"], "no reward"),
    ],
)
def test_mistakes_are_one_line(words, message):
    error = train(*words, status=2)
    assert message in error and "Traceback" not in error


def test_an_adapter_keeps_its_pooling_and_full_weights_have_no_base():
    base = ("--data-base", "reward_function_increasing_mult_2_", "--max-rows", 8, "--iters", 1)
    train(*base, "--pooling", "last")
    error = train(*base, "--resume-adapter-file", "rm.npz", "--pooling", "mean", name="b", status=2)
    assert "--pooling mean: rm.npz has been trained with last" in error
    train(*base, "--resume-adapter-file", "rm.npz", name="c")
    assert load_reward_model("c.npz", load_model()).pooling == "last"
    train(*base, "--fine-tune-type", "full", name="full")
    error = train(
        *base, "--resume-adapter-file", "full.npz", "--normalize-samples", 8, name="d", status=2
    )
    assert "full.npz holds every weight" in error


# ------------------------------------------------------------------------------ reports


def test_the_regression_report():
    scores, rewards = [0.1, 0.9, 0.4, 0.4], [0.0, 1.0, 1.0, 0.5]
    found = regression_report(scores, rewards)
    assert found["pearson"] == pytest.approx(np.corrcoef(scores, rewards)[0, 1])
    by_rank = np.corrcoef([0, 3, 1.5, 1.5], [0, 2.5, 2.5, 1])[0, 1]
    assert found["spearman"] == pytest.approx(by_rank)
    assert found["loss"] == pytest.approx((0.01 + 0.01 + 0.36 + 0.01) / 4)
    assert found["accuracy"] == pytest.approx(4 / 5)  # of five pairs of rows, one is a tie
    assert list(ranks(np.array([5.0, 1.0, 5.0, 0.0]))) == [2.5, 1, 2.5, 0]
    assert np.isnan(regression_report([1, 1], [0, 1])["pearson"])


def test_the_preference_report():
    chosen, rejected = [1.0, 0.2, 0.5], [0.0, 0.4, 0.5]
    found = preference_report(chosen, rejected, margins=[0.9, 0.1, 0.5])
    assert found["accuracy"] == pytest.approx(1 / 3)  # equal scores order nothing
    difference = np.array([1.0, -0.2, 0.0])
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-difference)).mean())
    assert found["spearman"] == pytest.approx(np.corrcoef([2, 0, 1], [2, 0, 1])[0, 1])
    weighted = preference_report(chosen, rejected, weights=[1, 0.5, 0.5])
    assert weighted["accuracy"] == pytest.approx(1 / 2) and "pearson" not in weighted
    scaled = preference_report([2 * s for s in chosen], [2 * s for s in rejected], gain=2)
    assert scaled["loss"] == pytest.approx(found["loss"])


def test_held_out_rows_of_ranked_lists_count_every_pair(tmp_path, monkeypatch):
    drawn = {}
    for module, name in ((reward_evaluation, "plot_distributions"),):
        monkeypatch.setattr(module, name, lambda groups, path, **_: drawn.update(groups) or path)
    ranked = [PreferenceRow([[0], [1], [2]], [0, 1, 2]), PreferenceRow([[3], [4]], [0, 1])]
    values = [0.3, -0.2, 0.5, 1.0, -1.0]
    found = evaluate_scores(lambda texts: [values[t[0]] for t in texts], ranked, tmp_path)
    assert found["accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert drawn == {"rank 1": [0.3, 1.0], "rank 2": [-0.2, -1.0], "rank 3": [0.5]}
    assert (tmp_path / "calibration.png").stat().st_size > 1000
    drawn.clear()
    evaluate_scores(lambda texts: [values[t[0]] for t in texts], ranked[1:], tmp_path)
    assert drawn == {"chosen": [1.0], "rejected": [-1.0]}


def test_calibration_of_pairs_groups_by_how_sure_it_is(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        reward_evaluation,
        "save",
        lambda figure, path: figures.append(figure) or plots.save(figure, path),
    )
    odds = np.log(3)  # sure by three quarters
    difference = np.array([0.01] * 40 + [odds] * 40)
    difference[:20] *= -1
    difference[40:50] *= -1
    reward_evaluation.plot_preference_calibration(
        difference, 0 * difference, tmp_path / "c.png", bins=2
    )
    line = figures[0].axes[0].containers[0].lines[0]
    assert line.get_xdata() == pytest.approx([0.5025, 0.75], abs=1e-4)
    assert line.get_ydata() == pytest.approx([0.5, 0.75])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
