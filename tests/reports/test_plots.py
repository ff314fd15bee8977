"""Plots: what is drawn is what the rows say, and the file is a readable PNG."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from errors import UserError
from reports import training_plots as plots

ROOT = Path(__file__).resolve().parents[2]


def rows(count: int = 100, seed: int = 0) -> list[dict]:
    noise = np.random.default_rng(seed).normal(size=count) / 50
    return [
        {
            "step": k + 1,
            "train/loss": 3 - k / count + noise[k],
            "valid/loss": 3 - k / count if k % 20 == 0 else None,
            "env/reward_mean": k / count + noise[k],
            "env/true_score": k / count,
            "objective/kl": k / 10 if k != 5 else None,
            "tokens/responses_len_mean": 20 + k / 10,
            "eval/greedy/score": k / 50 if k % 25 == 0 else None,
            "eval/greedy/response_tokens": 12.0 if k % 25 == 0 else None,
        }
        for k in range(count)
    ]


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, so that tests can ask what is in it."""
    seen = []
    monkeypatch.setattr(
        plots, "save", lambda figure, path: (seen.append(figure), original(figure, path))[1]
    )
    return seen


original = plots.save


def size_and_ink(path: Path) -> tuple[int, int, float]:
    """Width and height in pixels, and the share of pixels that are not white."""
    from matplotlib.image import imread

    image = imread(path)[..., :3]
    return image.shape[1], image.shape[0], float((image.min(-1) < 0.98).mean())


