"""What trainers on rollouts share on MLX: sampling, scoring, gradients of minibatches.

PPO (mlx_ppo_trainer.py) and the group methods (mlx_group_trainer.py) are subclasses, which say what
a step is made of and what its loss is.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from errors import UserError
from models.decoding import Sampling
from models.trunk import frozen_below, vocabulary_size
from rl.rollouts import (
    REFERENCE,
    SAMPLING,
    Rollout,
    minibatch_update,
    passes_over,
    set_mask,
    stream,
    use_sampled,
)
from training.pass_share import PassShare
from training.rollout_stages import KeptStates, pack_rows, reference_of, sample, scored
from training.rollout_steps import RolloutSteps
from training.update import (
    added,
    all_finite,
    apply_update,
    checkpointed_blocks,
    loss_and_gradient,
)


class RolloutTrainer(RolloutSteps):
    """A policy, its reference and its optimizer; a step is `generate`, and then `update`.

    A subclass has `config` of its own kind, `update`, `_gradient` (which ends in `_pass`) and
    `_loss(packed arrays, columns, ...) -> (loss, metrics)`. The reference is the model with its
    adapter off, or `ref_model`. `optimizer` defaults to bias-corrected Adam
    (training/optimizers.py) at `config.learning_rate`. `eos_ids` end a response; by default they
    are the tokenizer's. `recompute_frozen`: frozen blocks below the trained ones are run in every
    pass, where otherwise what they give is kept for as long as a rollout is trained on.
    """

    scored_as = ("logprobs",)  # where the first columns that the model gives stand in a rollout

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        ref_model: nn.Module | None,
        tokenizer: Any,
        optimizer: optim.Optimizer | None,
        eos_ids: set[int] | None,
        grad_checkpoint: bool,
        recompute_frozen: bool = False,
    ):
        if eos_ids is None and tokenizer is None:
            raise UserError(f"{type(self).__name__} needs a tokenizer, or eos_ids")
        ends = eos_ids if eos_ids is not None else tokenizer.eos_token_ids
        super().__init__(config, ends, vocabulary_size(model.model))
        self.model, self.reference, self.tokenizer = model, ref_model, tokenizer
        self.optimizer = optimizer or adam(config.learning_rate)
        self.optimizer.init(model.trainable_parameters())
        self.grad_checkpoint = grad_checkpoint
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        self.compiled = on_gpu if config.compile is None else config.compile
        # Compiled code is made anew for every shape, so there lengths come in steps of 16.
        self.pad_to_multiple = config.pad_to_multiple or (16 if on_gpu or self.compiled else 1)
        self._loss_and_grad = loss_and_gradient(self.model, self._loss, self.compiled)
        model.eval()  # no dropout, in rollouts and in updates
        self.recompute_frozen = recompute_frozen

    # ------------------------------------------------------------------ sample

    def sample_reference(
        self,
        queries: Sequence[Sequence[int]],
        should_stop: Callable[[list[int]], bool] | None = None,
    ) -> Rollout:
        """What the reference writes to the queries, sampled as the policy's responses are."""
        with reference_of(self.model.model, self.model.tuning, self.reference) as reference:
            return sample(
                reference,
                (),
                queries,
                max_tokens=self.config.max_new_tokens,
                sampling=Sampling(**self.sampling),
                eos_ids=self.eos_ids,
                vocabulary=self.vocabulary,
                random=stream(self.config.seed, self.steps_done, REFERENCE),
                should_stop=should_stop,
            )

    def _sample(
        self,
        queries: Sequence[Sequence[int]],
        sampling: dict[str, float],
        should_stop: Callable[[list[int]], bool] | None,
        purpose: tuple[int, ...] = (SAMPLING,),
        max_tokens: int | Sequence[int] | None = None,
        **options: Any,
    ) -> Rollout:
        return sample(
            self.model.model,
            self.model.tuning.prefix,  # ids from V on, which no query may have
            queries,
            max_tokens=self.config.max_new_tokens if max_tokens is None else max_tokens,
            sampling=Sampling(**sampling),
            eos_ids=self.eos_ids,
            vocabulary=self.vocabulary,
            random=stream(self.config.seed, self.steps_done, *purpose),
            should_stop=should_stop,
            **options,
        )

    # ------------------------------------------------------------------ frozen blocks

    compared = True  # with a reference

    @cached_property
    def frozen(self) -> int:
        """Blocks below the trained ones that are run once a rollout; 0: none, or in vain."""
        again = passes_over(self.config, self.compared and self.reference is None) > 1
        return frozen_below(self.model.model) if again and not self.recompute_frozen else 0

    def _kept(self, rollout: Rollout) -> KeptStates | None:
        """What they give for the rows of the rollout; None: they are run in every pass."""
        if self.frozen and rollout.kept is None:
            rollout.kept = KeptStates(self.model.model, self.frozen, len(rollout))
        return rollout.kept

    # ------------------------------------------------------------------ score the policy

    @property
    def _passes(self) -> dict[str, Any]:
        """How rows go through a model, for the stages of training/rollout_stages.py."""
        config = self.config
        return {
            "size": config.mini_batch_size,
            "temperature": config.temperature,
            "pad_to_multiple": self.pad_to_multiple,
        }

    def score_policy(self, rollout: Rollout) -> None:
        """Fill in mask and logprobs (and values): those kept from sampling, or a forward pass."""
        set_mask(rollout, mx.array)
        if self.config.rollout_logprobs and use_sampled(rollout, mx.array):
            return
        temperature = self.config.temperature
        found = scored(
            rollout,
            lambda packed: self.model(packed, temperature=temperature),
            self.config.mini_batch_size,
            self.model.tuning.prefix,
            self.pad_to_multiple,
            self._kept(rollout),
        )
        for name, column in zip(self.scored_as, found, strict=False):
            setattr(rollout, name, column)

    # ------------------------------------------------------------------ optimise

    def optimise(self, rollout: Rollout) -> list[dict[str, float]]:
        """Epochs of updates; returns the metrics of each minibatch."""
        metrics = super().optimise(rollout)
        rollout.kept = None  # the memory is for the next rollout
        return metrics

    def _update(self, rollout: Rollout, rows: np.ndarray) -> list[dict[str, float]]:
        """One optimizer update, from the minibatches that `rows` fall into; their metrics."""

        def apply(total: dict) -> float:
            return apply_update(
                self.model,
                self.optimizer,
                total,
                self.config.gradient_accumulation_steps,
                self.config.max_grad_norm,
                before=self.before_update,
            )

        metrics = minibatch_update(
            rows,
            self.config.mini_batch_size,
            lambda some: self._gradient(rollout, some),
            added,
            apply,
        )
        if math.isfinite(metrics[-1].get("grad_norm", math.nan)):
            self.after_update(metrics)
        return metrics

    def after_update(self, metrics: list[dict[str, float]]) -> None:
        """The weights have moved; `metrics` are those of the update's minibatches."""

    def _packed(self, rollout: Rollout, rows: np.ndarray, width: int = 1):
        """Rows of a rollout as one pass, their numbers, and the width of its (b, r) arrays.

        That is at least `width`.
        """
        prefix = self.model.tuning.prefix
        packed = pack_rows(
            rollout, rows.tolist(), prefix, self.pad_to_multiple, width, self._kept(rollout)
        )
        return packed, mx.array(rows), packed.mask.shape[1]

    def _pass(
        self, *arrays: Any, total: str = "loss", share: PassShare | None = None
    ) -> tuple[dict, dict[str, float]]:
        """Gradient and metrics of `_loss(*arrays)`; `not_finite` and `skipped` tell of bad ones.

        `total` names the metric that is the loss itself; `share`: what of the pass the arrays are.
        """
        with checkpointed_blocks(self.model.model, self.grad_checkpoint):
            (_, metrics), gradient = self._loss_and_grad(*arrays)
        if share is not None:
            gradient, metrics = share.whole(gradient, metrics)
        finite = all_finite(gradient)
        mx.eval(metrics, gradient, finite)
        metrics = {name: value.item() for name, value in metrics.items()}
        bad = not (finite.item() and math.isfinite(metrics[total]))
        return gradient, metrics | {"not_finite": float(bad), "skipped": float(bad)}


def adam(learning_rate: float) -> optim.Optimizer:
    """What moves the weights where no optimizer is given."""
    from training.optimizers import build_optimizer  # which a script has loaded, and gives one

    return build_optimizer("adam", learning_rate)
