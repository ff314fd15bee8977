"""models/reward_model.py in PyTorch: a language model that gives one number to a text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pytorch_files import load_adapter, read_head, save_head
from pytorch_models import Tuned, load_model
from torch import Tensor, nn

from errors import UserError
from models.adapter_description import REWARD_HEAD, check_shapes
from models.text_scores import TextScores

NOTHING_TRAINED = {"fine_tune_type": "full"}


class RewardModel(TextScores, nn.Module):
    """tokens (B, L) and lengths (B,) -> scores (B,); the rest is models/text_scores.py.

    transformers' own *ForSequenceClassification knows the last token alone, no gain and offset.
    """

    def __init__(self, model: Tuned, *, pooling: str = "mean"):
        super().__init__()
        width = model.base.config.hidden_size
        self.set_up_scores(pooling)
        self.model = model
        # normal(0, 1/sqrt(D+1)) as in lm-human-preference-details
        self.weight = nn.Parameter(torch.randn(1, width) * (width + 1) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(1))
        self.to(model.device)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Raw scores (B,) float32 of right-padded tokens (B, L), before gain and offset."""
        hidden = self.model.hidden_states(tokens, with_prompt=True).float()  # (B, n + L, D)
        lengths = lengths + self.model.prompt_length
        if self.pooling == "last":
            pooled = hidden[torch.arange(len(tokens), device=hidden.device), lengths - 1]
        else:
            places = torch.arange(hidden.shape[1], device=hidden.device)
            mask = places < lengths[:, None]  # (B, n + L)
            pooled = torch.where(mask[..., None], hidden, 0).sum(dim=1) / lengths[:, None]
        return (pooled @ self.weight.T).squeeze(-1) + self.bias

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int = 64,
        watched_as: str | None = None,
    ) -> list[float]:
        """Normalised scores of whole texts (token ids, prompt and response), in their order."""
        was_training = self.training
        self.eval()
        prepared = [self.prepared(sequence) for sequence in sequences]
        scores = self.scaled(prepared, batch_size, self.raw_scores, watched_as)
        self.train(was_training)
        return scores

    def raw_scores(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        inputs = (torch.from_numpy(a).long().to(self.model.device) for a in (tokens, lengths))
        return self(*inputs).cpu().numpy()

    def save_head(self, path: str):
        arrays = {"weight": self.weight, "bias": self.bias}
        return save_head(path, REWARD_HEAD, arrays, self.description())

    def load_head(self, path: str) -> None:
        """Take over the head beside an adapter or in a folder, and what it says of itself."""
        found = read_head(path, REWARD_HEAD)
        if found is None:
            raise UserError(f"{path}: has no reward head beside it; make one with --reward-model")
        arrays, described = found
        check_shapes(arrays, {"weight": self.weight, "bias": self.bias}, path)
        with torch.no_grad():
            self.weight.copy_(arrays["weight"])
            self.bias.copy_(arrays["bias"])
        self.take_description(described, path)


def load_reward_model(path: str, base: str | None = None, *, any_base: bool = False, **options):
    """(reward model, its tokenizer) from a folder with a head, or from an adapter with a head.

    An adapter goes on a copy of its base that is loaded for it; `options` are `load_model`'s.
    """
    if not Path(path).exists():
        raise UserError(
            f"{path}: no such reward model; give the folder or the adapter that "
            "pytorch_sft.py --reward-model wrote"
        )
    if (Path(path) / "config.json").exists():
        loaded = load_model(path, **options)
        model = Tuned(loaded.model, NOTHING_TRAINED)
    else:
        loaded = load_model(base, **options)
        model = load_adapter(loaded, path, any_base=any_base)
    reward_model = RewardModel(model)
    reward_model.load_head(path)
    return reward_model.requires_grad_(False).eval(), loaded.tokenizer
