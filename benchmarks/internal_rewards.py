"""Internal rewards on a real model: what each component sees, and which junk it stops.

    python benchmarks/internal_rewards.py [--model FOLDER]     (`make real` makes the model)

The answers rated 3.5 or better of data/conversations.jsonl, and made from them: kinds of junk; the
same answers under other prompts; the same sentences in other company. Means and perplexity are
calibrated on 64 answers that the model samples, as in a run, once for each seed; random words and
orders are drawn anew for each. AUC: how often a text of the first kind scores above one of the
second, ties half. What a seed gave is kept beside the model, and not measured again. Writes
results/internal_rewards.json, a table, and docs/images/techniques_internal_rewards.png.
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
from reports.plot_style import (  # noqa: E402
    SEED_COLOURS,
    label,
    legend,
    new_figure,
)
from reports.plot_style import save as save_picture  # noqa: E402
from rewards.internal import COMPONENTS, Signals, sentences  # noqa: E402
from training.internal_signals import reference_signals  # noqa: E402

MODEL = Path("~/.cache/mlx-rlhf/real_model/SmolLM2-135M-Instruct").expanduser()
CONVERSATIONS = ROOT / "data" / "conversations.jsonl"
IMAGE = ROOT / "docs" / "images" / "techniques_internal_rewards.png"
GOOD = 3.5  # of 5
LENGTH_TARGET, LONG = 60, 300  # tokens; words of what is much too long
REPEATS = (2, 4, 8, 12)


def good_rows() -> list[tuple[str, str]]:
    """(question, answer) of the rated conversations; the first of each question."""
    found = {}
    for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question, answer = (turn["content"] for turn in row["conversation"][:2])
        if row["meta_eval_score"] >= GOOD and len(sentences(answer)) > 1:
            found.setdefault(question, answer)
    return list(found.items())


def kinds(rows: list[tuple[str, str]], seed: int) -> dict[str, list[tuple[str, str]]]:
    """Rows of every kind, made from the real ones."""
    random = np.random.default_rng(seed)
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
        **{repeated(k): [(q, f"{sentences(a)[0]} " * k) for q, a in rows] for k in REPEATS},
    }


def repeated(times: int) -> str:
    return f"one sentence {times} times"


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


def measured(file: Path, seed: int, loaded, tuning, prompts: list, rows: list) -> dict:
    """{kind: {component: scores, also d and perplexity}} of a seed."""
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    signals = reference_signals(
        list(COMPONENTS),
        loaded=loaded,
        tuning=tuning,
        reference=None,
        prompts=prompts,
        eos_ids=set(loaded.tokenizer.eos_token_ids),
        max_new_tokens=64,
        batch_size=32,
        seed=seed,
        length_target=LENGTH_TARGET,
    )
    found: dict = {}
    for kind, pairs in kinds(rows, seed).items():
        found[kind] = scores(signals, prompts, pairs)
        shown = {k: round(float(np.median(v)), 2) for k, v in found[kind].items()}
        print(seed, kind, shown, flush=True)
        found[kind]["d"] = signals.described()["adlf/distinct"]
        found[kind]["perplexity"] = np.exp(signals.described()["adlf/log_ppl"]).tolist()
    file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def aucs_of(found: dict, rows: list) -> dict[str, float]:
    """What each component has to tell apart."""

    def one(component: str, other: str, count: int | None = None) -> float:
        there = [count in (None, len(sentences(answer))) for _, answer in rows]
        high, low = (np.array(found[kind][component])[there] for kind in ("real", other))
        return auc(high, low)

    many, name = "sentences of many answers", "coherence: own sentences against those of many"
    fluency = "fluency: real against"
    return {
        name: one("coherence", many),
        f"{name}, answers of two": one("coherence", many, 2),
        f"{name}, answers of four": one("coherence", many, 4),
        "faithfulness: own prompt against another": one("faithfulness", "another's answer"),
        f"{fluency} its words shuffled": one("fluency", "its words shuffled"),
        f"{fluency} one sentence repeated": one("fluency", "one sentence repeated"),
        **{f"{fluency} {repeated(k)}": one("fluency", repeated(k)) for k in REPEATS},
    }


def lines_of(found: dict) -> list[list[str]]:
    """A row for each kind: medians, and the share below the median of real answers."""
    means = {kind: np.mean([each[c] for c in COMPONENTS], axis=0) for kind, each in found.items()}
    median = float(np.median(means["real"]))
    return [
        [
            kind,
            *(f"{np.median(each[name]):.2f}" for name in COMPONENTS),
            f"{np.median(means[kind]):.2f}",
            f"{np.mean(means[kind] < median):.2f}",
        ]
        for kind, each in found.items()
    ]


def draw(found: dict[int, dict]) -> None:
    """The mean of all components of every row, kind by kind, with the median of real answers."""
    names = list(next(iter(found.values())))[::-1]
    figure, axes = new_figure(1, 1, (7.2, 5.2))
    axis = axes[0, 0]
    for k, (seed, each) in enumerate(found.items()):
        colour = SEED_COLOURS[k % len(SEED_COLOURS)]
        means = {kind: np.mean([each[kind][c] for c in COMPONENTS], axis=0) for kind in names}
        for i, kind in enumerate(names):
            height = np.full(len(means[kind]), i + 0.2 * (k - (len(found) - 1) / 2))
            text = f"seed {seed}" if not i else None
            axis.scatter(means[kind], height, s=7, color=colour, alpha=0.6, label=text)
        axis.axvline(np.median(means["real"]), color=colour, lw=1, ls="--")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 1)
    label(axis, "mean of the four components; dashed: the median of real answers", "")
    legend(axis)
    save_picture(figure, IMAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    loaded, rows = load_model(str(args.model)), good_rows()
    records = [{"messages": [{"role": "user", "content": question}]} for question, _ in rows]
    place = args.model.parent / "internal_rewards"
    place.mkdir(exist_ok=True)
    file = place / "prompts.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    prompts = tokenise_prompts(read_records(file), loaded.tokenizer).rows
    tuning = add_lora(loaded.model, LoraConfig(rank=1, scale=1.0))
    found = {
        seed: measured(place / f"scores_{seed}.json", seed, loaded, tuning, prompts, rows)
        for seed in args.seeds
    }
    aucs = {seed: aucs_of(each, rows) for seed, each in found.items()}
    first = args.seeds[0]
    header = ["AUC", *(f"seed {seed}" for seed in aucs), "worst"]
    body = []
    for name in aucs[first]:
        values = [aucs[seed][name] for seed in aucs]
        body.append([name, *(f"{v:.3f}" for v in values), f"{min(values):.3f}"])
    text = table(["answers", *COMPONENTS, "mean", "below the real median"], lines_of(found[first]))
    text += "\n\n" + table(header, body)
    medians = {
        seed: {
            kind: {k: float(np.median(v)) for k, v in e.items() if v} for kind, e in each.items()
        }
        for seed, each in found.items()
    }
    draw(found)
    result = {"machine": machine(), "rows": len(rows), "medians": medians, "auc": aucs}
    save("internal_rewards", result, text)


if __name__ == "__main__":
    main()
