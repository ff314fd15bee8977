"""models/reward_model.py in PyTorch: a language model that gives one number to a text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pytorch_files import load_adapter, read_head, save_head
from pytorch_models import Tuned, load_model
from torch import Tensor, nn

from errors import UserError
from models.adapter_description import REWARD_HEAD
from models.reading import Reading

POOLINGS = ("mean", "last")
NOTHING_TRAINED = {"fine_tune_type": "full"}


class RewardModel(nn.Module):
    """tokens (B, L) and lengths (B,) -> scores (B,); score = gain * raw + offset.

    `pooling` is "mean" over all tokens of the text, or the "last" token. transformers' own
    *ForSequenceClassification knows the last token alone, and has no gain and offset.
    """

    def __init__(self, model: Tuned, *, pooling: str = "mean"):
        super().__init__()
        width = model.base.config.hidden_size
        self.model, self.pooling = model, pooling
        # normal(0, 1/sqrt(D+1)) as in lm-human-preference-details
        self.weight = nn.Parameter(torch.randn(1, width) * (width + 1) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(1))
        self.gain, self.offset = 1.0, 0.0
        self.reading = Reading()
        self.prefix: list[int] = []  # tokens of a fused soft prompt
        self.pad_id: int | None = None
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
    def score(self, sequences: Sequence[Sequence[int]], batch_size: int = 64) -> list[float]:
        """Normalised scores of whole texts (token ids, prompt and response), in their order."""
        was_training = self.training
        self.eval()
        sequences = [self._prepared(list(sequence)) for sequence in sequences]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = np.zeros(len(sequences), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            lengths = torch.tensor([len(sequences[i]) for i in rows], device=self.model.device)
            tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
            for place, i in enumerate(rows):
                tokens[place, : len(sequences[i])] = torch.tensor(sequences[i])
            scores[rows] = self(tokens.to(self.model.device), lengths).cpu().numpy()
        self.train(was_training)
        return (self.gain * scores + self.offset).tolist()

    def _prepared(self, ids: list[int]) -> list[int]:
        while self.pad_id is not None and len(ids) > 1 and ids[-1] == self.pad_id:
            ids.pop()
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def save_head(self, path: str):
        described = {"pooling": self.pooling, "gain": self.gain, "offset": self.offset}
        if self.pad_id is not None:
            described["pad_id"] = self.pad_id
        described |= self.reading.description()
        return save_head(path, REWARD_HEAD, {"weight": self.weight, "bias": self.bias}, described)

    def load_head(self, path: str) -> None:
        """Take over the head beside an adapter or in a folder, and what it says of itself."""
        found = read_head(path, REWARD_HEAD)
        if found is None:
            raise UserError(f"{path}: has no reward head beside it; make one with --reward-model")
        arrays, described = found
        if arrays["weight"].shape != self.weight.shape:
            raise UserError(
                f"{path}: its reward head is {tuple(arrays['weight'].shape)}, this "
                f"model needs {tuple(self.weight.shape)}"
            )
        with torch.no_grad():
            self.weight.copy_(arrays["weight"])
            self.bias.copy_(arrays["bias"])
        self.pooling = described.get("pooling", "mean")
        if self.pooling not in POOLINGS:
            raise UserError(f"{path}: pooling is none of {', '.join(POOLINGS)}")
        self.gain, self.offset = described.get("gain", 1.0), described.get("offset", 0.0)
        self.reading = Reading.described(described)
        self.prefix, self.pad_id = described.get("prefix", []), described.get("pad_id")


def normalise(model: RewardModel, texts: Sequence[Sequence[int]]) -> None:
    """Set gain and offset so that the scores of `texts` have mean 0 and standard deviation 1."""
    model.gain, model.offset = 1.0, 0.0
    scores = np.array(model.score(texts), dtype=np.float64)
    if not scores.std() > 0:
        raise UserError("--normalize-samples: all samples have the same score")
    model.gain = float(1 / scores.std())
    model.offset = float(-scores.mean() / scores.std())


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
