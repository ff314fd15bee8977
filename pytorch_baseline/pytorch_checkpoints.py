"""training/checkpoints.py in PyTorch: one state.pt, in the same folders, with the same sums."""

from pathlib import Path
from pickle import UnpicklingError

import torch

from errors import UserError
from run_folder.checkpoint_folder import disk_refused, write_checkpoint
from run_folder.manifest import Metric, problem


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict,
    options: dict | None = None,
    *,
    keep: int = 2,
    metric: Metric | None = None,
    unfinished: bool = False,
) -> Path:
    """Write `state` (tensors and plain values; "trained" and more), and return the checkpoint.

    Raises what `write_checkpoint` raises, and FloatingPointError where a trained weight is not
    finite.
    """
    for name, weight in state["trained"].items():
        if not torch.isfinite(weight).all():
            raise FloatingPointError(f"{name} holds NaN or infinity; nothing was saved")

    def write(temporary: Path) -> None:
        try:
            torch.save({"step": step, **state}, temporary / "state.pt")
        except RuntimeError as wrong:
            raise disk_refused(wrong, temporary) from None

    return write_checkpoint(
        folder, step, write, keep=keep, metric=metric, unfinished=unfinished, options=options
    )


def load_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` was given, and the step. No pickled code is ever run."""
    if wrong := problem(path):
        raise UserError(f"{path}: {wrong}; this checkpoint cannot be used")
    try:
        return torch.load(path / "state.pt", weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read: {reason}") from None
