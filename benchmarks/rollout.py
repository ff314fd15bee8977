"""Rollouts: tokens per second with log-probabilities, ours against `mlx_lm.batch_generate`.

    python benchmarks/rollout.py            about a minute

64 prompts on a random Llama (hidden 256, 4 layers, vocabulary 512), greedy; each response has a
limit of its own from 16 to 64 tokens and nothing else ends it. mlx-lm gets all 64 rows at once, the
fastest way seen, and in a third row the 32 that are its default.
"""

import sys

if "--worker" in sys.argv:
    import fast_blas  # noqa: F401

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from side_by_side import Worker, interleave, ratio, serve, summary
from tables import machine, save, shown, table
from tiny_llama import CONFIG, FIRST_WORD, make_model

ROWS, SHORTEST, LONGEST = 64, 16, 64
CASES = {
    "prompts": "prompts of 16 tokens",
    "mixed": "prompts of 6 to 16 tokens",
    "default": "prompts of 16 tokens, mlx-lm's default batch",
}


def prompts(case: str) -> list[list[int]]:
    random = np.random.default_rng(0)
    lengths = random.integers(6, 17, ROWS) if case == "mixed" else [16] * ROWS
    return [random.integers(FIRST_WORD, CONFIG["vocab_size"], n).tolist() for n in lengths]


LIMITS = np.random.default_rng(1).integers(SHORTEST, LONGEST + 1, ROWS).tolist()


def of_mlx_lm(folder: str) -> Callable[[str], dict]:
    from mlx_lm import batch_generate
    from mlx_lm.utils import load

    model, tokenizer = load(folder)
    tokenizer._eos_token_ids = set()

    def run(case: str) -> dict:
        rows = (
            {} if case == "default" else {"completion_batch_size": ROWS, "prefill_batch_size": ROWS}
        )
        made = batch_generate(
            model,
            tokenizer,
            prompts(case),
            max_tokens=LIMITS,
            return_logprobs=True,
            return_token_ids=True,
            **rows,
        )
        return {"tokens": made.token_ids, "logprobs": made.logprobs}

    return run


def of_ours(folder: str) -> Callable[[str], dict]:
    from models.decoding import Sampling, generate
    from models.load import load_model

    model = load_model(folder).model

    def run(case: str) -> dict:
        made = generate(
            model, prompts(case), max_tokens=LIMITS, eos_ids=set(), sampling=Sampling(0.0)
        )
        return {"tokens": made.responses, "logprobs": [row.tolist() for row in made.logprobs]}

    return run


def measure(folder: Path, repeats: int) -> list[dict]:
    """A row for each case."""
    rows = []
    arguments = sys.executable, "rollout.py", "--worker"
    with Worker(*arguments, "mlx_lm", folder) as theirs, Worker(*arguments, "ours", folder) as ours:
        for case, name in CASES.items():
            samples = interleave({"mlx_lm": (theirs, case), "ours": (ours, case)}, repeats)
            texts = {who: compare_and_drop(runs) for who, runs in samples.items()}
            same = texts["mlx_lm"][0] == texts["ours"][0]
            apart = np.concatenate(texts["mlx_lm"][1]) - np.concatenate(texts["ours"][1])
            speeds = {key: ratio(samples, "mlx_lm", "ours", key) for key in ("cpu", "wall")}
            rows.append(
                {
                    "case": name,
                    "tokens": sum(LIMITS),
                    "same_tokens": same,
                    "largest_logprob_difference": float(np.abs(apart).max()),
                    **summary(samples),
                    "times_as_fast": speeds,
                }
            )
    return rows


def compare_and_drop(runs: list[dict]) -> tuple[list, list]:
    """Tokens and log-probabilities, which are the same in every repeat; only times are left."""
    found = [(run.pop("tokens"), run.pop("logprobs")) for run in runs]
    if any(tokens != found[0][0] for tokens, _ in found):
        raise RuntimeError("greedy texts differ from repeat to repeat")
    return found[0]


def tokens_per_second(row: dict, who: str) -> str:
    return f"{row['tokens'] / row[who]['cpu']['median']:,.0f}"


def headline(result: dict) -> list[list[str]]:
    """Rows of the table of all benchmarks."""
    return [
        [
            f"rollouts, {row['case']}: mlx_lm.batch_generate",
            *(f"{tokens_per_second(row, who)} tokens/s" for who in ("ours", "mlx_lm")),
            shown(row["times_as_fast"]["cpu"], 2, unit=" x as fast"),
        ]
        for row in result["rows"]
    ]


def report(rows: list[dict]) -> str:
    header = [
        "64 rows, 16 to 64 tokens",
        "mlx-lm, tokens per CPU s",
        "ours, tokens per CPU s",
        "ours / mlx-lm, CPU",
        "ours / mlx-lm, clock",
        "same greedy tokens",
    ]

    return table(
        header,
        [
            [
                row["case"],
                tokens_per_second(row, "mlx_lm"),
                tokens_per_second(row, "ours"),
                shown(row["times_as_fast"]["cpu"], 2),
                shown(row["times_as_fast"]["wall"], 2),
                "yes" if row["same_tokens"] else "NO",
            ]
            for row in rows
        ],
    )


def main() -> None:
    if "--worker" in sys.argv:
        who, folder = sys.argv[-2:]
        run = {"mlx_lm": of_mlx_lm, "ours": of_ours}[who](folder)
        serve({case: partial(run, case) for case in CASES})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(make_model(Path(folder)), repeats)
    save("rollout", {"machine": machine(), "rows": rows}, report(rows))


if __name__ == "__main__":
    main()
