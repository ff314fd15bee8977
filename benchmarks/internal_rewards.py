"""Internal rewards on a real model: what each component sees, and which junk it stops.

    python benchmarks/internal_rewards.py [--model FOLDER]     (`make real` makes the model)

The answers rated 3.5 or better of data/conversations.jsonl, and made from them: kinds of junk; the
same answers under other prompts; the same sentences in other company. Means and perplexity are
calibrated on 64 answers that the model samples, as in a run. AUC: how often a text of the first
kind scores above one of the second, ties half. Writes results/internal_rewards.json and a table.
"""

import argparse
import json
import sys
from pathlib import Path

from side_by_side import ROOT
from tables import machine, save, table

sys.path.insert(0, str(ROOT))
import fast_blas  # noqa: E402, F401, I001  before MLX
import numpy as np  # noqa: E402

from data_utils import read_records, tokenise_prompts  # noqa: E402
from models.load import load_model  # noqa: E402
from models.lora import LoraConfig, add_lora  # noqa: E402
from rewards.internal import COMPONENTS, Signals, sentences  # noqa: E402
from training.internal_signals import reference_signals  # noqa: E402

MODEL = Path("~/.cache/mlx-rlhf/real_model/SmolLM2-135M-Instruct").expanduser()
CONVERSATIONS = ROOT / "data" / "conversations.jsonl"
GOOD = 3.5  # of 5
LENGTH_TARGET, LONG = 60, 300  # tokens; words of what is much too long


def good_rows() -> list[tuple[str, str]]:
    """(question, answer) of the rated conversations; the first of each question."""
    found = {}
    for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question, answer = (turn["content"] for turn in row["conversation"][:2])
        if row["meta_eval_score"] >= GOOD and len(sentences(answer)) > 1:
            found.setdefault(question, answer)
    return list(found.items())


def kinds(rows: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Rows of every kind, made from the real ones."""
    random = np.random.default_rng(0)
    words = sorted({word for _, answer in rows for word in answer.split()})

    def drawn(count: int) -> str:
        return " ".join(random.choice(words, count))

    def like(answer: str) -> int:
        return len(answer.split())

    mixed = [
        " ".join(sentences(rows[(i + k) % len(rows)][1])[k % 2] for k in range(len(sentences(a))))
        for i, (_, a) in enumerate(rows)
    ]
    return {
        "real": rows,
        "one word repeated": [(q, "good " * like(a)) for q, a in rows],
        "the prompt copied": [(q, q) for q, _ in rows],
        "random words, right length": [(q, drawn(like(a))) for q, a in rows],
        "empty": [(q, "") for q, _ in rows],
        "the answer eight times": [(q, f"{a} " * 8) for q, a in rows],
        f"{LONG} random words": [(q, drawn(LONG)) for q, _ in rows],
        "punctuation": [(q, ". , ! ? ; : - " * 6) for q, _ in rows],
        "its words shuffled": [(q, " ".join(random.permutation(a.split()))) for q, a in rows],
        "one sentence repeated": [(q, f"{sentences(a)[0]} " * len(sentences(a))) for q, a in rows],
        "another's answer": [(q, rows[(i + 7) % len(rows)][1]) for i, (q, _) in enumerate(rows)],
        "sentences of many answers": [(q, m) for (q, _), m in zip(rows, mixed, strict=True)],
    }


def scores(signals: Signals, prompts: list, pairs: list[tuple[str, str]]) -> dict[str, list]:
    tokenizer = signals.tokenizer
    answers = [tokenizer.encode(text, add_special_tokens=False) for _, text in pairs]
    return signals.scores(
        prompts=[row.prompt for row in prompts],
        responses=[text for _, text in pairs],
        token_ids=[[*p.tokens, *a] for p, a in zip(prompts, answers, strict=True)],
        response_start=[len(row.tokens) for row in prompts],
        prompt_text=[row.text for row in prompts],
    )


def auc(high: list[float], low: list[float]) -> float:
    differences = np.subtract.outer(high, low)
    return float((differences > 0).mean() + 0.5 * (differences == 0).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    args = parser.parse_args()
    loaded, rows = load_model(str(args.model)), good_rows()
    records = [{"messages": [{"role": "user", "content": question}]} for question, _ in rows]
    file = args.model.parent / "internal_rewards.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    prompts = tokenise_prompts(read_records(file), loaded.tokenizer).rows
    tuning = add_lora(loaded.model, LoraConfig(rank=1, scale=1.0))
    signals = reference_signals(
        list(COMPONENTS),
        loaded=loaded,
        tuning=tuning,
        reference=None,
        prompts=prompts,
        eos_ids=set(loaded.tokenizer.eos_token_ids),
        max_new_tokens=64,
        batch_size=32,
        seed=0,
        length_target=LENGTH_TARGET,
    )
    found = {}
    for kind, pairs in kinds(rows).items():
        found[kind] = scores(signals, prompts, pairs)
        print(kind, {k: round(float(np.median(v)), 2) for k, v in found[kind].items()}, flush=True)
    means = {kind: np.mean([each[c] for c in COMPONENTS], axis=0) for kind, each in found.items()}
    median = float(np.median(means["real"]))
    lines = [
        [
            kind,
            *(f"{np.median(each[name]):.2f}" for name in COMPONENTS),
            f"{np.median(means[kind]):.2f}",
            f"{np.mean(means[kind] < median):.2f}",
        ]
        for kind, each in found.items()
    ]
    aucs = {
        "coherence: own sentences against those of many answers": auc(
            found["real"]["coherence"], found["sentences of many answers"]["coherence"]
        ),
        "faithfulness: own prompt against another": auc(
            found["real"]["faithfulness"], found["another's answer"]["faithfulness"]
        ),
        "fluency: real against its words shuffled": auc(
            found["real"]["fluency"], found["its words shuffled"]["fluency"]
        ),
        "fluency: real against one sentence repeated": auc(
            found["real"]["fluency"], found["one sentence repeated"]["fluency"]
        ),
    }
    text = table(["answers", *COMPONENTS, "mean", "below the real median"], lines)
    text += "\n\n" + table(["AUC", ""], [[k, f"{v:.3f}"] for k, v in aucs.items()])
    medians = {
        kind: {name: float(np.median(each[name])) for name in COMPONENTS}
        for kind, each in found.items()
    }
    save(
        "internal_rewards",
        {"machine": machine(), "rows": len(rows), "medians": medians, "auc": aucs},
        text,
    )


if __name__ == "__main__":
    main()
