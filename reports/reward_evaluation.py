"""A reward model on held-out rows: what its scores are worth, as numbers and as plots."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_utils import PreferenceRow, ScalarRow, ranked_pairs
from reports.plot_style import (
    GREY,
    SEED_COLOURS,
    VERMILION,
    label,
    legend,
    new_figure,
    require,
    save,
)
from reports.reward_report import preference_report, regression_report
from reports.training_plots import plot_calibration, plot_distributions

# ------------------------------------------------------------------------------ plots


FEWEST = 10  # pairs that a share is taken of


def plot_preference_calibration(
    chosen: Sequence[float],
    rejected: Sequence[float],
    path: str | Path,
    *,
    bins: int = 10,
    gain: float = 1.0,
    title: str = "Calibration on held-out pairs",
) -> Path:
    """How sure Bradley-Terry is of its order of two responses, against how often that is right.

    Scores of chosen (N,) and rejected (N,). Sure by sigmoid(|difference| / gain), from 0.5 up.
    """
    difference = (np.asarray(chosen, dtype=float) - np.asarray(rejected, dtype=float)) / gain
    require(len(difference) > 0, path, "a pair")
    sure = 1.0 / (1.0 + np.exp(-np.abs(difference)))
    right = np.where(difference == 0, 0.5, difference > 0)
    figure, axes = new_figure(size=(5.2, 4.8))
    axis = axes[0, 0]
    axis.plot([0.5, 1], [0.5, 1], color=GREY, lw=1, ls="--", label="as often right as it is sure")
    bins = min(bins, max(2, len(sure) // FEWEST))
    groups = [part for part in np.array_split(np.argsort(sure, kind="stable"), bins) if len(part)]
    middle = [sure[part].mean() for part in groups]
    share = np.array([right[part].mean() for part in groups])
    sizes = np.array([len(part) for part in groups])
    error = np.sqrt(share * (1 - share) / sizes)
    style = {"color": VERMILION, "marker": "o", "ms": 5, "lw": 1.8, "capsize": 2}
    text = f"mean of {len(sure) / len(groups):.0f} pairs ± s.e."
    axis.errorbar(middle, share, yerr=error, label=text, **style)
    axis.set_xlim(0.48, 1.02)
    axis.set_ylim(min(0.4, float((share - error).min())) - 0.02, 1.02)
    label(
        axis,
        "predicted probability of its order",
        "share of pairs ordered correctly",
        f"{title} ({len(sure)} pairs)",
    )
    legend(axis, loc="lower right")
    return save(figure, path)


def plot_rank_distributions(
    scores: Sequence[float], ranks: Sequence[int], path: str | Path
) -> Path:
    """Histograms of the scores (N,) of responses by their true ranks (N,), 0 the best."""
    lowest = min(max(ranks), len(SEED_COLOURS) - 1)  # a colour each; those below it count as it
    names = ["chosen", "rejected"] if lowest == 1 else [f"rank {k + 1}" for k in range(lowest + 1)]
    groups = {name: [] for name in names}
    for score, rank in zip(scores, ranks, strict=True):
        groups[names[min(rank, lowest)]].append(score)
    return plot_distributions(groups, path)


# ------------------------------------------------------------------------------ evaluation


Score = Callable[[list[list[int]]], list[float]]  # token ids of whole texts -> their scores


def evaluate_scores(
    score: Score,
    rows: Sequence[ScalarRow] | Sequence[PreferenceRow],
    plots: Path | None = None,
    *,
    gain: float = 1.0,
    offset: float = 0.0,
) -> dict[str, float]:
    """Agreement of scores with rewards or preferences; with `plots`, drawn in that folder.

    `gain` and `offset` are the normalisation that is in the scores. Rewards are predicted, and
    differences of scores are log odds, without it.
    """
    if isinstance(rows[0], PreferenceRow):
        return evaluate_preferences(score, rows, plots, gain)
    scores, rewards = score([row.tokens for row in rows]), [row.reward for row in rows]
    predicted = [(value - offset) / gain for value in scores]
    if plots is not None:
        plot_calibration(predicted, rewards, plots / "calibration.png")
        plot_distributions({"reward model": predicted, "truth": rewards}, plots / "scores.png")
    return regression_report(scores, rewards, predicted)


def evaluate_preferences(
    score: Score, rows: Sequence[PreferenceRow], plots: Path | None, gain: float
) -> dict[str, float]:
    """The same for preferences: every pair of responses of different ranks counts."""
    scores = score([response for row in rows for response in row.responses])
    pairs = ranked_pairs([row.ranks for row in rows])
    better, worse, weights, places = ([pair[k] for pair in pairs] for k in range(4))
    margins = [rows[place].margin or 0.0 for place in places]
    chosen, rejected = [scores[i] for i in better], [scores[i] for i in worse]
    if plots is not None:
        plot_preference_calibration(chosen, rejected, plots / "calibration.png", gain=gain)
        ranks = [rank for row in rows for rank in row.ranks]
        plot_rank_distributions(scores, ranks, plots / "scores.png")
    return preference_report(chosen, rejected, weights, margins, gain)
