"""Tables of techniques.py: a column for every seed, and the worst of them."""

from collections.abc import Callable

from tables import shown, table


def rows_of(found: dict, value: Callable, names, worst: Callable | None = min) -> list[list[str]]:
    """A row for each name: `value(figures of a seed, name)`, and the `worst`, where one is."""
    rows = []
    for name in names:
        values = [value(figures, name) for figures in found.values()]
        last = [f"{worst(values):.3f}"] if worst else []
        rows.append([name, *(f"{v:.3f}" for v in values), *last])
    return rows


def by_seed(
    title: str, found: dict, key: str, worst: Callable | None = min, names=None, first: str = ""
) -> str:
    """A table of one figure."""
    figures = next(iter(found.values()))
    names = [n for n in names or figures if key in figures[n]]
    header = [first or title, *(f"seed {seed}" for seed in found), *(["worst"] if worst else [])]
    body = table(header, rows_of(found, lambda f, name: f[name][key], names, worst))
    return f"**{title}**\n\n{body}"


def cost_table(rows: list[dict]) -> str:
    header = ["step", "without, CPU s", "with, CPU s", "times as much"]
    body = [
        [
            f"{row['step']}, {row['rows']} rows, {row['model']}: {row['technique']}",
            shown(row["cpu"]["plain"]),
            shown(row["cpu"][row["technique"]]),
            shown(row["times"], 2),
        ]
        for row in rows
    ]
    return f"**cost of a step**\n\n{table(header, body)}"


def wanted_table(found: dict) -> str:
    from techniques_models import WANTED

    header = ["asked for", *map(str, WANTED), "rank correlation"]
    body = [
        [f"seed {seed}", *(f"{s:.2f}" for s in row["scores"]), f"{row['rank_correlation']:.2f}"]
        for seed, row in found.items()
    ]
    return f"**conditioning: mean true score**\n\n{table(header, body)}"


TABLES = {
    "composite": [
        ("composite: tokens of a response", "tokens", None),
        ("composite: true score", "score", min),
        ("composite: KL, nats per response", "kl", max),
    ],
    "objectives": [
        ("weights (fluency, faithfulness, quality): quality", "quality", None),
        ("weights: fluency", "fluency", None),
        ("weights: faithfulness", "faithfulness", None),
        ("weights: share on the front", "pareto", None),
    ],
    "dynamic_kl": [
        ("KL per token, last 20 of 120 steps", "kl", None),
        ("the same: true score", "score", min),
        ("the same: coefficient", "coefficient", None),
    ],
    "curriculum_sft": [
        ("fine-tuning: lowest validation loss", "lowest", max),
        ("fine-tuning: after 60 of 200 updates", "at_60", max),
        ("fine-tuning: at the end", "last", max),
    ],
    "curriculum_ppo": [
        ("PPO: true score, last 10 of 40 steps", "score", min),
        ("PPO: mean over all steps", "mean", min),
    ],
    "contrastive": [
        ("contrastive weight: label by 5 nearest, accuracy", "accuracy", min),
        ("the same: error of their mean, quintiles", "off_by", max),
        ("the same: validation loss", "loss", max),
    ],
    "critique_sft": [
        ("critiques of held-out answers: correlation with the truth", "correlation", min),
        ("the same: share with a score that can be read", "readable", min),
        ("the same: loss in training", "train_loss", None),
    ],
    "critique_ppo": [
        ("self-critique in PPO: answers", "answer", min),
        ("the same: revisions, first 5 steps", "revised_first", None),
        ("the same: revisions, last 10 steps", "revised", min),
        ("the same: share of revisions that are better", "improved_share", None),
    ],
}


def report(found: dict) -> str:
    """All tables of what was found."""
    texts = []
    for part, tables in TABLES.items():
        if part in found:
            texts += [by_seed(title, found[part], key, worst) for title, key, worst in tables]
        if part == "contrastive" and "conditioning" in found:
            texts.append(wanted_table(found["conditioning"]))
    if "cost" in found:
        texts.append(cost_table(found["cost"]))
    return "\n\n".join(texts)
