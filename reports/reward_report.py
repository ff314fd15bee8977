"""How well a reward model's scores agree with the truth; numpy alone."""

from collections.abc import Sequence

import numpy as np

NAN = float("nan")


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, (N,) -> (N,); equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation of (N,) and (N,); NaN where one of them never changes."""
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / size) if size > 0 else NAN


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of the ranks of (N,) and (N,)."""
    return pearson(ranks(x), ranks(y))


def regression_report(
    scores: Sequence[float], rewards: Sequence[float], predicted: Sequence[float] | None = None
) -> dict[str, float]:
    """Correlations and error of scores (N,) against true rewards (N,).

    "loss" is the mean squared error of `predicted`, which are the scores unless these were
    normalised to another scale than that of the rewards. "accuracy" is the share of pairs of rows
    with different rewards that the scores order correctly.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    error = x - y if predicted is None else np.asarray(predicted, dtype=np.float64) - y
    true_order = np.sign(y[:, None] - y[None])
    decided = true_order != 0
    agree = np.sign(x[:, None] - x[None]) == true_order
    return {
        "pearson": pearson(x, y),
        "spearman": spearman(x, y),
        "loss": float((error**2).mean()),
        "accuracy": float(agree[decided].mean()) if decided.any() else NAN,
        "pairs": float(decided.sum() // 2),
        "score_mean": float(x.mean()),
        "score_std": float(x.std()),
    }


def preference_report(
    chosen: Sequence[float],
    rejected: Sequence[float],
    weights: Sequence[float] | None = None,
    margins: Sequence[float] | None = None,
    gain: float = 1.0,
) -> dict[str, float]:
    """Accuracy and loss (-log sigmoid of the difference / `gain`) of pairs (N,) of scores.

    `weights` (N,) let lists of several responses count like one pair. `margins` (N,), where they
    differ, are what "pearson" and "spearman" compare the differences of scores with.
    """
    a, b = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    difference = a - b
    weights = np.ones(len(a)) if weights is None else np.asarray(weights, dtype=np.float64)

    def mean(values: np.ndarray) -> float:
        return float((values * weights).sum() / weights.sum())

    found = {
        "accuracy": mean(difference > 0),
        "pairs": float(len(a)),
        "loss": mean(np.logaddexp(0, -difference / gain)),
        "margin_mean": mean(difference),
        "chosen_mean": mean(a),
        "rejected_mean": mean(b),
    }
    if margins is not None and np.ptp(margins) > 0:
        margins = np.asarray(margins, dtype=np.float64)
        found["pearson"] = pearson(difference, margins)
        found["spearman"] = spearman(difference, margins)
    return found
