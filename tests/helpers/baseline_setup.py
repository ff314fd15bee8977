"""What the tests of the PyTorch baseline share. Import it before anything else of the baseline.

Where torch is absent, importing this skips the test module.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from data_utils import BatchIterator

torch = pytest.importorskip("torch", reason="make test-baseline installs PyTorch")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pytorch_baseline"))
ORACLES = ROOT / "tests" / "oracles"
DIGITS = ROOT / "data" / "digits_model"
torch.set_num_threads(1)


def numpy(x) -> np.ndarray:
    """A torch tensor, an MLX array or a number as float64."""
    if isinstance(x, torch.Tensor):
        x = x.detach()
    return np.asarray(x, dtype=np.float64)


def close(ours, theirs, what: str = "", *, relative: float = 1e-5, absolute: float = 0.0) -> None:
    """The largest difference is at most `relative` of the largest number, plus `absolute`."""
    ours, theirs = numpy(ours), numpy(theirs)
    assert ours.shape == theirs.shape, what
    if ours.size:
        allowed = relative * max(np.abs(theirs).max(), 1e-2) + absolute
        difference = np.abs(ours - theirs).max()
        assert difference <= allowed, f"{what}: {difference:.2g} is above {allowed:.2g}"


def updates(trainer, rows, plan, count: int, accumulation: int = 1) -> list[dict[str, float]]:
    """The metrics of each update of a trainer, of either side."""
    batches = BatchIterator(rows, plan)
    made = [[next(batches) for _ in range(accumulation)] for _ in range(count)]
    return [trainer.step(part) for part in made]


def losses(*words) -> list[float]:
    return [metrics["loss"] for metrics in updates(*words)]
