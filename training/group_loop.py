"""The loop of group methods: several responses to a prompt, scored together.

Of training/rollout_loop.py it changes how a batch is made and what a step is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_utils import PromptRow
from rl.group_advantages import group_stds, weighted_sum
from rl.rollouts import join_rollouts, stream
from run_folder.console import Progress
from training.rollout_loop import Experience, RolloutLoop

FRESH = 4  # what a random stream is for, beside those of training/rollout_stages.py


@dataclass
class GroupLoop(RolloutLoop):
    """`run()` trains a trainer of groups (mlx_group_trainer.py)."""

    not_finite = "not_finite"
    resampled: int = 0  # groups of this step that were replaced

    # ------------------------------------------------------------------ the batch

    def collect(self) -> Experience:
        """Groups of responses to the prompts of this step, with their rewards.

        With dynamic sampling (DAPO, section 3.2), other prompts in place of groups whose rewards
        are equal, at most `max_resample` times; what is left of them is trained on as it is.
        """
        config = self.trainer.config
        chosen = self.numbers(config.prompts_per_step)
        made, seen = self.groups_of(chosen), list(chosen)
        self.resampled = 0
        for attempt in range(1, config.max_resample + 1 if config.dynamic_sampling else 1):
            equal = np.flatnonzero(self.equal_groups(made))
            if not len(equal):
                break
            fresh = self.fresh_prompts(len(equal), attempt, seen)
            made = replaced(made, self.groups_of(fresh, attempt), equal, config.num_generations)
            seen += fresh
            self.resampled += len(equal)
        return made

    def groups_of(self, chosen: Sequence[int], part: int = 0) -> Experience:
        """The groups of these prompts; `part` tells several calls in one step apart."""
        prompts = [self.prompts[i] for i in chosen]
        rollout = self.draw([row.query for row in prompts], part)
        # A copy for each group, as a prompt may stand in a batch twice.
        groups = [replace(row) for row in prompts]
        rows = [row for row in groups for _ in range(self.trainer.config.num_generations)]
        return Experience(rows, rollout, *self.timed_score(rows, rollout))

    def equal_groups(self, made: Experience) -> np.ndarray:
        """Of each group, whether its rewards are equal, or none is scored."""
        size = self.trainer.config.num_generations
        stds = np.nan_to_num(group_stds(weighted_sum(*self.reward_columns(made)), size))
        return stds[::size] == 0

    def fresh_prompts(self, count: int, attempt: int, seen: Sequence[int]) -> list[int]:
        """Numbers of prompts that this step has not had, as long as there are such."""
        random = stream(self.trainer.config.seed, self.step, FRESH, attempt)
        every = self.curriculum.open_rows(self.step) if self.curriculum else len(self.prompts)
        order = random.permutation(every).tolist()
        new = set(order) - set(seen)
        order = [i for i in order if i in new] + [i for i in order if i not in new]
        return [order[i % len(order)] for i in range(count)]

    def columns(self, rows: Sequence[PromptRow], rollout) -> dict[str, Sequence]:
        """What rewards may ask for; `group_ids` has the same number for rows of one prompt."""
        ids, last = [], None
        for row in rows:
            ids.append((ids[-1] if ids else -1) + (row is not last))
            last = row
        return super().columns(rows, rollout) | {"group_ids": ids}

    # ------------------------------------------------------------------ the step

    def reward_columns(self, made: Experience) -> tuple[np.ndarray, np.ndarray]:
        """(rewards (N, F), weights (F,)) of all functions; NaN where one did not score a row."""
        rewards = np.array(list(made.parts.values()), dtype=np.float64).T
        return rewards, np.array(self.rewards.weights, dtype=np.float64)

    def learn(self, made: Experience) -> dict:
        """The trainer's step, or none where a reward is infinite; its statistics."""
        rewards, weights = self.reward_columns(made)
        if np.isinf(rewards).any():
            return self.trainer.skip()
        stats = self.trainer.update(made.rollout, rewards, names=list(made.parts), weights=weights)
        if self.trainer.config.dynamic_sampling:
            stats["sampling/resampled"] = float(self.resampled)
        return stats

    def logged(self, stats: dict, made: Experience) -> dict:
        return stats | self.rewards.metrics(made.parts)

    def report(self, progress: Progress, stats: dict, made: Experience) -> None:
        shown = {"reward": stats["reward"]}
        if "kl" in stats:
            shown["kl"] = stats["kl"]
        shown |= {name: stats[f"rewards/{name}/mean"] for name in made.parts}
        shown |= {"equal": stats["frac_reward_zero_std"]}
        shown |= {"tokens": stats["completions/mean_length"]}
        progress.report(self.step, shown | self.paces())


def replaced(old: Experience, new: Experience, groups: Sequence[int], size: int) -> Experience:
    """`old` with its `groups` replaced by those of `new`, one after the other."""
    order = list(range(len(old.rows)))
    for place, group in enumerate(groups):
        start = len(old.rows) + place * size
        order[group * size : (group + 1) * size] = range(start, start + size)

    def joined(one: list, other: list) -> list:
        both = [*one, *other]
        return [both[i] for i in order]

    return Experience(
        joined(old.rows, new.rows),
        join_rollouts([old.rollout, new.rollout]).take(order),
        joined(old.texts, new.texts),
        joined(old.scores, new.scores),
        {name: joined(column, new.parts[name]) for name, column in old.parts.items()},
    )
