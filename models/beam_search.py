"""Beam search: the likeliest reply among those that a fixed number of beams can find.

Follows transformers 5 (`GenerationMixin._beam_search` with early_stopping=False, batch of one), so
that the same model gives the same text and score there and here. With a temperature it samples as
that one does with do_sample: continuations are drawn, without replacement, by the softmax of their
sums. Legend: K beams, V vocabulary, C candidates kept in a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from models.decoding import Sampling, filtered, keep_rows, make_cache
from models.trunk import hidden_states, logits_from_hidden


@dataclass
class Beam:
    """A reply; `score` is the sum of its log-probabilities / len(tokens) ** length_penalty."""

    tokens: list[int]  # EOS included where it was written
    score: float
    finished: bool  # ended by EOS, not by the length limit


def beam_search(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_tokens: int,
    eos_ids: set[int],
    length_penalty: float = 1.0,
    sampling: Sampling | None = None,
    processor: Callable[[list[int], mx.array], mx.array] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Beam]:
    """The best `num_beams` replies to `prompt` (token ids), best first.

    `processor(tokens so far, log-probabilities (1, V))` changes a beam's log-probabilities before
    they count (repetition penalty). `sampling` draws continuations, by MLX's global random state,
    where its temperature is above 0; towards 0 these become the best ones. When `should_stop()`
    becomes true the search ends with what the running beams have written.
    """
    if num_beams < 1 or max_tokens < 1 or not prompt:
        raise ValueError("beam search needs a beam, a token to write and a token to start from")
    tokens, cache = mx.array([list(prompt)]), make_cache(model)  # (1, P)
    running: list[tuple[list[int], float]] = [([], 0.0)]
    done: list[Beam] = []
    for length in range(1, max_tokens + 1):
        hidden = hidden_states(model, tokens, cache=cache)[:, -1]  # (k, D)
        logprobs = _log_softmax(logits_from_hidden(model, hidden))  # (k, V)
        if processor is not None:
            rows = [
                processor([*prompt, *written], logprobs[i : i + 1])
                for i, (written, _) in enumerate(running)
            ]
            logprobs = mx.concatenate(rows)
        # With n EOS tokens, (1 + n) K candidates leave at least K that go on.
        count = max(2, 1 + len(eos_ids)) * num_beams
        candidates = _best(logprobs, [score for _, score in running], count, sampling)
        scale = length**length_penalty
        going: list[tuple[int, int, float]] = []
        for place, (row, token, score) in enumerate(candidates):
            ended = token in eos_ids
            if ended or length == max_tokens:
                # Only the K best may end; those behind them are there to go on if the best end.
                if place < num_beams:
                    done.append(Beam([*running[row][0], token], score / scale, ended))
            elif len(going) < num_beams:
                going.append((row, token, score))
        done = sorted(done, key=lambda beam: -beam.score)[:num_beams]
        if not going or _settled(done, num_beams, max(score for *_, score in going) / scale):
            return done
        running = [([*running[row][0], token], score) for row, token, score in going]
        if should_stop is not None and should_stop():
            stopped = [Beam(written, score / scale, False) for written, score in running]
            return sorted(done + stopped, key=lambda beam: -beam.score)[:num_beams]
        index = mx.array([row for row, _, _ in going])
        for layer in cache:
            keep_rows(layer, index)
        tokens = mx.array([[token] for _, token, _ in going])  # (K, 1)
    raise AssertionError("at the length limit no candidate goes on")


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _best(
    logprobs: mx.array, scores: list[float], count: int, sampling: Sampling | None
) -> list[tuple[int, int, float]]:
    """(beam, token, score) of `count` continuations (all, if fewer), best or first drawn first.

    logprobs (k, V) are added to the beams' scores (k,). Drawing without replacement is taking the
    largest after Gumbel noise has been added (Kool et al. 2019, arXiv 1903.06059).
    """
    vocabulary = logprobs.shape[-1]
    count = min(count, logprobs.size)
    drawn = sampling is not None and sampling.temperature > 0
    if drawn and not sampling.filters_off:
        tempered = _log_softmax(logprobs / sampling.temperature)
        logprobs = mx.where(filtered(tempered, sampling) > 0, logprobs, -mx.inf)
    totals = (logprobs + mx.array(scores, dtype=mx.float32)[:, None]).reshape(-1)  # (k V,)
    worth = totals
    if drawn:
        worth = totals / sampling.temperature + mx.random.gumbel(totals.shape)
    places = mx.argpartition(-worth, kth=count - 1)[:count]
    worth, values = np.array(worth[places]), np.array(totals[places])
    places = np.array(places)
    order = np.argsort(-worth, kind="stable")
    return [
        (int(places[i]) // vocabulary, int(places[i]) % vocabulary, float(values[i]))
        for i in order
        if values[i] > -np.inf  # filtered out
    ]


def _settled(done: list[Beam], num_beams: int, best_running: float) -> bool:
    """Whether K replies have ended and the best running beam is behind the worst of them."""
    return len(done) == num_beams and best_running <= done[-1].score
