"""What labels say of those who gave them: agreement, and whether place or length sways them.

Files of label.py, of judge.py and any other with preferences or ranked lists are read; lists count
as all their pairs. Pairs of different files are the same where prompt and both texts are, whatever
stands on which side.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from data_loading.files import read_rows
from data_loading.formats import KINDS, recognise, to_record
from data_loading.messages import BadRow
from data_loading.preferences import is_true, set_aside
from data_loading.records import Record
from errors import UserError
from labelling.items import LONGEST_SECONDS

RESAMPLES = 2000  # of the bootstrap; its error on an end of an interval is about 0.01
Z = 1.959964  # two-sided 95% of a normal distribution
VERDICTS = (-1, 0, 1)


@dataclass(frozen=True)
class Verdict:
    """One pair as one labeller saw it; `key` names the pair.

    `better` is 1 or -1 for the first or second of its texts in an order of the texts' own, 0 for a
    tie; of a reply that was marked alone, 1 for good and -1 for bad. `first` and `longer`: whether
    the text that was shown first, the longer one, was preferred; None for a tie, or where that is
    not known or they are as long.
    """

    key: str
    better: int
    first: bool | None
    longer: bool | None


@dataclass
class Labeller:
    """All that one labeller said in one file."""

    name: str
    file: str
    choices: int = 0
    ties: int = 0
    skipped: int = 0
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    again: int = 0  # pairs that were labelled more than once; the last counts
    seconds: list[float] = field(default_factory=list)  # in the order of the file
    orders_agree: list[bool] = field(default_factory=list)  # of a judge that read both orders


# ------------------------------------------------------------------------------ reading


def read_labels(path: str | Path) -> list[Labeller]:
    """The labellers of a file. Raises UserError, FILE:LINE, for a row that is no label."""
    found: dict[str, Labeller] = {}
    for row in read_rows(path):
        try:
            if row.fields is None:
                raise BadRow(row.problem)
            name = str(row.fields.get("labeller") or own_name(row.fields, path))
            one = found.setdefault(name, Labeller(name, str(path)))
            add_row(one, row.fields, row.where)
        except BadRow as wrong:
            raise UserError(f"{row.where}: {wrong}") from None
    if not found:
        raise UserError(f"{path}: no rows; give files that label.py or judge.py wrote")
    return list(found.values())


def own_name(fields: dict[str, Any], path: str | Path) -> str:
    """Who labelled a row that does not say so."""
    return "judge" if "judge" in fields else Path(path).stem


def add_row(one: Labeller, fields: dict[str, Any], where: str) -> None:
    """Count a row and its pairs. BadRow for one that prefers nothing and says no tie."""
    if set_aside(fields) and is_true(fields.get("skipped")):
        one.skipped += 1
        return
    format = recognise(fields)
    if format == "unpaired" and not set_aside(fields):
        return add_mark(one, to_record(fields, format, where))
    prompt, texts, ranks = preferred(fields, where)
    tie = len(set(ranks)) == 1
    one.ties += tie
    one.choices += not tie
    one.seconds += seconds_of(fields)
    judge = fields.get("judge")
    ordered = isinstance(judge, dict) and judge.get("principle", "") is not None  # not of a reward
    if ordered and isinstance(judge.get("orders_agree"), bool):
        one.orders_agree.append(judge["orders_agree"])
    shown = fields.get("shown")
    known = isinstance(shown, list) and {*map(str, shown)} == {*map(str, range(len(texts)))}
    for i in range(len(texts)):
        for j in range(i + 1, len(texts)):
            before = shown[i] < shown[j] if known else None
            verdict = compare(prompt, (texts[i], texts[j]), ranks[j] - ranks[i], before)
            if verdict is not None:
                one.again += verdict.key in one.verdicts
                one.verdicts[verdict.key] = verdict


def add_mark(one: Labeller, record: Record) -> None:
    """Count a reply that was marked as good or bad: shared where prompt and text are."""
    one.choices += 1
    one.seconds += seconds_of(record.fields)
    words = [plain_text(record.prompt), plain_text(record.completion)]
    key = hashlib.sha256("\n".join(words).encode("utf-8", "replace")).hexdigest()
    one.again += key in one.verdicts
    one.verdicts[key] = Verdict(key, 1 if record.label else -1, None, None)


def seconds_of(fields: dict[str, Any]) -> list[float]:
    """How long a label took, as a list of one; empty where that is not known."""
    value = fields.get("seconds")
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return [float(value)] if known and 0 <= value <= LONGEST_SECONDS else []


def preferred(fields: dict[str, Any], where: str) -> tuple[str, list[str], list[int]]:
    """(prompt, responses, ranks) of a row as plain texts; all ranks are 0 for a tie."""
    if set_aside(fields):
        # Scores for their order alone: equal ones are refused as a preference.
        scored = fields | {"scores": [-i for i in range(len(fields["responses"]))]}
        record = to_record(scored, "ranked", where)
    else:
        format = recognise(fields)
        if KINDS.get(format, format) != "preference":
            raise BadRow(f"is a row of {format}, and prefers nothing; give rows of preferences")
        record = to_record(fields, format, where)
    judge = fields.get("judge")
    undecided = isinstance(judge, dict) and (record.margin == 0 or judge.get("p") == 0.5)
    ranks = [0] * len(record.ranks) if set_aside(fields) or undecided else record.ranks
    return plain_text(record.prompt), [plain_text(r) for r in record.responses], list(ranks)


def plain_text(text: Any) -> str:
    """A text, or messages, as one text; a lone message counts as what it says."""
    if isinstance(text, str):
        return text.strip()
    if len(text) == 1:
        return str(text[0]["content"]).strip()
    return json.dumps([[turn["role"], str(turn["content"]).strip()] for turn in text])


def compare(prompt: str, texts: tuple[str, str], lead: int, before: bool | None) -> Verdict | None:
    """The verdict on two texts, of which the first leads by `lead` ranks (below 0: trails).

    `before`: whether the first was shown before the second. None for two texts that are the same.
    """
    if texts[0] == texts[1]:
        return None
    names = [hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() for text in texts]
    key = hashlib.sha256("\n".join([prompt, *sorted(names)]).encode("utf-8", "replace")).hexdigest()
    sign = (lead > 0) - (lead < 0)
    lengths = [len(text) for text in texts]
    longer = None if lengths[0] == lengths[1] else (lengths[0] > lengths[1]) == (sign > 0)
    return Verdict(
        key,
        sign if names[0] < names[1] else -sign,
        None if before is None or not sign else before == (sign > 0),
        longer if sign else None,
    )


# ------------------------------------------------------------------------------ figures


def share(flags: Sequence[bool]) -> dict[str, float] | None:
    """A share with Wilson's 95% interval (1927), which holds for few and for extreme ones."""
    n = len(flags)
    if not n:
        return None
    p, z = sum(flags) / n, Z**2 / n
    middle = (p + z / 2) / (1 + z)
    half = Z * np.sqrt(p * (1 - p) / n + z / (4 * n)) / (1 + z)
    low, high = max(0.0, float(middle - half)), min(1.0, float(middle + half))  # rounding
    return {"share": p, "low": low, "high": high, "of": n}


