"""MLX and PyTorch on the digits task: the same data, start, rewards, flags and seeds.

    make compare            or: python benchmarks/compare.py --seeds 0 1 2 3 4

For each seed, one SFT model and one reward model are made; both backends then run PPO from them,
against the true score and against the reward model. Writes docs/comparison.md with a table, the
machine and the versions, and pictures of reward and KL in docs/images: mlx_reward.png,
pytorch_reward.png, and comparison.png with both. A run that is there already is not made again.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from digits_stages import ROOT, base_stages, run, summary
from tables import processor

sys.path.insert(0, str(ROOT))
from reports.plot_style import BLUE, ORANGE, label, legend, new_figure, save, series  # noqa: E402
from reports.training_plots import plot_seeds  # noqa: E402
from run_folder.run import read_rows  # noqa: E402

IMAGES, PAGE = ROOT / "docs" / "images", ROOT / "docs" / "comparison.md"
TRUE, KL = "env/ground_truth_mean", "objective/kl"
GOAL = 0.95
BACKENDS = {"mlx": "MLX", "pytorch": "PyTorch"}
SCRIPTS = {
    "mlx": "ppo_training.py",
    "pytorch": "pytorch_baseline/pytorch_ppo_training.py --tokenizer {place}/sft_model",
}
REWARDS = {
    "truth": ("ground truth", "--ground_truth_reward"),
    "learned": ("learned reward", "--reward_model {place}/reward_model --true-score"),
}
# Each backend gets one thread: MLX's CPU backend has no more, and at this size a second one slows
# PyTorch down.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# Each backend in an environment of its own: mlx-lm would import PyTorch where it is installed.
ENVIRONMENTS = {
    "mlx": ROOT / ".venv" / "bin" / "python",
    "pytorch": ROOT / ".venv-baseline" / "bin" / "python",
}
LIBRARIES = ("mlx", "mlx-lm", "torch", "transformers", "peft", "numpy")


# ------------------------------------------------------------------------------ running


def run_seed(place: Path, seed: int, steps: int, pythons: dict[str, str]) -> None:
    """Make what both start from, then every PPO run of this seed that is not there yet."""
    place.mkdir(parents=True, exist_ok=True)
    log = place / "log.txt"
    if not (place / "base_done").exists():
        for stage in base_stages(str(place), seed):
            print(f"seed {seed}: {stage.name}", flush=True)
            run(stage, log)
        (place / "base_done").touch()
    for reward in REWARDS:
        for backend in BACKENDS:
            name = f"{backend}_{reward}"
            if (place / f"{name}.json").exists():
                continue
            print(f"seed {seed}: {name}", flush=True)
            line = command(backend, reward, place, seed, steps)
            figures = measured(pythons[backend], line, log)
            (place / f"{name}.json").write_text(json.dumps(figures), encoding="utf-8")


def command(backend: str, reward: str, place: Path, seed: int, steps: int) -> str:
    name = f"{backend}_{reward}"
    parts = (
        f"python {SCRIPTS[backend]} --model {{place}}/sft_model {REWARDS[reward][1]}",
        "--data {place}/data --data-base prompts_increasing_mult_2_ --dtype float32",
        f"--num_steps {steps} --eval-every {steps} --eval-prompts -1 --seed {seed}",
        f"--save-file {{place}}/{name}.npz --output-dir {{place}}/{name} --overwrite",
    )
    return " ".join(parts).format(place=place)


def measured(python: str, line: str, log: Path) -> dict[str, float]:
    """Run a command; seconds on the clock, seconds of processor time, peak resident memory in GB.

    Measured from outside, so that it is the same thing for both: all of the process, with imports.
    """
    start = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {line}\n")
        file.flush()
        words = [python, *shlex.split(line)[1:]]
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: a run ended with {os.waitstatus_to_exitcode(status)}; see {log}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB on Linux
    return {
        "seconds": time.monotonic() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory": usage.ru_maxrss * unit / 1e9,
    }


# ------------------------------------------------------------------------------ figures


def figures_of(place: Path, backend: str, reward: str) -> dict[str, float | None]:
    """What the table says of one run."""
    name = f"{backend}_{reward}"
    done, rows = summary(place / name), read_rows(place / name)
    last = done["evaluation"]["last"][0]
    steps, scores = series(rows, TRUE)
    reached = [int(step) for step, score in zip(steps, scores, strict=True) if score >= GOAL]
    stages = [row["time/ppo/total"] for row in rows if "time/ppo/total" in row]
    return {
        **json.loads((place / f"{name}.json").read_text(encoding="utf-8")),
        "start": done["evaluation"]["first"][0]["eval/sampled/ground_truth"],
        "score": last["eval/sampled/ground_truth"],
        "numbers": last["eval/sampled/numbers"],
        "kl": done["kl"],
        "steps_to_goal": reached[0] if reached else None,
        "update_seconds": statistics.median(stages),
    }


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def steps_to_goal(found: list[dict]) -> str:
    """Median and range over the seeds that came there, and how many did."""
    reached = sorted(f["steps_to_goal"] for f in found if f["steps_to_goal"] is not None)
    if not reached:
        return f"none of {len(found)}"
    text = f"{statistics.median(reached):g} ({reached[0]} to {reached[-1]})"
    return text if len(reached) == len(found) else f"{text}, {len(reached)} of {len(found)} seeds"


def table(results: dict) -> str:
    head = [
        "reward",
        "backend",
        "score before",
        "score after",
        "worst seed",
        f"steps to {GOAL}",
        "KL, nats",
        "seconds",
        "CPU seconds",
        "peak memory, GB",
    ]
    rows = [head, ["---", "---"] + ["---:"] * (len(head) - 2)]
    for reward, (title, _) in REWARDS.items():
        for backend, shown in BACKENDS.items():
            found = list(results[reward][backend].values())
            column = {name: [f[name] for f in found] for name in found[0]}
            rows.append(
                [
                    title,
                    shown,
                    spread(column["start"], 3),
                    spread(column["score"], 3),
                    f"{min(column['score']):.3f}",
                    steps_to_goal(found),
                    spread(column["kl"], 1),
                    spread(column["seconds"], 0),
                    spread(column["cpu_seconds"], 0),
                    spread(column["peak_memory"], 2),
                ]
            )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


# ------------------------------------------------------------------------------ pictures


def curves(folder: Path, backend: str, reward: str, seeds: list[int]) -> dict[int, list[dict]]:
    return {seed: read_rows(folder / str(seed) / f"{backend}_{reward}") for seed in seeds}


def draw(folder: Path, seeds: list[int]) -> None:
    """Each backend's own curves, and both in one picture."""
    metrics = {TRUE: "true score", KL: "KL, nats per response"}
    for backend, shown in BACKENDS.items():
        plot_seeds(
            curves(folder, backend, "truth", seeds),
            IMAGES / f"{backend}_reward.png",
            metrics=metrics,
            title=f"PPO with the ground-truth reward, {shown}",
            goal={TRUE: GOAL},
        )
    figure, axes = new_figure(2, 2, (10.0, 6.2), sharex=True, sharey="row")
    for column, (reward, (title, _)) in enumerate(REWARDS.items()):
        for row, (metric, text) in enumerate(metrics.items()):
            axis = axes[row, column]
            for backend, colour in (("mlx", BLUE), ("pytorch", ORANGE)):
                runs = curves(folder, backend, reward, seeds)
                draw_spread(axis, runs, metric, colour, BACKENDS[backend])
            label(axis, "step" if row else "", "" if column else text, "" if row else title)
        axes[0, column].axhline(GOAL, color="#4D4D4D", linewidth=1, linestyle="--")
    legend(axes[0, 0], loc="lower right")
    save(figure, IMAGES / "comparison.png")


