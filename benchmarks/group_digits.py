"""GRPO, RLOO and REINFORCE++ beside PPO on the digits task, over seeds.

    python benchmarks/group_digits.py --seeds 0 1 2 3 4

Data and SFT model are those of digits.py. Writes results/group_digits.json, a Markdown table beside
it and docs/images/group_digits.png. Scores are true scores of sampled texts on held-out prompts;
"to 0.95": responses and processor seconds until a batch's mean score, over 5 steps, is there. A
folder that is there is gone on with: a run that has ended is not made again.
"""

import argparse
import json
import resource
import sys
from pathlib import Path

from digits_stages import ROOT, Stage, base_stages, run, summary

sys.path.insert(0, str(ROOT))
RESULTS = Path(__file__).resolve().parent / "results"
IMAGE = ROOT / "docs" / "images" / "group_digits.png"
GOAL, SMOOTHED, BATCH, STEPS = 0.95, 5, 64, 40
METHODS = {
    "grpo": ("GRPO", "group_training.py", ""),
    "rloo": ("RLOO", "group_training.py", "--advantage_estimator rloo --beta .01"),
    "reinforce": ("REINFORCE++", "group_training.py", "--advantage_estimator reinforce --beta .01"),
    "ppo": ("PPO", "ppo_training.py", ""),
}
REWARD = {"ppo": "env/reward_mean"}  # the metric that holds a batch's mean score; else "reward"


def make_base(place: Path, seed: int) -> None:
    stages = [stage for stage in base_stages(str(place), seed) if "reward" not in stage.name]
    if not (place / "sft_model" / "config.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        for stage in stages:
            run(stage, place / "log.txt")


def train(place: Path, name: str, seed: int) -> float:
    """Processor seconds of a run, kept beside it."""
    _, script, flags = METHODS[name]
    folder = place / name
    kept = place / f"{name}.seconds"
    if not (folder / "summary.json").exists():
        command = (
            f"python {script} --model {place}/sft_model --ground_truth_reward {flags} "
            f"--num-steps {STEPS} --batch-size {BATCH} --data {place}/data --eval-prompts -1 "
            f"--eval-every {STEPS} --data-base prompts_increasing_mult_2_ --save-every 0 "
            f"--save-file {place}/{name}.npz --output-dir {folder} --overwrite --seed {seed}"
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(Stage(name, command), place / "log.txt")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        kept.write_text(str(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return float(kept.read_text())


def figures(folder: Path, name: str, seconds: float) -> dict:
    from reports.plot_style import series
    from run_folder.run import read_rows

    rows = read_rows(folder)
    _, scores = series(rows, REWARD.get(name, "reward"))
    means = [sum(scores[i : i + SMOOTHED]) / SMOOTHED for i in range(len(scores) - SMOOTHED + 1)]
    steps = next((i + SMOOTHED for i, mean in enumerate(means) if mean >= GOAL), None)
    last = summary(folder)["evaluation"]["last"][0]
    return {
        "score": last["eval/sampled/ground_truth"],
        "numbers": last["eval/sampled/numbers"],
        "seconds": seconds,
        "steps_to_goal": steps,
        "samples_to_goal": None if steps is None else steps * BATCH,
        "seconds_to_goal": None if steps is None else seconds * steps / len(scores),
    }


def table(results: dict) -> str:
    seeds = list(results)
    head = [
        "method",
        *(f"seed {seed}" for seed in seeds),
        "worst",
        "numbers",
        "responses to 0.95",
        "seconds to 0.95",
        "seconds a step",
    ]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, (title, _, _) in METHODS.items():
        found = [results[seed][name] for seed in seeds]
        scores = [row["score"] for row in found]
        samples = [row["samples_to_goal"] for row in found]
        seconds = [row["seconds_to_goal"] for row in found]
        reached = None not in samples
        rows.append(
            [
                title,
                *(f"{score:.3f}" for score in (*scores, min(scores))),
                f"{sum(row['numbers'] for row in found) / len(found):.1f}",
                f"{min(samples)} to {max(samples)}" if reached else "not on every seed",
                f"{min(seconds):.1f} to {max(seconds):.1f}" if reached else "",
                f"{sum(row['seconds'] for row in found) / len(found) / STEPS:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def draw(folder: Path, seeds: list[int]) -> None:
    """The mean over seeds of each method, and its worst seed, over steps."""
    import numpy as np

    from reports.plot_style import (
        BLUE,
        ORANGE,
        SKY,
        VERMILION,
        label,
        legend,
        new_figure,
        save,
        series,
    )
    from run_folder.run import read_rows

    figure, axes = new_figure(1, 1, (6.4, 4.2))
    axis = axes[0, 0]
    for (name, (title, _, _)), colour in zip(
        METHODS.items(), (BLUE, ORANGE, SKY, VERMILION), strict=True
    ):
        metric = REWARD.get(name, "reward")
        runs = [series(read_rows(folder / str(seed) / name), metric)[1] for seed in seeds]
        runs = np.array(runs)
        steps = np.arange(1, runs.shape[1] + 1) * BATCH
        axis.plot(steps, runs.mean(axis=0), color=colour, lw=1.8, label=title)
        axis.plot(steps, runs.min(axis=0), color=colour, lw=0.8, ls=":")
    axis.axhline(GOAL, color="grey", lw=1, ls="--")
    label(axis, "responses", "true score", "Mean of five seeds; dotted: the worst")
    legend(axis)
    save(figure, IMAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "group_digits")
    args = parser.parse_args()
    results: dict = {seed: {} for seed in args.seeds}
    for name in METHODS:
        for seed in args.seeds:
            place = args.folder / str(seed)
            make_base(place, seed)
            seconds = train(place, name, seed)
            results[seed][name] = figures(place / name, name, seconds)
            print(f"seed {seed}: {name} {results[seed][name]}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (RESULTS / "group_digits.json").write_text(text, encoding="utf-8")
    (RESULTS / "group_digits.md").write_text(table(results), encoding="utf-8")
    draw(args.folder, args.seeds)
    print(table(results))


if __name__ == "__main__":
    main()
