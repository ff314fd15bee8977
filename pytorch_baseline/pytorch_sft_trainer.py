"""mlx_sft_trainer.py on TRL's SFTTrainer and RewardTrainer: models of language and of reward.

Losses and gradients are theirs (and transformers' Trainer's, on which they stand). What is added,
so that they train as the MLX side does: `step`, for the loop of both sides, on the batches of
data_utils, weighted by their tokens (or rows, or prompts), so that 8 x 1 = 1 x 8; and reward losses
that TRL has not.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import trl
from datasets import Dataset
from pytorch_arithmetic import pairwise_loss, regression_loss
from pytorch_models import Tuned
from pytorch_optimizers import Optimizer, apply_update, trainable
from pytorch_reward_model import RewardModel
from torch import Tensor, nn
from transformers import PrinterCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from data_utils import PreferenceBatch, ScalarBatch, TextBatch

Batch = TextBatch | ScalarBatch | PreferenceBatch
Inputs = dict[str, Tensor]


class SupervisedTrainer:
    """What both add to TRL's trainers, before them in the order of methods; no files or printing.

    Without an optimizer there is `evaluate` alone. A subclass has `inputs(batch)`, a batch of
    data_utils as TRL's collators would give it; `weight(inputs)`, what it counts for in means;
    `taken(mode)`, the metrics that TRL noted of the last batch, under the names of the MLX side.
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
        optimizer: Optimizer | None = None,
        max_grad_norm: float | None = None,
        grad_checkpoint: bool = False,
        seed: int = 0,
        **options,
    ):
        self.trained, self.parameters = trained, trainable(trained)
        self.max_grad_norm = max_grad_norm
        self.learning_rate = optimizer and optimizer.learning_rate  # of the last update
        self.before_update: Callable[[], None] = lambda: None  # called before weights move
        device = next(trained.parameters()).device
        config = self.CONFIG(
            output_dir=".",  # no file is written: checkpoints are the loop's
            report_to="none",
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
            # Asked for, and not read: `step` is given the batches of data_utils.
            train_dataset=Dataset.from_dict({name: [[0]] for name in self.COLUMNS}),
            data_collator=list,
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
        self.remove_callback(PrinterCallback)
        if grad_checkpoint:
            self.tuned.checkpoint_blocks()

    def step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One update from one or more batches; means over them, with grad_norm.

        Weights, moments and schedule stay as they are, and "not_finite" is 1, where loss or
        gradient is NaN or infinite.
        """
        made = [self._prepare_inputs(self.inputs(batch)) for batch in batches]
        weight, parts, loss = sum(map(self.weight, made)), [], 0.0
        for inputs in made:
            loss += self.training_step(self.model, inputs, weight).item()
            parts.append({"weight": self.weight(inputs), **self.taken("train")})
        norm = apply_update(self, loss)
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        ends = {"loss": loss, "grad_norm": norm, "not_finite": float(bad)}
        return self.summary(mean_of(parts) | ends)

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


def mean_of(parts: list[dict[str, float]]) -> dict[str, float]:
    """Means of metrics by "weight"; with the weight of all."""
    total = sum(part["weight"] for part in parts) or 1.0
    means = Counter()
    for part in parts:
        means.update({k: v * part["weight"] / total for k, v in part.items() if k != "weight"})
    return {**means, "weight": total}


IGNORED = -100  # label of a token that is no target


class SFTTrainer(SupervisedTrainer, trl.SFTTrainer):
    """Cross-entropy of the target tokens, nats per token; the weight is their number."""

    CONFIG, COLUMNS = trl.SFTConfig, ("input_ids",)

    def __init__(self, model: Tuned, tokenizer, **options):
        self.tuned = model
        module = model.base if model.peft is None else model.peft
        no_work = {"skip_prepare_dataset": True}
        options["router_aux_loss_coef"] = 0.0  # else a mixture of experts adds its balancing loss
        super().__init__(model, module, tokenizer, dataset_kwargs=no_work, **options)

    def inputs(self, batch: TextBatch) -> Inputs:
        labels = np.where(batch.mask > 0, batch.tokens, IGNORED)
        labels[:, 0] = IGNORED  # peft would count it behind a soft prompt
        return {**attended(batch.tokens, batch.lengths), "labels": torch.from_numpy(labels).long()}

    def weight(self, inputs: Inputs) -> float:
        return inputs["labels"].ne(IGNORED).sum().item()

    def taken(self, mode: str) -> dict[str, float]:
        (accuracy,) = self._metrics[mode].pop("mean_token_accuracy")
        self._metrics[mode].clear()
        return {"accuracy": accuracy}

    @staticmethod
    def summary(metrics: dict[str, float]) -> dict[str, float]:
        """With the perplexity."""
        return {**metrics, "perplexity": float(np.exp(min(metrics["loss"], 80.0)))}


class RewardTrainer(SupervisedTrainer, trl.RewardTrainer):
    """Bradley-Terry on pairs by TRL; on ranked lists, and regression on rewards, by this project.

    The weight is rows or prompts.
    """

    CONFIG, COLUMNS = trl.RewardConfig, ("chosen_ids", "rejected_ids")
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the weight of the whole update

    def __init__(
        self,
        model: RewardModel,
        tokenizer,
        *,
        centering: float = 0.0,
        use_margin: bool = True,
        **options,
    ):
        self.tuned, self.centering, self.use_margin = model.model, centering, use_margin
        tokenizer = copy.deepcopy(tokenizer)
        if tokenizer.pad_token is None:  # asked for; rows are padded by data_utils
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        super().__init__(
            model,
            Classifier(model),
            tokenizer,
            center_rewards_coefficient=centering or None,
            disable_dropout=False,
            **options,
        )

    def inputs(self, batch: ScalarBatch | PreferenceBatch) -> Inputs:
        if isinstance(batch, ScalarBatch):
            rewards = torch.from_numpy(batch.rewards)
            return {**attended(batch.tokens, batch.lengths), "rewards": rewards}
        margin = {"margin": torch.from_numpy(batch.margins)} if self.use_margin else {}
        if len(batch.tokens) == 2 * len(batch.better):  # pairs alone: all chosen, then all rejected
            order = np.concatenate([batch.better, batch.worse])
            return {**attended(batch.tokens[order], batch.lengths[order]), **margin}
        columns = {"better": batch.better.astype(int), "worse": batch.worse.astype(int)}
        columns = {k: torch.from_numpy(v) for k, v in {**columns, "weights": batch.weights}.items()}
        return {**attended(batch.tokens, batch.lengths), **margin, **columns}

    def weight(self, inputs: Inputs) -> float:
        if "rewards" in inputs:
            return len(inputs["rewards"])
        weights = inputs.get("weights")
        return len(inputs["input_ids"]) / 2 if weights is None else weights.sum().item()

    def compute_loss(self, model, inputs: Inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the batch, or its share of an update that counts `num_items_in_batch`."""
        if "rewards" in inputs or "weights" in inputs:
            loss = self.own_loss(model, inputs)
        else:
            loss = super().compute_loss(model, inputs)
        share = self.weight(inputs) / (num_items_in_batch or self.weight(inputs))
        return loss * share

    def own_loss(self, model, inputs: Inputs) -> Tensor:
        """What TRL's trainer has not; its metrics are noted where TRL notes its own."""
        scores = model(inputs["input_ids"], inputs["attention_mask"]).logits.squeeze(-1)
        if "rewards" in inputs:
            loss, metrics = regression_loss(scores, inputs["rewards"])
        else:
            better, worse = scores[inputs["better"]], scores[inputs["worse"]]
            loss, metrics = pairwise_loss(
                better,
                worse,
                inputs.get("margin"),
                centering=self.centering,
                weights=inputs["weights"],
            )
        noted = self._metrics["train" if model.training else "eval"]
        noted |= {name: [value.item()] for name, value in metrics.items() if name != "loss"}
        return loss

    def taken(self, mode: str) -> dict[str, float]:
        noted = {name: values[-1] for name, values in self._metrics[mode].items()}
        self._metrics[mode].clear()
        if "margin" not in noted:
            return noted
        mean, difference = noted["mean_reward"], noted["margin"]
        return {
            "accuracy": noted["accuracy"],
            "score_difference": difference,
            "chosen": mean + difference / 2,
            "rejected": mean - difference / 2,
        }


class Classifier(nn.Module):
    """A RewardModel as TRL wants it: with the face of transformers' *ForSequenceClassification."""

    def __init__(self, model: RewardModel):
        super().__init__()
        self.reward_model = model
        self.config = copy.deepcopy(model.model.base.config)
        self.config.num_labels = 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_) -> SequenceClassifierOutput:
        """Right-padded tokens (B, L) and their mask (B, L) -> logits (B, 1)."""
        scores = self.reward_model(input_ids, attention_mask.sum(dim=1))
        return SequenceClassifierOutput(logits=scores[:, None])

    def add_model_tags(self, tags: list[str]) -> None:
        """For model cards, which are not written here."""


def attended(tokens: np.ndarray, lengths: np.ndarray) -> Inputs:
    """Right-padded tokens (B, L) and lengths (B,) -> input_ids and attention_mask, (B, L)."""
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    arrays = {"input_ids": tokens, "attention_mask": mask}
    return {name: torch.from_numpy(array).long() for name, array in arrays.items()}
