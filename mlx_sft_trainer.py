"""Supervised training of language models and reward models: loss, update, evaluation.

A task says what a batch's loss is, as a sum and the weight it is divided by, so that gradients of
several batches add up to the gradient of one large batch: 8 x 1 = 1 x 8.
"""

import fast_blas  # noqa: F401

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from data_loading.collate import (
    PreferenceBatch,
    ScalarBatch,
    TextBatch,
    UnpairedBatch,
    count_rows,
    share_of,
)
from distributed.group import here
from models.adapter_description import REWARD_HEAD
from models.packing import pick_targets
from models.reward_network import RewardModel
from models.trunk import find_trunk, picked_hidden, token_logprobs
from models.tuning import Tuning
from padding import round_up
from rl.contrastive import contrastive_loss, pooled
from rl.losses import pairwise_loss, regression_loss
from training.groups import Group, adapter_group
from training.update import added, apply_update, checkpointed_blocks, loss_and_gradient

Batch = TextBatch | ScalarBatch | PreferenceBatch | UnpairedBatch
# Sums over a batch. "weight" is what each of them is divided by, but for those that are pairs of a
# sum and a weight of its own. "num_tokens" is a total, and stays one.
Sums = dict[str, mx.array | tuple[mx.array, mx.array]]
TOTALS = ("weight", "num_tokens")
# Of one forward pass on a CPU: a core is busy with these, and more in one pass only spoils its
# caches, while passes of like lengths need less padding (docs/LOG.md).
PASS_TOKENS = 512


class Task:
    """What the trainer asks of a task, beside `trained`, `groups`, `arrays`, `loss`, `summary`."""

    share_prompts = False  # a prompt may go through the model once for several responses

    def inputs(self, batches: Iterable[Batch]) -> Iterator[Sequence]:
        """What goes into `loss` for this worker's share of each batch, made when its turn comes."""
        return (self.arrays(own_share(batch)) for batch in batches)


class LanguageModelTask(Task):
    """Cross-entropy of the target tokens, nats per token; the weight is their number."""

    def __init__(self, model: nn.Module, tuning: Tuning, pad_to_multiple: int = 1):
        self.model, self.trained, self.tuning = model, model, tuning
        self.pad_to_multiple = pad_to_multiple

    def groups(self, adapter: dict) -> dict[str, Group]:
        """What a checkpoint holds of this task; `adapter`: what it says of the adapter."""
        return {"adapters": adapter_group(self.tuning, adapter)}

    def arrays(self, batch: TextBatch) -> list[mx.array]:
        """What of a batch goes into `loss`: inputs (B, L), index, targets and weights (N,)."""
        prefix = np.array(self.tuning.prefix, dtype=np.int32)
        shape = (len(batch.tokens), len(prefix))
        tokens = np.concatenate([np.broadcast_to(prefix, shape), batch.tokens], axis=1)
        mask = np.concatenate([np.zeros(shape), batch.mask], axis=1)
        inputs, index, targets = pick_targets(tokens, mask)
        weights = np.ones(len(index), dtype=np.float32)
        if batch.weights is not None:
            weights *= batch.weights[index // inputs.shape[1]]
        multiple = 16 * self.pad_to_multiple if self.pad_to_multiple > 1 else 1
        # At least one, of weight 0: MLX's sums over nothing can take minutes.
        spare = round_up(max(len(index), 1), multiple) - len(index)
        index, targets, weights = (np.pad(a, (0, spare)) for a in (index, targets, weights))
        return [mx.array(a) for a in (inputs, index, targets, weights)]

    def loss(self, arrays: Sequence[mx.array]) -> tuple[mx.array, Sums]:
        inputs, index, targets, weights = arrays
        return self.cross_entropy(picked_hidden(self.model, inputs, index), targets, weights)

    def cross_entropy(
        self, hidden: mx.array, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, Sums]:
        """Of hidden states (N, D) that predict targets (N,): its sum, and what is logged."""
        logprobs, top1 = token_logprobs(
            self.model, hidden, targets, extras=("top1",), gradient=self.trained.training
        )
        loss = -(logprobs * weights).sum()
        return loss, {"loss": loss, "accuracy": (top1 * weights).sum(), "weight": weights.sum()}

    @staticmethod
    def summary(metrics: dict[str, float]) -> dict[str, float]:
        """Means -> what is reported: with the perplexity."""
        return {**metrics, "perplexity": float(np.exp(min(metrics["loss"], 80.0)))}


class ContrastiveTask(LanguageModelTask):
    """Cross-entropy, and `contrastive_weight` times a contrastive loss on the rows' labels.

    The weight of a batch is the number of tokens whose cross-entropy counts, or 1 without any.
    """

    def __init__(self, *arguments, temperature: float, contrastive_weight: float, **options):
        super().__init__(*arguments, **options)
        self.temperature, self.contrastive_weight = temperature, contrastive_weight

    def arrays(self, batch: TextBatch) -> list[mx.array]:
        """Those of a language model, shares (B, N) of the tokens in their rows' means, labels."""
        inputs, index, targets, weights = super().arrays(batch)
        count, length = inputs.shape
        rows = np.array(index) // length
        counted = np.arange(len(rows)) < batch.mask[:, 1:].sum()  # the rest is padding
        shares = ((rows == np.arange(count)[:, None]) & counted).astype(np.float32)  # (B, N)
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1)
        labels = np.full(count, -1, np.int32) if batch.labels is None else batch.labels
        return [inputs, index, targets, weights, mx.array(shares), mx.array(labels)]

    def loss(self, arrays: Sequence[mx.array]) -> tuple[mx.array, Sums]:
        inputs, index, targets, weights, shares, labels = arrays
        hidden = picked_hidden(self.model, inputs, index)  # (N, D)
        total, sums = self.cross_entropy(hidden, targets, weights)
        weight = mx.maximum(sums["weight"], 1)
        found, metrics = contrastive_loss(pooled(hidden, shares), labels, self.temperature)
        total = total + self.contrastive_weight * found * weight
        return total, sums | {k: v * weight for k, v in metrics.items()} | {"weight": weight}


