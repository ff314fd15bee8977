"""An update by one process and by two on this machine: processor time, bytes sent, the clock.

    python benchmarks/workers.py [--sizes small medium large] [--updates 6] [--repeats 3]

SFT with LoRA of rank 8 on a random Llama, 32 rows in a batch; two workers take 16 each. The figure
is the processor time of one process over twice that of one of two, the least of a run's updates
each, as other programs' work falls on some updates only: 1 means that sharing out costs nothing. On
the clock two are faster where the machine is free and has a core for each.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from side_by_side import ratio, summary  # noqa: E402
from tables import machine, save, shown, table  # noqa: E402

from distributed.local import run_local  # noqa: E402

ROWS, RANK = 32, 8
SIZES = {  # tokens of a row, and the model
    "small": (32, {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 344}),
    "medium": (64, {}),
    "large": (128, {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1376}),
}


# ------------------------------------------------------------------------------ one worker


def train(folder: Path, size: str, updates: int) -> None:
    """Updates of this process's share; what each took goes into a file of its own."""
    import fast_blas  # noqa: F401, I001
    import mlx.core as mx
    import numpy as np

    from data_loading.collate import make_batch
    from data_loading.rows import TextRow
    from mlx_sft_trainer import LanguageModelTask, SupervisedTrainer
    from models.load import load_model
    from models.lora import LoraConfig, add_lora
    from training.optimizers import build_optimizer
    from distributed.group import here, join
    from distributed.membership import enter

    if (member := enter()) is not None:
        member.ready()
        join(member)
    mx.random.seed(0)
    model = load_model(str(folder / size)).model
    tuning = add_lora(model, LoraConfig(rank=RANK, scale=4.0, keys=["q_proj", "v_proj"]))
    trainer = SupervisedTrainer(LanguageModelTask(model, tuning), build_optimizer("adam", 1e-4))
    tokens = np.random.default_rng(0).integers(3, 500, size=(ROWS, SIZES[size][0])).tolist()
    batch = make_batch([TextRow(row, [1] * len(row), "a row") for row in tokens])
    trainer.step([batch])
    found = []
    for _ in range(updates):
        sent, wall, cpu = here().sent, time.perf_counter(), time.process_time()
        trainer.step([batch])
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        found.append({"cpu": cpu, "wall": wall, "bytes": here().sent - sent})
    (folder / f"{here().rank}.json").write_text(json.dumps(found), encoding="utf-8")


# ------------------------------------------------------------------------------ the comparison


def run(folder: Path, size: str, workers: int, updates: int) -> dict[str, float]:
    """The least that an update took, of the worker that took the most."""
    line = [__file__, "--worker", str(folder), "--sizes", size, "--updates", str(updates)]
    if run_local(line, workers, threads=1):
        raise SystemExit(f"{workers} workers failed")
    every = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(workers)]
    return {
        key: max(min(update[key] for update in updates) for updates in every)
        for key in ("cpu", "wall", "bytes")
    }


def measure(folder: Path, size: str, updates: int, repeats: int) -> dict:
    """One and two in turns."""
    from tiny_llama import make_model

    make_model(folder / size, **SIZES[size][1])
    samples: dict[str, list] = {"one": [], "two": []}
    for _ in range(repeats):
        samples["one"].append(run(folder, size, 1, updates))
        samples["two"].append(run(folder, size, 2, updates))
    halves = {key: ratio(samples, "one", "two", key) for key in ("cpu", "wall")}
    efficiency = {key: value / 2 for key, value in halves["cpu"].items()}
    return {
        "size": size,
        **summary(samples),
        "efficiency": efficiency,
        "faster": halves["wall"],
    }


def report(rows: list[dict]) -> str:
    header = ["model", "one, CPU s", "one of two, CPU s", "one / (2 x one of two)", "clock", "sent"]
    lines = [
        [
            row["size"],
            shown(row["one"]["cpu"]),
            shown(row["two"]["cpu"]),
            shown(row["efficiency"], 2),
            shown(row["faster"], 2, unit="x"),
            f"{row['two']['bytes']['median'] / 1000:,.0f} kB",
        ]
        for row in rows
    ]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        train(args.worker, args.sizes[0], args.updates)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), s, args.updates, args.repeats) for s in args.sizes]
    save("workers", {"machine": machine(), "rows": rows}, report(rows))


if __name__ == "__main__":
    main()
