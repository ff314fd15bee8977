"""mlx_sft_trainer.py on TRL's SFTTrainer and RewardTrainer: models of language and of reward.

Losses, accumulation, clipping and updates are theirs (and transformers' Trainer's, on which they
stand). Here is how batches become what they take, and the reward losses that TRL has not; what else
is added: pytorch_trl.py.
"""

import copy

import numpy as np
import torch
import trl
from pytorch_arithmetic import pairwise_loss, regression_loss
from pytorch_models import Tuned
from pytorch_reward_model import RewardModel
from pytorch_trl import Inputs, SupervisedTrainer
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from data_utils import PreferenceBatch, ScalarBatch, TextBatch

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
