"""Plots of runs and reward models as PNG files: each function takes rows or arrays and a path."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from reports.plot_style import (
    BLUE,
    GREY,
    ORANGE,
    SEED_COLOURS,
    SKY,
    SMOOTH_FROM,
    VERMILION,
    Rows,
    draw_series,
    label,
    legend,
    new_figure,
    require,
    running_mean,
    save,
    series,
)

# ------------------------------------------------------------------------------ runs


def plot_losses(
    rows: Rows,
    path: str | Path,
    *,
    train: str = "train/loss",
    valid: str = "valid/loss",
    title: str = "Loss",
    unit: str = "nats per token",
) -> Path:
    """Training and validation loss over steps."""
    figure, axes = new_figure()
    axis = axes[0, 0]
    drawn = draw_series(axis, rows, train, BLUE, "training")
    steps, values = series(rows, valid)
    if len(steps):
        axis.plot(steps, values, color=VERMILION, marker="o", ms=4, lw=1.8, label="validation")
    require(drawn or len(steps) > 0, path, f"{train} or {valid}")
    label(axis, "step", f"loss ({unit})" if unit and unit != "loss" else "loss", title)
    legend(axis)
    return save(figure, path)


def plot_ppo(
    rows: Rows,
    path: str | Path,
    *,
    score: str = "env/reward_mean",
    kl: str = "objective/kl",
    unit: str = "response",
    kl_target: float | None = None,
    title: str = "PPO",
) -> Path:
    """Mean score of a batch, and its KL divergence from the reference, over steps."""
    figure, axes = new_figure(2, 1, (6.4, 5.4), sharex=True)
    above, below = axes[:, 0]
    drawn = draw_series(above, rows, score, BLUE, "mean score")
    drawn |= draw_series(below, rows, kl, VERMILION, "KL to the reference")
    require(drawn, path, f"{score} or {kl}")
    if kl_target is not None:
        below.axhline(kl_target, color=GREY, linewidth=1, linestyle="--", label="target")
    label(above, "", "score", title)
    label(below, "step", f"KL (nats per {unit})")
    for axis in (above, below):
        if axis.get_legend_handles_labels()[0]:
            legend(axis)
    return save(figure, path)


def plot_preferences(rows: Rows, path: str | Path, *, title: str = "Preferences") -> Path:
    """Margin between both sides, and the log-probability of the chosen ones, over steps.

    A chosen side that falls while the margin grows is likelihood displacement.
    """
    figure, axes = new_figure(2, 1, (6.4, 5.4), sharex=True)
    above, below = axes[:, 0]
    drawn = draw_series(above, rows, "train/rewards/margins", BLUE, "margin")
    for side, colour in (("chosen", BLUE), ("rejected", VERMILION)):
        drawn |= draw_series(below, rows, f"train/logps/{side}", colour, side)
    require(drawn, path, "train/rewards/margins or train/logps/chosen")
    label(above, "", "reward margin", title)
    label(below, "step", "log-probability (nats)")
    for axis in (above, below):
        if axis.get_legend_handles_labels()[0]:
            legend(axis)
    return save(figure, path)


def plot_groups(rows: Rows, path: str | Path, *, title: str = "Group training") -> Path:
    """Mean reward of a batch, and the share of groups that taught nothing, over steps."""
    figure, axes = new_figure(2, 1, (6.4, 5.4), sharex=True)
    above, below = axes[:, 0]
    drawn = draw_series(above, rows, "reward", BLUE, "mean reward")
    drawn |= draw_series(below, rows, "frac_reward_zero_std", GREY, "groups of equal rewards")
    drawn |= draw_series(below, rows, "kl", VERMILION, "KL to the reference, nats per token")
    require(drawn, path, "reward, frac_reward_zero_std or kl")
    label(above, "", "reward", title)
    label(below, "step", "share, KL")
    for axis in (above, below):
        if axis.get_legend_handles_labels()[0]:
            legend(axis)
    return save(figure, path)


def plot_learned_and_true(
    rows: Rows,
    path: str | Path,
    *,
    learned: str = "env/reward_mean",
    true: str = "env/true_score",
    title: str = "Learned reward against the true score",
) -> Path:
    """Both scores over steps, and one against the other: where they part, the model is gamed."""
    both = [row for row in rows if len(series([row], learned)[0]) and len(series([row], true)[0])]
    require(bool(both), path, f"{learned} and {true}")
    figure, axes = new_figure(1, 2, (9.6, 4.2), width_ratios=(1.25, 1))
    left, right = axes[0]
    draw_series(left, both, learned, ORANGE, "learned")
    draw_series(left, both, true, BLUE, "true")
    label(left, "step", "mean score of a batch", title)
    legend(left)
    steps, x = series(both, learned)
    _, y = series(both, true)
    dots = right.scatter(x, y, c=steps, cmap="viridis", s=16, edgecolors="none")
    bar = figure.colorbar(dots, ax=right, label="step")
    bar.outline.set_visible(False)
    label(right, "learned score", "true score")
    return save(figure, path)


def plot_seeds(
    runs: Mapping[Any, Rows],
    path: str | Path,
    *,
    metrics: Mapping[str, str],
    title: str = "",
    goal: Mapping[str, float] | None = None,
) -> Path:
    """Each seed thin, their mean, and ± 1 standard deviation; one panel per metric.

    ``runs``: rows by seed. ``metrics``: axis label by name. ``goal``: a line to reach, by name.
    """
    figure, axes = new_figure(len(metrics), 1, (6.4, 2.9 * len(metrics) + 0.4), sharex=True)
    for axis, (name, text) in zip(axes[:, 0], metrics.items(), strict=True):
        draw_seeds(axis, runs, name, path)
        if goal and name in goal:
            line = f"goal {goal[name]:g}"
            axis.axhline(goal[name], color=GREY, linewidth=1, linestyle="--", label=line)
        label(axis, "", text)
    legend(axes[0, 0], ncols=3)
    axes[0, 0].set_title(title, fontsize=11, loc="left")
    axes[-1, 0].set_xlabel("step", fontsize=10)
    return save(figure, path)


def draw_seeds(axis: Axes, runs: Mapping[Any, Rows], name: str, path: str | Path) -> None:
    """Every seed's curve of one metric; mean and spread over the steps that all of them have."""
    curves = []
    for index, (seed, rows) in enumerate(runs.items()):
        steps, values = series(rows, name)
        require(len(steps) > 0, path, f"{name} (seed {seed})")
        if len(values) >= SMOOTH_FROM:
            values = running_mean(values, len(values) // 20 | 1)
        colour = SEED_COLOURS[index % len(SEED_COLOURS)]
        axis.plot(steps, values, color=colour, lw=1, alpha=0.75, label=f"seed {seed}")
        curves.append(dict(zip(steps, values, strict=True)))
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    if len(curves) > 1 and shared:
        table = np.array([[curve[step] for step in shared] for curve in curves])  # (seeds, steps)
        mean, spread = table.mean(0), table.std(0, ddof=1)
        axis.fill_between(shared, mean - spread, mean + spread, color=GREY, alpha=0.18, lw=0)
        axis.plot(shared, mean, color="black", linewidth=2.2, label="mean ± sd")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


# ------------------------------------------------------------------------------ reward models


def plot_calibration(
    predicted: Sequence[float],
    true: Sequence[float],
    path: str | Path,
    *,
    bins: int = 10,
    title: str = "Calibration on held-out rows",
) -> Path:
    """Predicted against true reward: every row, and the mean of each tenth of them."""
    x, y = np.asarray(predicted, dtype=float), np.asarray(true, dtype=float)
    require(len(x) > 0, path, "a prediction")
    figure, axes = new_figure(size=(5.2, 4.8))
    axis = axes[0, 0]
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    pad = 0.04 * (high - low or 1.0)
    axis.plot([low, high], [low, high], color=GREY, lw=1, ls="--", label="predicted = true")
    axis.scatter(x, y, color=SKY, s=14, alpha=0.45, edgecolors="none", label="one row")
    groups = [part for part in np.array_split(np.argsort(x, kind="stable"), bins) if len(part)]
    middle = [x[part].mean() for part in groups]
    mean = [y[part].mean() for part in groups]
    error = [y[part].std() / len(part) ** 0.5 for part in groups]
    style = {"color": VERMILION, "marker": "o", "ms": 5, "lw": 1.8, "capsize": 2}
    text = f"mean of {len(x) / len(groups):.0f} rows ± s.e."
    axis.errorbar(middle, mean, yerr=error, label=text, **style)
    axis.set_xlim(low - pad, high + pad)
    axis.set_ylim(low - pad, high + pad)
    axis.set_aspect("equal")
    label(axis, "predicted reward", "true reward", f"{title} ({len(x)} rows)")
    legend(axis)
    return save(figure, path)


def plot_distributions(
    scores: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    unit: str = "score",
    title: str = "Scores on held-out rows",
) -> Path:
    """Histograms of several groups of scores (chosen and rejected, say) over the same bins."""
    groups = {name: np.asarray(values, dtype=float) for name, values in scores.items()}
    together = np.concatenate(list(groups.values())) if groups else np.zeros(0)
    require(len(together) > 0, path, "a score")
    edges = np.histogram_bin_edges(together, bins=min(40, max(8, int(len(together) ** 0.5))))
    figure, axes = new_figure()
    axis = axes[0, 0]
    for index, (name, values) in enumerate(groups.items()):
        colour = SEED_COLOURS[index % len(SEED_COLOURS)]
        text = f"{name} (mean {values.mean():.3g}, {len(values)} rows)"
        shares = np.ones(len(values)) * 100.0 / len(values)
        axis.hist(values, edges, weights=shares, color=colour, alpha=0.35, label=text)
        axis.hist(values, edges, weights=shares, color=colour, histtype="step", linewidth=1.6)
    label(axis, unit, "share of the group (%)", title)
    axis.set_ylim(top=axis.get_ylim()[1] * (1.05 + 0.09 * len(groups)))  # room for the legend
    legend(axis)
    return save(figure, path)
