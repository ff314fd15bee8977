"""Stages that algorithms on rollouts share: sample, score under policy and reference, KL, order.

PPO and the group methods call them; none needs a value head.

Legend: B responses, b of them in one pass, R longest response, N response tokens picked.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from distributed.group import here
from models.actor_critic import picked_logits, reference_logprobs
from models.decoding import Generation, Sampling
from models.decoding import generate as decode
from models.packing import Packed, pack
from models.trunk import entering_states
from models.tuning import Tuning
from rl.kl import full_kl
from rl.rollouts import Rollout, check_token_ids, token_lists

# ------------------------------------------------------------------------------ sample


def sample(
    model: nn.Module,
    prefix: Sequence[int],
    queries: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    sampling: Sampling,
    eos_ids: set[int],
    vocabulary: int,
    random: np.random.Generator,
    value_head: Callable[[mx.array], mx.array] | None = None,
    should_stop: Callable[[list[int]], bool] | None = None,
    samples: int = 1,
) -> Rollout:
    """A response (EOS included) to each query, with log-probabilities and, given a head, values.

    `prefix`: ids of virtual tokens in front of every query. `samples` responses to each query
    adjoin, and their query stands there as often. Raises UserError, naming the row, for a
    query with an id beyond the `vocabulary`. Several workers share the queries, and have all.
    """
    queries = token_lists(queries)
    check_token_ids("query", queries, vocabulary)
    key, count = mx.random.key(int(random.integers(2**63))), len(queries) * samples
    options = {
        "eos_ids": eos_ids,
        "sampling": sampling,
        "value_head": value_head,
        "should_stop": should_stop,
        "samples": samples,
    }
    prompts = [[*prefix, *query] for query in queries]
    queries = [query for query in queries for _ in range(samples)]
    if here().alone:
        made = decode(model, prompts, max_tokens=max_tokens, key=key, **options)
    else:
        limits = [max_tokens] * count if isinstance(max_tokens, int) else list(max_tokens)
        made = decode_share(model, prompts, limits, key, with_values=bool(value_head), **options)
    return Rollout(queries, made.responses, made.finished, made.logprobs, made.values)


def decode_share(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    key: mx.array,
    *,
    samples: int,
    with_values: bool,
    **options: Any,
) -> Generation:
    """This worker's share of the prompts decoded, by its columns of the draws of all; all of it."""
    workers, count = here(), len(limits)
    own = workers.share(range(len(prompts)))
    places = [prompt * samples + i for prompt in own for i in range(samples)]
    part = Generation([], [], [] if with_values else None, [])
    if places:
        draws = mx.random.uniform(shape=(max(limits), count), key=key)  # (step, B)
        part = decode(
            model,
            [prompts[prompt] for prompt in own],
            max_tokens=[limits[place] for place in places],
            uniforms=draws[:, mx.array(places)],
            samples=samples,
            **options,
        )
    return gathered(part, places, count)


def gathered(part: Generation, places: Sequence[int], count: int) -> Generation:
    """What all workers have written, `part` of it at its `places`."""
    workers, stage = here(), "the responses"
    ends = [(len(r), float(end)) for r, end in zip(part.responses, part.finished, strict=True)]
    ends = workers.rows(np.array(ends, np.float32).reshape(-1, 2), places, count, stage)
    lengths = ends[:, 0].astype(int)
    columns = [part.responses, part.logprobs, *([] if part.values is None else [part.values])]
    own = np.zeros((len(places), len(columns), lengths.max()), dtype=np.float32)
    for kind, column in enumerate(columns):
        for row, entries in enumerate(column):
            own[row, kind, : len(entries)] = entries
    whole = workers.rows(own, places, count, stage)

    def cut(kind: int) -> list[np.ndarray]:
        return [row[kind, :length].copy() for row, length in zip(whole, lengths, strict=True)]

    responses = [row.astype(int).tolist() for row in cut(0)]  # ids below 2^24, exact in float32
    values = None if part.values is None else cut(2)
    return Generation(responses, cut(1), values, (ends[:, 1] > 0).tolist())


# ------------------------------------------------------------------------------ frozen blocks


class KeptStates:
    """What enters the first trained block, `first` of `model`, once for each of `count` rows.

    Reference, policy and every epoch pass the same frozen blocks with the same tokens. A row that
    is asked for a second time has its hidden states in memory. Rows stand in other batches then,
    padded to other lengths, so that numbers are those of a whole pass up to rounding.
    """

    def __init__(self, model: nn.Module, first: int, count: int):
        self.model, self.first = model, first
        self._rows: list[mx.array | None] = [None] * count  # (l, D)

    def below(self, rows: Sequence[int], tokens: mx.array) -> tuple[int, mx.array]:
        """(first, states (b, L, D)) of these rows, whose tokens are (b, L), D width."""
        new = [place for place, row in enumerate(rows) if self._rows[row] is None]
        if new:
            found = entering_states(self.model, self.first, tokens[mx.array(new)])
            mx.eval(found)
            for place, states in zip(new, found, strict=True):
                self._rows[rows[place]] = states
            if len(new) == len(rows):
                return self.first, found
        states = mx.stack([_fit(self._rows[row], tokens.shape[1]) for row in rows])
        mx.eval(states)
        return self.first, states


