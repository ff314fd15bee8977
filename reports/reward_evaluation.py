"""A reward model on held-out rows: what its scores are worth, as numbers and as plots."""

from collections.abc import Callable, Sequence
from pathlib import Path

from data_utils import PreferenceRow, ScalarRow, ranked_pairs
from reports.reward_plots import plot_preference_calibration, plot_rank_distributions
from reports.reward_report import preference_report, regression_report
from reports.training_plots import plot_calibration, plot_distributions

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
