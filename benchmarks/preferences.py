"""Every preference loss on the digits task: five seeds, the same updates, the worst one shown.

    python benchmarks/preferences.py [--variants sigmoid kto] [--seeds 0 1] [--table]

One SFT model (seed 0, of rows with noise 0.4) learns from 1,000 pairs of the generator, whose
answers have noise from 0 to 1; KTO reads the same file. A seed draws other pairs, another adapter
and another order. Measured: the true score of answers to 128 prompts of the test set at
temperature 1, which nothing is trained on. What is in results/preferences.json is not run again.
"""

import argparse
import contextlib
import functools
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fast_blas  # noqa: E402, F401

RESULTS = ROOT / "benchmarks/results/preferences.json"
TABLE = ROOT / "benchmarks/results/preferences.md"
PLOT = ROOT / "docs/images/preferences.png"
FOLDER = ROOT / "runs/preferences"
UPDATES, BATCH, PROMPTS, SEEDS = 40, 16, 128, (0, 1, 2, 3, 4)
PAIRS = "preference_increasing_mult_2_"
# Of each row: its own flags. Rates are one a family, from a first look at seed 0.
RATE = "--learning-rate 2e-3"
DPO = {
    "sigmoid": "",
    "hinge": "",
    "ipo": "",
    "sigmoid_norm": "--beta 1",
    "exo_pair": "",
    "robust": "--label-smoothing 0.1",
    "nca_pair": "",
    "bco_pair": "",
    "sppo_hard": "",
    "aot": "",
    "aot_unpaired": "",
    "apo_zero": "",
    "apo_down": "",
    "discopop": "",
    "sft": "",
}
VARIANTS = {name: f"--loss-type {name} {more}" for name, more in DPO.items()} | {
    "sigmoid + sft": "--loss-type sigmoid sft --loss-weights 1 0.5",
    "kto": "--algorithm kto",
    "apo_zero_unpaired": "--algorithm kto --loss-type apo_zero_unpaired",
    "orpo": "--algorithm orpo",
    "cpo": "--algorithm cpo",
    "simpo": "--algorithm simpo",
    "alphapo": "--algorithm alphapo",
}


# ------------------------------------------------------------------------------ runs


def command(words: str) -> None:
    """Run a script as a person would; its output is shown where it fails."""
    done = subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{words}\n{done.stdout}{done.stderr}")


def data(seed: int) -> Path:
    """The folder of generated rows of a seed."""
    folder = FOLDER / f"data_{seed}"
    if not folder.exists():
        command(
            "data/generate_digit_data.py --increasing --multiple-of 2 --num-samples 1000 "
            f"--noise 0.4 --kind text preference prompts --seed {seed} --output-dir {folder}"
        )
    return folder


def sft_model() -> Path:
    """The model that every run begins with."""
    folder, adapter = FOLDER / "sft_model", FOLDER / "sft.npz"
    if not folder.exists():
        command(
            f"sft.py --train --data {data(0)} --iters 100 --batch-size 32 --learning-rate 3e-3 "
            f"--steps-per-eval 0 --save-every 0 --save-file {adapter} --overwrite "
            f"--output-dir {FOLDER}/sft"
        )
        command(f"fuse.py --adapter-file {adapter} --save-path {folder}")
    return folder


def true_score(loaded) -> tuple[float, float]:
    """(mean score, mean number of tokens) of a model's answers to prompts of the test set."""
    import mlx.core as mx

    from models.decoding import generate
    from rewards.digits import digits_score

    loaded.model.eval()
    rows = (data(0) / "prompts_increasing_mult_2_test.jsonl").read_text().splitlines()[:PROMPTS]
    prompts = [json.loads(row)["prompt"] for row in rows]
    tokens = [list(loaded.tokenizer.encode(prompt)) for prompt in prompts]
    made = generate(
        loaded.model, tokens, max_tokens=40, eos_ids=loaded.eos_ids, key=mx.random.key(0)
    )
    texts = [loaded.tokenizer.decode(r, skip_special_tokens=True) for r in made.responses]
    scores = [digits_score(f"{p} {t}") for p, t in zip(prompts, texts, strict=True)]
    return float(np.mean(scores)), float(np.mean([len(r) for r in made.responses]))


def arguments(name: str, seed: int):
    """The parsed command line of a run; what preference_training.py would be given."""
    from command_line.preference_flags import parse_arguments

    return parse_arguments(
        (
            f"--model {sft_model()} --train --data {data(seed)} --data-base {PAIRS} "
            f"--iters {UPDATES} --batch-size {BATCH} {RATE} --lr-schedule linear "
            f"--lr-end-factor 0.1 --steps-per-eval 0 --seed {seed} {VARIANTS[name]}"
        ).split()
    )


@functools.cache
def rows_of(seed: int, kto: bool):
    """Tokenised rows, once for all losses that read them."""
    from command_line.preference_rows import load_rows
    from models.load import load_model

    args = arguments("kto" if kto else "sigmoid", seed)
    with contextlib.redirect_stdout(io.StringIO()):
        return load_rows(args, load_model(args.model).tokenizer)["train"]


