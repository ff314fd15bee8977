"""Tokenised rows, ready for batches."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np


@dataclass
class TextRow:
    """A row for SFT: `mask[t]` is 1 where `tokens[t]` is a target. Same length."""

    tokens: list[int]
    mask: list[int]
    where: str = ""
    # Of the row, where it has one. Not in the repr, of which a run's data is fingerprinted.
    reward: float | None = field(default=None, repr=False, compare=False)
    label: int | None = field(default=None, repr=False, compare=False)  # of the contrastive loss
    weight: float = field(default=1.0, repr=False, compare=False)  # of each target in the loss


@dataclass
class ScalarRow:
    """A row for reward regression."""

    tokens: list[int]
    reward: float
    where: str = ""


@dataclass
class PreferenceRow:
    """Two or more responses to one prompt, best first; equal ranks are ties.

    `masks[i][t]` is 1 where `responses[i][t]` is a token of the response (of its assistant turns,
    where it has several), as `TextRow.mask`: `masks[i][0]` is 0. Left out, everything but the first
    token counts, as for a row without a prompt.
    """

    responses: list[list[int]]  # each: the prompt's tokens, then the response's
    ranks: list[int]
    margin: float | None = None
    where: str = ""
    # That the chosen one of a pair is the better one, where training is on that. Its margin, which
    # is in the repr, has the same source.
    probability: float | None = field(default=None, repr=False, kw_only=True)
    # As long as `responses`, each too. Not in the repr, of which a run's data is fingerprinted:
    # checkpoints from before rows had masks go on.
    masks: list[list[int]] = field(default_factory=list, repr=False)
    # log p of each token under a reference model, 0 outside of the mask, if it was computed before
    reference: list[np.ndarray] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.masks = self.masks or [[0] + [1] * (len(tokens) - 1) for tokens in self.responses]

    @property
    def chosen(self) -> list[int]:
        """The best response."""
        return self.responses[0]

    @property
    def rejected(self) -> list[int]:
        """The worst response."""
        return self.responses[-1]


def ranked_pairs(groups: Iterable[Sequence[int]]) -> list[tuple[int, int, float, int]]:
    """(better, worse, weight, group) of all pairs of responses of a group whose ranks differ.

    `groups` are the ranks of each prompt's responses, 0 the best; a place counts through all
    groups. The weights of a group's pairs sum to 1, so that prompts count alike.
    """
    pairs, start = [], 0
    for group, ranks in enumerate(groups):
        places = range(len(ranks))
        own = [(i, j) for i in places for j in places if ranks[i] < ranks[j]]
        pairs += [(start + i, start + j, 1 / len(own), group) for i, j in own]
        start += len(ranks)
    return pairs


@dataclass
class UnpairedRow:
    """A response that is wanted (`label`) or not; `mask` as in `PreferenceRow`."""

    tokens: list[int]
    mask: list[int]
    label: bool
    where: str = ""
    max_length: int | None = None  # of its prompt with another row's response
    reference: np.ndarray | None = field(default=None, repr=False, compare=False)  # as above

    @property
    def prompt_length(self) -> int:
        """Tokens before the response."""
        return self.mask.index(1)


@dataclass
class PromptRow:
    """A prompt for PPO, as tokens, as the text they stand for and as a person wrote it; the row's
    other fields.
    """

    tokens: list[int]
    text: str
    columns: dict[str, Any]
    where: str = ""
    # A text, or messages. Not in repr, of which the fingerprint of a run's data is made.
    prompt: str | list = field(default="", repr=False)
    reward: float | None = field(default=None, repr=False, compare=False)  # of the recorded answer
    given: list[int] | None = field(default=None, repr=False)  # what the model reads instead

    def __post_init__(self) -> None:
        self.prompt = self.prompt or self.text

    @property
    def query(self) -> list[int]:
        """The tokens that the model reads: behind the score that is wanted, if one is."""
        return self.tokens if self.given is None else self.given


Row = TypeVar("Row", TextRow, ScalarRow, PreferenceRow, UnpairedRow, PromptRow)


@dataclass
class Tokenised(Generic[Row]):
    """Rows ready for batches, how many were cut, and which were refused: [(where, why), ...].

    `notes` say what the template did to rows: [(where, what, an example), ...]; `unused` counts the
    rows in which a field is filled in and no text is made of it.
    """

    rows: list[Row] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    cut: int = 0
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row; of a preference row, those of its longest response."""
        return list(map(max, self.sequences))

    @property
    def sequences(self) -> list[list[int]]:
        """Tokens of each sequence that a row brings into a batch: one, or one a response."""
        return [
            list(map(len, r.responses)) if isinstance(r, PreferenceRow) else [len(r.tokens)]
            for r in self.rows
        ]
