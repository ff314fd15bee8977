"""DPO: an epoch of updates, ours, TRL's and mlx-lm-lora's; processor time, clock, peak memory.

    python benchmarks/preference_speed.py [--shape smollm2] [--repeats 3]

A random Llama of hidden 256 (4 layers, vocabulary 8,192) or of SmolLM2-135M's shape, LoRA of rank
8 on every linear layer, Adam, pairs of 20 to 200 tokens a side, a third of them the prompt, in
batches of 4. The reference is computed in every update: ours and TRL's is the base with the adapter
off, mlx-lm-lora's a second copy of the base, as its command loads it. TRL runs in .venv-baseline,
with MKL; mlx-lm-lora in .venv-lora (requirements-mlx-lm-lora.txt), with our BLAS; one thread each.
A call is an epoch; the first does not count. Peaks are of the process. "Base held": the arrays that
MLX holds between updates, without adapters and Adam's state, over the base's bytes. "Prompt once":
our epoch over what it takes where only one side of each pair has its prompt, which is the most that
sharing prompts could gain.
"""

import sys

if "--ours" in sys.argv:
    import fast_blas  # noqa: F401

import argparse
import contextlib
import json
import tempfile
from pathlib import Path

from side_by_side import ROOT, Worker, interleave, ratio, serve, summary
from tables import machine, save, shown, table
from tiny_llama import SMOLLM2, make_model

BATCH, SHORTEST, LONGEST, RATE = 4, 20, 200, 1e-4
SHAPES = {"hidden 256": ({"vocab_size": 8192}, 24), "smollm2": (SMOLLM2, 4)}
PEERS = {
    "trl": (ROOT / ".venv-baseline/bin/python", "trl_dpo_worker.py"),
    "lora": (ROOT / ".venv-lora/bin/python", "mlx_lm_lora_worker.py", "dpo"),
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


def without_template(model: Path) -> Path:
    """The model, for which rows are texts: ours would put a chat template around them."""
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    del settings["chat_template"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    return model


def ours(model: str, pairs: str) -> None:
    from dataclasses import replace

    import mlx.core as mx
    from mlx.utils import tree_flatten

    from data_utils import BatchIterator, BatchPlan, read_records, tokenise_pairs
    from mlx_preference_tasks import make_task
    from mlx_sft_trainer import SupervisedTrainer
    from models.load import load_model
    from models.lora import LoraConfig, add_lora
    from models.reference import adapter_off
    from training.optimizers import build_optimizer

    loaded = load_model(model)
    base = sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))
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

    def without_prompts(row):
        """The rejected side begins with the last token of its prompt."""
        start = row.masks[1].index(True) - 1
        responses = [row.responses[0], row.responses[1][start:]]
        return replace(row, responses=responses, masks=[row.masks[0], row.masks[1][start:]])

    def epoch(batches) -> dict:
        steps = [trainer.step([next(batches)]) for _ in range(len(plan))]
        return {"tokens": sum(step["num_tokens"] for step in steps), "loss": steps[0]["loss"]}

    whole = BatchIterator(rows.rows, plan)
    short = BatchIterator([without_prompts(row) for row in rows.rows], plan)

    def held() -> dict:
        mx.clear_cache()
        own = [*tuning.arrays().values()]
        state = tree_flatten(trainer.optimizer.state)
        own += [array for _, array in state if isinstance(array, mx.array)]
        bytes_held = mx.get_active_memory() - sum(array.nbytes for array in own)
        return {"base_held": bytes_held / base}

    serve({"epoch": lambda: epoch(whole), "short": lambda: epoch(short), "held": held})


def measure(shape: str, repeats: int) -> dict:
    """A row of the table."""
    changes, count = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        model = without_template(make_model(Path(folder) / "model", **changes))
        pairs = make_pairs(Path(folder) / "pairs.jsonl", changes["vocab_size"], count)
        with contextlib.ExitStack() as stack:
            mine = Worker(sys.executable, "preference_speed.py", "--ours", model, pairs)
            calls = {name: (stack.enter_context(mine), name) for name in ("epoch", "short")}
            for name, (python, *words) in PEERS.items():
                peer = Worker(python, *words, model, pairs, ours=name == "lora")
                calls[name] = stack.enter_context(peer), "epoch"
            samples = interleave(calls, repeats, warm_up=1)
            base_held = mine.call("held")["base_held"]
    tokens = {name: samples[name][0]["tokens"] for name in ("epoch", *PEERS)}
    if len({*tokens.values()}) > 1:
        raise RuntimeError(f"the sides are trained on different tokens: {tokens}")
    return {
        "shape": shape,
        "pairs": count,
        "tokens": tokens["epoch"],
        "base_held": base_held,
        **summary(samples),
        "ratios": {
            name: {key: ratio(samples, name, "epoch", key) for key in ("cpu", "wall")}
            for name in PEERS
        },
        "prompt_once": ratio(samples, "epoch", "short"),
    }


def report(rows: list[dict]) -> str:
    """The figures as a table."""
    header = [
        "DPO, 20 to 200 tokens a side",
        "ours, tokens per CPU s",
        "TRL",
        "mlx-lm-lora",
        "ours / TRL, CPU",
        "clock",
        "ours / mlx-lm-lora, CPU",
        "clock",
        "peak of ours, MB",
        "TRL",
        "mlx-lm-lora",
        "base held",
        "prompt once, CPU",
    ]
    sides = ("epoch", *PEERS)
    lines = [
        [
            row["shape"],
            *(f"{row['tokens'] / row[who]['cpu']['median']:,.0f}" for who in sides),
            *(shown(row["ratios"][who][key], 2) for who in PEERS for key in ("cpu", "wall")),
            *(f"{row[who]['peak_rss']['median'] / 1e6:,.0f}" for who in sides),
            f"{row['base_held']:.3f}",
            shown(row["prompt_once"], 2),
        ]
        for row in rows
    ]
    return table(header, lines)


def main() -> None:
    if sys.argv[1:2] == ["--ours"]:
        ours(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=[*SHAPES])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for python, *_ in PEERS.values():
        if not python.exists():
            sys.exit(f"error: {python} is missing; the head of this file says how it is made")
    rows = [measure(shape, args.repeats) for shape in args.shape]
    save("preference_speed", {"machine": machine(), "rows": rows}, report(rows))


if __name__ == "__main__":
    main()
