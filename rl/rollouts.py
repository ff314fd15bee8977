"""One batch of experience: what was asked, what was written, and what training makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np


@dataclass
class Rollout:
    """Shapes: B responses, R the most counted tokens in one. Rows are right-padded with 0.

    The lists are what sampling gives, one entry a response; the arrays are filled in stage by stage
    (training/rollout_stages.py), and stay None where an algorithm has no use for them.
    """

    queries: list[list[int]]  # B
    responses: list[list[int]]  # B, EOS included
    ended: list[bool]  # B, whether the response ended by itself: by EOS or a stop text
    sampled_logprobs: list[np.ndarray] | None = None  # B x (length,), None: not kept
    sampled_values: list[np.ndarray] | None = None  # B x (length,), None: no value head, not kept
    masks: list[np.ndarray] = None  # B x (length,), True where a response token counts (all)

    scores: mx.array = field(default=None)  # (B,) after penalties, scaling and clipping
    mask: mx.array = field(default=None)  # (B, R) 1 where there is a token
    logprobs: mx.array = field(default=None)  # (B, R) under the policy that wrote them
    ref_logprobs: mx.array = field(default=None)  # (B, R)
    values: mx.array = field(default=None)  # (B, R)
    kls: mx.array = field(default=None)  # (B, R) nats
    non_score_rewards: mx.array = field(default=None)  # (B, R) -beta * KL
    rewards: mx.array = field(default=None)  # (B, R) the same, plus the score on the last token
    advantages: mx.array = field(default=None)  # (B, R)
    returns: mx.array = field(default=None)  # (B, R)

    def __post_init__(self):
        if self.masks is None:
            self.masks = [np.ones(len(response), dtype=bool) for response in self.responses]

    def __len__(self) -> int:
        return len(self.responses)

    def take(self, rows: Sequence[int]) -> "Rollout":
        """What was sampled of these rows, in this order; no array comes along."""

        def taken(column):
            return None if column is None else [column[row] for row in rows]

        return Rollout(**{name: taken(getattr(self, name)) for name in SAMPLED})


SAMPLED = ("queries", "responses", "ended", "sampled_logprobs", "sampled_values", "masks")


def join_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """One rollout of what was sampled in several calls, row after row; no array comes along."""

    def joined(name: str):
        columns = [getattr(part, name) for part in parts]
        return None if None in columns else [entry for column in columns for entry in column]

    return Rollout(**{name: joined(name) for name in SAMPLED})


def pad_rows(rows: Sequence[np.ndarray]) -> mx.array:
    """Rows of different length -> (B, R) float32, right-padded with 0."""
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.float32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return mx.array(padded)