def _fit(states: mx.array, length: int) -> mx.array:
    """(l, D) cut to (L, D), or padded with the last one: causal blocks heed no padding, but NaN."""
    if len(states) >= length:
        return states[:length]
    return mx.pad(states, [(0, length - len(states)), (0, 0)], mode="edge")


# ------------------------------------------------------------------------------ score


def pack_rows(
    rollout: Rollout,
    rows: Sequence[int],
    prefix: Sequence[int] = (),
    pad_to_multiple: int = 1,
    width: int = 1,
    kept: KeptStates | None = None,
) -> Packed:
    """Some rows of a rollout laid out for one forward pass, R at least `width`."""
    packed = pack(
        [rollout.queries[i] for i in rows],
        [rollout.responses[i] for i in rows],
        masks=[rollout.masks[i] for i in rows],
        prefix=prefix,
        pad_to_multiple=pad_to_multiple,
        width=width,
    )
    if kept is not None:
        packed.below = kept.below(rows, packed.tokens)
    return packed


def scored(
    rollout: Rollout,
    score: Callable[[Packed], Sequence[mx.array]],
    size: int,
    prefix: Sequence[int] = (),
    pad_to_multiple: int = 1,
    kept: KeptStates | None = None,
) -> list[mx.array]:
    """`score(packed)` gives (b, r) arrays; the same as (B, R) for all rows, `size` at a time.

    `kept`: what frozen blocks give comes from there. Several workers share the rows, and have all.
    """
    parts, workers = [], here()
    every = workers.share(range(len(rollout)))
    size = max(1, size // workers.size)
    for start in range(0, len(every), size):
        rows = every[start : start + size]
        found = score(pack_rows(rollout, rows, prefix, pad_to_multiple, kept=kept))
        mx.eval(found)
        parts.append(found)
    width = rollout.mask.shape[1]
    columns = [
        mx.concatenate([fit_columns(part, width) for part in column])
        for column in zip(*parts, strict=True)
    ]
    if workers.alone:
        return columns
    own = np.array(mx.stack(columns, axis=1))  # (b, columns, R)
    whole = workers.rows(own, every, len(rollout), "the scores of responses")
    return [mx.array(column) for column in whole.swapaxes(0, 1)]


def fit_columns(array: mx.array, width: int) -> mx.array:
    """(b, r) cut or padded with 0 on the right to (b, width)."""
    if array.shape[1] >= width:
        return array[:, :width]
    return mx.pad(array, [(0, 0), (0, width - array.shape[1])])


# ------------------------------------------------------------------------------ reference, KL


@contextmanager
def reference_of(
    model: nn.Module, tuning: Tuning, reference: nn.Module | None = None
) -> Iterator[nn.Module]:
    """`reference`, or for as long as the context lasts `model` with its adapter off."""
    if reference is not None:
        yield reference
    else:
        with tuning.disabled():
            yield model


def score_reference(
    rollout: Rollout,
    model: nn.Module,
    tuning: Tuning,
    reference: nn.Module | None,
    *,
    size: int,
    temperature: float = 1.0,
    pad_to_multiple: int = 1,
    kept: KeptStates | None = None,
) -> None:
    """Fill in ref_logprobs (B, R), under `reference` or `model` with its adapter off.

    `kept` is of `model`, whose frozen blocks another reference does not share.
    """
    with reference_of(model, tuning, reference) as other:
        (rollout.ref_logprobs,) = scored(
            rollout,
            lambda packed: (reference_logprobs(other, packed, temperature),),
            size,
            pad_to_multiple=pad_to_multiple,
            kept=kept if other is model else None,
        )


def whole_kl(
    rollout: Rollout,
    model: nn.Module,
    tuning: Tuning,
    reference: nn.Module | None,
    *,
    size: int,
    temperature: float = 1.0,
    pad_to_multiple: int = 1,
    kept: KeptStates | None = None,
) -> mx.array:
    """KL over the whole vocabulary (B, R); logits of `size` rows are held at a time."""
    prefix = tuning.prefix

    def score(packed: Packed) -> tuple[mx.array]:
        logits = picked_logits(model, packed, temperature)  # (N, V)
        mx.eval(logits)
        with reference_of(model, tuning, reference) as other:
            plain = packed.without_prefix(len(prefix))
            if other is not model:
                plain = replace(plain, below=None)
            ref_logits = picked_logits(other, plain, temperature)  # (N, V)
            return (packed.spread(full_kl(logits, ref_logits)),)

    (kls,) = scored(rollout, score, size, prefix, pad_to_multiple, kept)
    return kls
