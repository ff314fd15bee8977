"""Rows of different length to one array, right-padded, once for all. NumPy alone."""

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
    width = round_up(int(lengths.max()), pad_to_multiple)
    padded = np.full((len(rows), width), pad_id, dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded, lengths


def lay_out(
    rows: Sequence[Sequence[int]],
    ends: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]] | None,
    pad_to_multiple: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens (B, L) of rows that end in `ends`, which of them count (B, L), and a mask (B, R).

    `masks` marks the tokens of `ends` that count (None: all). R is the most that count in a row;
    row i of the mask is 1 in as many places as count there. L - 1 and R are rounded up.
    """
    length = 1 + round_up(max(map(len, rows)) - 1, pad_to_multiple)
    tokens = np.zeros((len(rows), length), dtype=np.int32)
    counted = np.zeros((len(rows), length), dtype=bool)
    for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
        tokens[i, : len(row)] = row
        counted[i, len(row) - len(end) : len(row)] = True if masks is None else masks[i]
    counts = counted.sum(axis=1)
    mask = np.arange(round_up(int(counts.max()), pad_to_multiple)) < counts[:, None]
    return tokens, counted, mask


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
