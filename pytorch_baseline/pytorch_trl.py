"""What is added to TRL's trainers, so that they train as the MLX side does.

The batches of data_utils in their order, weighted by their tokens (or rows, or prompts), so that
8 x 1 = 1 x 8; and an update whose gradient is not finite is skipped.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pytorch_models import Tuned
from pytorch_optimizers import Scheduler, finite, trainable
from pytorch_reward_model import RewardModel
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from data_utils import BatchIterator, PreferenceBatch, ScalarBatch, TextBatch
from run_folder.console import Progress
from training.supervised_loop import Loop

Batch = TextBatch | ScalarBatch | PreferenceBatch
Inputs = dict[str, Tensor]


class SupervisedTrainer:
    """What both add to TRL's trainers, before them in the order of methods; no files or printing.

    An update is of `accumulation` batches; the last one has fewer where they end before. Without
    an optimizer there is `evaluate` alone. A subclass has `inputs(batch)`, a batch of data_utils as
    TRL's collators would give it; `weight(inputs)`, what it counts for in means; `taken(mode)`, the
    metrics that TRL noted of the last batch, under the names of the MLX side.
    """

    CONFIG: type  # of the trainer's options
    COLUMNS: tuple[str, ...]  # that it wants a data set to have
    tuned: Tuned

    def __init__(
        self,
        trained: Tuned | RewardModel,
        module: nn.Module,
        tokenizer,
        *,
        batches: BatchIterator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Scheduler | None = None,
        accumulation: int = 1,
        max_grad_norm: float | None = None,
        grad_checkpoint: bool = False,
        seed: int = 0,
        **options,
    ):
        self.trained, self.batches, self.scheduler = trained, batches, scheduler
        self.parameters = trainable(trained)
        self.update: list[Batch] = []  # that is made
        self.parts: list[dict[str, float]] = []  # metrics of its batches
        self.loss = 0.0  # its loss; Trainer's own sum stays NaN after the first NaN
        self.skipped = False  # whether the last update was
        self.begin_update: Callable[[], None] = lambda: None
        self.before_update: Callable[[], None] = lambda: None  # called before weights move
        device = next(trained.parameters()).device
        config = self.CONFIG(
            output_dir=".",  # no file is written: checkpoints are the loop's
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="steps",
            logging_steps=1,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=max_grad_norm or 0.0,
            activation_checkpointing=False,  # Tuned.checkpoint_blocks does it
            bf16=False,  # the weights have the type that they were loaded in
            use_cpu=device.type == "cpu",
            use_cache=True,
            max_length=None,
            seed=seed % 2**32,
            **options,
        )
        config._n_gpu = min(config.n_gpu, 1)  # one of several GPUs, with no copies on the others
        super().__init__(
            model=module,
            args=config,
            # Asked for, and not read: `get_batch_samples` takes the batches of data_utils.
            train_dataset=Dataset.from_dict({name: [[0]] for name in self.COLUMNS}),
            data_collator=list,
            processing_class=tokenizer,
            optimizers=(optimizer, scheduler),
            callbacks=[Hooks(self)],
        )
        self.remove_callback(PrinterCallback)
        if grad_checkpoint:
            self.tuned.checkpoint_blocks()

    # -------------------------------------------------------------------------- training

    def train_for(
        self, updates: int, batches: int, after_update: Callable[[dict[str, float]], Any]
    ) -> None:
        """Make `updates` updates from the next `batches` batches.

        After each, `after_update` gets means over it, with grad_norm and learning_rate; training
        ends where it returns True. "not_finite" is 1 where loss or gradient was NaN or infinite,
        and the weights stayed as they were.
        """
        self.args.max_steps, self.left, self.after_update = updates, batches, after_update
        self.train()

    def get_train_dataloader(self):
        return range(self.left)  # batches; `get_batch_samples` takes them of data_utils

    def get_batch_samples(
        self, epoch_iterator: Iterator[int], num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], float]:
        """The batches of one update, and what its loss is divided by."""
        self.begin_update()
        self.update = [next(self.batches) for _ in itertools.islice(epoch_iterator, num_batches)]
        self.parts, self.loss = [], 0.0
        made = [self._prepare_inputs(self.inputs(batch)) for batch in self.update]
        return made, sum(map(self.weight, made))

    def training_step(self, model, inputs: Inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.parts.append({"weight": self.weight(inputs), **self.taken("train")})
        self.loss += loss.item()
        return loss

    # ------------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss and metrics over `batches`, dropout off."""
        self.model.eval()
        parts = []
        for batch in batches:
            inputs = self._prepare_inputs(self.inputs(batch))
            loss = self.compute_loss(self.model, inputs).item()
            parts.append({"weight": self.weight(inputs), "loss": loss, **self.taken("eval")})
        means = mean_of(parts)
        means.pop("weight")
        return self.summary(means)

    @staticmethod
    def summary(metrics: dict[str, float]) -> dict[str, float]:
        """Means -> what is reported."""
        return metrics

    def _send_telemetry(self) -> None:
        """TRL's trainers tell its makers what they run on; these do not."""


class Hooks(TrainerCallback):
    """What Trainer calls in an update, before the optimizer's step and after it."""

    def __init__(self, trainer: SupervisedTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **_) -> None:
        """Leave weights, moments and schedule as they are where something is not finite."""
        trainer, weights = self.trainer, self.trainer.parameters.values()
        gradients = (w.grad for w in weights if w.grad is not None)
        trainer.skipped = not (np.isfinite(trainer.loss) and finite(gradients))
        if trainer.skipped:
            for weight in weights:
                weight.grad = None  # of these no optimizer takes a step
            trainer.scheduler.wait()
        else:
            trainer.before_update()

    def on_log(self, args, state, control, logs: dict[str, float], **_) -> None:
        """After every update, and once more, without these, when training ends."""
        trainer = self.trainer
        if "grad_norm" in logs:
            metrics = {**mean_of(trainer.parts), "loss": trainer.loss}
            metrics |= {name: logs[name] for name in ("grad_norm", "learning_rate")}
            metrics["not_finite"] = float(trainer.skipped)
            control.should_training_stop |= bool(trainer.after_update(trainer.summary(metrics)))


@dataclass
class TrainerLoop(Loop):
    """training/supervised_loop.py with updates in transformers' Trainer, which calls back."""

    def trained(self) -> dict:
        return self.trainer.parameters

    def make_updates(self, progress: Progress) -> None:
        """Updates until the last one, or a stop; the Trainer's own loop makes them."""
        plan, step = self.schedule, ExitStack()
        left = (plan.batches or plan.steps * plan.accumulation) - self.step * plan.accumulation

        def after_update(metrics: dict[str, float]) -> bool:
            step.close()
            self.note(metrics, self.trainer.update, progress)
            self.end_step(progress)
            return self.ended(progress)

        if not self.ended(progress):
            self.trainer.batches = self.batches
            self.trainer.begin_update = lambda: step.enter_context(self.step_to_give_up())
            with step:
                self.trainer.train_for(plan.steps - self.step, left, after_update)


def mean_of(parts: list[dict[str, float]]) -> dict[str, float]:
    """Means of metrics by "weight"; with the weight of all."""
    total = sum(part["weight"] for part in parts) or 1.0
    means = Counter()
    for part in parts:
        means.update({k: v * part["weight"] / total for k, v in part.items() if k != "weight"})
    return {**means, "weight": total}