def draw_spread(axis, runs: dict[int, list[dict]], metric: str, colour: str, text: str) -> None:
    """Mean over seeds, ± 1 standard deviation; each seed thin behind it."""
    columns = [series(rows, metric) for rows in runs.values()]
    length = min(len(steps) for steps, _ in columns)
    steps, values = columns[0][0][:length], [column[1][:length] for column in columns]
    for seed in values:
        axis.plot(steps, seed, color=colour, linewidth=0.6, alpha=0.35)
    mean = [statistics.mean(at) for at in zip(*values, strict=True)]
    if len(values) > 1:
        widths = [statistics.stdev(at) for at in zip(*values, strict=True)]
        low = [m - w for m, w in zip(mean, widths, strict=True)]
        high = [m + w for m, w in zip(mean, widths, strict=True)]
        axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.plot(steps, mean, color=colour, linewidth=2.2, label=f"{text} (mean ± sd)")


# ------------------------------------------------------------------------------ page


def machine(place: Path) -> str:
    """The machine, and the versions that the runs of a seed wrote down."""
    found = {}
    for backend in BACKENDS:
        config = json.loads((place / f"{backend}_truth" / "config.json").read_text("utf-8"))
        found |= {name: version for name, version in config["versions"].items() if version}
    versions = ", ".join(f"{name} {found[name]}" for name in LIBRARIES if name in found)
    return (
        f"{platform.system()} {platform.machine()}, {processor()}, {os.cpu_count()} processors, "
        f"Python {found['python']}; {versions}"
    )


