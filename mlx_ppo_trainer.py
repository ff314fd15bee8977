"""Proximal policy optimisation for language models, with the interface of TRL's classic trainer.

One step is `generate`, which gives a `Rollout`, and then `update` with a score for each response.
TRL's `step(queries, responses, scores)` does the same for responses that came from elsewhere. The
parts have a method each, numbered as in docs/ppo.md. What needs no array library of them is in
training/rollout_steps.py, what other algorithms on rollouts share in training/rollout_stages.py:

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

from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from distributed.group import here
from errors import UserError
from models.actor_critic import ActorCritic
from models.packing import Packed
from rl.advantages import gae
from rl.kl import kl_penalty
from rl.losses import masked_mean, masked_var, masked_whiten, policy_loss, value_loss
from rl.ppo_config import PPOConfig
from rl.rollouts import Rollout
from rl.shaping import per_token_rewards, rollout_stats
from training.pass_share import PassShare, token_shares
from training.rollout_stages import fit_columns, score_reference, whole_kl
from training.rollout_steps import PPOSteps
from training.rollout_trainer import RolloutTrainer

__all__ = ["PPOConfig", "PPOTrainer"]


class PPOTrainer(PPOSteps, RolloutTrainer):
    """PPO on an `ActorCritic`.

    The reference is the model with its adapter off, or `ref_model` (needed for full fine-tuning).
    `optimizer` defaults to torch's Adam (training/optimizers.py) at `config.learning_rate`.
    `eos_ids` end a response; by default they are the tokenizer's. `log_stats` calls
    `log(step, row)`.
    """

    scored_as = ("logprobs", "values")
    arithmetic = SimpleNamespace(
        gae=gae,
        masked_mean=masked_mean,
        masked_whiten=masked_whiten,
        per_token_rewards=per_token_rewards,
        policy_loss=policy_loss,
        rollout_stats=rollout_stats,
        value_loss=value_loss,
    )

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
        recompute_frozen: bool = False,
        log: Callable[[int, dict], None] | None = None,
    ):
        if ref_model is None and model.tuning.kind == "full":
            raise UserError("full fine-tuning needs a reference model: a frozen copy of the policy")
        options = (eos_ids, grad_checkpoint, recompute_frozen)
        super().__init__(config, model, ref_model, tokenizer, optimizer, *options)
        self.log = log
        self.set_up(config)

    def as_array(self, values: np.ndarray) -> mx.array:
        return mx.array(values)

    # ------------------------------------------------------------------ 4. reference

    def score_reference(self, rollout: Rollout) -> None:
        """Fill in ref_logprobs and kls, nats per token."""
        mode, policy = self.config.kl_penalty, self.model
        models = (policy.model, policy.tuning, self.reference)
        score_reference(rollout, *models, kept=self._kept(rollout), **self._passes)
        if mode == "full":
            rollout.kls = whole_kl(rollout, *models, kept=self._kept(rollout), **self._passes)
        else:
            rollout.kls = kl_penalty(rollout.logprobs, rollout.ref_logprobs, mode)

    # ------------------------------------------------------------------ 5. and 6.

    def compute_rewards(self, rollout: Rollout) -> None:
        super().compute_rewards(rollout)
        mx.eval(rollout.rewards)

    def compute_advantages(self, rollout: Rollout) -> None:
        super().compute_advantages(rollout)
        mx.eval(rollout.advantages, rollout.returns)

    # ------------------------------------------------------------------ 7. optimise

    def _gradient(self, rollout: Rollout, rows: np.ndarray) -> tuple[dict | None, dict]:
        """The gradient of one minibatch, None where it must not move the weights; its metrics."""
        workers, share = here(), None
        if not workers.alone:
            share = PassShare(token_shares(rollout.masks, rows, workers.size)[workers.rank])
        packed, index, width = self._packed(rollout, workers.share(rows))
        columns = (rollout.logprobs, rollout.values, rollout.advantages, rollout.returns)
        columns = [fit_columns(column[index], width) for column in columns]  # (b, r)
        gradient, metrics = self._pass(packed.arrays(), columns, total="loss/total", share=share)
        if share is not None:
            metrics |= self.variances(rollout, mx.array(rows))
        if self.runs_away(metrics):
            metrics["skipped"] = 1.0
        return (None if metrics["skipped"] else gradient), metrics

    def variances(self, rollout: Rollout, rows: mx.array) -> dict[str, float]:
        """The metrics of `value_loss` that are no means over the tokens of `rows`."""
        mask = rollout.mask[rows]
        found = {"val/var": rollout.values, "returns/var": rollout.returns}
        return {name: masked_var(column[rows], mask).item() for name, column in found.items()}

    def _loss(self, packed: list[mx.array], columns: list[mx.array]) -> tuple[mx.array, dict]:
        """Loss of one minibatch, and its metrics."""
        packed = Packed(*packed)
        scored = self.model(
            packed, temperature=self.config.temperature, with_entropy=True, gradient=True
        )
        return self.losses(scored, columns, packed.mask)

    @property
    def learning_rate(self) -> float:
        """Of the last update."""
        return float(self.optimizer.learning_rate)
