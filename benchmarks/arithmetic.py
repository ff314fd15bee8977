"""Addition learned from right and wrong alone: `a+b=`, a and b from 0 to 19, exact match.

    python benchmarks/arithmetic.py --seeds 0 1 2 3 4 [--methods grpo reinforce_baseline]

A quarter of the 400 pairs (a, b) is held out of everything. The embedded digits model is tuned on
the others until it is right on some of them, on less than half even where it writes its likeliest
answer, and becomes the base of group_training.py, which trains all weights. Writes
results/arithmetic.json and a Markdown table beside it. A folder that is there is gone on with: a
run that has ended is not made again. The score cannot be reached by shorter answers.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from digits_stages import ROOT, Stage, run

sys.path.insert(0, str(ROOT))
import fast_blas  # noqa: E402, F401  before MLX

RESULTS = Path(__file__).resolve().parent / "results"
LARGEST = 19
HELD_OUT = 100  # of 400 pairs
BASE_STEPS = 80  # of supervised training
METHODS = {
    "grpo": "",
    "reinforce_baseline": "--advantage_estimator reinforce_baseline",
}
# All weights, which learn faster here than LoRA of rank 16; an entropy term, so that sampling goes
# on finding answers that are right seldom.
TRAINING = (
    "--answer_reward answer --answer_from text --max-new-tokens 4 --num-steps 1000 "
    "--batch-size 256 --num-generations 8 --beta 0 --use_peft False "
    "--learning-rate 1e-3 --lr-schedule constant --entropy_coef 0.005 "
    "--eval-every 0 --save-every 0 --steps-per-report 50"
)


def pairs(seed: int) -> tuple[list[dict], list[dict]]:
    """(trained, held out): rows with a prompt and an answer."""
    rows = [
        {"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)}
        for a in range(LARGEST + 1)
        for b in range(LARGEST + 1)
    ]
    random.Random(seed).shuffle(rows)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def write(path: Path, rows: list[dict], *names: str) -> None:
    text = "".join(json.dumps({name: row[name] for name in names}) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def stages(place: Path, seed: int) -> list[Stage]:
    """The base, as a user would make it."""
    tune = (
        f"python sft.py --train --fine-tune-type full --train-file {place}/sft.jsonl --mask-prompt "
        f"--validation-file {place}/held_out_sft.jsonl --iters {BASE_STEPS} --batch-size 64 "
        f"--learning-rate 1e-3 --save-file {place}/base.npz --output-dir {place}/base_run "
        f"--steps-per-eval 0 --save-every 0 --seed {seed}"
    )
    fuse = f"python fuse.py --adapter-file {place}/base.npz --save-path {place}/base"
    return [Stage("base", tune), Stage("fuse", fuse)]


def make_base(place: Path, seed: int) -> None:
    if (place / "base" / "config.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    trained, held_out = pairs(seed)
    write(place / "sft.jsonl", trained, "prompt", "completion")
    write(place / "held_out_sft.jsonl", held_out, "prompt", "completion")
    write(place / "prompts.jsonl", trained, "prompt", "answer")
    for stage in stages(place, seed):
        run(stage, place / "log.txt")
    size = sum(file.stat().st_size for file in (place / "base").glob("*.safetensors"))
    assert size < 1_000_000, f"the base has {size} bytes"


def train(place: Path, method: str, seed: int) -> None:
    """A run of group_training.py, which may be resumed."""
    folder = place / method
    if (folder / "summary.json").exists():
        return
    command = (
        f"python group_training.py --model {place}/base --train-file {place}/prompts.jsonl "
        f"{TRAINING} {METHODS[method]} --save-file {place}/{method}.npz --output-dir {folder} "
        f"--seed {seed}"
    )
    if (folder / "config.json").exists():
        command = f"python group_training.py --resume {folder}"
    run(Stage(method, command), place / "log.txt")


def accuracy(place: Path, adapter: Path | None, rows: list[dict], samples: int) -> dict:
    """Share of right answers: the most likely one, and of `samples` drawn ones each."""
    import mlx.core as mx

    from models.adapter_files import load_adapter
    from models.decoding import Sampling, generate
    from models.load import load_model

    loaded = load_model(str(place / "base"))
    if adapter is not None:
        load_adapter(loaded, str(adapter))
    prompts = [loaded.tokenizer.encode(row["prompt"]) for row in rows]
    found = {}
    for name, temperature, count in (("greedy", 0.0, 1), ("sampled", 1.0, samples)):
        made = generate(
            loaded.model,
            prompts,
            max_tokens=4,
            eos_ids=set(loaded.tokenizer.eos_token_ids),
            sampling=Sampling(temperature),
            key=mx.random.key(1),
            samples=count,
        )
        texts = [loaded.tokenizer.decode(r, skip_special_tokens=True) for r in made.responses]
        known = [row["answer"] for row in rows for _ in range(count)]
        right = [text.strip() == answer for text, answer in zip(texts, known, strict=True)]
        found[name] = sum(right) / len(right)
    return found


def table(results: dict) -> str:
    lines = [
        "| | trained pairs, each seed | worst | likeliest answer | held out, each seed |",
        "|---|---:|---:|---:|---:|",
    ]
    for method in ("base", *METHODS):
        rows = [seed[method] for seed in results.values() if method in seed]
        if not rows:
            continue
        trained = [row["trained"]["sampled"] for row in rows]
        greedy = [row["trained"]["greedy"] for row in rows]
        held_out = [row["held_out"]["sampled"] for row in rows]
        cells = [
            method,
            ", ".join(f"{value:.3f}" for value in trained),
            f"{min(trained):.3f}",
            f"{min(greedy):.2f} to {max(greedy):.2f}",
            ", ".join(f"{value:.2f}" for value in held_out),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_results(results: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (RESULTS / "arithmetic.json").write_text(text, encoding="utf-8")
    (RESULTS / "arithmetic.md").write_text(table(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["grpo"])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "arithmetic")
    args = parser.parse_args()
    results: dict = {}
    for seed in args.seeds:
        place = args.folder / str(seed)
        make_base(place, seed)
        trained, held_out = pairs(seed)
        sets = {"trained": trained, "held_out": held_out}
        results[seed] = {"base": {n: accuracy(place, None, rows, 8) for n, rows in sets.items()}}
        print(f"seed {seed}: base {results[seed]['base']}", flush=True)
        for method in args.methods:
            train(place, method, seed)
            file = place / f"{method}.npz"
            found = {name: accuracy(place, file, rows, 8) for name, rows in sets.items()}
            results[seed][method] = found
            print(f"seed {seed}: {method} {results[seed][method]}", flush=True)
        write_results(results)
    print(table(results))


if __name__ == "__main__":
    main()
