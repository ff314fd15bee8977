"""The end of a step, on either backend: a checkpoint, or the end of a run that cannot go on."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import MEMORY_ADVICE, UserError
from run_folder.checkpoint_folder import list_checkpoints
from run_folder.manifest import Metric, problem
from run_folder.run import Run, read_rows
from run_folder.secrets import tell

SCORE = "eval/sampled/score"  # of held-out prompts; what makes one checkpoint the best


def skipped_steps(run_folder: Path, not_finite: str = "ppo/not_finite") -> int:
    """How many steps of the run, resumed ones included, moved no weight: their metric is 1."""
    return sum(row.get(not_finite) == 1 for row in read_rows(run_folder))


def is_best(evaluations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last evaluation has the best score so far."""
    *earlier, last = [row[SCORE] for row in evaluations]
    return all(last > other for other in earlier if other is not None)


def save_or_stop(
    loop: Any, due: bool, metric: Metric | None, what: str, last_bad: str = ""
) -> None:
    """The end of a step: a checkpoint if one is `due`; UserError where the run cannot go on.

    `loop` is of either backend; `what` was not finite in its bad steps, and `last_bad` names the
    row where that is known. Of bad steps in a row the first is saved, its update skipped, so that
    the newest checkpoints are from before the others.
    """
    plan, bad = loop.schedule, loop.bad_in_a_row
    if bad == 1 and plan.save_every:
        # Weights that are not finite themselves have an older checkpoint to go back to.
        with contextlib.suppress(NotFiniteError):
            loop.checkpoint(metric)
    elif due and not bad:
        loop.checkpoint(metric)
    if bad >= plan.max_bad_steps:
        times = f"in {bad} steps in a row (their rows: bad_rows.jsonl{last_bad})"
        raise not_finite(loop.run_folder, f"{what} was NaN or infinite {times}")
    try:
        loop.check_memory()
    except UserError:
        loop.checkpoint()
        raise


def check_memory(gigabytes: float | None, peak: float) -> None:
    """Raise ``UserError`` once the peak, in GB, has passed a limit."""
    if gigabytes is not None and peak > gigabytes:
        raise UserError(
            f"--memory-limit: {peak:.3g} GB were needed, {gigabytes:g} allowed; {MEMORY_ADVICE}"
        )


def report_skipped(loop: Any, skipped: float, what: str, last_bad: str = "") -> None:
    """The end of a run: a warning of steps that were `skipped`, a UserError where all were."""
    rows = f"their rows: bad_rows.jsonl{last_bad}"
    if loop.step and skipped == loop.step:
        raise not_finite(
            loop.run_folder,
            f"{what} was NaN or infinite in every step, so all {loop.step} were skipped and "
            f"nothing was trained ({rows})",
        )
    if skipped:
        tell(
            f"warning: {what} was NaN or infinite in {skipped:.0f} of {loop.step} steps, which "
            f"were skipped ({rows})"
        )


class NotFiniteError(UserError):
    """Training went to NaN or infinity and cannot go on."""


def not_finite(run_folder: Run, what: str) -> NotFiniteError:
    """The error that ends a run, with the way back."""
    whole = [path for path in list_checkpoints(run_folder.checkpoints) if problem(path) is None]
    back = f"from {whole[-1].name}" if whole else "from the start: no checkpoint was written before"
    if whole[:-1]:
        back += f" (--resume {whole[-2]}: from an older one)"
    return NotFiniteError(
        f"{run_folder.folder}: {what}; --resume {run_folder.folder} goes on {back}; --force-resume "
        "allows another --learning-rate, data or reward"
    )
