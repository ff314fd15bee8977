"""A language model that gives one number to a text: trunk, pooling, a linear head.

The head reads hidden states after the final norm. With a `tuning` the reward model is an adapter
and a head on a base that others share; the adapter goes in for scoring and out again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from models.limits import find_limits
from models.reading import Reading
from models.text_scores import TextScores
from models.trunk import hidden_size, hidden_states, picked_hidden
from models.tuning import Tuning, check_arrays


class RewardModel(TextScores, nn.Module):
    """tokens (B, L) and lengths (B,) -> scores (B,).

    `pooling` is "mean" over all tokens of the text, or the "last" token. `gain` and `offset`
    normalise: score = gain * raw + offset (lm-human-preference-details: mean 0 and standard
    deviation 1 on samples of the base model). `reading` says how texts become the tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pooling: str = "mean",
        tuning: Tuning | None = None,
        gain: float = 1.0,
        offset: float = 0.0,
        reading: Reading | None = None,
    ):
        super().__init__()
        self.set_up_scores(pooling, gain, offset, reading)
        self.model = model
        width = hidden_size(model)
        # normal(0, 1/sqrt(D+1)) as in lm-human-preference-details
        self.head = {
            "weight": mx.random.normal((1, width), scale=(width + 1) ** -0.5),
            "bias": mx.zeros((1,)),
        }
        self._tuning = tuning
        self.source: Any = None  # LoadedModel: where it was loaded from, with its tokenizer
        self.train(model.training)

    @property
    def tuning(self) -> Tuning | None:
        return self._tuning

    def __call__(self, tokens: mx.array, lengths: mx.array) -> mx.array:
        """Raw scores (B,) float32 of right-padded tokens (B, L), before gain and offset."""
        if self.pooling == "last":
            last = mx.arange(len(tokens)) * tokens.shape[1] + lengths - 1
            pooled = picked_hidden(self.model, tokens, last).astype(mx.float32)  # (B, D)
        else:
            hidden = hidden_states(self.model, tokens)  # (B, L, D)
            mask = mx.arange(tokens.shape[1])[None] < lengths[:, None]  # (B, L)
            hidden = mx.where(mask[..., None], hidden.astype(mx.float32), 0)
            pooled = hidden.sum(axis=1) / lengths[:, None]  # (B, D)
        return (pooled @ self.head["weight"].T).squeeze(-1) + self.head["bias"]

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int = 64,
        watched_as: str | None = None,
    ) -> list[float]:
        """Normalised scores of whole texts (token ids, prompt and response), in their order."""
        with self._scoring():
            return self._score_sorted(sequences, batch_size, watched_as)

    def check(self, sequence: Sequence[int], *, where: str, room: int = 0) -> None:
        """Raise UserError, before anything is scored, for a text that has a token without a row in
        the embedding, or more positions, `room` for a response included, than the model."""
        with self._scoring():
            find_limits(self.model).check_one(self.prepared(sequence), where, room)

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """The model as it scores: its adapter in, no dropout."""
        tuning, was_training = self._tuning, self.training
        was_active = tuning is None or tuning.active
        if not was_active:
            tuning.activate()
        self.eval()  # after the adapter is in, whose layers have a mode of their own
        try:
            yield
        finally:
            self.train(was_training)
            if not was_active:
                tuning.deactivate()

    def _score_sorted(
        self, sequences: Sequence[Sequence[int]], batch_size: int, watched_as: str | None
    ) -> list[float]:
        sequences = [self.prepared(sequence) for sequence in sequences]
        find_limits(self.model).check(sequences, where="a text to score")
        return self.scaled(
            sequences,
            batch_size,
            lambda tokens, lengths: np.array(self(mx.array(tokens), mx.array(lengths))),
            watched_as,
        )

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids of the virtual tokens that stand in front of a text."""
        return self._tuning.prefix if self._tuning is not None else self._prefix

    def settle(self, prefix: Sequence[int] | None) -> None:
        """Its adapter was fused into the model; `prefix` holds the ids of a fused soft prompt."""
        self._tuning = None
        if prefix is not None:
            self._prefix = tuple(prefix)

    def head_arrays(self) -> dict[str, mx.array]:
        return dict(self.head)

    def load_head(self, arrays: dict[str, mx.array], description: dict, source: str) -> None:
        """Take over a saved head and its description."""
        check_arrays(arrays, self.head_arrays(), source)
        self.head = {name: array.astype(mx.float32) for name, array in arrays.items()}
        self.take_description(description, source)
