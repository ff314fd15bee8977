"""Rows for benchmarks/real_model.py, each made by a stated rule. Standard library only.

Prompts: an everyday subject in an everyday situation, a sentence about it to be written. A fifth of
the subjects is held out, so that no held-out prompt shares its subject with one that is trained on.
Rows for SFT: of the model's own samples, those that end by themselves after one sentence of 5 to 25
words. Pairs: two samples for one prompt of which VADER (examples/sentiment.py) likes one better by
MARGIN or more; that one is chosen.
"""

import itertools
import json
import random
from pathlib import Path

SUBJECTS = (
    "a dog,a bus driver,my neighbour,the old library,a rainy morning,the new teacher,a lost key,"
    "a football match,the village bakery,a broken bicycle,the dentist,a long train ride,"
    "a birthday cake,the night shift,an empty house,a small garden,the hospital,a school trip,"
    "a cat,the office kitchen,a winter coat,the river,a phone call,the local market,a burnt dinner,"
    "the swimming pool,an exam,a wooden boat,the mountain path,a stranger,the morning news,"
    "a job interview,the last bus,a letter,the piano,a crowded beach,the museum,a power cut,"
    "the hotel room,a farm"
).split(",")
SITUATIONS = (
    "on a Monday,in the rain,after work,before breakfast,late at night,in a big city,"
    "during the holidays,at the end of the year,on the first day,without any money"
).split(",")
MARGIN = 0.3  # of VADER's compound score, which goes from -1 to 1
HELD_OUT = 5  # every fifth subject


def ask(subject: str, situation: str) -> str:
    return f"Write one sentence about {subject} {situation}."


def prompts(held_out: bool) -> list[dict]:
    """All prompts of one of the two splits, in an order that is always the same."""
    kept = [s for i, s in enumerate(SUBJECTS) if (i % HELD_OUT == HELD_OUT - 1) == held_out]
    rows = [{"prompt": ask(*pair)} for pair in itertools.product(kept, SITUATIONS)]
    random.Random(0).shuffle(rows)
    return rows


def one_sentence(row: dict) -> bool:
    """Whether a sampled row ends by itself after one sentence of 5 to 25 words."""
    text = row["completion"].strip()
    inside = text[:-1]
    return bool(
        row["ended"]
        and text[-1:] in (".", "!")
        and 5 <= len(text.split()) <= 25
        and not any(mark in inside for mark in ".!?\n:")
    )


def sft_rows(samples: list[dict]) -> list[dict]:
    """Rows to fine-tune on: the samples that are one sentence, each text once."""
    kept = {(row["prompt"], row["completion"].strip()) for row in samples if one_sentence(row)}
    return [{"prompt": prompt, "completion": text} for prompt, text in sorted(kept)]


def pairs(samples: list[dict]) -> list[dict]:
    """Preference rows: for each prompt its best against its worst sample, its second best against
    its second worst, and so on, where the scores are MARGIN apart.
    """
    found = []
    for prompt, group in itertools.groupby(samples, key=lambda row: row["prompt"]):
        ranked = sorted(group, key=lambda row: -row["score"])
        for better, worse in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
            if better["score"] - worse["score"] >= MARGIN:
                texts = {"chosen": better["completion"], "rejected": worse["completion"]}
                found.append({"prompt": prompt, **texts})
    return found


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    """Rows as JSON lines; written aside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".writing")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    aside.write_text("".join(lines), encoding="utf-8")
    aside.rename(path)
