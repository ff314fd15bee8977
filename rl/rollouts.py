"""One batch of experience: what was asked, what was written, and what PPO makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

import padding


@dataclass
class Rollout:
    """Shapes: B responses, R the most counted tokens in one. Rows are right-padded with 0."""

    queries: list[list[int]]  # B
    responses: list[list[int]]  # B, EOS included
    masks: list[np.ndarray]  # B, True where a response token counts
    ended: list[bool]  # B, whether the response ended by itself
    scores: mx.array  # (B,) after penalties, scaling and clipping
    mask: mx.array = field(default=None)  # (B, R) 1 where there is a token
    logprobs: mx.array = field(default=None)  # (B, R) under the policy that wrote them
    ref_logprobs: mx.array = field(default=None)  # (B, R)
    values: mx.array = field(default=None)  # (B, R)
    kls: mx.array = field(default=None)  # (B, R) nats
    non_score_rewards: mx.array = field(default=None)  # (B, R) -beta * KL
    rewards: mx.array = field(default=None)  # (B, R) the same, plus the score on the last token
    advantages: mx.array = field(default=None)  # (B, R) whitened
    returns: mx.array = field(default=None)  # (B, R)


def pad_rows(rows: Sequence[np.ndarray]) -> mx.array:
    """Rows of different length -> (B, R) float32, right-padded with 0."""
    return mx.array(padding.pad_rows(rows, dtype=np.float32)[0])
