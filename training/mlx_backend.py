"""What the loops ask of MLX: see training/backend.py."""

from typing import Any

from training.checkpoints import load_checkpoint, refuse_non_finite, save_checkpoint
from training.groups import Arrays
from training.memory import peak_memory
from training.optimizers import optimizer_arrays, restore_optimizer
from training.streams import rng_state, set_rng_state

__all__ = [
    "load_checkpoint",
    "peak_memory",
    "refuse_non_finite",
    "restore_training",
    "save_checkpoint",
    "training_state",
]


def training_state(trainer: Any) -> tuple[Arrays, dict[str, Any]]:
    return optimizer_arrays(trainer.optimizer), rng_state()


def restore_training(trainer: Any, arrays: Arrays, generators: dict, trained: dict) -> None:
    restore_optimizer(trainer.optimizer, arrays, trained)
    set_rng_state(generators)
