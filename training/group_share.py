"""What a worker's part of a group method's pass weighs (training/pass_share.py)."""

from collections.abc import Sequence

import numpy as np

from distributed.group import here
from rl.group_config import GroupConfig
from rl.group_losses import LOSSES, over_batch_tokens, over_pass_tokens
from rl.group_statistics import LARGEST, LEAST, NOT_SHOWN
from rl.rollouts import Rollout
from training.pass_share import PassShare

# Means over rows where the ratio is one of a whole response.
OF_RATIOS = (
    "clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean cispo_clip_ratio"
).split()
OF_PAIRS = "rewards/chosen rewards/rejected rewards/margins rewards/accuracies".split()


def own_rows(rows: np.ndarray, unit: int) -> np.ndarray:
    """This worker's of `rows`, which adjoin in units: pairs of online DPO stay together."""
    return here().share(rows.reshape(-1, unit)).reshape(-1)


def group_share(
    config: GroupConfig, rollout: Rollout, rows: np.ndarray, own: np.ndarray
) -> PassShare:
    """The weights of this worker's `own` rows in a pass of `rows`."""
    workers = here()
    unit = 2 if config.online_dpo else 1
    units = rows.reshape(-1, unit)
    parts = [units[rank :: workers.size].reshape(-1) for rank in range(workers.size)]
    counts = [sum(int(rollout.masks[row].sum()) for row in part) for part in parts]
    tokens = counts[workers.rank] / max(sum(counts), 1)
    of_rows = len(own) / len(rows)
    loss = of_rows if config.advantage_estimator == "rloo" else loss_share(config, tokens, of_rows)
    if config.online_dpo:
        loss = decided_share(rollout, rows, own)
    whole_ratio = (
        config.advantage_estimator == "rloo" or config.importance_sampling_level == "sequence"
    )
    metrics = dict.fromkeys(OF_RATIOS, of_rows if whole_ratio else tokens)
    metrics |= {"entropy": tokens, "kl": tokens, "vespo/phi_seq_mean": of_rows, "ties": of_rows}
    metrics |= dict.fromkeys(NOT_SHOWN, 1.0) | dict.fromkeys(OF_PAIRS, loss)
    there = [whole_ratio or count > 0 for count in counts]
    # The entropy term is a mean over tokens, but for losses that divide by those of the batch.
    by_tokens = tokens / loss if loss else 0.0
    over_batch = LOSSES[config.loss_type][1] is over_batch_tokens
    return PassShare(loss, metrics, LEAST, LARGEST, there, 1.0 if over_batch else by_tokens)


def loss_share(config: GroupConfig, tokens: float, of_rows: float) -> float:
    """Of the losses of rl/group_losses.py, by what their reduction divides by."""
    _, reduction = LOSSES[config.loss_type]
    if reduction is over_batch_tokens:
        return 1.0
    return tokens if reduction is over_pass_tokens else of_rows


def decided_share(rollout: Rollout, rows: Sequence[int], own: Sequence[int]) -> float:
    """Of online DPO, a mean over the pairs that are no tie, or a sum where there is one at most."""
    decided = np.abs(np.array(rollout.advantages)[:, 0])
    return max(decided[own[::2]].sum(), 1.0) / max(decided[rows[::2]].sum(), 1.0)
