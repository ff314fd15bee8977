"""What trainers on rollouts share: sampling, scoring, epochs of minibatches, warnings.

PPO (mlx_ppo_trainer.py) and the group methods (mlx_group_trainer.py) are subclasses, which say what
a step is made of and what its loss is.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from errors import UserError
from models.decoding import Sampling
from models.trunk import vocabulary_size
from rl.rollout_checks import check_rollout
from rl.rollouts import Rollout
from rl.shaping import length_penalties
from training.optimizers import build_optimizer
from training.rollout_stages import (
    EVALUATION,
    REFERENCE,
    SAMPLING,
    minibatch_order,
    pack_rows,
    reference_of,
    sample,
    scored,
    set_mask,
    stream,
    token_lists,
    use_sampled,
)
from training.update import (
    all_finite,
    apply_update,
    checkpointed_blocks,
    loss_and_gradient,
    minibatch_update,
)


class RolloutTrainer:
    """A policy, its reference and its optimizer; a step is `generate`, and then `update`.

    A subclass has `config` of its own kind, `update`, `_gradient` (which ends in `_pass`) and
    `_loss(packed arrays, columns, ...) -> (loss, metrics)`. The reference is the model with its
    adapter off, or `ref_model`. `optimizer` defaults to bias-corrected Adam
    (training/optimizers.py) at `config.learning_rate`. `eos_ids` end a response; by default they
    are the tokenizer's.
    """

    not_finite = "not_finite"  # the metric of a step without an update
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
    ):
        if eos_ids is None and tokenizer is None:
            raise UserError(f"{type(self).__name__} needs a tokenizer, or eos_ids")
        self.config, self.model, self.reference = config, model, ref_model
        self.tokenizer = tokenizer
        self.eos_ids = set(eos_ids if eos_ids is not None else tokenizer.eos_token_ids)
        self.vocabulary = vocabulary_size(model.model)
        self.optimizer = optimizer or build_optimizer("adam", config.learning_rate)
        self.optimizer.init(model.trainable_parameters())
        self.grad_checkpoint = grad_checkpoint
        self.steps_done = 0
        self.before_update: Callable[[], None] = lambda: None  # called before weights move
        self._warned: set[str] = set()
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        self.compiled = on_gpu if config.compile is None else config.compile
        # Compiled code is made anew for every shape, so there lengths come in steps of 16.
        self.pad_to_multiple = config.pad_to_multiple or (16 if on_gpu or self.compiled else 1)
        self._loss_and_grad = loss_and_gradient(self.model, self._loss, self.compiled)
        model.eval()  # no dropout, in rollouts and in updates

    # ------------------------------------------------------------------ sample

    @property
    def sampling(self) -> Sampling:
        """How responses are drawn to train on."""
        config = self.config
        return Sampling(config.temperature, config.top_k, config.top_p, config.min_p)

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
        sampling = Sampling(0.0 if greedy else self.config.temperature)
        return self._sample(queries, sampling, should_stop, (EVALUATION, part))

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
                sampling=self.sampling,
                eos_ids=self.eos_ids,
                vocabulary=self.vocabulary,
                random=stream(self.config.seed, self.steps_done, REFERENCE),
                should_stop=should_stop,
            )

    def _sample(
        self,
        queries: Sequence[Sequence[int]],
        sampling: Sampling,
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
            sampling=sampling,
            eos_ids=self.eos_ids,
            vocabulary=self.vocabulary,
            random=stream(self.config.seed, self.steps_done, *purpose),
            should_stop=should_stop,
            **options,
        )

    def as_rollout(
        self, queries: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> Rollout:
        """Responses that were written elsewhere; they have ended where they end with EOS."""
        responses = token_lists(responses)
        ended = [bool(response) and response[-1] in self.eos_ids for response in responses]
        return Rollout(token_lists(queries), responses, ended)

    # ------------------------------------------------------------------ what a step is given

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
        set_mask(rollout)
        if self.config.rollout_logprobs and use_sampled(rollout):
            return
        temperature = self.config.temperature
        found = scored(
            rollout,
            lambda packed: self.model(packed, temperature=temperature),
            self.config.mini_batch_size,
            self.model.tuning.prefix,
            self.pad_to_multiple,
        )
        for name, column in zip(self.scored_as, found, strict=False):
            setattr(rollout, name, column)

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
            rows, self.config.mini_batch_size, lambda some: self._gradient(rollout, some), apply
        )
        if math.isfinite(metrics[-1].get("grad_norm", math.nan)):
            self.after_update(metrics)
        return metrics

    def after_update(self, metrics: list[dict[str, float]]) -> None:
        """The weights have moved; `metrics` are those of the update's minibatches."""

    def _packed(self, rollout: Rollout, rows: np.ndarray):
        """Rows of a rollout as one pass, their number, and the width of its (b, r) arrays."""
        packed = pack_rows(rollout, rows.tolist(), self.model.tuning.prefix, self.pad_to_multiple)
        return packed, mx.array(rows), packed.mask.shape[1]

    def _pass(self, *arrays: Any, total: str = "loss") -> tuple[dict, dict[str, float]]:
        """Gradient and metrics of `_loss(*arrays)`; `not_finite` and `skipped` tell of bad ones.

        `total` names the metric that is the loss itself.
        """
        with checkpointed_blocks(self.model.model, self.grad_checkpoint):
            (_, metrics), gradient = self._loss_and_grad(*arrays)
        finite = all_finite(gradient)
        mx.eval(metrics, gradient, finite)
        metrics = {name: value.item() for name, value in metrics.items()}
        bad = not (finite.item() and math.isfinite(metrics[total]))
        return gradient, metrics | {"not_finite": float(bad), "skipped": float(bad)}

    # ------------------------------------------------------------------ warnings

    def _warn(self, **messages: str) -> None:
        """Say each of these once a run, by its name."""
        for name, message in messages.items():
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(message, stacklevel=3)
