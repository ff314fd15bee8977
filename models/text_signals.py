"""What a model says of texts: mean log-probability of a continuation, mean hidden state of a text.

Both come out of one forward pass over all texts together, a batch of like lengths at a time.

Legend: B texts of one batch, L their padded length, D width, N tokens picked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from errors import UserError
from models.trunk import hidden_states, token_logprobs
from padding import pad_rows, round_up
from waiting import watched

# Tokens of one batch: on a CPU more only spoils its caches; a GPU is busy with these.
BATCH_TOKENS = {mx.DeviceType.cpu: 1024, mx.DeviceType.gpu: 16384}


@dataclass(frozen=True)
class Text:
    """Tokens of which those from `start` (at least 1, or 0 for embeddings alone) on count."""

    tokens: tuple[int, ...]
    start: int
    scored: bool = False  # its mean log-probability is wanted, else its mean hidden state


def measure(
    model: nn.Module, texts: Sequence[Text], watched_as: str | None = None
) -> dict[Text, np.ndarray]:
    """For each text, once: mean log p of its counted tokens, or mean of their hidden states (D,).

    Padding and company change nothing but rounding. Texts whose counted part is empty are left out.
    `watched_as`: what a bar calls it; None: there is none.
    Raises UserError for a model whose values are not finite.
    """
    wanted = [text for text in dict.fromkeys(texts) if len(text.tokens) > text.start]
    wanted.sort(key=lambda text: len(text.tokens))
    found: dict[Text, np.ndarray] = {}
    device = mx.default_device().type
    parts = batches(wanted, BATCH_TOKENS[device])
    for batch in parts if watched_as is None else watched(parts, watched_as):
        found |= _measure(model, batch, 16 if device == mx.DeviceType.gpu else 1)
    if not all(np.isfinite(values).all() for values in found.values()):
        raise UserError("NaN or infinite log-probabilities or hidden states of the reference model")
    return found


def batches(texts: Sequence[Text], most: int) -> list[list[Text]]:
    """Neighbours together, as many as have `most` tokens with their padding, at least one each."""
    made: list[list[Text]] = []
    for text in texts:
        if not made or len(text.tokens) * (len(made[-1]) + 1) > most:
            made.append([])
        made[-1].append(text)
    return made


def _measure(model: nn.Module, batch: Sequence[Text], multiple: int) -> dict[Text, np.ndarray]:
    tokens, lengths = pad_rows([text.tokens for text in batch], 0, multiple)
    width = tokens.shape[1]
    places = np.arange(width)
    starts = np.array([text.start for text in batch])
    counted = (places >= starts[:, None]) & (places < lengths[:, None])  # (B, L)
    hidden = hidden_states(model, mx.array(tokens))  # (B, L, D)
    scored = [i for i, text in enumerate(batch) if text.scored]
    embedded = [i for i, text in enumerate(batch) if not text.scored]
    found: dict[Text, np.ndarray] = {}
    wanted = []
    if embedded:
        weights = counted[embedded] / counted[embedded].sum(axis=1, keepdims=True)
        chosen = hidden[mx.array(embedded)].astype(mx.float32)  # (b, L, D)
        means = (chosen * mx.array(weights.astype(np.float32))[..., None]).sum(axis=1)
        wanted.append(means)
    if scored:
        rows, at = np.nonzero(counted[scored])
        rows = np.array(scored)[rows]
        spare = round_up(len(rows), 8 * multiple) - len(rows) if multiple > 1 else 0
        index = np.pad(rows * width + at - 1, (0, spare))
        targets = np.pad(tokens[rows, at], (0, spare))
        flat = hidden.reshape(-1, hidden.shape[-1])[mx.array(index)]  # (N, D)
        wanted.append(token_logprobs(model, flat, mx.array(targets))[0])
    mx.eval(wanted)
    if embedded:
        found |= zip([batch[i] for i in embedded], np.array(wanted[0]), strict=True)
    if scored:
        logprobs = np.array(wanted[-1])[: len(rows)].astype(np.float64)
        found |= {batch[i]: logprobs[rows == i].mean() for i in scored}
    return found