def agreement(one: Labeller, other: Labeller, seed: int = 0) -> dict[str, Any] | None:
    """Share of shared pairs with the same verdict (ties are one), Cohen's kappa (1960) and its
    95% bootstrap interval; None without a shared pair.

    Kappa is None where both gave one and the same verdict throughout: chance would agree as well.
    """
    from sklearn.metrics import cohen_kappa_score, confusion_matrix

    keys = [key for key in one.verdicts if key in other.verdicts]
    if not keys:
        return None
    a = [one.verdicts[key].better for key in keys]
    b = [other.verdicts[key].better for key in keys]
    counts = confusion_matrix(a, b, labels=list(VERDICTS))  # (3, 3)
    certain = np.count_nonzero(counts.sum(0)) == np.count_nonzero(counts.sum(1)) == 1
    same = [x == y for x, y in zip(a, b, strict=True)]
    found: dict[str, Any] = {
        "one": one,
        "other": other,
        "pairs": len(keys),
        "same": share(same),
        "opposite": sum(x * y < 0 for x, y in zip(a, b, strict=True)),
        "kappa": None,
    }
    if not (certain and all(same)):
        found["kappa"] = float(cohen_kappa_score(a, b, labels=list(VERDICTS)))
        found["low"], found["high"] = kappa_interval(counts, seed)
    return found


def kappa_interval(counts: np.ndarray, seed: int) -> tuple[float, float]:
    """2.5% and 97.5% of kappa over tables drawn anew from `counts` (C, C)."""
    total = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(total, (counts / total).ravel(), size=RESAMPLES)
    tables = drawn.reshape(-1, *counts.shape) / total  # (N, C, C)
    seen = np.trace(tables, axis1=1, axis2=2)
    chance = (tables.sum(1) * tables.sum(2)).sum(-1)
    fits = chance < 1 - 1e-12  # else undefined: one verdict throughout
    kappas = (seen[fits] - chance[fits]) / (1 - chance[fits])
    if not len(kappas):
        return float("nan"), float("nan")
    low, high = np.quantile(kappas, [0.025, 0.975])
    return float(low), float(high)


def biases(one: Labeller) -> dict[str, dict[str, float] | None]:
    """How often what was shown first, and what is longer, was preferred; ties left out."""
    verdicts = one.verdicts.values()
    return {
        "first": share([v.first for v in verdicts if v.first is not None]),
        "longer": share([v.longer for v in verdicts if v.longer is not None]),
        "orders": share(one.orders_agree),
    }


def make_report(files: Sequence[list[Labeller]], seed: int = 0) -> dict[str, Any]:
    """All figures. Labellers of one name in several files are told apart by their files."""
    labellers = [one for file in files for one in file]
    names = Counter(one.name for one in labellers)
    short = Counter((one.name, Path(one.file).name) for one in labellers)
    for one in labellers:
        if names[one.name] > 1:
            file = Path(one.file).name
            one.name = f"{one.name} ({file if short[one.name, file] == 1 else one.file})"
    pairs = [
        found
        for i, one in enumerate(labellers)
        for other in labellers[i + 1 :]
        if (found := agreement(one, other, seed)) is not None
    ]
    return {
        "labellers": [
            {
                "name": one.name,
                "file": one.file,
                "choices": one.choices,
                "ties": one.ties,
                "skipped": one.skipped,
                "again": one.again,
                "seconds": one.seconds,
                "median_seconds": median(one.seconds) if one.seconds else None,
                **biases(one),
            }
            for one in labellers
        ],
        "agreement": [
            found | {"one": found["one"].name, "other": found["other"].name} for found in pairs
        ],
    }
