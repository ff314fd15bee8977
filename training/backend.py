"""The five functions that the loops ask of an array library.

training/mlx_backend.py has MLX's, pytorch_baseline/pytorch_backend.py the twin's: a module with
these names. Importing this, or a loop, loads neither library.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from run_folder.manifest import Metric
from training.groups import Arrays


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: ``arrays[group][name]`` and whatever ``state`` was saved with."""

    path: Path
    step: int
    arrays: dict[str, Arrays]
    state: dict[str, Any]


class Backend(Protocol):
    """An array library, to the loops."""

    def save_checkpoint(
        self,
        folder: Path,
        step: int,
        arrays: Mapping[str, Arrays],
        state: Mapping[str, Any],
        *,
        described: Mapping[str, Mapping[str, Any]],
        keep: int,
        metric: Metric | None,
        unfinished: bool,
        options: dict[str, Any],
    ) -> Path:
        """Write a checkpoint (``write_checkpoint`` has the rest); FloatingPointError for NaN."""

    def load_checkpoint(self, path: Path) -> Checkpoint:
        """Read a checkpoint; UserError where it is missing, torn or altered."""

    def training_state(self, trainer: Any) -> tuple[Arrays, Any]:
        """(what its optimizer remembers, the states of the random generators)."""

    def restore_training(self, trainer: Any, arrays: Arrays, generators: Any, trained: Any) -> None:
        """Put back what ``training_state`` gave; ``trained``: the parameters that are trained.

        UserError where it belongs to another optimizer or other parameters.
        """

    def peak_memory(self) -> float:
        """The most memory held so far, in GB."""
