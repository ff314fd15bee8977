"""The digits pipeline over seeds: does it learn, on every one of them?

    python benchmarks/digits.py --seeds 0 1 2 3 4

Runs data, SFT, reward model, PPO with the ground truth, with the learned reward, with a soft prompt
and with full fine-tuning, for each seed; writes results/digits.json, a Markdown table beside it and
docs/images/digits_seeds.png. Scores are true scores of sampled texts on held-out prompts.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

from digits_stages import GROUND_TRUTH, ROOT, base_stages, learned, ppo_stage, run, summary

RESULTS = Path(__file__).resolve().parent / "results"
IMAGE = ROOT / "docs" / "images" / "digits_seeds.png"
LEARNED = "ppo_learned"
FLAGS = {
    "ppo": GROUND_TRUTH,
    "ppo_prompt": f"{GROUND_TRUTH} --prompt_tuning --num-steps 200",
    "ppo_full": f"{GROUND_TRUTH} --use_peft False",
}
TITLES = {
    "ppo": "PPO, ground truth (LoRA)",
    LEARNED: "PPO, learned reward (LoRA)",
    "ppo_prompt": "PPO, ground truth (soft prompt, 200 steps)",
    "ppo_full": "PPO, ground truth (full fine-tuning)",
}


def run_seed(folder: Path, seed: int) -> dict:
    """All stages of one seed; {stage: figures}."""
    log, place = folder / "log.txt", str(folder)
    for stage in base_stages(place, seed):
        print(f"seed {seed}: {stage.name}", flush=True)
        run(stage, log)
    found = {"reward": summary(folder / "reward")}
    for name in TITLES:
        print(f"seed {seed}: {name}", flush=True)
        flags = learned(place) if name == LEARNED else FLAGS[name]
        seconds = run(ppo_stage(name, place, flags + " --eval-prompts -1", seed), log)
        found[name] = {**summary(folder / name), "seconds": seconds}
    return found


def last(found: dict, name: str, key: str, which: str = "last") -> float:
    return found[name]["evaluation"][which][0][key]


def table(results: dict[int, dict]) -> str:
    """A Markdown table: a row a stage, the score of every seed, the worst of them."""
    seeds = list(results)
    head = ["after", *(f"seed {seed}" for seed in seeds), "worst", "numbers", "KL, nats", "seconds"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]

    def row(title: str, name: str, which: str = "last") -> list[str]:
        scores = [last(results[s], name, "eval/sampled/ground_truth", which) for s in seeds]
        numbers = [last(results[s], name, "eval/sampled/numbers", which) for s in seeds]
        worst = max(scores) if which == "first" else min(scores)
        after = which == "last"
        kl = f"{mean([results[s][name]['kl'] for s in seeds]):.1f}" if after else "0"
        seconds = f"{mean([results[s][name]['seconds'] for s in seeds]):.0f}" if after else ""
        cells = [f"{score:.3f}" for score in (*scores, worst)]
        return [title, *cells, f"{mean(numbers):.1f}", kl, seconds]

    rows.append(row("SFT on noisy rows (the start of PPO; worst: highest)", "ppo", "first"))
    rows += [row(title, name) for name, title in TITLES.items()]
    pearson = [results[s]["reward"]["heldout/pearson"] for s in seeds]
    cells = [f"{value:.3f}" for value in (*pearson, min(pearson))]
    rows.append(["reward model: Pearson correlation, held-out rows", *cells, "", "", ""])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(folder: Path, seeds: list[int]) -> None:
    sys.path.insert(0, str(ROOT))
    from reports.training_plots import plot_seeds
    from run_folder.run import read_rows

    runs = {seed: read_rows(folder / str(seed) / "ppo") for seed in seeds}
    plot_seeds(
        runs,
        IMAGE,
        metrics={"env/reward_mean": "true score", "objective/kl": "KL, nats per response"},
        title="PPO with the ground-truth reward",
        goal={"env/reward_mean": 0.95},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "digits_seeds")
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"error: {args.folder}: exists; delete it or give another --folder")
    results = {}
    for seed in args.seeds:
        place = args.folder / str(seed)
        place.mkdir(parents=True)
        results[seed] = run_seed(place, seed)
    machine = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine, "results": results}, indent=1)
    (RESULTS / "digits.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / "digits.md").write_text(table(results), encoding="utf-8")
    draw(args.folder, args.seeds)
    print(table(results))


if __name__ == "__main__":
    main()
