"""A step's metrics of a group method under TRL's names, and the warnings that they call for."""

import math
from collections.abc import Sequence

import numpy as np

from rl.group_config import GroupConfig
from rl.ppo_statistics import ALMOST_NO_ENTROPY, MOSTLY_CUT_OFF
from rl.rollouts import Rollout

# Steps in a row in which no group had two different rewards, before it is said.
STEPS_OF_EQUAL_REWARDS = 20
# Of the passes of a step these are extremes; all other metrics are means over them.
LEAST, LARGEST = (
    ("clip_ratio/low_min", "clip_ratio/high_min"),
    (
        "clip_ratio/low_max",
        "clip_ratio/high_max",
    ),
)
NOT_SHOWN = ("entropy_sum", "entropy_count")


def completion_metrics(rollout: Rollout) -> dict[str, float]:
    """Lengths of the policy's own tokens, of all responses and of those that ended."""
    lengths = np.array([mask.sum() for mask in rollout.masks], dtype=np.float64)
    own = np.array([len(r) for r in rollout.responses], dtype=np.float64)
    # A response that is masked as a whole has its length all the same.
    lengths = np.where(lengths > 0, lengths, own)
    ended = np.array(rollout.ended)
    whole = lengths[ended] if ended.any() else np.zeros(1)
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
        "completions/mean_terminated_length": float(whole.mean()),
        "completions/min_terminated_length": float(whole.min()),
        "completions/max_terminated_length": float(whole.max()),
    }


def pass_metrics(passes: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step's forward passes as one: means, and extremes of extremes."""
    found = {}
    for name in dict.fromkeys(name for metrics in passes for name in metrics):
        values = [metrics[name] for metrics in passes if name in metrics]
        if name not in NOT_SHOWN:
            join = min if name in LEAST else max if name in LARGEST else np.mean
            found[name] = float(join(values))
    return found


def config_warnings(config: GroupConfig) -> dict[str, str]:
    """What is unusual about the options."""
    found = {}
    if config.advantage_estimator == "rloo" or config.online_dpo:  # these have no loss type
        return found
    if config.loss_type == "luspo":  # as TRL warns: its paper's loss is GSPO's times the length
        if config.importance_sampling_level == "token":
            found["level"] = (
                "--loss-type luspo with ratios of tokens: its paper has one of each response, "
                "--importance-sampling-level sequence"
            )
    elif config.importance_sampling_level == "sequence" and config.loss_type != "grpo":
        found["level"] = (
            f"--importance-sampling-level sequence with --loss-type {config.loss_type}: GSPO is "
            "--loss-type grpo, where each response weighs the same"
        )
    return found


def warnings_for(stats: dict, equal_steps: int, max_new_tokens: int) -> dict[str, str]:
    """What looks wrong in a step: a name for each kind of trouble, and a sentence.

    `equal_steps`: steps in a row in which the rewards of every group were equal.
    """
    found = {}
    if equal_steps >= STEPS_OF_EQUAL_REWARDS and math.isnan(stats["reward"]):
        found["equal"] = (
            f"for {equal_steps} steps no two responses to a prompt were told apart, as no reward "
            "scored them (the last were all None or NaN), so nothing was learned"
        )
    elif equal_steps >= STEPS_OF_EQUAL_REWARDS:
        found["equal"] = (
            f"for {equal_steps} steps all responses to a prompt had the same reward, so nothing "
            "was learned: the task is too easy or too hard for this model, or the reward does not "
            "tell responses apart"
        )
    if stats.get("entropy", math.inf) < ALMOST_NO_ENTROPY:
        found["entropy"] = (
            "entropy is almost 0: the policy writes one text to a prompt and can learn nothing "
            "from it; a lower learning rate, --beta or --entropy-coef helps"
        )
    if stats["completions/clipped_ratio"] > MOSTLY_CUT_OFF:
        found["length"] = (
            f"most responses reach the limit of {max_new_tokens} tokens without an end; raise "
            "--max-new-tokens or set --missing-eos-penalty"
        )
    return found
