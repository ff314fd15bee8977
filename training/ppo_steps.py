"""What both backends' PPO loops ask of their steps and evaluations. Loads no MLX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from run_folder.run import read_rows

SCORE = "eval/sampled/score"  # of held-out prompts; what makes one checkpoint the best


def skipped_steps(run_folder: Path, not_finite: str = "ppo/not_finite") -> int:
    """How many steps of the run, resumed ones included, moved no weight: their metric is 1."""
    return sum(row.get(not_finite) == 1 for row in read_rows(run_folder))


def is_best(evaluations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last evaluation has the best score so far."""
    *earlier, last = [row[SCORE] for row in evaluations]
    return all(last > other for other in earlier if other is not None)
