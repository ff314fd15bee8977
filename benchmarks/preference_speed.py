"""DPO: an epoch of updates, ours against TRL's DPOTrainer; processor time, clock, peak memory.

    python benchmarks/preference_speed.py [--shape smollm2] [--repeats 3]

A random Llama of hidden 256 (4 layers, vocabulary 8,192) or of SmolLM2-135M's shape, LoRA of rank
8 on every linear layer, Adam, pairs of 20 to 200 tokens a side, a third of them the prompt, in
batches of 4. The reference is the base with the adapter off, on both sides, computed in every
update. TRL runs in .venv-baseline, with MKL; ours with OpenBLAS; one thread
each. Peaks are of the process.
"""

import sys

if "--ours" in sys.argv:
    import fast_blas  # noqa: F401

import argparse
import json
import tempfile
from pathlib import Path

from side_by_side import ROOT, Worker, interleave, ratio, serve, summary

BATCH, SHORTEST, LONGEST, RATE = 4, 20, 200, 1e-4
SHAPES = {
    "hidden 256": ({"vocab_size": 8192}, 24),
    "smollm2": (
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
        4,
    ),
}


def make_pairs(file: Path, vocabulary: int, count: int) -> Path:
    """Pairs of random words; both answers follow the same prompt."""
    import numpy as np

    random, rows = np.random.default_rng(0), []

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in random.integers(5, vocabulary, length))

    for _ in range(count):
        longest, other = sorted(random.integers(SHORTEST, LONGEST + 1, 2))[::-1]
        start = max(2, min(longest // 3, other - 3))
        rows.append(
            {
                "prompt": text(start),
                "chosen": " " + text(longest - start - 1),
                "rejected": " " + text(other - start - 1),
            }
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def ours(model: str, pairs: str) -> None:
    from data_utils import BatchIterator, BatchPlan, read_records, tokenise_pairs
    from mlx_preference_tasks import make_task
    from mlx_sft_trainer import SupervisedTrainer
    from models.load import load_model
    from models.lora import LoraConfig, add_lora
    from models.reference import adapter_off
    from training.optimizers import build_optimizer

    loaded = load_model(model)
    rows = tokenise_pairs(read_records(pairs), loaded.tokenizer)
    tuning = add_lora(loaded.model, LoraConfig(rank=8, scale=4.0))
    task = make_task(
        "dpo",
        loaded.model,
        tuning,
        loss_type=["sigmoid"],
        options={"sigmoid": {}},
        reference=adapter_off(loaded.model, tuning),
    )
    trainer = SupervisedTrainer(task, build_optimizer("adam", RATE), max_grad_norm=1.0)
    plan = BatchPlan(rows.lengths, BATCH)
    batches = BatchIterator(rows.rows, plan)

    def epoch() -> dict:
        steps = [trainer.step([next(batches)]) for _ in range(len(plan))]
        return {"tokens": sum(step["num_tokens"] for step in steps), "loss": steps[0]["loss"]}

    serve({"epoch": epoch})


def measure(shape: str, repeats: int) -> dict:
    """A row of the table."""
    from tiny_llama import CONFIG, make_model

    changes, count = SHAPES[shape]
    old = dict(CONFIG)
    CONFIG.update(changes)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", vocabulary=changes["vocab_size"])
        pairs = make_pairs(Path(folder) / "pairs.jsonl", changes["vocab_size"], count)
        theirs = ROOT / ".venv-baseline/bin/python"
        with (
            Worker(sys.executable, "preference_speed.py", "--ours", model, pairs) as a,
            Worker(theirs, "trl_dpo_worker.py", model, pairs, ours=False) as b,
        ):
            samples = interleave({"ours": (a, "epoch"), "trl": (b, "epoch")}, repeats, warm_up=1)
    CONFIG.clear()
    CONFIG.update(old)
    tokens = {name: runs[0]["tokens"] for name, runs in samples.items()}
    if tokens["ours"] != tokens["trl"]:
        raise RuntimeError(f"the two are trained on different tokens: {tokens}")
    return {
        "shape": shape,
        "pairs": count,
        "tokens": tokens["ours"],
        **summary(samples),
        "times_as_fast": {key: ratio(samples, "trl", "ours", key) for key in ("cpu", "wall")},
    }


def main() -> None:
    if sys.argv[1:2] == ["--ours"]:
        ours(*sys.argv[2:])
    from tables import machine, save, shown, table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=[*SHAPES])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows = [measure(shape, args.repeats) for shape in args.shape]
    header = [
        "DPO, 20 to 200 tokens a side",
        "TRL, tokens per CPU s",
        "ours, tokens per CPU s",
        "ours / TRL, CPU",
        "ours / TRL, clock",
        "peak of TRL, MB",
        "peak of ours, MB",
    ]
    made = [
        [
            row["shape"],
            *(f"{row['tokens'] / row[who]['cpu']['median']:,.0f}" for who in ("trl", "ours")),
            *(shown(row["times_as_fast"][key], 2) for key in ("cpu", "wall")),
            *(f"{row[who]['peak_rss']['median'] / 1e6:,.0f}" for who in ("trl", "ours")),
        ]
        for row in rows
    ]
    save("preference_speed", {"machine": machine(), "rows": rows}, table(header, made))


if __name__ == "__main__":
    main()
