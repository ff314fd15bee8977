"""Random numbers: one seed for all three generators, and their states as JSON."""

import random
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and MLX."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    mx.random.seed(seed)


def rng_state() -> dict[str, Any]:
    """The states of the three global generators in JSON's own types."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "mlx": [key.tolist() for key in mx.random.state],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    # MLX's key is its 64-bit seed in two words, and seeding is the only way to set it in place.
    ((high, low),) = state["mlx"]
    mx.random.seed(high << 32 | low)
