"""Reinforcement learning without a critic: GRPO, RLOO, REINFORCE++, and online DPO.

A prompt gets several responses, a group, and each is compared with the others of its group, where
PPO compares it with the forecast of a value head. One step is `generate`, which gives a `Rollout`,
and then `update` with what the rewards gave. The parts have a method each, numbered as in
docs/group.md:

1. generate            several responses to each prompt, with their log-probabilities
2. prepare             checked rewards, masks, penalties for length
3. score_policy        log-probabilities kept from sampling, or a forward pass
4. score_reference     under the reference; not at all where the KL has no weight
5. compute_advantages  by the estimator (rl/group_advantages.py)
6. optimise            epochs of minibatches of the loss (rl/group_losses.py)
7. statistics; the entropy coefficient and the reference move

Papers: Shao et al. 2024 (GRPO), Ahmadian et al. 2024 (RLOO), Hu 2025 (REINFORCE++), Yu et al. 2025
(DAPO), Guo et al. 2024 (online DPO); the reference implementation is TRL 1.16's.
"""

import fast_blas  # noqa: F401

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from distributed.group import here
from errors import UserError
from models.packing import Packed
from rl.group_advantages import ESTIMATORS, group_stds, reward_metrics, weighted_sum
from rl.group_config import GroupConfig
from rl.group_losses import Pass, group_loss, mean_of, surrogate_options
from rl.group_statistics import (
    completion_metrics,
    config_warnings,
    pass_metrics,
    warnings_for,
)
from rl.ppo_statistics import sampling_warnings
from rl.rollouts import SAMPLING, Rollout, minibatch_order
from training.group_share import group_share, own_rows
from training.rollout_stages import fit_columns, score_reference
from training.rollout_trainer import RolloutTrainer

if TYPE_CHECKING:
    from models.policy import Policy

__all__ = ["GroupConfig", "GroupTrainer"]


