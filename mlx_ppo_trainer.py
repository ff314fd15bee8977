"""Proximal policy optimisation for language models, with the interface of TRL's classic trainer.

One step is `generate`, which gives a `Rollout`, and then `update` with a score for each response.
TRL's `step(queries, responses, scores)` does the same for responses that came from elsewhere. The
parts have a method each, numbered as in docs/ppo.md; what other algorithms on rollouts share of
them is in training/rollout_stages.py:

1. generate            a response to each query, with its log-probabilities and values
2. shape_scores        penalties, running scaling and clipping of the scores
3. score_policy        log-probabilities and values of the responses under the policy
4. score_reference     log-probabilities under the reference, KL per token
5. compute_rewards     per token: -beta * KL, plus the score on the last token
6. compute_advantages  generalised advantage estimation, whitening
7. optimise            epochs of minibatches of the clipped losses
8. statistics; and the controller moves beta

Papers: Schulman et al. 2017 (PPO), Schulman et al. 2016 (GAE), Ziegler et al. 2019 (KL in the
reward), Huang et al. 2024 (the implementation details that matter).
"""

import fast_blas  # noqa: F401

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from errors import UserError
from models.actor_critic import ActorCritic
from models.packing import Packed
from rl.advantages import gae
from rl.kl import AdaptiveKLController, FixedKLController, kl_penalty
from rl.losses import masked_mean, masked_whiten, policy_loss, value_loss
from rl.ppo_config import PPOConfig
from rl.ppo_statistics import logged_row, sampling_warnings, step_statistics, warnings_for
from rl.rollout_checks import as_numbers
from rl.rollouts import Rollout
from rl.shaping import (
    RunningMoments,
    clip_scores,
    per_token_rewards,
    scale_scores,
)
from training.clock import StageClock
from training.rollout_stages import (
    SAMPLING,
    fit_columns,
    response_limits,
    score_reference,
    whole_kl,
)
from training.rollout_trainer import RolloutTrainer

__all__ = ["PPOConfig", "PPOTrainer"]