def run(name: str, seed: int) -> dict:
    """Train one variant by the script's own task, without a run folder; what came out."""
    from command_line.preference_flags import WITH_REFERENCE, task_options
    from command_line.preference_rows import make_plan
    from command_line.shared_flags import adapter_description, optimizer_options
    from data_utils import BatchIterator
    from mlx_preference_tasks import make_task
    from mlx_sft_trainer import SupervisedTrainer
    from models.adapter_files import attach
    from models.load import load_model
    from models.reference import adapter_off
    from training.optimizers import build_optimizer
    from training.streams import seed_everything

    args = arguments(name, seed)
    rows = rows_of(seed, args.algorithm == "kto")
    seed_everything(seed)
    loaded = load_model(args.model)
    tuning = attach(loaded.model, adapter_description(args))
    reference = None
    if args.algorithm in WITH_REFERENCE:
        reference = adapter_off(loaded.model, tuning)
    task = make_task(
        args.algorithm, loaded.model, tuning, reference=reference, **task_options(args)
    )
    optimizer = build_optimizer(**optimizer_options(args), steps=UPDATES)
    trainer = SupervisedTrainer(task, optimizer, max_grad_norm=args.max_grad_norm)
    batches = BatchIterator(rows.rows, make_plan(args, rows, seed=seed))
    started, clock = time.process_time(), time.monotonic()
    steps = [trainer.step([next(batches)]) for _ in range(UPDATES)]
    seconds, clock = time.process_time() - started, time.monotonic() - clock
    score, tokens = true_score(loaded)
    curve = {
        key: [round(step[key], 4) for step in steps if key in step]
        for key in ("rewards/margins", "logps/chosen", "logps/rejected", "loss")
    }
    return {"score": score, "tokens": tokens, "cpu_seconds": seconds, "seconds": clock} | curve


# ------------------------------------------------------------------------------ table


def write(results: dict) -> None:
    aside = RESULTS.with_suffix(".writing")
    lines = [f"{json.dumps(name)}: {json.dumps(runs)}" for name, runs in results.items()]
    aside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    aside.replace(RESULTS)


def change(values: list[float]) -> float:
    """From the mean of the first five updates to that of the last five."""
    return float(np.mean(values[-5:]) - np.mean(values[:5]))


def table(results: dict) -> str:
    base = results["sft model"]["0"]["score"]
    lines = [
        f"SFT model: {base:.2f}. {UPDATES} updates of {BATCH} pairs (KTO: {BATCH} answers), rate "
        "2e-3, falling to a tenth.",
        "",
        "| loss | seeds | true score, mean | worst seed | worst - SFT | tokens | margin, change | "
        "log p of chosen, change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        if not (runs := [*results.get(name, {}).values()]):
            continue
        scores = [r["score"] for r in runs]
        margin, chosen = (
            np.mean([change(r[key]) for r in runs if r[key]] or [np.nan])
            for key in ("rewards/margins", "logps/chosen")
        )
        tokens = np.mean([r["tokens"] for r in runs])
        lines.append(
            f"| {name} | {len(runs)} | {np.mean(scores):.2f} | {min(scores):.2f} | "
            f"{min(scores) - base:+.2f} | {tokens:.1f} | {margin:+.2f} | {chosen:+.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict) -> None:
    """Margins and log-probabilities of chosen answers, the mean of the seeds."""
    from reports.plot_style import label, legend, new_figure, save

    figure, axes = new_figure(1, 2, (9.6, 4.2))
    shown = ("sigmoid", "ipo", "sigmoid + sft", "kto", "orpo", "simpo")
    for name in (n for n in shown if n in results):
        for axis, key in zip(axes[0], ("rewards/margins", "logps/chosen"), strict=True):
            curves = np.array([r[key] for r in results[name].values() if len(r[key]) == UPDATES])
            if len(curves):
                mean = np.convolve(curves.mean(axis=0), np.ones(5) / 5, "valid")
                mean = mean - mean[0] if key == "logps/chosen" else mean
                axis.plot(np.arange(3, 3 + len(mean)), mean, label=name, lw=1.6)
    label(axes[0, 0], "update", "reward margin", "Margins")
    label(axes[0, 1], "update", "change of log p, as each loss has it", "Chosen answers")
    legend(axes[0, 0])
    save(figure, PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=[*VARIANTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[*SEEDS])
    parser.add_argument("--table", action="store_true", help="write table and plot, run nothing")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.table:
        FOLDER.mkdir(parents=True, exist_ok=True)
        if "sft model" not in results:
            from models.load import load_model

            score, tokens = true_score(load_model(str(sft_model())))
            results["sft model"] = {"0": {"score": score, "tokens": tokens}}
        for seed in args.seeds:
            for name in args.variants:
                if str(seed) not in results.setdefault(name, {}):
                    found = results[name][str(seed)] = run(name, seed)
                    print(
                        f"seed {seed} {name}: {found['score']:.3f}, {found['seconds']:.0f} s",
                        flush=True,
                    )
                    write(results)
    TABLE.write_text(table(results))
    plot(results)
    print(table(results))


if __name__ == "__main__":
    main()
