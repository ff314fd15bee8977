"""Labels of rows for the contrastive loss: which rows say something of the same quality."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from data_loading.records import Record
from errors import UserError

QUINTILES = (0.2, 0.4, 0.6, 0.8)
GOOD, BAD = 1, 0


def label_edges(records: Iterable[Record]) -> list[float]:
    """The quintiles of `reward` in these rows."""
    rewards = [r.reward for r in records if r.reward is not None and "reward" in r.fields]
    return np.quantile(rewards, QUINTILES).tolist() if rewards else []


def label_of(record: Record, edges: Sequence[float]) -> int | None:
    """The quintile of `reward`, the rounded `meta_eval_score`; None for a row without either."""
    if record.kind == "preference":
        return GOOD
    if record.reward is None:
        return None
    if "reward" in record.fields:
        return int(np.searchsorted(edges, record.reward, side="right"))
    return round(record.reward)


def rejected_answers(records: Iterable[Record]) -> list[Record]:
    """The worst answer of each preference row, as rows of prompt and completion."""
    return [
        replace(
            record,
            kind="prompt_completion",
            completion=record.responses[-1],
            where=f"{record.where} rejected",
        )
        for record in records
        if record.kind == "preference"
    ]


def refuse_unlabelled(labels: Sequence[int | None], where: str) -> None:
    """Raise UserError where no two rows could be told apart, or none is like another."""
    known = [label for label in labels if label is not None]
    if len(set(known)) < 2:
        raise UserError(
            f"{where}: --use-contrastive: the rows have {len(set(known))} kinds of label; reward, "
            "meta_eval_score, or chosen and rejected (--chosen) are needed, with different values"
        )
    if len(set(known)) == len(known):
        raise UserError(
            f"{where}: --use-contrastive: no two rows have the same label, so none is drawn to "
            "another; more rows are needed"
        )
