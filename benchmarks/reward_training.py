"""Reward-model training: batches of 16 against row by row, the same updates.

    python benchmarks/reward_training.py            about two minutes

Row by row is the same trainer with a gradient for each row, 16 of which are added up for an update;
a row of preferences is two texts in one forward pass either way. LoRA of rank 8 on every linear
layer, Adam. The digits rows (10 to 30 tokens) are those of data/ with the model of the project;
"hidden 256" is a random Llama of 4 layers. On one CPU core, batches save what surrounds the matrix
products; with long rows in a model of that size the products are nearly all there is.
"""

import sys

if "--worker" in sys.argv:
    import fast_blas  # noqa: F401

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from side_by_side import ROOT, Worker, interleave, ratio, serve, summary
from tables import machine, save, shown, table
from tiny_llama import CONFIG, FIRST_WORD, make_model

BATCH = 16
CASES = {
    "preferences": "preferences, digits",
    "rewards": "regression on rewards, digits",
    "short": "preferences of 10 to 30 tokens, hidden 256",
    "long": "preferences of 20 to 400 tokens, hidden 256",
}
ROWS = {"preferences": 144, "rewards": 256, "short": 64, "long": 32}
TARGET = 1.8  # times as fast, on the digits rows


def load_rows(case: str, tokenizer) -> list:
    from data_utils import PreferenceRow, read_records, tokenise_preferences, tokenise_scalar

    count = ROWS[case]
    if case == "preferences":
        records = read_records(ROOT / "data" / "preference_increasing_mult_2_train.jsonl")
        return tokenise_preferences(records, tokenizer).rows[:count]
    if case == "rewards":
        records = read_records(ROOT / "data" / "reward_function_increasing_mult_2_train.jsonl")
        return tokenise_scalar(records, tokenizer).rows[:count]
    random, (low, high) = np.random.default_rng(0), (10, 30) if case == "short" else (20, 400)
    texts = [
        random.integers(FIRST_WORD, CONFIG["vocab_size"], length).tolist()
        for length in random.integers(low, high + 1, 2 * count)
    ]
    return [PreferenceRow([a, b], [0, 1]) for a, b in zip(texts[::2], texts[1::2], strict=True)]


def make_call(folder: str, case: str, in_batches: bool) -> Callable[[], dict]:
    """An epoch."""
    import mlx.core as mx

    from data_utils import BatchPlan, Tokenised, make_batch
    from mlx_sft_trainer import RewardModelTask, SupervisedTrainer
    from models.load import load_model
    from models.lora import LoraConfig, add_lora
    from models.reward_model import RewardModel
    from training.optimizers import build_optimizer

    mx.random.seed(0)
    loaded = load_model(folder if case in ("short", "long") else None)
    rows = load_rows(case, loaded.tokenizer)
    tuning = add_lora(loaded.model, LoraConfig(rank=8))
    task = RewardModelTask(RewardModel(loaded.model, tuning=tuning))
    trainer = SupervisedTrainer(task, build_optimizer("adam", 1e-4), max_grad_norm=1.0)
    plan = BatchPlan(Tokenised(rows).lengths, BATCH)

    def batches(of: list) -> list:
        return [make_batch(of)] if in_batches else [make_batch([row]) for row in of]

    def epoch() -> dict:
        mx.reset_peak_memory()
        steps = [trainer.step(batches([rows[i] for i in own])) for own in plan.epoch(0)]
        loss = float(np.mean([step["loss"] for step in steps]))
        return {"loss": loss, "peak": mx.get_peak_memory()}

    return epoch


def measure(folder: Path, repeats: int, cases=tuple(CASES)) -> list[dict]:
    """A row for each case."""
    rows = []
    for case in cases:
        with Worker(sys.executable, "reward_training.py", "--worker", folder, case) as worker:
            calls = {"row_by_row": (worker, "row_by_row"), "batched": (worker, "batched")}
            samples = interleave(calls, repeats)
        losses = [[sample["loss"] for sample in samples[way]] for way in calls]
        apart = float(np.abs(np.subtract(*losses)).max())
        if apart > 1e-3 * max(losses[0]):
            raise RuntimeError(f"{case}: the two are trained differently: {losses}")
        speeds = {key: ratio(samples, "row_by_row", "batched", key) for key in ("cpu", "wall")}
        rows.append(
            {
                "case": CASES[case],
                "rows": ROWS[case],
                "largest_loss_difference": apart,
                **summary(samples),
                "times_as_fast": speeds,
            }
        )
    return rows


def rows_per_second(row: dict, way: str) -> str:
    return f"{row['rows'] / row[way]['cpu']['median']:,.0f}"


def headline(result: dict) -> list[list[str]]:
    """Rows of the table of all benchmarks."""
    return [
        [
            f"reward model, {row['case']}, batches of {BATCH}: row by row",
            *(f"{rows_per_second(row, way)} rows/s" for way in ("batched", "row_by_row")),
            shown(row["times_as_fast"]["cpu"], 2, unit=" x as fast"),
        ]
        for row in result["rows"]
    ]


def report(rows: list[dict]) -> str:
    header = [
        "",
        "row by row, rows per CPU s",
        f"batches of {BATCH}, rows per CPU s",
        "batched / row by row, CPU",
        "batched / row by row, clock",
    ]
    return table(
        header,
        [
            [
                row["case"],
                rows_per_second(row, "row_by_row"),
                rows_per_second(row, "batched"),
                shown(row["times_as_fast"]["cpu"], 2),
                shown(row["times_as_fast"]["wall"], 2),
            ]
            for row in rows
        ],
    )


def missed(rows: list[dict]) -> list[str]:
    """Which digits rows miss the target, in words."""
    digits = [row for row in rows if row["case"] in (CASES["preferences"], CASES["rewards"])]
    return [r["case"] for r in digits if r["times_as_fast"]["cpu"]["median"] < TARGET]


def main() -> int:
    if "--worker" in sys.argv:
        folder, case = sys.argv[-2:]
        ways = {"row_by_row": False, "batched": True}
        serve({way: make_call(folder, case, on) for way, on in ways.items()})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(make_model(Path(folder)), repeats)
    save("reward_training", {"machine": machine(), "rows": rows}, report(rows))
    for what in missed(rows):
        print(f"target missed: {what}")
    return 1 if missed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
