"""Two models that should compute the same: run on a few sequences, and compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from waiting import watched

CHECK_TEXTS = ("2 4 6 8 10", "The quick brown fox jumps over the lazy dog.", "Question: why?")
FORGOTTEN = 110.0  # exp(-110) is below the least float32
RANDOM_ROWS, RANDOM_LENGTH, LONGEST = 3, 12, 32


def check_sequences(tokenizer, vocabulary: int) -> list[list[int]]:
    """A few texts as token ids, and a few rows of ids drawn evenly from the vocabulary."""
    texts = [tokenizer.encode(text)[:LONGEST] for text in CHECK_TEXTS]
    drawn = np.random.default_rng(0).integers(0, vocabulary, (RANDOM_ROWS, RANDOM_LENGTH))
    rows = [ids for ids in texts if ids] + drawn.tolist()
    # A classifier scores the last token that is not the padding, which BOS may have to serve as.
    pads = {tokenizer.pad_token_id, tokenizer.bos_token_id}
    return [ids if ids[-1] not in pads else [*ids, tokenizer.eos_token_id] for ids in rows]


def all_logits(
    model: nn.Module, sequences: Sequence[Sequence[int]], prefix: Sequence[int] = ()
) -> list[np.ndarray]:
    """Logits (T, V) float32 of each sequence, those of the prefix left out."""
    model.eval()
    found = []
    for ids in watched(sequences, "checking"):
        logits = model(mx.array([[*prefix, *ids]]))[0, len(prefix) :]
        found.append(np.array(logits.astype(mx.float32)))
    return found


@dataclass
class Difference:
    """How far apart two models are on the same sequences."""

    largest: float  # of the absolute differences of logits or scores
    same_choice: int  # positions where both find the same token most likely
    positions: int

    def __str__(self) -> str:
        text = f"{self.largest:.1e}"
        if self.positions:
            text += f"; the most likely token is the same at {self.same_choice} of {self.positions}"
        return text


def compare_logits(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Difference:
    """Lists of (T, V) logits, compared over the columns that both have.

    A token FORGOTTEN below the likeliest one has no probability that float32 could tell from 0.
    """
    width = min(ours[0].shape[-1], theirs[0].shape[-1])

    def visible(logits: np.ndarray) -> np.ndarray:
        return np.maximum(logits[:, :width], logits.max(-1, keepdims=True) - FORGOTTEN)

    largest = max(abs(visible(a) - visible(b)).max() for a, b in zip(ours, theirs, strict=True))
    same = sum((a.argmax(-1) == b.argmax(-1)).sum() for a, b in zip(ours, theirs, strict=True))
    return Difference(float(largest), int(same), sum(len(a) for a in ours))


def compare_scores(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Scores of the same texts."""
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return Difference(float(largest), 0, 0)
