"""What labels say of those who gave them, drawn: agreement, biases, ties, time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from reports.plot_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SEED_COLOURS,
    label,
    legend,
    new_figure,
    running_mean,
    save,
)

LONGEST_NAME = 28


def plot_labels(found: dict[str, Any], path: str | Path) -> Path:
    """Four panels of what labelling.agreement.make_report found; written as PNG."""
    labellers, pairs = found["labellers"], found["agreement"]
    height = 6.4 + 0.35 * max(0, len(labellers) + len(pairs) - 4)
    figure, axes = new_figure(2, 2, size=(10.5, height))
    draw_agreement(axes[0, 0], [pair for pair in pairs if pair["kappa"] is not None])
    draw_biases(axes[0, 1], labellers)
    draw_counts(axes[1, 0], labellers)
    draw_times(axes[1, 1], [one for one in labellers if one["seconds"]])
    return save(figure, path)


def draw_agreement(axis: Axes, pairs: Sequence[dict[str, Any]]) -> None:
    """Kappa of every two labellers with its interval."""
    names = [f"{short(pair['one'])} and {short(pair['other'])}" for pair in pairs]
    for row, pair in enumerate(pairs):
        ends = [[pair["kappa"] - pair["low"]], [pair["high"] - pair["kappa"]]]
        axis.errorbar(
            pair["kappa"], row, xerr=np.maximum(ends, 0), fmt="o", color=BLUE, capsize=3, lw=1.8
        )
        said = f"{pair['same']['share']:.0%} the same, {pair['pairs']} pairs"
        axis.annotate(
            said,
            (pair["kappa"], row),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=GREY,
        )
    axis.axvline(0, color=GREY, lw=1, ls="--")
    set_rows(axis, names, "no two labellers share pairs")
    axis.set_xlim(-1.05 if any(pair["low"] < -0.25 for pair in pairs) else -0.3, 1.08)
    label(axis, "Cohen's kappa, 95% interval (0: chance)", "", "Agreement")


def draw_biases(axis: Axes, labellers: Sequence[dict[str, Any]]) -> None:
    """Shares that should be a half where place and length say nothing."""
    kinds = (("first", "shown first", BLUE), ("longer", "longer", ORANGE))
    for shift, (name, text, colour) in zip((-0.12, 0.12), kinds, strict=True):
        drawn = False
        for row, one in enumerate(labellers):
            if (found := one[name]) is None:
                continue
            ends = [[found["share"] - found["low"]], [found["high"] - found["share"]]]
            style = {"fmt": "o", "color": colour, "capsize": 3, "lw": 1.8}
            said = {} if drawn else {"label": text}
            axis.errorbar(found["share"], row + shift, xerr=np.maximum(ends, 0), **style, **said)
            drawn = True
    axis.axvline(0.5, color=GREY, lw=1, ls="--")
    set_rows(axis, [short(one["name"]) for one in labellers], "no labels")
    axis.set_xlim(0, 1)
    label(axis, "share preferred, 95% interval (dashed: no bias)", "", "Place and length")
    if axis.get_legend_handles_labels()[0]:
        legend(axis, loc="lower right")


def draw_counts(axis: Axes, labellers: Sequence[dict[str, Any]]) -> None:
    """Choices, ties and skipped pairs."""
    rows, left = np.arange(len(labellers)), np.zeros(len(labellers))
    for name, colour in (("choices", GREEN), ("ties", ORANGE), ("skipped", GREY)):
        counts = np.array([one[name] for one in labellers])
        axis.barh(rows, counts, left=left, color=colour, height=0.5, label=name)
        left += counts
    set_rows(axis, [short(one["name"]) for one in labellers], "no labels")
    axis.set_xlim(0, 1.4 * max(1.0, left.max(initial=0)))  # room for the legend
    label(axis, "labels", "", "What was given")
    legend(axis, loc="lower right")


def draw_times(axis: Axes, labellers: Sequence[dict[str, Any]]) -> None:
    """Seconds a label over the labels of each file, smoothed."""
    for place, one in enumerate(labellers):
        seconds, colour = np.array(one["seconds"]), SEED_COLOURS[place % len(SEED_COLOURS)]
        axis.plot(np.arange(1, len(seconds) + 1), seconds, ".", ms=3, alpha=0.4, color=colour)
        smooth = running_mean(seconds, max(1, len(seconds) // 10) | 1)
        axis.plot(np.arange(1, len(seconds) + 1), smooth, color=colour, label=short(one["name"]))
    if labellers:
        top = np.quantile(np.concatenate([one["seconds"] for one in labellers]), 0.98)
        axis.set_ylim(0, max(1.0, 1.3 * top))  # a break for coffee would flatten the rest
        legend(axis, loc="upper right")
    else:
        axis.text(
            0.5, 0.5, "no times in these files", transform=axis.transAxes, ha="center", color=GREY
        )
    label(axis, "label", "seconds", "Time a label took")


def set_rows(axis: Axes, names: Sequence[str], empty: str) -> None:
    """A row for each name, the first on top; what to say where there is none."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    if not names:
        axis.set_ylim(1, 0)
        axis.text(0.5, 0.5, empty, transform=axis.transAxes, ha="center", color=GREY)


def short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
