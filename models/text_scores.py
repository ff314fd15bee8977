"""What a reward model is beside its network: how it reads texts, and the scale of its scores.

No array library: the PyTorch twin shares it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from errors import UserError
from models.reading import Reading
from padding import pad_rows
from waiting import watched

POOLINGS = ("mean", "last")


class TextScores:
    """`score = gain * raw + offset`, which makes mean 0 and standard deviation 1 on samples.

    `pooling` is "mean" over all tokens of the text, or the "last" token. `reading` says how texts
    become tokens.
    """

    def set_up_scores(
        self,
        pooling: str = "mean",
        gain: float = 1.0,
        offset: float = 0.0,
        reading: Reading | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise UserError(f"pooling {pooling!r} is none of {', '.join(POOLINGS)}")
        self.pooling, self.gain, self.offset = pooling, gain, offset
        self.reading = reading or Reading()
        self._prefix: tuple[int, ...] = ()  # of a soft prompt that is fused into the vocabulary
        self._pad_id: int | None = None  # where given, the "last" token is the last that is not it

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids of the virtual tokens that stand in front of a text."""
        return self._prefix

    def prepared(self, sequence: Sequence[int]) -> list[int]:
        """What is run for a text: its tokens, behind the virtual tokens of a soft prompt."""
        ids = list(sequence)
        while self._pad_id is not None and len(ids) > 1 and ids[-1] == self._pad_id:
            ids.pop()
        prefix = list(self.prefix)
        # The tokenizer of a fused soft prompt may have put them there already.
        return ids if prefix and ids[: len(prefix)] == prefix else prefix + ids

    def scaled(
        self,
        sequences: Sequence[Sequence[int]],
        batch_size: int,
        raw: Callable[[np.ndarray, np.ndarray], np.ndarray],
        watched_as: str | None = None,
    ) -> list[float]:
        """Scores of prepared texts in their order, by `raw(tokens (B, L), lengths (B,)) -> (B,)`.

        Texts of like lengths go together. `watched_as`: what a bar calls it; None: there is none.
        """
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = np.zeros(len(sequences), dtype=np.float32)
        starts = range(0, len(order), batch_size)
        for start in starts if watched_as is None else watched(starts, watched_as):
            rows = order[start : start + batch_size]
            scores[rows] = raw(*pad_rows([sequences[i] for i in rows]))
        return (self.gain * scores + self.offset).tolist()

    def description(self) -> dict[str, Any]:
        """What a head's file says of all this, JSON-able."""
        described = {"pooling": self.pooling, "gain": self.gain, "offset": self.offset}
        if self.prefix:
            described["prefix"] = list(self.prefix)
        if self._pad_id is not None:
            described["pad_id"] = self._pad_id
        return described | self.reading.description()

    def take_description(self, description: dict, source: str) -> None:
        """What `description` gave, from the file `source`; UserError where it is not usable."""
        pooling = description.get("pooling", "mean")
        if pooling not in POOLINGS:
            raise UserError(f"{source}: pooling is none of {', '.join(POOLINGS)}")
        self.pooling = pooling
        try:
            self.gain = float(description.get("gain", 1.0))
            self.offset = float(description.get("offset", 0.0))
            self._prefix = tuple(int(i) for i in description.get("prefix", ()))
            pad_id = description.get("pad_id")
            self._pad_id = None if pad_id is None else int(pad_id)
            self.reading = Reading.described(description)
        except (TypeError, ValueError, KeyError, OverflowError, AttributeError) as error:
            raise UserError(f"{source}: its description is not usable: {error!r}") from None
        if not (math.isfinite(self.gain) and math.isfinite(self.offset)):
            raise UserError(f"{source}: gain and offset must be finite numbers")


def normalise(model: Any, texts: Sequence[Sequence[int]]) -> None:
    """Set gain and offset so that the scores of `texts` have mean 0 and standard deviation 1.

    lm-human-preference-details does so on samples of the base model. Raises UserError where all
    scores are equal.
    """
    model.gain, model.offset = 1.0, 0.0
    scores = np.array(model.score(texts, watched_as="scoring"), dtype=np.float64)
    if not scores.std() > 1e-6 * np.abs(scores).max():  # what is less is rounding
        raise UserError(
            "--normalize-samples: all samples have the same score, so there is no "
            "deviation to divide by"
        )
    model.gain = float(1 / scores.std())
    model.offset = float(-scores.mean() / scores.std())
