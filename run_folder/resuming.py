"""Whether a run may go on: what of its options, data and base may differ. Loads no MLX."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from run_folder.manifest import options_of
from run_folder.run import Run
from run_folder.run_config import REDACTED
from run_folder.secrets import tell

# Where things are written and what is printed: a run with other values here ends the same.
HARMLESS = frozenset(
    "any_base changed config cpus_per_worker defaults explicit force_resume fused_dir "
    "keep_checkpoints log_with max_bad_steps may_change memory_limit num_training_workers "
    "output_dir overwrite resume save_every save_file steps_per_report typed wandb_project "
    "wandb_run_name worker_timeout".split()
)
# How long a run goes on: harmless as long as the learning rate does not depend on it.
LENGTHS = frozenset({"epochs", "iters", "num_steps", "steps"})
# Rows that a fingerprint of the data looks at: all of a small set, a spread of a large one.
LOOKED_AT = 1000


def check_resume_options(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    harmless: Iterable[str] = (),
    force: bool = False,
    cure: str = "leave the flag out",
) -> list[str]:
    """Compare the options of a run with those it is resumed with; return the names that changed.

    Raises ``UserError`` for the first change that would make the resumed run differ from one that
    was never stopped, unless ``force``. Names that only one side has are not compared.
    """
    allowed = HARMLESS | set(harmless)
    # Only a constant rate is the same function of the step whatever the number of steps.
    if new.get("lr_schedule", "constant") == "constant":
        allowed |= LENGTHS
    changed = [name for name in old if name in new and old[name] != new[name]]
    refused = [name for name in changed if name not in allowed]
    if refused and not force:
        name = refused[0]
        flag = "--" + name.replace("_", "-")
        why = f"{new[name]!r} differs from {old[name]!r} in the run that is resumed, so it"
        if name in LENGTHS:
            why = (
                f"the rates of --lr-schedule {new['lr_schedule']} depend on how long a run is, so "
                "with another length than it was started with it"
            )
        raise UserError(
            f"{flag}: {why} would not end as it would have; {cure}, or add --force-resume"
        )
    return changed


def check_checkpoint_options(checkpoint: Path, run: Run, force: bool) -> None:
    """UserError where a run's config.json is not what its checkpoint was made with; notes of what
    may differ. Some edit that file, and a bit of it may change by itself."""
    made_with = options_of(checkpoint)
    if made_with is None:
        return
    file, now = run.folder / "config.json", run.own_options
    if made_with["script"] != now["script"]:
        raise UserError(f"{checkpoint}: is of a run of {made_with['script']}")
    old = {k: v for k, v in made_with["options"].items() if REDACTED not in str(v)}
    new = {k: v for k, v in now["options"].items() if REDACTED not in str(v)}
    changed = check_resume_options(
        old, new, harmless=run.may_change, force=force, cure=f"put it back in {file}"
    )
    for name in sorted({*changed} - run.typed):
        flag = "--" + name.replace("_", "-")
        tell(
            f"note: {flag} is {new[name]!r} now, and was {old[name]!r} when {checkpoint.name} was "
            "made"
        )


def fingerprint(rows: Sequence[Any]) -> str:
    """What tells one set of training rows from another: a hash of their number and of a spread."""
    spread = range(0, len(rows), max(1, len(rows) // LOOKED_AT))
    text = repr((len(rows), [rows[i] for i in spread]))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_same_data(state: Mapping[str, Any], now: str) -> None:
    """Raise ``UserError`` unless a checkpoint was made on rows with the fingerprint ``now``."""
    if state["data"] != now:
        raise UserError(
            "--resume: the training data is not what the run was started with, so it would not end "
            "as it would have; put the files back, or add --force-resume"
        )


def check_whole_updates(step: int, accumulation: int, position: int, batches: int | None) -> None:
    """Raise ``UserError`` where a checkpoint's last update is not one that a longer run makes.

    ``step`` updates of ``accumulation`` batches are done, in which ``position`` batches were used,
    of ``batches`` in all (None: no limit).
    """
    if position < step * accumulation and position != batches:
        flag = "--iters" if batches is None else "--epochs"
        raise UserError(
            f"{flag}: the run that is resumed ended in an update of fewer than {accumulation} "
            "batches, which a longer run would not have made; start anew, or add --force-resume"
        )


def check_same_reference(state: Mapping[str, Any], now: str | None) -> None:
    """Raise ``UserError`` unless a checkpoint was compared with the reference ``now``.

    It is the fingerprint of one that lies outside of the run; None, or none, is not compared.
    """
    if None not in (state.get("reference"), now) and state["reference"] != now:
        raise UserError(
            "--resume: the file of --resume-adapter-file, the reference, is not what the run was "
            "started with, so it would not end as it would have; put it back, or add --force-resume"
        )


def check_same_base(state: Mapping[str, Any], now: str | None) -> None:
    """Raise ``UserError`` unless a checkpoint was made on a base with the fingerprint ``now``.

    An unknown one (None, or a checkpoint that holds none) is not compared.
    """
    then = state.get("base")
    if None not in (then, now) and then != now:
        raise UserError(
            "--resume: the weights of the model are not what the run was started with (fingerprint "
            f"{then}, now {now}), so it would not end as it would have; put them back, or add "
            "--force-resume"
        )