class PPOTrainer(RolloutTrainer):
    """PPO on an `ActorCritic`.

    The reference is the model with its adapter off, or `ref_model` (needed for full fine-tuning).
    `optimizer` defaults to torch's Adam (training/optimizers.py) at `config.learning_rate`.
    `eos_ids` end a response; by default they are the tokenizer's. `log_stats` calls
    `log(step, row)`.
    """

    not_finite = "ppo/not_finite"
    scored_as = ("logprobs", "values")

    def __init__(
        self,
        config: PPOConfig,
        model: ActorCritic,
        ref_model: nn.Module | None = None,
        tokenizer=None,
        optimizer: optim.Optimizer | None = None,
        *,
        eos_ids: set[int] | None = None,
        grad_checkpoint: bool = False,
        log: Callable[[int, dict], None] | None = None,
    ):
        if ref_model is None and model.tuning.kind == "full":
            raise UserError("full fine-tuning needs a reference model: a frozen copy of the policy")
        super().__init__(config, model, ref_model, tokenizer, optimizer, eos_ids, grad_checkpoint)
        self.log = log
        target = config.kl_target if config.use_dynamic_kl else config.target
        self.kl_controller = (
            AdaptiveKLController(config.init_kl_coef, target, config.horizon)
            if config.adap_kl_ctrl or config.use_dynamic_kl
            else FixedKLController(config.init_kl_coef)
        )
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
        rollout = self.prepare(rollout, scores, response_masks)
        self.score_policy(rollout)
        with clock.part("reference"):
            self.score_reference(rollout)
        clock.lap("forward_pass")
        self.compute_rewards(rollout)
        clock.lap("compute_rewards")
        self.compute_advantages(rollout)
        clock.lap("compute_advantages")
        minibatches = self.optimise(rollout)
        clock.lap("optimize_step")
        stats = self.statistics(rollout, minibatches)
        clock.lap("calc_stats")
        self.finish(stats)
        if stats["ppo/not_finite"]:
            self.kl_controller.load_state_dict(before["kl_controller"])
            self.running.load_state_dict(before["running"])
        return stats | clock.times()

    def prepare(self, rollout: Rollout, scores, response_masks=None) -> Rollout:
        """What `update` is given, checked; the rollout with shaped scores."""
        scores = as_numbers(scores)
        self.check(rollout, scores, response_masks)
        shaped = self.shape_scores(scores, rollout.responses, rollout.ended)
        rollout.scores = mx.array(shaped, dtype=mx.float32)
        return rollout

    # ------------------------------------------------------------------ 2. scores

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

    # ------------------------------------------------------------------ 4. reference

    def score_reference(self, rollout: Rollout) -> None:
        """Fill in ref_logprobs and kls, nats per token."""
        mode, policy = self.config.kl_penalty, self.model
        models = (policy.model, policy.tuning, self.reference)
        score_reference(rollout, *models, **self._passes)
        if mode == "full":
            rollout.kls = whole_kl(rollout, *models, **self._passes)
        else:
            rollout.kls = kl_penalty(rollout.logprobs, rollout.ref_logprobs, mode)

    # ------------------------------------------------------------------ 5. and 6.

    def compute_rewards(self, rollout: Rollout) -> None:
        """Fill in rewards: -beta * KL on every token, plus the score on the last one."""
        rollout.rewards, rollout.non_score_rewards = per_token_rewards(
            rollout.scores, rollout.kls, rollout.mask, self.kl_controller.value
        )
        mx.eval(rollout.rewards)

    def compute_advantages(self, rollout: Rollout) -> None:
        """Fill in advantages and returns."""
        config, rewards = self.config, rollout.rewards
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, rollout.mask, shift_mean=False)
        rollout.advantages, rollout.returns = gae(
            rewards, rollout.values, rollout.mask, gamma=config.gamma, lam=config.lam
        )
        if config.whiten_advantages:
            rollout.advantages = masked_whiten(rollout.advantages, rollout.mask)
        mx.eval(rollout.advantages, rollout.returns)

    # ------------------------------------------------------------------ 7. optimise

    def far_enough(self, metrics: list[dict[str, float]]) -> bool:
        """Whether the policy has moved beyond the KL that --early-stopping allows."""
        config = self.config
        return config.early_stopping and metrics[-1]["policy/policykl"] > 1.5 * config.target_kl

    def _gradient(self, rollout: Rollout, rows: np.ndarray) -> tuple[dict | None, dict]:
        """The gradient of one minibatch, None where it must not move the weights; its metrics."""
        packed, index, width = self._packed(rollout, rows)
        columns = (rollout.logprobs, rollout.values, rollout.advantages, rollout.returns)
        columns = [fit_columns(column[index], width) for column in columns]  # (b, r)
        gradient, metrics = self._pass(packed.arrays(), columns, total="loss/total")
        if metrics["policy/ratio"] > self.config.ratio_threshold:
            self._warn(
                ratio=f"mean ratio {metrics['policy/ratio']:.2f} is above --ratio-threshold "
                f"{self.config.ratio_threshold:g}: minibatch skipped; a lower learning rate helps"
            )
            metrics["skipped"] = 1.0
        return (None if metrics["skipped"] else gradient), metrics

    def _loss(self, packed: list[mx.array], columns: list[mx.array]) -> tuple[mx.array, dict]:
        """Loss of one minibatch, and its metrics."""
        packed = Packed(*packed)
        found = self.model(
            packed, temperature=self.config.temperature, with_entropy=True, gradient=True
        )
        return self.losses(found, columns, packed.mask)

    def losses(
        self, found: Sequence[mx.array], columns: Sequence[mx.array], mask: mx.array
    ) -> tuple[mx.array, dict]:
        """Loss and metrics of rows: what the model says of them now, what was found before."""
        config = self.config
        logprobs, values, entropy = found  # (b, r) each
        old_logprobs, old_values, advantages, returns = columns
        policy, metrics = policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            cliprange=config.cliprange,
            cliprange_high=config.cliprange_high,
            dual_clip=config.dual_clip,
        )
        value, value_metrics = value_loss(
            values, old_values, returns, mask, cliprange_value=config.cliprange_value
        )
        total = policy + config.vf_coef * value
        totals = {"loss/total": total, "policy/entropy": masked_mean(entropy, mask)}
        return total, {**metrics, **value_metrics, **totals}

    # ------------------------------------------------------------------ 8. statistics

    def statistics(self, rollout: Rollout, minibatches: list[dict[str, float]]) -> dict:
        """The step's metrics under TRL's names; warns, once each, of what usually goes wrong."""
        stats = step_statistics(rollout, minibatches)
        stats["objective/kl_coef"] = self.kl_controller.value
        if self.config.use_dynamic_kl:
            per_token = masked_mean(rollout.kls, rollout.mask).item()
            stats["objective/kl_per_token"] = per_token
        stats["ppo/learning_rate"] = float(self.optimizer.learning_rate)
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
