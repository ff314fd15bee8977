"""sft.py in which worker 1 is odd, as the variable ODD says: slow, drift, seed, version or base."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fast_blas  # noqa: E402, F401, I001

import importlib.metadata  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402

import mlx.core as mx  # noqa: E402

import mlx_sft_trainer  # noqa: E402
import sft  # noqa: E402
from command_line.exits import run_main  # noqa: E402

MODE = os.environ["ODD"]


def wrapped(inner, mode: str):
    """`SupervisedTrainer.step` that takes longer, or rounds otherwise than other chips."""

    def step(self, batches):
        if mode == "slow":
            time.sleep(0.5)
        found = inner(self, batches)
        if mode == "drift":
            arrays = self.task.tuning.arrays()
            name = min(arrays)
            self.task.tuning.load_arrays({**arrays, name: arrays[name] * 1.001 + 1e-4}, "drift")
        return found

    return step


if os.environ["MLX_RANK"] == "1":
    trainer = mlx_sft_trainer.SupervisedTrainer
    trainer.step = wrapped(trainer.step, MODE)
    if MODE == "seed":
        seed = mx.random.seed
        mx.random.seed = lambda number: seed(number + 1)
    if MODE == "version":
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: "0.0.1" if name == "mlx" else version(name)

run_main(sft.main, workers=True)
