"""A whole GRPO step, ours, TRL 1.16's and mlx-lm-lora's: generate, score, update.

    python benchmarks/group_step.py [--shapes small smollm2] [--repeats 5]

4 prompts of 16 tokens, 8 responses of 24 tokens to each, LoRA of rank 8 on q and v, one update,
beta 0. "small" is a random Llama of hidden size 256, 4 layers and 512 tokens; "smollm2" has
SmolLM2-135M's shape. TRL runs in .venv-baseline (`make test-baseline` makes it), mlx-lm-lora in
.venv-lora (requirements-mlx-lm-lora.txt), with our BLAS and the same sampling. One thread each, in
turns; the shared prefill is also measured against reading each prompt eight times.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from side_by_side import ROOT, Worker, interleave, ratio, summary
from tables import machine, save, shown, table
from tiny_llama import SMOLLM2, make_model

SHAPES = {"small": {}, "smollm2": SMOLLM2}
PEERS = {
    "trl": (ROOT / ".venv-baseline/bin/python", "trl_group_worker.py"),
    "lora": (ROOT / ".venv-lora/bin/python", "mlx_lm_lora_worker.py", "grpo"),
}


def measure(folder: Path, name: str, repeats: int) -> dict:
    """Samples of all programs at one shape, and the ratios."""
    model = make_model(folder / name, **SHAPES[name])
    workers = {"ours": Worker(sys.executable, "group_worker.py", model)}
    for peer, (python, *words) in PEERS.items():
        workers[peer] = Worker(python, *words, model, ours=peer == "lora")
    calls = {key: (worker, "step") for key, worker in workers.items()}
    calls["shared"] = workers["ours"], "shared"
    calls["unshared"] = workers["ours"], "unshared"
    samples = interleave(calls, repeats, warm_up=1)
    for worker in workers.values():
        worker.__exit__()
    return {
        "shape": name,
        **summary(samples),
        "ratios": {
            peer: {key: ratio(samples, peer, "ours", key) for key in ("cpu", "wall")}
            for peer in PEERS
        },
        "prefill": ratio(samples, "unshared", "shared"),
    }


def report(rows: list[dict]) -> str:
    header = [
        "shape",
        "ours, CPU s",
        "TRL, CPU s",
        "mlx-lm-lora, CPU s",
        "TRL / ours, CPU",
        "clock",
        "mlx-lm-lora / ours, CPU",
        "clock",
        "prefill unshared / shared, CPU",
    ]
    lines = [
        [
            row["shape"],
            *(shown(row[who]["cpu"]) for who in ("ours", *PEERS)),
            *(shown(row["ratios"][who][key], 2) for who in PEERS for key in ("cpu", "wall")),
            shown(row["prefill"], 2),
        ]
        for row in rows
    ]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    for python, *_ in PEERS.values():
        if not python.exists():
            sys.exit(f"error: {python} is missing; the head of this file says how it is made")
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), n, args.repeats) for n in args.shapes]
    save("group_step", {"machine": machine(), "rows": rows}, report(rows))


if __name__ == "__main__":
    main()
