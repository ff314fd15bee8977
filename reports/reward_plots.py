"""Plots of a reward model on preferences as PNG files; training_plots.py has those on rewards."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
from reports.training_plots import plot_distributions

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
