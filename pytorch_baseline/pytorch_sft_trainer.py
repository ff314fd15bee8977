"""mlx_sft_trainer.py in PyTorch: supervised training of language models and reward models.

A task says what a batch's loss is, as a sum and the weight it is divided by, so that gradients of
several batches add up to the gradient of one large batch: 8 x 1 = 1 x 8.
"""

from collections.abc import Iterable

import numpy as np
import torch
from pytorch_losses import pairwise_loss, regression_loss
from pytorch_models import Tuned
from pytorch_reward_model import RewardModel
from pytorch_training import finite
from torch import Tensor

from data_utils import PreferenceBatch, ScalarBatch, TextBatch

Batch = TextBatch | ScalarBatch | PreferenceBatch
Sums = dict[str, Tensor]  # sums over a batch; "weight" is what each of them is divided by


class LanguageModelTask:
    """Cross-entropy of the target tokens, nats per token; the weight is their number."""

    def __init__(self, model: Tuned):
        self.model = self.trained = model

    def loss(self, batch: TextBatch) -> tuple[Tensor, Sums]:
        tokens = torch.from_numpy(batch.tokens).long().to(self.model.device)  # (B, L)
        counted = torch.from_numpy(batch.mask).to(self.model.device)[:, 1:] > 0
        hidden = self.model.hidden_states(tokens[:, :-1])  # (B, L - 1, D)
        logp = self.model.logits(hidden[counted]).log_softmax(-1)  # (N, V)
        targets = tokens[:, 1:][counted]  # (N,)
        loss = -logp.gather(-1, targets[:, None]).sum()
        right = (logp.argmax(-1) == targets).sum()
        return loss, {"loss": loss.detach(), "accuracy": right, "weight": counted.sum()}

    @staticmethod
    def summary(metrics: dict[str, float]) -> dict[str, float]:
        """Means -> what is reported: with the perplexity."""
        return {**metrics, "perplexity": float(np.exp(min(metrics["loss"], 80.0)))}


class RewardModelTask:
    """Regression on rewards, or Bradley-Terry on preferences; the weight is rows or prompts."""

    def __init__(self, model: RewardModel, *, centering: float = 0.0, use_margin: bool = True):
        self.model, self.trained, self.reward_model = model.model, model, model
        self.centering, self.use_margin = centering, use_margin

    def loss(self, batch: ScalarBatch | PreferenceBatch) -> tuple[Tensor, Sums]:
        device = self.model.device
        tokens = torch.from_numpy(batch.tokens).long().to(device)
        scores = self.reward_model(tokens, torch.from_numpy(batch.lengths).to(device))  # (N,)
        if isinstance(batch, ScalarBatch):
            weight = torch.tensor(float(len(scores)))
            loss, metrics = regression_loss(scores, torch.from_numpy(batch.rewards).to(device))
        else:
            weights = torch.from_numpy(batch.weights).to(device)
            weight = weights.sum()
            loss, metrics = pairwise_loss(
                scores[torch.from_numpy(batch.better).long()],
                scores[torch.from_numpy(batch.worse).long()],
                torch.from_numpy(batch.margins).to(device) if self.use_margin else None,
                centering=self.centering,
                weights=weights,
            )
        return loss * weight, {**{k: v * weight for k, v in metrics.items()}, "weight": weight}

    @staticmethod
    def summary(metrics: dict[str, float]) -> dict[str, float]:
        return metrics


class SupervisedTrainer:
    """One optimizer update at a time on a task; no data, files or printing here."""

    def __init__(
        self,
        task: LanguageModelTask | RewardModelTask,
        optimizer: torch.optim.Optimizer,
        scheduler=None,
        *,
        max_grad_norm: float | None = None,
        grad_checkpoint: bool = False,
    ):
        self.task, self.optimizer, self.scheduler = task, optimizer, scheduler
        self.max_grad_norm = max_grad_norm
        self.parameters = trainable(task.trained)
        self.learning_rate = optimizer.param_groups[0]["lr"]  # of the last update
        if grad_checkpoint:
            task.model.checkpoint_blocks()

    def step(self, batches: Iterable[Batch]) -> dict[str, float]:
        """One update from one or more batches, weighted by their tokens (or rows).

        Returns means over all of them, with grad_norm. Weights stay as they are, and "not_finite"
        is 1, where loss or gradient is NaN or infinite.
        """
        self.task.trained.train()
        parameters, sums = list(self.parameters.values()), {}
        gradient = [torch.zeros_like(p) for p in parameters]
        for batch in batches:
            loss, found = self.task.loss(batch)
            part = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            gradient = [a + b for a, b in zip(gradient, part, strict=True)]
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in found.items()}
        weight = sums.pop("weight")
        for parameter, total in zip(parameters, gradient, strict=True):
            parameter.grad = total / weight
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf"))
        metrics = {name: total / weight for name, total in sums.items()}
        metrics |= {"grad_norm": norm.item(), "weight": weight}
        good = np.isfinite([metrics["loss"], metrics["grad_norm"]]).all() and finite(gradient)
        metrics["not_finite"] = float(not good)
        self.learning_rate = self.optimizer.param_groups[0]["lr"]
        if good:
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.task.summary(metrics)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        return evaluate(self.task, batches)


@torch.no_grad()
def evaluate(task: LanguageModelTask | RewardModelTask, batches: Iterable[Batch]) -> dict:
    """Mean loss and metrics over `batches`, dropout off."""
    task.trained.eval()
    sums: dict[str, float] = {}
    for batch in batches:
        _, found = task.loss(batch)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    weight = sums.pop("weight")
    return task.summary({name: total / weight for name, total in sums.items()})


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What the optimizer moves, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
