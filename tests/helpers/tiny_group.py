"""Group trainers on tiny models, and batches for them."""

import mlx.optimizers as optim
import numpy as np
from tiny import tiny_model
from tiny_ppo import EOS, tuned

from mlx_group_trainer import GroupConfig, GroupTrainer
from models.policy import Policy

SMALL = {
    "batch_size": 8,
    "num_generations": 4,
    "mini_batch_size": 4,
    "max_new_tokens": 6,
    "max_grad_norm": None,
}


def make_trainer(
    kind: str = "lora",
    model=None,
    optimizer=None,
    reference: bool = True,
    blocks: int = -1,
    recompute_frozen: bool = False,
    **config,
) -> GroupTrainer:
    """A trainer of `kind` (lora, dora, prompt, full) with plain SGD at 0.1 unless told otherwise.

    SGD moves the weights by the gradient itself; Adam would turn a gradient of 1e-9 into a whole
    learning rate.
    """
    model = tiny_model() if model is None else model
    other = tiny_model() if kind == "full" and reference else None
    return GroupTrainer(
        GroupConfig(**{**SMALL, **config}),
        Policy(model, tuned(model, kind, blocks)),
        other,
        optimizer=optimizer or optim.SGD(0.1),
        eos_ids=EOS,
        recompute_frozen=recompute_frozen,
    )


def random_groups(count: int = 8, size: int = 4, seed: int = 0, length: int | None = None):
    """(queries, responses, rewards); groups of `size` adjoin, responses of 2 to 6 tokens."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, 64, rng.integers(1, 5)).tolist() for _ in range(count // size)]
    lengths = rng.integers(2, 7, count) if length is None else [length] * count
    responses = [rng.integers(2, 64, n).tolist() for n in lengths]
    return [p for p in prompts for _ in range(size)], responses, rng.normal(size=count).tolist()
