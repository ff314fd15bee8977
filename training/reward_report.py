"""How well a reward model's scores agree with the truth; numpy alone."""

from collections.abc import Sequence

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, (N,) -> (N,); equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation of (N,) and (N,); NaN where one of them never changes."""
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / size) if size > 0 else float("nan")


def regression_report(scores: Sequence[float], rewards: Sequence[float]) -> dict[str, float]:
    """Correlations and error of scores (N,) against true rewards (N,).

    "accuracy" is the share of pairs with different rewards that the scores order correctly.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    true_order = np.sign(y[:, None] - y[None])
    decided = true_order != 0
    agree = np.sign(x[:, None] - x[None]) == true_order
    return {
        "pearson": pearson(x, y),
        "spearman": pearson(ranks(x), ranks(y)),
        "mean_squared_error": float(((x - y) ** 2).mean()),
        "accuracy": float(agree[decided].mean()) if decided.any() else float("nan"),
        "score_mean": float(x.mean()),
        "score_std": float(x.std()),
    }


def preference_report(chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, float]:
    """Accuracy, margin and log loss of scores of chosen (N,) and rejected (N,) responses."""
    difference = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    return {
        "accuracy": float((difference > 0).mean()),
        "margin_mean": float(difference.mean()),
        "log_loss": float(np.logaddexp(0, -difference).mean()),
        "chosen_mean": float(np.mean(chosen)),
        "rejected_mean": float(np.mean(rejected)),
    }
