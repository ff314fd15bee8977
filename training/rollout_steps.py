"""What trainers on rollouts do that needs no array library: order, checks, scores, counting.

`PPOSteps.update` is PPO as one numbered loop, for MLX (mlx_ppo_trainer.py) and the PyTorch twin;
forward passes, losses, GAE and KL are each backend's own. Group methods share `RolloutSteps`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rl.ppo_statistics import (
    StageClock,
    logged_row,
    sampling_warnings,
    step_statistics,
    warnings_for,
)
from rl.rollouts import (
    EVALUATION,
    SAMPLING,
    Array,
    Rollout,
    as_numbers,
    check_rollout,
    minibatch_order,
    response_limits,
    token_lists,
)
from rl.scores import (
    RunningMoments,
    clip_scores,
    length_penalties,
    make_kl_controller,
    scale_scores,
)

if TYPE_CHECKING:
    from rl.ppo_config import PPOConfig


class RolloutSteps:
    """A step is `generate`, which gives a `Rollout`, and then `update`.

    A subclass has `update`; `_sample(queries, sampling, should_stop, purpose, max_tokens)`, which
    draws by the random stream of `purpose`; and `_update(rollout, rows)`, which moves the weights.
    """

    not_finite = "not_finite"  # the metric of a step without an update

    def __init__(self, config: Any, eos_ids: set[int], vocabulary: int):
        self.config, self.eos_ids, self.vocabulary = config, set(eos_ids), vocabulary
        self.steps_done = 0
        self.before_update: Callable[[], None] = lambda: None  # called before weights move
        self._warned: set[str] = set()

    def as_rollout(
        self, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> Rollout:
        """Responses that were written elsewhere; they have ended where they end with EOS."""
        responses = token_lists(responses)
        ended = [bool(response) and response[-1] in self.eos_ids for response in responses]
        return Rollout(token_lists(queries), responses, ended)

    def skip(self) -> dict:
        """A step without an update, for a batch that cannot be learned from; its statistics."""
        self.steps_done += 1
        return {self.not_finite: 1.0}

    def check(self, rollout: Rollout, scores: Sequence[float], response_masks) -> None:
        """UserError, naming the row, for what cannot be learned from; sets masks that are given.

        `scores` (B,); `response_masks` has a 0 for each response token that is not the policy's.
        """
        check_rollout(
            rollout.queries,
            rollout.responses,
            scores,
            response_masks,
            self.config.batch_size,
            self.vocabulary,
        )
        if response_masks is not None:
            rollout.masks = [np.asarray(mask, dtype=bool) for mask in response_masks]

    def penalties(
        self, responses: Sequence[Sequence[int]], ended: Sequence[bool]
    ) -> Sequence[float]:
        """What comes off the score of each response for its length, or for no end; (B,)."""
        config = self.config
        return length_penalties(
            [len(response) for response in responses],
            ended,
            missing_eos_penalty=config.missing_eos_penalty,
            max_length=config.max_new_tokens,
            overlong_buffer=config.overlong_buffer,
            overlong_penalty=config.overlong_penalty,
        )

    # ------------------------------------------------------------------ sample

    @property
    def sampling(self) -> dict[str, float]:
        """How responses are drawn to train on."""
        config = self.config
        filters = {"top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p}
        return {"temperature": config.temperature, **filters}

    def sample_for_evaluation(
        self,
        queries: Sequence[Sequence[int]],
        greedy: bool,
        should_stop: Callable[[list[int]], bool] | None = None,
        part: int = 0,
    ) -> Rollout:
        """A response to each query, the most likely one or a sampled one; without values.

        `part` tells the batches of one evaluation apart, so that each draws other numbers.
        """
        sampling = {"temperature": 0.0 if greedy else self.config.temperature}
        return self._sample(queries, sampling, should_stop, (EVALUATION, part))

    # ------------------------------------------------------------------ optimise

    def minibatch_order(self, epoch: int) -> np.ndarray:
        """A permutation of the batch (B,), fresh for each epoch of each step."""
        config = self.config
        return minibatch_order(config.batch_size, config.seed, self.steps_done, epoch)

    def optimise(self, rollout: Rollout) -> list[dict[str, float]]:
        """Epochs of updates; returns the metrics of each minibatch."""
        config, metrics = self.config, []
        for epoch in range(config.ppo_epochs):
            order = self.minibatch_order(epoch)
            for start in range(0, config.batch_size, config.backward_batch_size):
                metrics += self._update(rollout, order[start : start + config.backward_batch_size])
            if self.far_enough(metrics):
                break
        return metrics

    def far_enough(self, metrics: list[dict[str, float]]) -> bool:
        """Whether the epochs of this step end early, from the metrics of its minibatches."""
        return False

    def _warn(self, **messages: str) -> None:
        """Say each of these once a run, by its name."""
        for name, message in messages.items():
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(message, stacklevel=3)


class PPOSteps(RolloutSteps):
    """PPO; the parts are numbered as in docs/ppo.md.

    A backend has `arithmetic` (`policy_loss`, `value_loss`, `masked_mean`, `masked_whiten`, `gae`,
    `per_token_rewards`, `rollout_stats`), `as_array`, `score_policy`, `score_reference`,
    `learning_rate` and the gradients.
    """

    not_finite = "ppo/not_finite"
    arithmetic: Any

    def set_up(self, config: "PPOConfig") -> None:
        """Controllers and moments, as before the first step."""
        self.kl_controller = make_kl_controller(config)
        self.running = RunningMoments()
        self._warn(**sampling_warnings(config))

    # ------------------------------------------------------------------ 1. generate

    def generate(
        self,
        queries: Sequence[Sequence[int]],
        *,
        max_tokens: int | Sequence[int] | None = None,
        should_stop: Callable[[list[int]], bool] | None = None,
        part: int = 0,
    ) -> Rollout:
        """Sample a response (token ids, EOS included) to each query, as the config says.

        `max_tokens` replaces the config's limit, for all or for each; `should_stop(tokens)` ends a
        response early. A batch may be made in several calls (rl.rollouts.join_rollouts); `part`
        tells them apart, so that each draws other numbers.
        """
        config = self.config
        parts = (part,) if part else ()  # the first one has the stream of the step itself
        if max_tokens is None:
            max_tokens = response_limits(
                config.min_response_length,
                config.max_new_tokens,
                len(queries),
                config.seed,
                self.steps_done,
                *parts,
            )
        purpose, head = (SAMPLING, *parts), self.model.value_head
        return self._sample(
            queries, self.sampling, should_stop, purpose, max_tokens, value_head=head
        )

    # ------------------------------------------------------------------ the step

    def step(
        self,
        queries: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        scores: Sequence[float],
        response_masks: Sequence[Sequence[int]] | None = None,
    ) -> dict:
        """TRL's interface: `update` for responses (token ids) that say no more than themselves.

        They are scored in a forward pass of their own, and have ended where they end with EOS.
        """
        return self.update(self.as_rollout(queries, responses), scores, response_masks)

    def update(
        self,
        rollout: Rollout,
        scores: Sequence[float],
        response_masks: Sequence[Sequence[int]] | None = None,
    ) -> dict:
        """One PPO step on a batch of responses with a score each.

        `response_masks` has a 0 for each response token that the policy did not choose (a tool's
        output); rewards and advantages pass over those. Returns statistics under TRL's names.
        Raises UserError, naming the row, for what cannot be learned from. Where a loss or gradient
        was not finite ("ppo/not_finite"), KL coefficient and running moments are as before.
        """
        clock, before = StageClock(), self.state_dict()
        rollout = self.prepare(rollout, scores, response_masks)  # 2.
        self.score_policy(rollout)  # 3.
        with clock.part("reference"):
            self.score_reference(rollout)  # 4.
        clock.lap("forward_pass")
        self.compute_rewards(rollout)  # 5.
        clock.lap("compute_rewards")
        self.compute_advantages(rollout)  # 6.
        clock.lap("compute_advantages")
        minibatches = self.optimise(rollout)  # 7.
        clock.lap("optimize_step")
        stats = self.statistics(rollout, minibatches)  # 8.
        clock.lap("calc_stats")
        self.finish(stats)
        if stats[self.not_finite]:
            self.kl_controller.load_state_dict(before["kl_controller"])
            self.running.load_state_dict(before["running"])
        return stats | clock.times()

    # ------------------------------------------------------------------ 2. scores

    def prepare(self, rollout: Rollout, scores, response_masks=None) -> Rollout:
        """What `update` is given, checked; the rollout with shaped scores."""
        scores = as_numbers(scores)
        self.check(rollout, scores, response_masks)
        shaped = self.shape_scores(scores, rollout.responses, rollout.ended)
        rollout.scores = self.as_array(np.array(shaped, dtype=np.float32))
        return rollout

    def shape_scores(
        self, scores: Sequence[float], responses: Sequence[Sequence[int]], ended: Sequence[bool]
    ) -> list[float]:
        """Scores (B,) with penalties for length, then scaled by running moments, then clipped."""
        config = self.config
        penalties = self.penalties(responses, ended)
        scores = [score + penalty for score, penalty in zip(scores, penalties, strict=True)]
        if config.use_score_scaling:
            scores = scale_scores(scores, self.running, subtract_mean=config.use_score_norm)
        return scores if config.score_clip is None else clip_scores(scores, config.score_clip)

    # ------------------------------------------------------------------ 5. and 6.

    def compute_rewards(self, rollout: Rollout) -> None:
        """Fill in rewards: -beta * KL on every token, plus the score on the last one."""
        rollout.rewards, rollout.non_score_rewards = self.arithmetic.per_token_rewards(
            rollout.scores, rollout.kls, rollout.mask, self.kl_controller.value
        )

    def compute_advantages(self, rollout: Rollout) -> None:
        """Fill in advantages and returns."""
        config, rewards, rl = self.config, rollout.rewards, self.arithmetic
        if config.whiten_rewards:
            rewards = rl.masked_whiten(rewards, rollout.mask, shift_mean=False)
        rollout.advantages, rollout.returns = rl.gae(
            rewards, rollout.values, rollout.mask, gamma=config.gamma, lam=config.lam
        )
        if config.whiten_advantages:
            rollout.advantages = rl.masked_whiten(rollout.advantages, rollout.mask)

    # ------------------------------------------------------------------ 7. optimise

    def far_enough(self, metrics: list[dict[str, float]]) -> bool:
        """Whether the policy has moved beyond the KL that --early-stopping allows."""
        config = self.config
        return config.early_stopping and metrics[-1]["policy/policykl"] > 1.5 * config.target_kl

    def runs_away(self, metrics: dict[str, float]) -> bool:
        """Whether a minibatch is skipped for its ratio, which is said once."""
        ratio, threshold = metrics["policy/ratio"], self.config.ratio_threshold
        if ratio > threshold:
            self._warn(
                ratio=f"mean ratio {ratio:.2f} is above --ratio-threshold {threshold:g}: minibatch "
                "skipped; a lower learning rate helps"
            )
        return ratio > threshold

    def losses(
        self, scored: Sequence[Array], columns: Sequence[Array], mask: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Loss of one minibatch, and its metrics; arrays (b, r).

        `scored`: logprobs, values and entropy now; `columns`: logprobs and values of the rollout,
        advantages, returns.
        """
        config, rl = self.config, self.arithmetic
        logprobs, values, entropy = scored
        old_logprobs, old_values, advantages, returns = columns
        policy, metrics = rl.policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            cliprange=config.cliprange,
            cliprange_high=config.cliprange_high,
            dual_clip=config.dual_clip,
        )
        value, value_metrics = rl.value_loss(
            values, old_values, returns, mask, cliprange_value=config.cliprange_value
        )
        total = policy + config.vf_coef * value
        totals = {"loss/total": total, "policy/entropy": rl.masked_mean(entropy, mask)}
        return total, {**metrics, **value_metrics, **totals}

    # ------------------------------------------------------------------ 8. statistics

    def statistics(self, rollout: Rollout, minibatches: list[dict[str, float]]) -> dict:
        """The step's metrics under TRL's names; warns, once each, of what usually goes wrong."""
        stats = step_statistics(rollout, minibatches, self.arithmetic.rollout_stats)
        stats["objective/kl_coef"] = self.kl_controller.value
        if self.config.use_dynamic_kl:
            per_token = self.arithmetic.masked_mean(rollout.kls, rollout.mask).item()
            stats["objective/kl_per_token"] = per_token
        stats["ppo/learning_rate"] = self.learning_rate
        self._warn(**warnings_for(stats, self.config.max_new_tokens))
        return stats

    def finish(self, stats: dict) -> None:
        """Move beta and count the step."""
        unit = "kl_per_token" if self.config.use_dynamic_kl else "kl"
        self.kl_controller.update(stats[f"objective/{unit}"], self.config.batch_size)
        self.steps_done += 1

    def log_stats(self, stats: dict, batch: dict, scores: Sequence[float]) -> None:
        """Hand a step's scalars to `log`, with env/reward_mean and env/reward_std of the scores.

        `batch` may hold further columns of numbers; each is logged as env/<name>_mean.
        """
        if self.log is not None:
            self.log(self.steps_done, logged_row(stats, batch, scores))

    # ------------------------------------------------------------------ resume

    def state_dict(self) -> dict:
        """What resuming needs besides weights and optimizer state; JSON-able."""
        return {
            "steps_done": self.steps_done,
            "kl_controller": self.kl_controller.state_dict(),
            "running": self.running.state_dict(),
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state: dict) -> None:
        self.steps_done = int(state["steps_done"])
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.running.load_state_dict(state["running"])
        self._warned = set(state["warned"])
