"""Plots of runs and reward models as PNG files: each function takes rows or arrays and a path."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports.plot_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SEED_COLOURS,
    SKY,
    SMOOTH_FROM,
    TICKS,
    VERMILION,
    Rows,
    count_steps,
    draw_points,
    draw_series,
    label,
    legend,
    new_figure,
    require,
    running_mean,
    save,
    scale,
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
    drawn |= draw_points(axis, rows, valid, VERMILION, "validation")
    require(drawn, path, f"{train} or {valid}")
    scale(axis)
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
    """Scores of batches and of held-out prompts, KL divergence from the reference, and lengths."""
    figure, axes = new_figure(3, 1, (6.4, 7.6), sharex=True)
    above, middle, below = axes[:, 0]
    drawn = draw_series(above, rows, score, BLUE, "batch")
    drawn |= draw_series(middle, rows, kl, VERMILION, "KL to the reference")
    require(drawn, path, f"{score} or {kl}")
    draw_held_out(above, rows)
    scale(middle)
    if kl_target is not None:
        middle.axhline(kl_target, color=GREY, linewidth=1, linestyle="--", label="target")
    draw_lengths(below, rows)
    label(above, "", "mean score", title)
    label(middle, "", f"KL (nats per {unit})")
    label(below, "step", "response (tokens)")
    return save(with_legends(figure), path)


def draw_held_out(axis: Axes, rows: Rows) -> None:
    """Mean scores of the responses to held-out prompts, greedy and sampled ones."""
    draw_points(axis, rows, "eval/greedy/score", VERMILION, "held out, greedy")
    style = {"marker": "s", "ls": "--"}
    draw_points(axis, rows, "eval/sampled/score", GREEN, "held out, sampled", **style)


def draw_lengths(axis: Axes, rows: Rows, name: str = "tokens/responses_len_mean") -> None:
    """Mean lengths of the batches' responses, and of those to held-out prompts."""
    draw_series(axis, rows, name, BLUE, "batch")
    draw_points(axis, rows, "eval/greedy/response_tokens", VERMILION, "held out, greedy")
    axis.set_ylim(bottom=0)


def with_legends(figure: Figure) -> Figure:
    """The figure, with a legend in each panel that has something to name."""
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            legend(axis)
    return figure


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
    return save(with_legends(figure), path)


def plot_groups(rows: Rows, path: str | Path, *, title: str = "Group training") -> Path:
    """Rewards of batches and of held-out prompts, groups that taught nothing, KL, and lengths."""
    figure, axes = new_figure(3, 1, (6.4, 7.6), sharex=True)
    above, middle, below = axes[:, 0]
    drawn = draw_series(above, rows, "reward", BLUE, "batch")
    drawn |= draw_series(middle, rows, "frac_reward_zero_std", GREY, "groups of equal rewards")
    drawn |= draw_series(middle, rows, "kl", VERMILION, "KL to the reference, nats per token")
    require(drawn, path, "reward, frac_reward_zero_std or kl")
    if not any(line.get_ydata().any() for line in middle.lines):
        middle.set_ylim(-0.02, 1)  # a share of 0 throughout
    draw_held_out(above, rows)
    draw_lengths(below, rows, "completions/mean_length")
    label(above, "", "mean reward", title)
    label(middle, "", "share, KL")
    label(below, "step", "response (tokens)")
    return save(with_legends(figure), path)


def plot_learned_and_true(
    rows: Rows,
    path: str | Path,
    *,
    learned: str = "env/reward_mean",
    true: str = "env/true_score",
    title: str = "Learned reward against the true score",
) -> Path:
    """Each score over steps in a panel of its own, and one against the other:
    where they part, the model is gamed."""
    both = [row for row in rows if len(series([row], learned)[0]) and len(series([row], true)[0])]
    require(bool(both), path, f"{learned} and {true}")
    figure, axes = new_figure(1, 3, (12.0, 3.8))
    left, middle, right = axes[0]
    for axis, name, colour, text in (
        (left, learned, ORANGE, "learned"),
        (middle, true, BLUE, "true"),
    ):
        draw_series(axis, both, name, colour, text)
        label(axis, "step", f"{text} score, mean of a batch")
    left.set_title(title, fontsize=11, loc="left")
    steps, x = series(both, learned)
    _, y = series(both, true)
    dots = right.scatter(x, y, c=steps, cmap="viridis", s=16, edgecolors="none")
    bar = figure.colorbar(dots, ax=right, label="step")
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, steps=TICKS))
    label(right, "learned score", "true score")
    for axis in (left, middle):
        legend(axis)
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
    axes[0, 0].set_title(title, fontsize=11, loc="left")
    legend(axes[0, 0])
    axes[-1, 0].set_xlabel("step", fontsize=10)
    return save(figure, path)


def draw_seeds(axis: Axes, runs: Mapping[Any, Rows], name: str, path: str | Path) -> None:
    """Every seed's curve of one metric; mean and spread over the steps that all of them have."""
    curves, smoothed = [], set()
    for index, (seed, rows) in enumerate(runs.items()):
        steps, values = series(rows, name)
        require(len(steps) > 0, path, f"{name} (seed {seed})")
        if len(values) >= SMOOTH_FROM:
            window = len(values) // 20 | 1
            values = running_mean(values, window)
            smoothed.add(window)
        colour = SEED_COLOURS[index % len(SEED_COLOURS)]
        axis.plot(steps, values, color=colour, lw=1, alpha=0.75, label=f"seed {seed}")
        curves.append(dict(zip(steps, values, strict=True)))
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    if len(curves) > 1 and shared:
        table = np.array([[curve[step] for step in shared] for curve in curves])  # (seeds, steps)
        mean, spread = table.mean(0), table.std(0, ddof=1)
        axis.fill_between(shared, mean - spread, mean + spread, color=GREY, alpha=0.18, lw=0)
        axis.plot(shared, mean, color="black", linewidth=2.2, label="mean ± sd")
    count_steps(axis)
    if smoothed:
        text = "means of " + " or ".join(map(str, sorted(smoothed))) + " steps"
        axis.annotate(text, (0.99, 0.02), xycoords="axes fraction", ha="right", fontsize=8)


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
    legend(axis)
    return save(figure, path)
