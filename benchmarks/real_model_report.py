"""Table and plots of what benchmarks/real_model.py has done so far."""

import json
import os
import platform
import sys
from pathlib import Path

from real_model_data import one_sentence

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "real_model.json"
IMAGE = ROOT / "docs" / "images" / "real_model.png"
HELD_OUT = "eval/sampled/positive"  # VADER's score of sampled responses to held-out prompts


def read_rows(file: Path) -> list[dict]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_seed(place: Path) -> dict:
    """Stages with their time, and of each run what its folder says; {} where nothing was done."""
    file = place / "stages.json"
    if not file.exists():
        return {}
    found = {"stages": json.loads(file.read_text(encoding="utf-8")), "runs": {}}
    for folder in sorted(place.iterdir()):
        if not (folder / "summary.json").exists():
            continue
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rows = read_rows(folder / "metrics.jsonl")
        samples = [r for r in read_rows(folder / "samples.jsonl") if "evaluation" in r]
        found["runs"][folder.name] = {
            "rate": config["options"]["learning_rate"],
            "summary": json.loads((folder / "summary.json").read_text(encoding="utf-8")),
            "evaluations": [r for r in rows if HELD_OUT in r],
            "curve": [
                {k: r[k] for k in ("step", "env/reward_mean", "objective/kl") if k in r}
                for r in rows
                if "objective/kl" in r
            ],
            "samples": samples[:2] + samples[-2:],
        }
    for name in ("samples", "sft_samples"):
        if rows := read_rows(place / f"{name}.jsonl"):
            found[name] = {
                "rows": len(rows),
                "score": sum(r["score"] for r in rows) / len(rows),
                "ended": sum(r["ended"] for r in rows) / len(rows),
                "one_sentence": sum(map(one_sentence, rows)) / len(rows),
            }
    return found


def figures(seeds: dict[int, dict], run: str) -> list[str] | None:
    """Cells of a PPO run's row: over seeds the mean, and the worst where there are several."""
    runs = [s["runs"][run] for s in seeds.values() if run in s["runs"]]
    runs = [r for r in runs if r["evaluations"]]
    if not runs:
        return None
    first = [r["evaluations"][0][HELD_OUT] for r in runs]
    last = [r["evaluations"][-1][HELD_OUT] for r in runs]
    kl = [r["curve"][-1]["objective/kl"] for r in runs]
    tokens = [r["evaluations"][-1]["eval/sampled/response_tokens"] for r in runs]
    return [
        f"{runs[0]['rate']:g}",
        str(len(runs)),
        f"{mean(first):.2f}",
        f"{mean(last):.2f}",
        f"{min(last):.2f}",
        f"{mean(kl):.1f}",
        f"{mean(tokens):.1f}",
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(seeds: dict[int, dict]) -> str:
    lines = [
        "VADER's score (-1 to 1) of sampled responses to held-out prompts:",
        "",
        "| PPO towards | rate | seeds | before | after | worst seed | KL, nats | tokens |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    names = sorted({n for s in seeds.values() for n in s["runs"] if n.startswith("ppo")})
    for run in [*names, "learned"]:
        if cells := figures(seeds, run):
            title = "the reward model" if run == "learned" else "VADER"
            lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        "| stage | seeds | seconds on the clock | of processor time | peak, GB |",
        "|---|--:|--:|--:|--:|",
    ]
    stages = list(dict.fromkeys(n for s in seeds.values() for n in s["stages"]))
    for stage in stages:
        done = [
            s["stages"][stage] for s in seeds.values() if "seconds" in s["stages"].get(stage, {})
        ]
        if done and not stage.endswith("stopped"):
            cells = [f"{mean([d[k] for d in done]):.0f}" for k in ("seconds", "cpu_seconds")]
            peak = max(d["peak_gb"] for d in done)
            lines.append(f"| {stage} | {len(done)} | {' | '.join(cells)} | {peak:.2f} |")
    rewards = [s["runs"]["reward"]["summary"] for s in seeds.values() if "reward" in s["runs"]]
    if rewards:
        accuracy = [r["heldout/accuracy"] for r in rewards]
        lines += ["", f"Reward model, accuracy on held-out pairs: {mean(accuracy):.3f} "]
        lines[-1] += f"(worst {min(accuracy):.3f}, {len(accuracy)} seeds)."
    for name, title in (("samples", "before SFT"), ("sft_samples", "after SFT")):
        found = [s[name] for s in seeds.values() if name in s]
        if found:
            score, ended, one = (
                mean([f[k] for f in found]) for k in ("score", "ended", "one_sentence")
            )
            lines += ["", f"Samples {title}: VADER {score:.2f}, {ended:.0%} ended by themselves, "]
            lines[-1] += f"{one:.0%} one whole sentence."
    return "\n".join(lines) + "\n"


def draw(seeds: dict[int, dict]) -> None:
    """Score and KL over steps, a colour a rate, a line a seed."""
    from reports.plot_style import SEED_COLOURS, label, legend, new_figure, save, series

    names = sorted({n for s in seeds.values() for n in s["runs"] if n.startswith("ppo")})
    if not names:
        return
    figure, axes = new_figure(1, 3, (11, 3.6))
    panels = (("env/reward_mean", "curve", "VADER, batch"), ("objective/kl", "curve", "KL, nats"))
    panels += ((HELD_OUT, "evaluations", "VADER, held-out prompts"),)
    for colour, name in zip(SEED_COLOURS, names, strict=False):
        for number, seed in enumerate(s for s in seeds.values() if name in s["runs"]):
            run = seed["runs"][name]
            for axis, (metric, part, _) in zip(axes[0], panels, strict=True):
                text = f"rate {run['rate']:g}" if not number else None
                axis.plot(*series(run[part], metric), color=colour, lw=1.5, label=text)
    for axis, (_, _, title) in zip(axes[0], panels, strict=True):
        label(axis, "PPO step", title)
    legend(axes[0, 0])
    save(figure, IMAGE)


def write_report(cache: Path) -> None:
    """results/real_model.json and .md, and the plots, of what is there.

    What earlier results have, and the cache no longer, stays.
    """
    sys.path.insert(0, str(ROOT))
    before = json.loads(RESULTS.read_text("utf-8"))["seeds"] if RESULTS.exists() else {}
    seeds = {int(number): found for number, found in before.items()}
    for place in cache.glob("seed_*"):
        if found := read_seed(place):
            number = int(place.name.removeprefix("seed_"))
            kept = seeds.get(number, {})
            parts = {name: kept.get(name, {}) | found[name] for name in ("stages", "runs")}
            seeds[number] = kept | found | parts
    seeds = dict(sorted(seeds.items()))
    if not seeds:
        sys.exit(f"error: {cache}: no stage of a seed is done")
    machine = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
    }
    text = json.dumps({"machine": machine, "seeds": seeds}, indent=1)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text.replace(str(cache), "CACHE") + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(table(seeds), encoding="utf-8")
    draw(seeds)
    print(table(seeds))
