"""A whole PPO step, ours against TRL 0.11.4's: `generate`, score, `step`.

    python benchmarks/ppo_step.py            about two minutes

A random Llama (hidden 256, 4 layers, vocabulary 512), LoRA of rank 8 on q and v, prompts of 16
tokens, 4 epochs of one minibatch each, Adam, clip norm 1. TRL runs in .venv-bench
(requirements-trl.txt), in torch with MKL; ours in MLX with the BLAS that fast_blas.py finds. One
thread each. Where the environment fixes OpenBLAS's kernels, a second row has those that it picks.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from side_by_side import ROOT, Worker, interleave, ratio, summary
from tables import blas, machine, save, shown, table
from tiny_llama import make_model

SIZES = ["8x16", "16x24"]  # responses x tokens
TRL_PYTHON = ROOT / ".venv-bench" / "bin" / "python"


def measure(folder: Path, repeats: int) -> list[dict]:
    """A row for each size and each choice of BLAS kernels."""
    kernels = {blas(own): own for own in (True, False)}  # one row where both are the same
    rows = []
    with Worker(TRL_PYTHON, "trl_worker.py", folder, *SIZES, ours=False) as trl:
        for name, own_blas in kernels.items():
            with Worker(sys.executable, "mlx_worker.py", folder, *SIZES, own_blas=own_blas) as mlx:
                for size in SIZES:
                    samples = interleave({"trl": (trl, size), "ours": (mlx, size)}, repeats)
                    speeds = {key: ratio(samples, "trl", "ours", key) for key in ("cpu", "wall")}
                    row = {"size": size, "blas": name, **summary(samples), "times_as_fast": speeds}
                    rows.append(row)
    return rows


def report(rows: list[dict]) -> str:
    header = [
        "responses x tokens, BLAS under MLX",
        "TRL, CPU s",
        "ours, CPU s",
        "TRL / ours, CPU",
        "TRL / ours, clock",
    ]
    return table(
        header,
        [
            [
                f"{row['size']}, {row['blas']}",
                shown(row["trl"]["cpu"]),
                shown(row["ours"]["cpu"]),
                shown(row["times_as_fast"]["cpu"], 2),
                shown(row["times_as_fast"]["wall"], 2),
            ]
            for row in rows
        ],
    )


def headline(result: dict) -> list[list[str]]:
    """Rows of the table of all benchmarks."""
    return [
        [
            f"PPO step, {row['size'].replace('x', ' responses of ')} tokens: TRL 0.11.4",
            shown(row["ours"]["cpu"], unit=" s"),
            shown(row["trl"]["cpu"], unit=" s"),
            shown(row["times_as_fast"]["cpu"], 2, unit=" x as fast"),
        ]
        for row in result["rows"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    if not TRL_PYTHON.exists():
        sys.exit(f"error: {TRL_PYTHON} is missing; `make bench` makes it")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(make_model(Path(folder)), repeats)
    save("ppo_step", {"machine": machine(), "rows": rows}, report(rows))


if __name__ == "__main__":
    main()
