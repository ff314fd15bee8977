"""The run of a worker that writes nothing: worker 0 keeps the folder for all."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from run_folder.rows import numbered


class SilentRun:
    """What loops ask of a `Run` (run.py), without a file. `folder` is worker 0's."""

    may_change, typed, recorded = (), frozenset(), None
    own_options: dict[str, Any] = {}

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoints, self.plots = self.folder / "checkpoints", self.folder / "plots"

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return numbered(step, metrics)

    def log_values(self, step: int, name: str, values: Iterable[float]) -> None:
        """Nothing."""

    def log_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Nothing."""

    def log_bad_rows(self, step: int, reason: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def cut_back(self, state: Mapping[str, Any]) -> None:
        """Nothing."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""

    def __enter__(self) -> "SilentRun":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""
