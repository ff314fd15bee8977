"""A picture for each part of techniques.py, into docs/images: every seed is a line or a point.

Thick: the mean over seeds. Figures are those of techniques_runs.py, {seed: figures}.
"""

import sys
from pathlib import Path

import numpy as np
from side_by_side import ROOT

sys.path.insert(0, str(ROOT))
from reports.plot_style import (  # noqa: E402
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SEED_COLOURS,
    SKY,
    VERMILION,
    label,
    legend,
    new_figure,
    save,
)

COLOURS = (BLUE, ORANGE, GREEN, VERMILION, SKY, GREY)
MARKERS = "os^Dv"


def path(name: str) -> Path:
    return ROOT / "docs" / "images" / f"techniques_{name}.png"


def seeds_of(found: dict) -> str:
    return f"seeds {', '.join(map(str, found))}"


def courses(axis, found: dict, names, key: str, titles=None, steps=None) -> None:
    """A line for the mean over seeds of each name, thin ones for the seeds."""
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        curves = np.array([figures[name][key] for figures in found.values()])
        x = np.arange(1, curves.shape[1] + 1) if steps is None else steps
        for one in curves:
            axis.plot(x, one, color=colour, lw=0.7, alpha=0.45)
        axis.plot(x, curves.mean(axis=0), color=colour, lw=2, label=(titles or {}).get(name, name))


def composite(found: dict) -> None:
    figure, axes = new_figure(1, 2, (9.6, 3.9))
    left, right = axes[0]
    names = list(next(iter(found.values())))
    courses(left, found, names, "curve")
    label(left, "PPO step", "tokens of a response", "Responses get longer with alpha")
    legend(left)
    for i, name in enumerate(names):
        for k, figures in enumerate(found.values()):
            style = {"color": COLOURS[i], "marker": MARKERS[k % 5], "s": 34}
            text = name if not k else None
            right.scatter(figures[name]["tokens"], figures[name]["score"], label=text, **style)
    label(
        right,
        "tokens of a response",
        "true score (0 to 1)",
        f"Last 10 steps; {seeds_of(found)}",
    )
    save(figure, path("composite"))


def objectives(found: dict) -> None:
    figure, axes = new_figure(1, 2, (9.6, 4.2), sharey=True)
    names = list(next(iter(found.values())))
    for axis, other in zip(axes[0], ("fluency", "faithfulness"), strict=True):
        for k, figures in enumerate(found.values()):
            before = figures[names[0]]["before"]
            style = {"marker": MARKERS[k % 5], "s": 38}
            text = "before training" if not k else None
            axis.scatter(before[other], before["quality"], color="none", edgecolor=GREY, **style)
            if text:
                axis.scatter([], [], color="none", edgecolor=GREY, label=text, **style)
            for i, name in enumerate(names):
                text = name if not k else None
                row = figures[name]
                axis.scatter(row[other], row["quality"], color=COLOURS[i], label=text, **style)
        label(axis, f"{other} (0 to 1)", "", f"Last 10 steps; {seeds_of(found)}")
    axes[0, 0].set_ylabel("quality: true score (0 to 1)", fontsize=10)
    legend(axes[0, 0], title="weights: fluency,\nfaithfulness, quality", title_fontsize=9)
    save(figure, path("objectives"))


def dynamic_kl(found: dict) -> None:
    figure, axes = new_figure(1, 1, (6.8, 4.2))
    axis = axes[0, 0]
    targets = [name for name in next(iter(found.values())) if name != "fixed"]
    titles = {name: f"target {name}" for name in targets} | {"fixed": "fixed coefficient"}
    courses(axis, found, [*targets, "fixed"], "curve", titles)
    for i, target in enumerate(targets):
        axis.axhline(float(target), color=COLOURS[i], lw=1, ls="--")
    label(axis, "PPO step", "KL, nats per token", f"Mean of 10 steps; {seeds_of(found)}")
    legend(axis)
    save(figure, path("dynamic_kl"))


def curriculum_sft(found: dict) -> None:
    figure, axes = new_figure(1, 1, (6.8, 4.2))
    axis, first = axes[0, 0], next(iter(found.values()))
    courses(axis, found, list(first), "curve", steps=next(iter(first.values()))["steps"])
    highest = max(max(row["curve"][1:]) for figures in found.values() for row in figures.values())
    lowest = min(row["lowest"] for figures in found.values() for row in figures.values())
    axis.set_ylim(lowest - 0.02, highest + 0.02)  # all begin at the same loss, far above
    label(axis, "update", "validation loss, nats per token", f"Fine-tuning; {seeds_of(found)}")
    legend(axis)
    save(figure, path("curriculum_sft"))