class GroupTrainer(RolloutTrainer):
    """A group method on a `Policy`.

    The reference is the model with its adapter off, or `ref_model` (needed for full fine-tuning
    with a KL). `optimizer` defaults to bias-corrected Adam at `config.learning_rate`. `eos_ids` end
    a response; by default they are the tokenizer's.
    """

    def __init__(
        self,
        config: GroupConfig,
        model: "Policy",
        ref_model: nn.Module | None = None,
        tokenizer=None,
        optimizer: optim.Optimizer | None = None,
        *,
        eos_ids: set[int] | None = None,
        grad_checkpoint: bool = False,
        recompute_frozen: bool = False,
    ):
        kind = model.tuning.kind
        if config.beta and ref_model is None and kind == "full":
            raise UserError(
                "full fine-tuning with a KL needs a reference model: a frozen copy of "
                "the policy; --beta 0 needs none"
            )
        options = (eos_ids, grad_checkpoint, recompute_frozen)
        super().__init__(config, model, ref_model, tokenizer, optimizer, *options)
        self.updates_done = self.equal_steps = self.num_tokens = 0
        self.entropy_coef, self.last_entropy = config.entropy_coef, float("inf")
        self.blend = None
        if config.sync_ref_model:
            from models.reference import ReferenceBlend

            alpha = config.ref_model_mixup_alpha
            self.blend = ReferenceBlend(model.model, model.tuning, ref_model, alpha)
        self._warn(**sampling_warnings(config), **config_warnings(config))

    @property
    def compared(self) -> bool:
        return bool(self.config.beta)

    # ------------------------------------------------------------------ 1. generate

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        should_stop: Callable[[list[int]], bool] | None = None,
        part: int = 0,
    ) -> Rollout:
        """`num_generations` responses (token ids, EOS included) to each prompt, which adjoin.

        `should_stop(tokens)` ends a response early. `part` tells several calls in one step apart,
        so that each draws other numbers.
        """
        purpose = (SAMPLING, part) if part else (SAMPLING,)
        samples = self.config.num_generations
        return self._sample(prompts, self.sampling, should_stop, purpose, samples=samples)

    # ------------------------------------------------------------------ the step

    def step(
        self,
        queries: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        rewards: Sequence,
        response_masks: Sequence[Sequence[int]] | None = None,
    ) -> dict:
        """`update` for responses (token ids) that were written elsewhere, groups adjoining."""
        rollout = self.as_rollout(queries, responses)
        return self.update(rollout, rewards, response_masks=response_masks)

    def update(
        self,
        rollout: Rollout,
        rewards: Sequence,
        *,
        names: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        response_masks: Sequence[Sequence[int]] | None = None,
    ) -> dict:
        """One step on a batch of responses with their rewards; returns metrics under TRL's names.

        `rewards` (N,) or (N, F), a column for each reward function; None or NaN where it did not
        score the row. `weights` and `names` are the functions'. `response_masks` has a 0 for each
        response token that the policy did not choose (a tool's output). Raises UserError, naming
        the row, for what cannot be learned from.
        """
        start = time.perf_counter()
        found = reward_matrix(rewards)
        weights = np.ones(found.shape[1]) if weights is None else np.asarray(weights, np.float64)
        names = list(names or (f"reward{i}" for i in range(found.shape[1])))
        stats = reward_metrics(
            found, names, weights=weights, group_size=self.config.num_generations
        )
        found, weights = self.prepare(rollout, found, weights, response_masks)
        self.score_policy(rollout)
        self.score_reference(rollout)
        self.compute_advantages(rollout, found, weights)
        passes = self.optimise(rollout)
        stats |= self.statistics(rollout, passes)
        self._warn(**warnings_for(stats, self.equal_steps, self.config.max_new_tokens))
        self.finish(stats)
        return stats | {"step_time": time.perf_counter() - start}

    # ------------------------------------------------------------------ 2. prepare

    def prepare(
        self, rollout: Rollout, rewards: np.ndarray, weights: np.ndarray, response_masks=None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Check a batch, set its masks; rewards (N, F) and weights with the length's penalties."""
        config = self.config
        scores = np.nan_to_num(rewards, nan=0.0, posinf=np.inf, neginf=-np.inf).sum(axis=1)
        self.check(rollout, scores, response_masks)
        check_groups(rollout.queries, config.num_generations)
        if config.mask_truncated_completions:
            rollout.masks = [
                mask if ended else np.zeros_like(mask)
                for mask, ended in zip(rollout.masks, rollout.ended, strict=True)
            ]
        penalties = self.penalties(rollout.responses, rollout.ended)
        if not any(penalties):
            return rewards, weights
        unscored = np.isnan(weighted_sum(rewards, weights))
        column = np.where(unscored, np.nan, penalties)[:, None]
        return np.hstack([rewards, column]), np.append(weights, 1.0)

    # ------------------------------------------------------------------ 4. score

    def score_reference(self, rollout: Rollout) -> None:
        """Fill in ref_logprobs, unless the KL has no weight."""
        if not self.config.beta:
            return
        fixed = contextlib.nullcontext(self.reference)
        with fixed if self.blend is None else self.blend.in_place() as reference:
            score_reference(
                rollout,
                self.model.model,
                self.model.tuning,
                reference,
                kept=self._kept(rollout),
                **self._passes,
            )

    # ------------------------------------------------------------------ 5. advantages

    def compute_advantages(
        self, rollout: Rollout, rewards: np.ndarray, weights: np.ndarray
    ) -> None:
        """Fill in advantages, (N, 1) or (N, R); for online DPO 1 and -1, or 0 in a tie."""
        config = self.config
        mask = np.array(rollout.mask, dtype=np.float64)
        penalties = np.zeros_like(mask)
        if config.beta:
            rollout.kls = mx.where(rollout.mask > 0, rollout.logprobs - rollout.ref_logprobs, 0.0)
        if config.reward_beta:
            penalties = config.reward_beta * np.array(rollout.kls, dtype=np.float64)
        if config.online_dpo:
            pair = weighted_sum(rewards, weights).reshape(-1, 2)
            sign = np.sign(np.nan_to_num(pair[:, 0] - pair[:, 1]))  # a side without score: a tie
            advantages = np.stack([sign, -sign], axis=1).reshape(-1, 1)
        else:
            advantages = ESTIMATORS[config.advantage_estimator](
                rewards,
                penalties,
                mask,
                weights=weights,
                group_size=config.num_generations,
                **estimator_options(config),
            )
        rollout.advantages = mx.array(advantages.astype(np.float32))
        stds = np.nan_to_num(group_stds(weighted_sum(rewards, weights), config.num_generations))
        self.equal_steps = 0 if stds.any() else self.equal_steps + 1

    # ------------------------------------------------------------------ 6. optimise

    def minibatch_order(self, epoch: int) -> np.ndarray:
        """A permutation of the batch (N,), fresh for each epoch; of online DPO, pairs adjoin."""
        config = self.config
        if not config.online_dpo:
            return super().minibatch_order(epoch)
        pairs = minibatch_order(config.batch_size // 2, config.seed, self.steps_done, epoch)
        return np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)

    def _gradient(self, rollout: Rollout, rows: np.ndarray) -> tuple[dict | None, dict]:
        """The gradient of one pass, None where it must not move the weights; its metrics."""
        longest = max(int(rollout.masks[row].sum()) for row in rows)
        if not longest:
            return None, {"skipped": 1.0}
        share, own = None, rows
        if not here().alone:
            own = own_rows(rows, 2 if self.config.online_dpo else 1)
            share = group_share(self.config, rollout, rows, own)
        # As wide as all rows are: a share whose rows have one token, or none, is not another case.
        packed, index, width = self._packed(rollout, own, longest)
        advantages = rollout.advantages[index]
        if rollout.advantages.shape[1] > 1 or rollout.mask.shape[1] == 1:
            advantages = fit_columns(advantages, width)
        columns = [fit_columns(rollout.logprobs[index], width), advantages]
        if rollout.ref_logprobs is not None:
            columns.append(fit_columns(rollout.ref_logprobs[index], width))
        passes = self.config.batch_size / self.config.mini_batch_size
        weight = self.entropy_weight
        if share is not None:
            weight *= share.entropy
        scalars = [rollout.mask.sum() / passes, mx.array(weight)]
        gradient, metrics = self._pass(packed.arrays(), columns, scalars, share=share)
        return (None if metrics["skipped"] else gradient), metrics

    def _loss(self, packed, columns, scalars) -> tuple[mx.array, dict]:
        """Loss of one pass, and its metrics."""
        if self.config.online_dpo:
            return self._pair_loss(packed, columns)
        config, packed = self.config, Packed(*packed)
        with_bonus = bool(config.entropy_coef or config.use_adaptive_entropy)
        logprobs, entropy = self.model(
            packed, temperature=config.temperature, gradient=not with_bonus
        )
        old_logprobs, advantages, *reference = columns
        rows = Pass(logprobs, old_logprobs, advantages, packed.mask, entropy, *reference)
        if config.advantage_estimator == "rloo":
            from rl.response_losses import rloo_loss

            return rloo_loss(rows, epsilon=config.epsilon, epsilon_high=config.epsilon_high)
        tokens_per_pass, entropy_coef = scalars
        return group_loss(
            rows,
            loss_type=config.loss_type,
            tokens_per_pass=tokens_per_pass,
            max_completion_length=config.max_new_tokens,
            level=config.importance_sampling_level,
            beta=config.loss_beta,
            use_bias_correction_kl=config.use_bias_correction_kl,
            top_entropy_quantile=config.top_entropy_quantile,
            entropy_coef=entropy_coef if with_bonus else None,
            off_policy_mask_threshold=config.off_policy_mask_threshold,
            options=surrogate_options(config),
        )

    def _pair_loss(self, packed, columns) -> tuple[mx.array, dict]:
        """The DPO loss of one pass, whose rows are pairs, and its metrics."""
        config, packed = self.config, Packed(*packed)
        logprobs, entropy = self.model(packed, temperature=config.temperature, gradient=True)
        old_logprobs, advantages, ref_logprobs = columns
        rows = Pass(logprobs, old_logprobs, advantages, packed.mask, entropy, ref_logprobs)
        from rl.response_losses import online_dpo_loss

        return online_dpo_loss(rows, loss=config.dpo_loss, beta=config.beta)

    # ------------------------------------------------------------------ 7. after an update

    @property
    def entropy_weight(self) -> float:
        """The entropy coefficient that applies; the adaptive one rests above its target."""
        resting = (
            self.config.use_adaptive_entropy and self.last_entropy > self.config.entropy_target
        )
        return 0.0 if resting else self.entropy_coef

    def after_update(self, passes: list[dict[str, float]]) -> None:
        """Move what follows the updates: the entropy coefficient, the reference."""
        config = self.config
        self.updates_done += 1
        if config.use_adaptive_entropy:
            count = sum(found.get("entropy_count", 0.0) for found in passes)
            self.last_entropy = sum(found.get("entropy_sum", 0.0) for found in passes) / count
            move = config.entropy_coef_delta
            move = move if self.last_entropy <= config.entropy_target else -move
            self.entropy_coef = min(
                max(self.entropy_coef + move, config.entropy_coef_min), config.entropy_coef_max
            )
        if config.sync_ref_model and self.updates_done % config.ref_model_sync_steps == 0:
            self.blend.blend()

    def statistics(self, rollout: Rollout, passes: list[dict[str, float]]) -> dict:
        """The step's metrics, but for those of rewards."""
        stats = pass_metrics(passes) | completion_metrics(rollout)
        stats.setdefault("not_finite", 0.0)
        if self.config.reward_beta:
            stats["kl"] = mean_of(rollout.kls, rollout.mask).item()
        if self.config.entropy_coef or self.config.use_adaptive_entropy:
            stats["entropy_coef"] = self.entropy_coef
        self.num_tokens += sum(map(len, rollout.queries)) + sum(map(len, rollout.responses))
        stats["num_tokens"] = float(self.num_tokens)
        stats["learning_rate"] = float(self.optimizer.learning_rate)
        return stats

    def finish(self, stats: dict) -> None:
        """Count the step."""
        self.steps_done += 1

    # ------------------------------------------------------------------ resume

    def state_dict(self) -> dict:
        """What resuming needs besides weights and optimizer state; JSON-able."""
        return {
            "steps_done": self.steps_done,
            "updates_done": self.updates_done,
            "equal_steps": self.equal_steps,
            "num_tokens": self.num_tokens,
            "entropy_coef": self.entropy_coef,
            # JSON has no infinity
            "last_entropy": None if np.isinf(self.last_entropy) else self.last_entropy,
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("steps_done", "updates_done", "equal_steps", "num_tokens"):
            setattr(self, name, int(state[name]))
        self.entropy_coef = float(state["entropy_coef"])
        last = state["last_entropy"]
        self.last_entropy = float("inf") if last is None else float(last)
        self._warned = set(state["warned"])


def estimator_options(config: GroupConfig) -> dict:
    """The options that the estimator has."""
    if config.advantage_estimator == "grpo":
        return {
            "scale_rewards": config.scale_rewards,
            "multi_objective_aggregation": config.multi_objective_aggregation,
        }
    if config.advantage_estimator == "rloo":
        return {
            "reward_clip_range": config.reward_clip_range,
            "normalize_advantages": config.normalize_advantages,
        }
    return {}


def reward_matrix(rewards: Sequence) -> np.ndarray:
    """Rewards (N,) or (N, F) as float64 (N, F), None as NaN; UserError for what is no number."""
    try:
        found = np.array(rewards, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError("rewards: numbers or None are needed, one row for each response") from None
    return found[:, None] if found.ndim == 1 else found


def check_groups(queries: Sequence[list[int]], group_size: int) -> None:
    """UserError, naming the row, where the rows of a group answer different prompts."""
    for row, query in enumerate(queries):
        if query != queries[row // group_size * group_size]:
            raise UserError(
                f"row {row}: its prompt is not that of its group; the "
                f"{group_size} responses to a prompt adjoin"
            )