DRAWN = {
    "losses": lambda path: plots.plot_losses(rows(), path),
    "ppo": lambda path: plots.plot_ppo(rows(), path, kl_target=6.0),
    "learned": lambda path: plots.plot_learned_and_true(rows(), path),
    "seeds": lambda path: plots.plot_seeds(
        {s: rows(seed=s) for s in range(5)},
        path,
        metrics={"env/reward_mean": "score", "objective/kl": "KL (nats)"},
        goal={"env/reward_mean": 0.95},
    ),
    "calibration": lambda path: plots.plot_calibration(np.arange(50), np.arange(50) + 1, path),
    "distributions": lambda path: plots.plot_distributions({"a": [1, 2, 3], "b": [2, 3, 9]}, path),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_plot_is_a_readable_png_with_labelled_axes(tmp_path, figures, name):
    path = DRAWN[name](tmp_path / "plots" / f"{name}.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    width, height, ink = size_and_ink(path)
    assert width >= 700 and height >= 550 and 0.02 < ink < 0.6
    axes = [axis for axis in figures[0].axes if axis.get_label() != "<colorbar>"]
    assert all(axis.get_ylabel() for axis in axes) and axes[-1].get_xlabel()
    assert any(axis.get_legend() for axis in axes)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", [*DRAWN])
def test_legends_cover_nothing_and_are_whole(tmp_path, figures, name):
    DRAWN[name](tmp_path / "a.png")
    (figure,) = figures
    for axis in figure.axes:
        if (legend := axis.get_legend()) is not None:
            box, panel = legend.get_window_extent(), axis.get_window_extent()
            assert box.y0 >= panel.y1 - 1  # a pixel
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert not axis.title.get_window_extent().overlaps(box)
            title = axis._left_title
            assert not title.get_text() or title.get_window_extent().y0 >= box.y1 - 1


def test_the_same_rows_give_the_same_bytes(tmp_path):
    first, second = (DRAWN["losses"](tmp_path / f"{k}.png").read_bytes() for k in "ab")
    assert first == second


def test_losses_are_the_ones_in_the_rows(tmp_path, figures):
    few = rows(20)
    plots.plot_losses(few, tmp_path / "l.png")
    training, validation = figures[0].axes[0].get_lines()
    assert list(training.get_ydata()) == [row["train/loss"] for row in few]
    assert list(validation.get_xdata()) == [1.0] and list(validation.get_ydata()) == [3.0]


def panel(figure, place: int) -> dict[str, np.ndarray]:
    """Named curves of one panel: values by the name in the legend."""
    lines = figure.axes[place].lines
    return {line.get_label(): line.get_ydata() for line in lines if line.get_label()[0] != "_"}


@pytest.mark.parametrize("plot", [plots.plot_ppo, plots.plot_groups])
def test_held_out_scores_and_lengths_stand_beside(tmp_path, figures, plot):
    more = [
        row | {"reward": row["env/reward_mean"], "completions/mean_length": 20 + k / 10}
        for k, row in enumerate(rows())
    ]
    plot(more, tmp_path / "a.png")
    scores, lengths = panel(figures[0], 0), panel(figures[0], 2)
    np.testing.assert_allclose(scores["held out, greedy"], [0, 0.5, 1, 1.5])
    assert "batch (mean of 5 steps)" in scores and "batch (mean of 5 steps)" in lengths
    np.testing.assert_allclose(lengths["held out, greedy"], 12)
    assert "tokens" in figures[0].axes[2].get_ylabel()
    assert figures[0].axes[2].get_ylim()[0] == 0


def test_learned_and_true_score_have_a_panel_each(tmp_path, figures):
    plots.plot_learned_and_true(rows(), tmp_path / "a.png")
    assert [*panel(figures[0], 0)] == ["learned (mean of 5 steps)"]
    assert [*panel(figures[0], 1)] == ["true (mean of 5 steps)"]


def falling(first: float, last: float) -> list[dict]:
    values = np.geomspace(first, last, 40)
    return [{"step": k, "train/loss": float(value)} for k, value in enumerate(values)]


@pytest.mark.parametrize(
    "first, last, scale", [(3, 2, "linear"), (9, 0.01, "log"), (9, 1, "linear")]
)
def test_a_wide_range_has_a_logarithmic_axis(tmp_path, figures, first, last, scale):
    plots.plot_losses(falling(first, last), tmp_path / "a.png")
    axis = figures[0].axes[0]
    assert axis.get_yscale() == scale
    figures[0].canvas.draw()
    shown = [float(text.get_text()) for text in axis.get_yticklabels() if text.get_text()]
    inside = [value for value in shown if last <= value <= first]
    assert len(inside) > 1
    if scale == "log":  # 1, 2 and 5 times a power of ten, in plain numbers
        assert all(f"{value:e}"[0] in "125" for value in inside)


def test_a_kl_that_begins_at_nothing_stays_linear(tmp_path, figures):
    some = [{"step": k, "objective/kl": max(k / 10, 1e-9)} for k in range(60)]
    plots.plot_ppo(some, tmp_path / "a.png")
    assert figures[0].axes[1].get_yscale() == "linear"


@pytest.mark.parametrize("count", [7, 60, 2500])
def test_ticks_are_what_people_count_in(tmp_path, figures, count):
    plots.plot_losses([{"step": k, "train/loss": 1.5} for k in range(count)], tmp_path / "a.png")
    axis = figures[0].axes[0]
    figures[0].canvas.draw()
    steps = np.diff(axis.get_xticks())
    assert np.allclose(steps, steps[0]) and f"{steps[0]:e}"[:4] in ("1.00", "2.00", "5.00")
    texts = [text.get_text() for text in axis.get_xticklabels()]
    assert all(text.replace("−", "").replace("-", "").replace(",", "").isdigit() for text in texts)
    assert ("1,000" in texts) == (count > 1000)


def test_smoothing_over_seeds_is_stated(tmp_path, figures):
    two = {seed: rows(seed=seed) for seed in range(2)}
    plots.plot_seeds(two, tmp_path / "a.png", metrics={"env/reward_mean": "score"})
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["means of 5 steps"]


def test_gaps_are_left_out_not_drawn_as_zero():
    steps, values = plots.series(rows(10), "objective/kl")
    assert list(steps) == [1, 2, 3, 4, 5, 7, 8, 9, 10] and values[5] == 0.6


def test_a_running_mean_is_centred():
    values = np.arange(9.0)
    assert plots.running_mean(values, 3)[1:-1] == pytest.approx(values[1:-1])
    assert plots.running_mean(values, 3)[0] == pytest.approx(0.5)
    assert plots.running_mean(values, 1) == pytest.approx(values)


def test_mean_and_spread_over_seeds(tmp_path, figures):
    runs = {
        seed: [{"step": k, "m": float(seed + k)} for k in range(1, 4 + seed)] for seed in (0, 1, 2)
    }
    plots.plot_seeds(runs, tmp_path / "s.png", metrics={"m": "metric"})
    axis = figures[0].axes[0]
    (mean,) = [line for line in axis.get_lines() if line.get_label() == "mean ± sd"]
    # Only steps that every seed has.
    assert list(mean.get_xdata()) == [1, 2, 3] and list(mean.get_ydata()) == [2.0, 3.0, 4.0]
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(1.0) and band.max() == pytest.approx(5.0)


def test_calibration_groups_by_prediction(tmp_path, figures):
    predicted = np.arange(100) / 100
    plots.plot_calibration(predicted, predicted**2, tmp_path / "c.png", bins=4)
    line = figures[0].axes[0].containers[0].lines[0]
    assert line.get_xdata() == pytest.approx([0.12, 0.37, 0.62, 0.87])
    groups = (predicted**2).reshape(4, 25).mean(1)
    assert line.get_ydata() == pytest.approx(groups)


def test_rows_without_the_metric_are_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="env/reward_mean"):
        plots.plot_ppo([{"step": 1}], tmp_path / "p.png")
    with pytest.raises(UserError, match="seed 1"):
        plots.plot_seeds({0: rows(3), 1: []}, tmp_path / "p.png", metrics={"train/loss": "x"})
    with pytest.raises(UserError, match="score"):
        plots.plot_distributions({"a": []}, tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_no_display_and_no_pyplot_are_needed(tmp_path):
    code = (
        "import sys; from reports.training_plots import plot_losses\n"
        f"plot_losses([{{'step': 1, 'train/loss': 1.0}}], {str(tmp_path / 'p.png')!r})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | {"MPLBACKEND": "TkAgg"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0