class RewardModelTask(Task):
    """Regression on rewards, or Bradley-Terry on preferences; the weight is rows or prompts.

    All rows of a batch go through the model in one forward pass; on a CPU in one for about every
    PASS_TOKENS tokens, rows of like lengths together. `pass_tokens` sets another number; 0: one.
    """

    def __init__(
        self,
        model: RewardModel,
        *,
        centering: float = 0.0,
        use_margin: bool = True,
        soft_labels: bool = False,
        pass_tokens: int | None = None,
    ):
        """`soft_labels`: pairs count by their `probability`, and have no margin."""
        self.model, self.trained = model.model, model
        self.soft_labels = soft_labels
        self.reward_model, self.tuning = model, model.tuning
        self.centering, self.use_margin = centering, use_margin
        on_gpu = mx.default_device().type == mx.DeviceType.gpu  # every new shape is traced anew
        self.pass_tokens = (0 if on_gpu else PASS_TOKENS) if pass_tokens is None else pass_tokens
        owner, _ = find_trunk(model.model)
        if "lm_head" in owner:
            owner.lm_head.freeze()  # scores do not pass through it; its moments would cost memory

    def groups(self, adapter: dict) -> dict[str, Group]:
        """What a checkpoint holds of this task; `adapter`: what it says of the adapter."""
        model = self.reward_model
        return {
            "adapters": adapter_group(self.tuning, adapter),
            REWARD_HEAD: Group(
                model.head_arrays,
                lambda arrays: model.load_head(arrays, model.description(), REWARD_HEAD),
                lambda: {REWARD_HEAD: model.description()},
            ),
        }

    def arrays(self, batch: ScalarBatch | PreferenceBatch) -> list:
        """What of a batch goes into `loss`: [[tokens, lengths] of each pass, *columns]."""
        prefix = np.array(self.tuning.prefix, dtype=np.int32)
        front = np.broadcast_to(prefix, (len(batch.tokens), len(prefix)))
        tokens, lengths = np.concatenate([front, batch.tokens], axis=1), batch.lengths + len(prefix)
        passes = self.passes(batch.lengths, batch.tokens.shape[1])
        columns = [np.argsort(np.concatenate([rows for rows, _ in passes]))]  # back into order
        if isinstance(batch, ScalarBatch):
            columns += [batch.rewards]
        else:
            columns += [batch.better, batch.worse, batch.margins, batch.weights]
            columns += [batch.probabilities] if self.soft_labels else []
        return [
            [
                [mx.array(tokens[rows, : len(prefix) + width]), mx.array(lengths[rows])]
                for rows, width in passes
            ],
            *map(mx.array, columns),
        ]

    def passes(self, lengths: np.ndarray, width: int) -> list[tuple[np.ndarray, int]]:
        """(rows, padded length) of each forward pass of a batch; without the soft prompt."""
        if not self.pass_tokens:
            return [(np.arange(len(lengths)), width)]
        groups = by_length(lengths + len(self.tuning.prefix), self.pass_tokens)
        return [(rows, lengths[rows].max()) for rows in groups]

    def loss(self, arrays: Sequence) -> tuple[mx.array, Sums]:
        passes, place, *rest = arrays
        scores = mx.concatenate([self.reward_model(*inputs) for inputs in passes])[place]  # (N,)
        if len(rest) == 1:
            weight = mx.array(float(scores.size))
            loss, metrics = regression_loss(scores, rest[0])
        else:
            better, worse, margins, weights, *soft = rest
            weight = weights.sum()
            loss, metrics = pairwise_loss(
                scores[better],
                scores[worse],
                margins if self.use_margin and not soft else None,
                centering=self.centering,
                weights=weights,
                probability=soft[0] if soft else None,
            )
        return loss * weight, {**{k: v * weight for k, v in metrics.items()}, "weight": weight}

    @staticmethod
    def summary(metrics: dict[str, float]) -> dict[str, float]:
        return metrics


