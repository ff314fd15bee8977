"""Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, equation 2).

Legend: B rows of a batch, D width, N tokens picked.
"""

import mlx.core as mx

from rl.losses import Metrics


def pooled(hidden: mx.array, shares: mx.array) -> mx.array:
    """hidden (N, D), shares (B, N): 1/n at a row's n tokens -> z (B, D) of length 1; 0 for none."""
    means = shares @ hidden.astype(mx.float32)
    return means * mx.rsqrt(mx.maximum(mx.square(means).sum(axis=-1, keepdims=True), 1e-12))


def contrastive_loss(z: mx.array, labels: mx.array, temperature: float) -> tuple[mx.array, Metrics]:
    """z (B, D) of length 1, labels (B,), below 0 for none -> (loss, metrics); 0 without positives.

    -mean_i mean_p log[exp(z_i z_p / t) / sum over a != i of exp(z_i z_a / t)] over rows i that have
    a positive p: another row of the same label.
    """
    others = 1 - mx.eye(len(labels))  # (B, B)
    likeness = (z @ z.T) / temperature
    total = mx.logsumexp(mx.where(others > 0, likeness, -mx.inf), axis=-1, keepdims=True)
    same = (labels[:, None] == labels[None]) & (labels[:, None] >= 0)
    positives = same.astype(mx.float32) * others
    counts = positives.sum(axis=-1)  # (B,)
    there = (counts > 0).astype(mx.float32)
    logprobs = mx.where(positives > 0, likeness - total, 0.0).sum(axis=-1)
    rows = mx.maximum(there.sum(), 1)
    loss = -(logprobs / mx.maximum(counts, 1)).sum() / rows
    return loss, {"contrastive/loss": loss, "contrastive/rows": there.mean()}
