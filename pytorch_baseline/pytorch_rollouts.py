"""rl/rollouts.py and rl/ppo_statistics.py in PyTorch: one batch of experience, and its metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pytorch_rewards import rollout_stats
from torch import Tensor

import padding


@dataclass
class Rollout:
    """Shapes: B responses, R the most counted tokens in one. Rows are right-padded with 0."""

    queries: list[list[int]]  # B
    responses: list[list[int]]  # B, EOS included
    masks: list[np.ndarray]  # B, True where a response token counts
    ended: list[bool]  # B, whether the response ended by itself
    scores: Tensor  # (B,) after penalties, scaling and clipping
    mask: Tensor = None  # (B, R) 1 where there is a token
    logprobs: Tensor = None  # (B, R) under the policy that wrote them
    ref_logprobs: Tensor = None  # (B, R)
    values: Tensor = None  # (B, R)
    kls: Tensor = None  # (B, R) nats
    non_score_rewards: Tensor = None  # (B, R) -beta * KL
    rewards: Tensor = None  # (B, R) the same, plus the score on the last token
    advantages: Tensor = None  # (B, R) whitened
    returns: Tensor = None  # (B, R)


def pad_rows(rows: Sequence[np.ndarray]) -> Tensor:
    """Rows of different length -> (B, R) float32, right-padded with 0."""
    return torch.from_numpy(padding.pad_rows(rows, dtype=np.float32)[0])


def step_statistics(rollout: Rollout, minibatches: list[dict[str, float]]) -> dict:
    """Metrics of a step: of the rollout, and the means over its minibatches ("ppo/" in front)."""
    found = rollout_stats(
        rollout.scores,
        rollout.logprobs,
        rollout.ref_logprobs,
        rollout.kls,
        rollout.non_score_rewards,
        rollout.mask,
    )
    stats = {k: v.item() if v.ndim == 0 else v.cpu().numpy() for k, v in found.items()}
    for name, rows in (("queries", rollout.queries), ("responses", rollout.responses)):
        lengths = np.array([len(row) for row in rows], dtype=np.float64)
        stats[f"tokens/{name}_len_mean"] = float(lengths.mean())
        stats[f"tokens/{name}_len_std"] = float(lengths.std(ddof=1)) if len(rows) > 1 else 0.0
    stats["tokens/responses_ended"] = float(np.mean(rollout.ended))
    for name in dict.fromkeys(name for metrics in minibatches for name in metrics):
        column = [metrics[name] for metrics in minibatches if name in metrics]
        stats[f"ppo/{name}"] = float(np.mean(column))
    variance, error = stats["ppo/returns/var"], stats["ppo/val/error"]
    stats["ppo/val/var_explained"] = 1 - error / variance if variance else float("nan")
    return stats
