"""How plots look, and the few drawing steps that all of them share.

matplotlib's object interface alone: no display, no pyplot, no global state. Colours are Okabe and
Ito's, which people with any kind of colour vision can tell apart.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from errors import UserError
from safe_files import write_atomically

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
SEED_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
GREY = "#4D4D4D"
DOTS_PER_INCH = 150
# Of a legend in 9 points, in points: a line's height, a letter's mean width, a key with its gaps;
# and what a panel's width leaves to ticks and labels.
LEGEND_LINE, LETTER, LEGEND_KEY, BESIDE_PANEL = 14, 4.6, 39, 50
# Fewer points than this are shown as they are; more get a running mean over a twentieth of them.
SMOOTH_FROM = 60

# Values up to so many times those that a twentieth stays below are shown on a logarithmic axis.
LOG_FROM = 50
TICKS = [1, 2, 5, 10]  # steps between ticks, times a power of ten: what people count in

Rows = Sequence[Mapping[str, Any]]

# ------------------------------------------------------------------------------ data


def series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (N,), (N,) of the rows that have a finite number under ``name``."""
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    if not pairs:
        return np.zeros(0), np.zeros(0)
    steps, values = np.array(pairs, dtype=float).T
    return steps, values


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the ``window`` values around every place (N,), of fewer at both ends.

    Centred: a mean of the past alone would show a falling loss too high.
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    half = window // 2
    starts, ends = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (total[ends] - total[starts]) / (ends - starts)


# ------------------------------------------------------------------------------ drawing


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.0), **options):
    """A figure and its axes, both of our own (``subplots`` without pyplot)."""
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(True, color="#E3E3E3", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(colors=GREY, labelsize=9)
        axis.yaxis.set_major_locator(MaxNLocator(steps=TICKS))
    return figure, axes


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG; a reader never sees half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
    return path


def label(axis: Axes, x: str, y: str, title: str = "") -> None:
    axis.set_xlabel(x, fontsize=10)
    axis.set_ylabel(y, fontsize=10)
    if title:
        axis.set_title(title, fontsize=11, loc="left")


def count_steps(axis: Axes) -> None:
    """Ticks of an axis of steps: whole numbers, with a comma from a thousand on."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=TICKS))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def scale(axis: Axes) -> None:
    """A logarithmic y axis where what is drawn asks for it: all above 0, over a wide range."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines])
    low = np.quantile(drawn, 0.05) if len(drawn) else 0.0  # a KL may begin at next to nothing
    if not len(drawn) or drawn.min() <= 0 or drawn.max() < LOG_FROM * low:
        return
    axis.set_yscale("log")
    axis.set_ylim(bottom=max(drawn.min(), low / 10) / 1.2)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def draw_points(axis: Axes, rows: Rows, name: str, colour: str, text: str, **style: Any) -> bool:
    """One metric that few steps have, held-out scores say: a line through points."""
    steps, values = series(rows, name)
    if not len(steps):
        return False
    count_steps(axis)
    style = {"marker": "o", "ms": 4, "lw": 1.8} | style
    axis.plot(steps, values, color=colour, label=text, **style)
    return True


def draw_series(axis: Axes, rows: Rows, name: str, colour: str, text: str) -> bool:
    """One metric over steps: raw and faint with a running mean, or plain where it is short."""
    steps, values = series(rows, name)
    if not len(steps):
        return False
    count_steps(axis)
    if len(steps) < SMOOTH_FROM:
        marker = "o" if len(steps) < 25 else None
        axis.plot(steps, values, color=colour, linewidth=1.8, marker=marker, ms=3.5, label=text)
        return True
    window = len(steps) // 20 | 1
    axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    smooth = running_mean(values, window)
    axis.plot(steps, smooth, color=colour, linewidth=2, label=f"{text} (mean of {window} steps)")
    return True


def legend(axis: Axes, **place: Any) -> None:
    """What the colours mean: above the panel, where it covers nothing, or at a `place` in it."""
    if place:
        axis.legend(fontsize=9, frameon=True, framealpha=0.9, edgecolor="#E3E3E3", **place)
        return
    texts = axis.get_legend_handles_labels()[1]
    columns = next(n for n in range(len(texts), 0, -1) if n == 1 or fits(axis, texts, n))
    style = {"frameon": False, "borderaxespad": 0.1, "columnspacing": 1.4, "borderpad": 0.2}
    axis.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **style)
    lines = -(-len(texts) // columns)
    axis.set_title(axis.get_title("left"), fontsize=11, loc="left", pad=6 + LEGEND_LINE * lines)


def fits(axis: Axes, texts: Sequence[str], columns: int) -> bool:
    """Whether a legend of so many columns is no wider than the panel."""
    parts = np.array_split(np.array([len(text) for text in texts]), columns)  # as matplotlib does
    letters = sum(part.max() for part in parts)
    panels = axis.get_subplotspec().get_gridspec().ncols
    room = axis.figure.get_figwidth() * 72 / panels - BESIDE_PANEL
    return letters * LETTER + len(parts) * LEGEND_KEY <= room


def require(drawn: bool, path: str | Path, names: str) -> None:
    if not drawn:
        raise UserError(f"{path}: nothing to plot: no row has {names}")
