"""Right-padding, once for all: rows of different length to one array. NumPy alone."""

from collections.abc import Sequence

import numpy as np


def pad_rows(
    rows: Sequence[Sequence],
    pad_id: float = 0,
    pad_to_multiple: int = 1,
    dtype: type = np.int32,
) -> tuple[np.ndarray, np.ndarray]:
    """(rows (B, L) of `dtype`, padded on the right to a multiple; lengths (B,) int32)."""
    lengths = np.array([len(row) for row in rows], np.int32)
    width = -(-int(lengths.max()) // pad_to_multiple) * pad_to_multiple
    padded = np.full((len(rows), width), pad_id, dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded, lengths