def curriculum_ppo(found: dict) -> None:
    figure, axes = new_figure(1, 1, (6.8, 4.2))
    courses(axes[0, 0], found, list(next(iter(found.values()))), "curve")
    label(axes[0, 0], "PPO step", "true score (0 to 1)", f"Mean of 10 steps; {seeds_of(found)}")
    legend(axes[0, 0])
    save(figure, path("curriculum_ppo"))


def contrastive(found: dict) -> None:
    figure, axes = new_figure(1, 2, (9.0, 3.9))
    names = ["untrained", "0", "0.1", "1"]
    titles = {"0": "cross-entropy\nalone", "0.1": "weight 0.1", "1": "weight 1"}
    for axis, key, said in (
        (axes[0, 0], "accuracy", "held-out rows with the label of\ntheir 5 nearest rows (share)"),
        (axes[0, 1], "loss", "validation loss, nats per token"),
    ):
        there = [name for name in names if key in found[next(iter(found))][name]]
        for k, (seed, figures) in enumerate(found.items()):
            values = [figures[name][key] for name in there]
            style = {"marker": MARKERS[k % 5], "color": SEED_COLOURS[k % 6], "lw": 1}
            axis.plot(range(len(there)), values, label=f"seed {seed}", **style)
        axis.set_xticks(range(len(there)), [titles.get(name, name) for name in there])
        axis.margins(x=0.15)
        label(axis, "contrastive loss", said)
        legend(axis)
    axes[0, 0].axhline(0.2, color=GREY, lw=1, ls="--")
    axes[0, 0].annotate("chance", (-0.3, 0.21), fontsize=9, color=GREY)
    save(figure, path("contrastive"))


def conditioning(found: dict) -> None:
    from techniques_models import WANTED

    figure, axes = new_figure(1, 1, (5.6, 4.4))
    axis = axes[0, 0]
    axis.plot((0, 1), (0, 1), color=GREY, lw=1, ls="--", label="as asked")
    for k, (seed, figures) in enumerate(found.items()):
        style = {"marker": MARKERS[k % 5], "color": SEED_COLOURS[k % 6], "lw": 1.5}
        axis.plot(WANTED, figures["scores"], label=f"seed {seed}", **style)
    axis.set_xlim(0.1, 1.05)
    axis.set_ylim(0.1, 1.05)
    label(axis, "score that was asked for", "mean true score of 128 responses")
    legend(axis)
    save(figure, path("conditioning"))


def critique_sft(found: dict) -> None:
    figure, axes = new_figure(1, len(found), (3.3 * len(found), 3.6), sharey=True)
    for axis, (seed, figures) in zip(axes[0], found.items(), strict=True):
        truth, told = np.array(figures["critiques"]["pairs"]).T
        axis.plot((0, 1), (0, 1), color=GREY, lw=1, ls="--")
        axis.scatter(truth, told, color=BLUE, s=12, alpha=0.5)
        said = f"seed {seed}: correlation {figures['critiques']['correlation']:.2f}"
        label(axis, "true score of a held-out answer", "", said)
    axes[0, 0].set_ylabel("score in the critique of it", fontsize=10)
    save(figure, path("critique_sft"))


def critique_ppo(found: dict) -> None:
    figure, axes = new_figure(1, 2, (9.6, 4.0), sharey=True)
    left, right = axes[0]
    names = list(next(iter(found.values())))
    courses(left, found, names, "curve")
    label(left, "PPO step", "true score (0 to 1)", "Answers")
    legend(left)
    revised = [name for name in names if name.startswith("w ")]
    courses(right, found, revised, "revised_curve")
    label(right, "PPO step", "", f"Revisions; {seeds_of(found)}")
    legend(right)
    save(figure, path("critique_ppo"))


PICTURES = {
    picture.__name__: picture
    for picture in (
        composite,
        objectives,
        dynamic_kl,
        curriculum_sft,
        curriculum_ppo,
        contrastive,
        conditioning,
        critique_sft,
        critique_ppo,
    )
}
