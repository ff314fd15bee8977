"""Easy rows first: which of them are open at an update, and batches drawn among these.

Competence of Platanios et al. 2019 (arXiv 1903.09848, equation 7, p = 2). Like the ordinary order,
a function of seed and update alone, so a resumed run draws what one never stopped would have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_loading.batching import BatchPlan, prompt_batch
from data_loading.rows import PreferenceRow, PromptRow
from errors import UserError

DRAWS = 6  # tells its random numbers from those of epochs


@dataclass
class Curriculum:
    """`difficulty`: a number for each row, low is easy; ties by row number.

    `start`: competence at update 0, the share of open rows; `steps`: updates until all are open.
    """

    difficulty: Sequence[float]
    start: float
    steps: int
    order: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.difficulty = np.asarray(self.difficulty, dtype=np.float64)
        self.order = np.argsort(self.difficulty, kind="stable")

    def competence(self, update: int) -> float:
        """c(t) = min(1, sqrt(t (1 - c0^2) / T + c0^2))."""
        grown = update * (1 - self.start**2) / self.steps + self.start**2
        return min(1.0, math.sqrt(grown))

    def open_rows(self, update: int) -> np.ndarray:
        """Numbers of the ceil(c N) easiest rows."""
        # Less a rounding error, so that a fifth of 10 rows is 2 of them.
        return self.order[: math.ceil(self.competence(update) * len(self.order) - 1e-9)]

    def draw(self, update: int, count: int, seed: int, part: int = 0) -> np.ndarray | None:
        """`count` open rows, none twice where there are so many; None once all rows are open.

        `part` tells several batches of one update apart.
        """
        if self.competence(update) >= 1:
            return None
        rows, random = self.open_rows(update), np.random.default_rng([seed, update, part, DRAWS])
        rounds = [random.permutation(rows) for _ in range(-(-count // len(rows)))]
        return np.concatenate(rounds)[:count]

    def notes(self, update: int, rows: Sequence[int]) -> dict[str, float]:
        """What is logged of an update that was made from these rows."""
        return {
            "curriculum/competence": self.competence(update),
            "curriculum/difficulty": float(self.difficulty[np.asarray(rows)].mean()),
        }


class CurriculumPlan(BatchPlan):
    """The batches of `plan`, but for those of updates that come before competence is 1.

    `accumulation`: batches of one update.
    """

    def __init__(self, plan: BatchPlan, curriculum: Curriculum, accumulation: int) -> None:
        vars(self).update(vars(plan))
        self.curriculum, self.accumulation = curriculum, accumulation

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, each an array of row numbers."""
        batches = super().epoch(epoch)
        for i in range(len(batches)):
            update, part = divmod(epoch * len(self) + i, self.accumulation)
            drawn = self.curriculum.draw(update, self.batch_size, self.seed, part)
            if drawn is None:
                break
            batches[i] = drawn
        return batches

    def notes(self, update: int, rows: Sequence[int]) -> dict[str, float]:
        return self.curriculum.notes(update, rows)


def easy_first(plan: BatchPlan, curriculum: Curriculum | None, accumulation: int) -> BatchPlan:
    """`plan` with a curriculum; itself without one."""
    return plan if curriculum is None else CurriculumPlan(plan, curriculum, accumulation)


def chosen_prompts(
    curriculum: Curriculum | None, count: int, batch_size: int, step: int, seed: int
) -> list[int]:
    """`prompt_batch`, or while not all rows are open, a draw among those that are."""
    drawn = curriculum.draw(step, batch_size, seed) if curriculum is not None else None
    return prompt_batch(count, batch_size, step, seed) if drawn is None else drawn.tolist()


# ------------------------------------------------------------------------------ difficulty


def hard_by_length(rows: Sequence[Any]) -> list[float]:
    """Tokens of each row; of a preference row, those of its longest response."""
    return [
        float(max(map(len, row.responses)) if isinstance(row, PreferenceRow) else len(row.tokens))
        for row in rows
    ]


def hard_by_score(rows: Sequence[Any]) -> list[float]:
    """Minus the score of each row: high is easy. Of a preference row that is its margin.

    Raises UserError for a row without one.
    """
    found = []
    for row in rows:
        score = row.margin if isinstance(row, PreferenceRow) else getattr(row, "reward", None)
        if score is None:
            name = "margin" if isinstance(row, PreferenceRow) else "reward or meta_eval_score"
            raise UserError(
                f"{row.where}: --curriculum-by score: the row has no score; the field {name} is "
                "needed"
            )
        found.append(-float(score))
    return found


def counted_tokens(row: Any) -> tuple[list[int], int]:
    """(tokens, from which on they count) for --curriculum-by loss: the targets of the row."""
    if isinstance(row, PromptRow):
        return row.tokens, 1
    tokens = row.chosen if isinstance(row, PreferenceRow) else row.tokens
    mask = row.masks[0] if isinstance(row, PreferenceRow) else getattr(row, "mask", None)
    return tokens, mask.index(1) if mask else 1