def step_times(results: dict) -> str:
    """Seconds of the update part of a PPO step, which both measure themselves."""
    found = {
        shown: [f["update_seconds"] for f in results["truth"][backend].values()]
        for backend, shown in BACKENDS.items()
    }
    return ", ".join(f"{shown} {spread(values, 3)}" for shown, values in found.items())


def page(results: dict, seeds: list[int], steps: int, machine: str) -> str:
    return f"""# MLX and PyTorch side by side

Written by `make compare` (benchmarks/compare.py) on {time.strftime("%Y-%m-%d")}. The digits task,
seeds {", ".join(map(str, seeds))}: {steps} PPO steps of 64 responses, LoRA on every linear layer,
all other flags at their defaults. For each seed both backends start from the same fused SFT model,
with the same prompts in the same order, against the same reward model; sampled texts differ,
because their random numbers do. float32 on a CPU, one thread each.

{table(results)}

Scores are true scores of sampled texts on held-out prompts, mean ± standard deviation over seeds.
"Steps to {GOAL}" is the first step whose batch has a mean true score of {GOAL} or more: median, and
range. Seconds, processor seconds and peak resident memory are of the whole process seen from
outside, imports and two evaluations included.

Of a step, all but sampling took (median, seconds): {step_times(results)}.

The clock counts whatever else the machine is doing, processor time hardly. In the last 15 minutes
{os.getloadavg()[2]:.1f} processes were running or waiting on {os.cpu_count()} processors.

![Reward and KL, both backends](images/comparison.png)

Each by itself: [MLX](images/mlx_reward.png), [PyTorch](images/pytorch_reward.png).

**What it shows:** that both learn the same thing. Given the same rollout, a step agrees to 1e-4 in
loss, KL, advantages and weights (`tests/baseline/test_baseline_parity.py`). **What it does not
show:** Apple GPUs, CUDA, and models of a useful size were not measured. These times are of a model
of 130,688 parameters on a CPU, where the cost of a call outweighs arithmetic.

Machine: {machine}.
"""


# ------------------------------------------------------------------------------ main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=60, help="PPO steps of each run")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "comparison")
    for backend, place in ENVIRONMENTS.items():
        default = str(place) if place.exists() else sys.executable
        text = f"interpreter for {BACKENDS[backend]} (default: that of {place.parts[-3]}, or this)"
        parser.add_argument(f"--{backend}-python", default=default, help=text)
    args = parser.parse_args()
    pythons = {"mlx": args.mlx_python, "pytorch": args.pytorch_python}
    for seed in args.seeds:
        run_seed(args.folder / str(seed), seed, args.steps, pythons)
    results = {
        reward: {
            backend: {
                seed: figures_of(args.folder / str(seed), backend, reward) for seed in args.seeds
            }
            for backend in BACKENDS
        }
        for reward in REWARDS
    }
    draw(args.folder, args.seeds)
    where = machine(args.folder / str(args.seeds[0]))
    PAGE.write_text(page(results, args.seeds, args.steps, where), encoding="utf-8")
    text = json.dumps({"machine": where, "results": results}, indent=1)
    (args.folder / "comparison.json").write_text(text + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
