"""Cost of a PPO step against the number of rows and the length of responses.

    python benchmarks/scaling.py            about three minutes

The model of ppo_step.py; minibatches of 16 rows at most. The table gives processor time for each
token of a response, which stays level (or falls) where the cost grows linearly; `growth` is the
exponent of a power law through the medians: 1 is linear.
"""

import sys

if "--worker" in sys.argv:
    import fast_blas  # noqa: F401

import argparse
import math
import statistics
import tempfile
import warnings
from pathlib import Path

from side_by_side import Worker, interleave, summary
from tables import machine, save, table
from tiny_llama import make_model

ROWS = [(rows, 32) for rows in (8, 16, 32, 64, 128)]
LENGTHS = [(16, tokens) for tokens in (16, 32, 64, 128, 256)]
LARGEST_MINIBATCH = 16


def named(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def worker(folder: str) -> None:
    from mlx_worker import make_call
    from side_by_side import serve

    warnings.filterwarnings("ignore")  # responses reach their limit on purpose
    calls = {}
    for rows, tokens in {*ROWS, *LENGTHS}:
        calls[named((rows, tokens))] = make_call(folder, rows, tokens, min(rows, LARGEST_MINIBATCH))
    serve(calls)


def growth(amounts: list[int], seconds: list[float]) -> float:
    """The slope of log(seconds) over log(amounts), least squares."""
    fit = statistics.linear_regression([*map(math.log, amounts)], [*map(math.log, seconds)])
    return fit.slope


def measure(folder: Path, repeats: int) -> dict:
    sizes = [*dict.fromkeys([*ROWS, *LENGTHS])]
    with Worker(sys.executable, "scaling.py", "--worker", folder) as running:
        calls = {named(size): (running, named(size)) for size in sizes}
        found = summary(interleave(calls, repeats, warm_up=1))
    cpu = {size: found[named(size)]["cpu"]["median"] for size in sizes}
    slopes = {
        "rows": growth([rows for rows, _ in ROWS], [cpu[size] for size in ROWS]),
        "tokens": growth([tokens for _, tokens in LENGTHS], [cpu[size] for size in LENGTHS]),
    }
    return {"sizes": found, "growth": slopes}


def report(result: dict) -> str:
    def row(name: str, sizes: list[tuple[int, int]], growth: float) -> list[str]:
        cells = []
        for rows, tokens in sizes:
            seconds = result["sizes"][named((rows, tokens))]["cpu"]["median"]
            cells.append(f"{1e3 * seconds / (rows * tokens):.2f} ({rows} x {tokens})")
        return [name, *cells, f"{growth:.2f}"]

    header = ["CPU ms per response token (rows x tokens)", *[""] * len(ROWS), "growth"]
    return table(
        header,
        [
            row("more rows", ROWS, result["growth"]["rows"]),
            row("longer responses, after 16 prompt tokens", LENGTHS, result["growth"]["tokens"]),
        ],
    )


def headline(result: dict) -> list[list[str]]:
    """Rows of the table of all benchmarks."""
    names = {"rows": "8 to 128 rows", "tokens": "16 to 256 response tokens"}
    return [
        [f"cost of a PPO step, {names[what]}: linear", f"power {slope:.2f}", "power 1", ""]
        for what, slope in result["growth"].items()
    ]


def main() -> None:
    if "--worker" in sys.argv:
        worker(sys.argv[-1])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        result = measure(make_model(Path(folder)), repeats)
    save("scaling", {"machine": machine(), **result}, report(result))


if __name__ == "__main__":
    main()
