"""mlx_ppo_trainer.py in PyTorch: forward passes, gradients and updates, on transformers and peft.

The numbered loop around them is `PPOSteps.update` (training/rollout_steps.py), for both backends.
TRL took its PPO out after 1.12. This equals TRL 0.11.4's numbers, like the MLX side
(tests/baseline/test_baseline_oracles.py).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytorch_arithmetic
import torch
from pytorch_actor_critic import (
    ActorCritic,
    Packed,
    generate,
    pack,
    picked_logits,
    reference_logprobs,
)
from pytorch_arithmetic import full_kl, kl_penalty
from pytorch_models import Tuned
from pytorch_optimizers import Optimizer, apply_update, build_optimizer, finite
from torch import Tensor

from errors import UserError
from rl.ppo_config import PPOConfig
from rl.rollouts import (
    Rollout,
    check_token_ids,
    minibatch_update,
    set_mask,
    stream,
    token_lists,
    use_sampled,
)
from training.rollout_steps import PPOSteps

__all__ = ["PPOConfig", "PPOTrainer"]


class PPOTrainer(PPOSteps):
    """PPO on an `ActorCritic`; the reference is the model with its adapter off, or `ref_model`."""

    arithmetic = pytorch_arithmetic

    def __init__(
        self,
        config: PPOConfig,
        model: ActorCritic,
        ref_model: Tuned | None = None,
        optimizer: Optimizer | None = None,
        *,
        eos_ids: set[int],
        grad_checkpoint: bool = False,
    ):
        if ref_model is None and model.model.kind == "full":
            raise UserError("full fine-tuning needs a reference model: a frozen copy of the policy")
        vocabulary = model.model.base.get_input_embeddings().num_embeddings
        super().__init__(config, eos_ids, vocabulary)
        self.model, self.reference = model, ref_model
        self.parameters = model.trainable_parameters()
        self.optimizer = optimizer or build_optimizer(self.parameters, "adam", config.learning_rate)
        self.learning_rate = self.optimizer.learning_rate  # of the last update
        self.max_grad_norm, self.device = config.max_grad_norm, model.model.device
        self.grad_checkpoint = grad_checkpoint
        if grad_checkpoint:
            model.model.checkpoint_blocks()
        model.model.drop_nothing()  # no dropout, in rollouts and in updates
        model.eval()
        self.set_up(config)

    def _sample(
        self, queries, sampling, should_stop, purpose: tuple[int, ...], max_tokens=None, **options
    ) -> Rollout:
        queries = token_lists(queries)
        check_token_ids("query", queries, self.vocabulary)
        random = stream(self.config.seed, self.steps_done, *purpose)
        return generate(
            self.model.model,
            queries,
            max_tokens=self.config.max_new_tokens if max_tokens is None else max_tokens,
            eos_ids=self.eos_ids,
            seed=int(random.integers(2**63)),
            should_stop=should_stop,
            **sampling,
            **options,
        )

    # ------------------------------------------------------------------ 3. and 4.

    def as_array(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def score_policy(self, rollout: Rollout) -> None:
        """Fill in mask, logprobs and values: those kept from sampling, or a forward pass."""
        set_mask(rollout, self.as_array)
        if self.config.rollout_logprobs and use_sampled(rollout, self.as_array):
            return
        temperature = self.config.temperature
        rollout.logprobs, rollout.values = self.by_rows(
            rollout, lambda packed: self.model(packed, temperature=temperature)
        )

    def score_reference(self, rollout: Rollout) -> None:
        """Fill in ref_logprobs and kls, nats per token."""
        mode, temperature = self.config.kl_penalty, self.config.temperature
        with self.off():
            (rollout.ref_logprobs,) = self.by_rows(
                rollout, lambda packed: (reference_logprobs(self.other, packed, temperature),)
            )
        if mode == "full":
            (rollout.kls,) = self.by_rows(rollout, self.full_kl)
        else:
            rollout.kls = kl_penalty(rollout.logprobs, rollout.ref_logprobs, mode)

    @property
    def other(self) -> Tuned:
        """The reference model, within `off`."""
        return self.model.model if self.reference is None else self.reference

    def off(self) -> AbstractContextManager:
        return self.model.model.disabled() if self.reference is None else nullcontext()

    def full_kl(self, packed: Packed) -> tuple[Tensor]:
        """KL over the whole vocabulary (b, r); logits of a minibatch are held at a time."""
        logits = picked_logits(self.model.model, packed, self.config.temperature)  # (N, V)
        with self.off():
            ref_logits = picked_logits(self.other, packed, self.config.temperature)  # (N, V)
        return (packed.spread(full_kl(logits, ref_logits)),)

    @torch.no_grad()
    def by_rows(self, rollout: Rollout, score: Callable[[Packed], Sequence[Tensor]]) -> list:
        """`score(packed)` gives (b, r) tensors; the same for all rows, a minibatch at a time."""
        parts, size = [], self.config.mini_batch_size
        for start in range(0, self.config.batch_size, size):
            parts.append(score(self.packed(rollout, range(start, start + size))))
        width = rollout.mask.shape[1]
        return [
            torch.cat([fit_columns(part, width) for part in column])
            for column in zip(*parts, strict=True)
        ]

    def packed(self, rollout: Rollout, rows: Sequence[int]) -> Packed:
        return pack(
            [rollout.queries[i] for i in rows],
            [rollout.responses[i] for i in rows],
            masks=[rollout.masks[i] for i in rows],
            pad_to_multiple=self.config.pad_to_multiple or 1,
            device=self.device,
        )

    # ------------------------------------------------------------------ 7. optimise

    def _update(self, rollout: Rollout, rows: np.ndarray) -> list[dict[str, float]]:
        """One optimizer update, from the minibatches that `rows` fall into; their metrics."""

        def added(total: Sequence[Tensor] | None, part: Sequence[Tensor]) -> Sequence[Tensor]:
            return part if total is None else [a + b for a, b in zip(total, part, strict=True)]

        def apply(total: Sequence[Tensor]) -> float:
            for weight, gradient in zip(self.parameters.values(), total, strict=True):
                weight.grad = gradient / self.config.gradient_accumulation_steps
            return apply_update(self)

        return minibatch_update(
            rows,
            self.config.mini_batch_size,
            lambda some: self.gradient(rollout, some),
            added,
            apply,
        )

    def gradient(self, rollout: Rollout, rows: np.ndarray) -> tuple[Sequence[Tensor] | None, dict]:
        """The gradient of one minibatch, None where it must not move the weights; its metrics."""
        packed = self.packed(rollout, rows)
        index, width = torch.from_numpy(rows).to(self.device), packed.mask.shape[1]
        columns = (rollout.logprobs, rollout.values, rollout.advantages, rollout.returns)
        columns = [fit_columns(column[index], width) for column in columns]  # (b, r)
        self.model.train(self.grad_checkpoint)  # transformers recomputes in training mode alone
        temperature = self.config.temperature
        scored = self.model(packed, temperature=temperature, with_entropy=True)
        loss, metrics = self.losses(scored, columns, packed.mask)
        gradient = torch.autograd.grad(
            loss, list(self.parameters.values()), allow_unused=True, materialize_grads=True
        )
        self.model.eval()
        metrics = {name: value.item() for name, value in metrics.items()}
        bad = not (finite(gradient) and math.isfinite(metrics["loss/total"]))
        skipped = self.runs_away(metrics) or bad
        metrics |= {"not_finite": float(bad), "skipped": float(skipped)}
        return (None if skipped else gradient), metrics


def fit_columns(tensor: Tensor, width: int) -> Tensor:
    """(b, r) cut or padded with 0 on the right to (b, width)."""
    spare = max(width - tensor.shape[1], 0)
    return torch.nn.functional.pad(tensor[:, :width], (0, spare))
