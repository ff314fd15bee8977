"""A PPO step's metrics under TRL's names, and the warnings that they call for. No array library."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from rl.rollouts import Rollout

if TYPE_CHECKING:
    from rl.ppo_config import PPOConfig

# What may be wrong, from metrics to a sentence; each is said once a run.
ALMOST_NO_ENTROPY = 0.01  # nats per token
MOSTLY_CUT_OFF = 0.5  # share of responses


def rollout_statistics(rollout: Rollout, rollout_stats: Callable[..., dict]) -> dict:
    """Metrics of a batch before it is trained on; those of the KL where a reference was asked.

    `rollout_stats` is the backend's (rl/shaping.py).
    """
    stats = rollout_stats(
        rollout.scores,
        rollout.logprobs,
        rollout.ref_logprobs,
        rollout.kls,
        rollout.non_score_rewards,
        rollout.mask,
    )
    stats = {k: v.item() if v.ndim == 0 else np.array(v) for k, v in stats.items()}
    for name, rows in (("queries", rollout.queries), ("responses", rollout.responses)):
        lengths = np.array([len(row) for row in rows], dtype=np.float64)
        stats[f"tokens/{name}_len_mean"] = float(lengths.mean())
        stats[f"tokens/{name}_len_std"] = float(lengths.std(ddof=1)) if len(rows) > 1 else 0.0
    stats["tokens/responses_ended"] = float(np.mean(rollout.ended))
    return stats


def minibatch_means(minibatches: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over those minibatches that have it."""
    names = dict.fromkeys(name for metrics in minibatches for name in metrics)
    return {
        name: float(np.mean([metrics[name] for metrics in minibatches if name in metrics]))
        for name in names
    }


def step_statistics(
    rollout: Rollout, minibatches: list[dict[str, float]], rollout_stats: Callable[..., dict]
) -> dict:
    """Metrics of a step: of the rollout, and the means over its minibatches ("ppo/" in front)."""
    stats = rollout_statistics(rollout, rollout_stats)
    stats |= {f"ppo/{name}": value for name, value in minibatch_means(minibatches).items()}
    variance = stats["ppo/returns/var"]
    error = stats["ppo/val/error"]
    stats["ppo/val/var_explained"] = 1 - error / variance if variance else float("nan")
    return stats


def logged_row(stats: Mapping[str, Any], parts: Mapping[str, Sequence], scores: Sequence) -> dict:
    """A step's scalars as one row, with env/reward_mean and env/reward_std of the scores.

    `parts` may hold further columns of numbers; each is logged as env/<name>_mean, over the rows
    that have one (NaN: none).
    """
    row = {name: value for name, value in stats.items() if np.ndim(value) == 0}
    row["env/reward_mean"] = float(np.mean(scores))
    row["env/reward_std"] = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    return row | {f"env/{name}_mean": value for name, value in part_means(parts).items()}


def part_means(parts: Mapping[str, Sequence]) -> dict[str, float]:
    """The mean of each column of numbers over the rows that have one; NaN where none has."""
    found = {}
    for name, column in parts.items():
        if len(column) and isinstance(column[0], (int, float)):
            there = [value for value in column if not np.isnan(value)]
            found[name] = float(np.mean(there)) if there else float("nan")
    return found


def sampling_warnings(config: "PPOConfig") -> dict[str, str]:
    """What is unusual about how responses are drawn."""
    found = {}
    filters = {"top_k": config.top_k, "min_p": config.min_p, "top_p": config.top_p % 1}
    used = ", ".join(f"--{name.replace('_', '-')}" for name, value in filters.items() if value)
    if used:
        found["filters"] = (
            f"{used}: texts are drawn from a part of the distribution that is scored, so the KL is "
            "no longer an estimate of the true one and can become negative"
        )
    if config.temperature != 1:
        found["temperature"] = (
            f"--temperature {config.temperature:g}: it is the policy at this temperature that is "
            "scored and trained; the model at temperature 1 is another one"
        )
    return found


def warnings_for(stats: dict, max_new_tokens: int) -> dict[str, str]:
    """What looks wrong in a step: a name for each kind of trouble, and a sentence."""
    found = {}
    if stats.get("objective/kl", 0.0) < -1.0:
        found["kl"] = (
            f"KL to the reference is {stats['objective/kl']:.2f}, below 0: sampling is not the "
            "policy's own distribution (temperature 1, no top-k, top-p or min-p is)"
        )
    if stats["ppo/policy/entropy"] < ALMOST_NO_ENTROPY:
        found["entropy"] = (
            "entropy is almost 0: the policy writes one text and can learn nothing from it; "
            "a higher KL coefficient or a lower learning rate helps"
        )
    if stats["ppo/std_scores"] <= 1e-6 * abs(stats["ppo/mean_scores"]):  # less is rounding
        found["scores"] = "all scores of a batch are equal: there is nothing to learn from them"
    if 1 - stats["tokens/responses_ended"] > MOSTLY_CUT_OFF:
        found["length"] = (
            f"most responses reach the limit of {max_new_tokens} tokens without an end; "
            "raise --max-new-tokens or set --missing-eos-penalty"
        )
    return found


class StageClock:
    """Seconds of each stage, under TRL's names."""

    def __init__(self):
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[f"time/ppo/{name}"] = now - self._last
        self._last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part of what the next `lap` covers."""
        start = time.perf_counter()
        yield
        self._laps[f"time/ppo/{name}"] = time.perf_counter() - start

    def times(self) -> dict[str, float]:
        return self._laps | {"time/ppo/total": time.perf_counter() - self._start}
