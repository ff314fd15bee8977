"""What is added to TRL's trainers, so that they train as the MLX side does.

The batches of data_utils in their order, weighted by their tokens (or rows, or prompts), so that
8 x 1 = 1 x 8; and an update whose gradient is not finite is skipped.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pytorch_models import Tuned
from pytorch_reward_model import RewardModel
from pytorch_training import Scheduler, finite, trainable
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from data_utils import BatchIterator, PreferenceBatch, ScalarBatch, TextBatch

Batch = TextBatch | ScalarBatch | PreferenceBatch
Inputs = dict[str, Tensor]


class SupervisedTrainer:
    """What both add to TRL's trainers, before them in the order of methods; no files or printing.

    An update is of `accumulation` batches; the last one has fewer where they end before. Without
    an optimizer there is `evaluate` alone.
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
        self.trained, self.batches = trained, batches
        self.parameters = trainable(trained)
        self.update: list[Batch] = []  # that is made
        self.parts: list[dict[str, float]] = []  # metrics of its batches
        self.loss = 0.0  # its loss; Trainer's own sum stays NaN after the first NaN
        self.skipped = False  # whether the last update was
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

    def inputs(self, batch: Batch) -> Inputs:
        """A batch of data_utils as TRL's collators would give it."""
        raise NotImplementedError

    def weight(self, inputs: Inputs) -> float:
        """What a batch counts for in means: its targets, rows or prompts."""
        raise NotImplementedError

    def taken(self, mode: str) -> dict[str, float]:
        """The metrics that TRL noted of the last batch, under the names of the MLX side."""
        raise NotImplementedError

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
        return Coming(self.batches, self.left)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Inputs], float]:
        """The batches of one update, and what its loss is divided by."""
        self.update = list(itertools.islice(epoch_iterator, num_batches))
        self.parts, self.loss = [], 0.0
        made = [self._prepare_inputs(self.inputs(batch)) for batch in self.update]
        return made, sum(map(self.weight, made))

    def training_step(self, model, inputs: Inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.parts.append({"weight": self.weight(inputs), **self.taken("train")})
        self.loss += loss.item()
        return loss

    def rows_of_update(self) -> list[list[int]]:
        """The tokens of every sequence of the last update."""
        return [
            tokens[:length].tolist()
            for batch in self.update
            for tokens, length in zip(batch.tokens, batch.lengths, strict=True)
        ]

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
            trainer.lr_scheduler.wait()

    def on_log(self, args, state, control, logs: dict[str, float], **_) -> None:
        """After every update, and once more, without these, when training ends."""
        trainer = self.trainer
        if "grad_norm" in logs:
            metrics = {**mean_of(trainer.parts), "loss": trainer.loss}
            metrics |= {name: logs[name] for name in ("grad_norm", "learning_rate")}
            metrics["not_finite"] = float(trainer.skipped)
            control.should_training_stop |= bool(trainer.after_update(trainer.summary(metrics)))


class Coming:
    """The next `count` batches of an iterator; Trainer asks a data loader for its length."""

    def __init__(self, batches: BatchIterator, count: int):
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(self.batches, self.count)


def mean_of(parts: list[dict[str, float]]) -> dict[str, float]:
    """Means of metrics by "weight"; with the weight of all."""
    total = sum(part["weight"] for part in parts) or 1.0
    means = Counter()
    for part in parts:
        means.update({k: v * part["weight"] / total for k, v in part.items() if k != "weight"})
    return {**means, "weight": total}