def own_share(batch: Batch) -> Batch:
    """The rows of a batch that this worker takes: alone, all."""
    workers = here()
    return batch if workers.alone else share_of(batch, workers.rank, workers.size)


def has_share(batch: Batch) -> bool:
    """Whether this worker has a row of the batch; else its share is a stand-in that counts 0."""
    return here().alone or here().rank < count_rows(batch)


def by_length(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Row numbers in groups of like lengths, all with about as many tokens, at least `tokens`."""
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    count = max(1, ends[-1] // tokens)
    middles = ends - lengths[order] / 2
    group = middles * count // ends[-1]
    return np.split(order, np.flatnonzero(np.diff(group)) + 1)


class SupervisedTrainer:
    """One optimizer update at a time on a task; no data, files or printing here."""

    def __init__(
        self,
        task: Task,
        optimizer: optim.Optimizer,
        *,
        max_grad_norm: float | None = None,
        grad_checkpoint: bool = False,
        compile: bool | None = None,
    ):
        self.task = task
        self.max_grad_norm, self.grad_checkpoint = max_grad_norm, grad_checkpoint
        if grad_checkpoint:  # which makes blocks anew without the prompt's keys and values
            task.share_prompts = False
        self.begin(optimizer)
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        compiled = on_gpu if compile is None else compile
        self._loss_and_grad = loss_and_gradient(task.trained, task.loss, compiled)
        self.before_update: Callable[[], None] = lambda: None  # called before weights move

    def begin(self, optimizer: optim.Optimizer) -> None:
        """Go on with a new optimizer, which knows nothing of the updates before."""
        self.optimizer = optimizer
        optimizer.init(self.parameters)

    @property
    def parameters(self) -> dict:
        """What the optimizer moves."""
        return self.task.trained.trainable_parameters()

    @property
    def learning_rate(self) -> float:
        """Of the last update."""
        return float(self.optimizer.learning_rate)

    def step(self, batches: Iterable[Batch]) -> dict[str, float]:
        """One update from one or more batches, weighted by their tokens (or rows).

        Returns means over all of them, with grad_norm. Weights stay as they are, and "not_finite"
        is 1, where loss or gradient is NaN or infinite.
        """
        self.task.trained.train()
        total, workers, batches = None, here(), list(batches)
        with workers.own_draws(self.optimizer):
            for batch, arrays in zip(batches, self.task.inputs(batches), strict=True):
                with checkpointed_blocks(self.task.model, self.grad_checkpoint):
                    (_, sums), gradient = self._loss_and_grad(arrays)
                part = gradient, sums
                total = added(total, part if has_share(batch) else tree_map(mx.zeros_like, part))
        gradient, sums = workers.sum(total, "the sum of gradients")
        metrics = means(sums)
        metrics["grad_norm"] = apply_update(
            self.task.trained,
            self.optimizer,
            gradient,
            sums["weight"],
            self.max_grad_norm,
            loss=metrics["loss"],
            before=self.before_update,
        )
        finite = np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
        metrics["not_finite"] = float(not finite)
        return self.task.summary(metrics)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        return evaluate(self.task, batches)


def means(sums: dict) -> dict[str, float]:
    """Sums over batches as means; one of weight 0 is left out, and TOTALS stay as they are."""
    found = {}
    for name, value in sums.items():
        total, weight = value if isinstance(value, tuple) else (value, sums["weight"])
        if name in TOTALS:
            found[name] = float(total)
        elif isinstance(value, tuple) and not float(weight):
            continue
        else:
            found[name] = float(total / weight)
    return found


def added_up(every: Sequence[dict]) -> dict:
    """The sums of several workers as those of one; pairs are lists where JSON had them."""
    found: dict = {}
    for sums in every:
        for name, value in sums.items():
            value = tuple(value) if isinstance(value, list) else value
            found[name] = tree_map(operator.add, found[name], value) if name in found else value
    return found


def evaluate(task: Task, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss and metrics over `batches`, dropout off."""
    task.trained.eval()
    sums: dict = {}
    batches, counted = itertools.tee(batches)
    for batch, arrays in zip(counted, task.inputs(batches), strict=True):
        _, found = task.loss(arrays)
        mx.eval(found)
        # In Python's own floats: a float32 sum over many batches would lose digits.
        counts = has_share(batch)
        found = tree_map(lambda value, counts=counts: value.item() if counts else 0.0, found)
        sums = tree_map(operator.add, sums, found) if sums else found
    found = means(sums if here().alone else added_up(here().gather(sums, "the evaluation")))
    return task.summary({name: value for name, value in found.items() if name not in TOTALS})
