"""Random batches of what PPO's arithmetic is given."""

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

NAMES = ("logprobs", "old_logprobs", "ref_logprobs", "values", "old_values")


seeds = st.integers(0, 2**32 - 1)


def make_batch(seed: int, rows: int = 5, tokens: int = 9, holes: bool = True) -> dict:
    """A random batch (B, T) with padding on both sides, and holes; scores (B,)."""
    rng = np.random.default_rng(seed)
    batch = {name: rng.normal(size=(rows, tokens)).astype(np.float32) for name in NAMES}
    batch["logprobs"] = batch["old_logprobs"] + 0.3 * batch["logprobs"]
    mask = np.zeros((rows, tokens), dtype=np.float32)
    for row in mask:
        start = rng.integers(0, tokens)
        row[start : rng.integers(start + 1, tokens + 1)] = 1
        if holes:
            row *= rng.random(tokens) < 0.7
        row[start] = 1
    batch["mask"] = mask
    batch["scores"] = rng.normal(size=rows).astype(np.float32)
    return {name: mx.array(value) for name, value in batch.items()}
