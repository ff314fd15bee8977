"""Stages that algorithms on rollouts share: sample, score under policy and reference, KL, order.

PPO and the group methods call them; none needs a value head.

Legend: B responses, b of them in one pass, R longest response, N response tokens picked.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from models.actor_critic import picked_logits, reference_logprobs
from models.decoding import Sampling
from models.decoding import generate as decode
from models.packing import Packed, pack
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
    query with an id beyond the `vocabulary`.
    """
    queries = token_lists(queries)
    check_token_ids("query", queries, vocabulary)
    made = decode(
        model,
        [[*prefix, *query] for query in queries],
        max_tokens=max_tokens,
        eos_ids=eos_ids,
        sampling=sampling,
        key=mx.random.key(int(random.integers(2**63))),
        value_head=value_head,
        should_stop=should_stop,
        samples=samples,
    )
    queries = [query for query in queries for _ in range(samples)]
    return Rollout(queries, made.responses, made.finished, made.logprobs, made.values)


# ------------------------------------------------------------------------------ score


def pack_rows(
    rollout: Rollout, rows: Sequence[int], prefix: Sequence[int] = (), pad_to_multiple: int = 1
) -> Packed:
    """Some rows of a rollout laid out for one forward pass."""
    return pack(
        [rollout.queries[i] for i in rows],
        [rollout.responses[i] for i in rows],
        masks=[rollout.masks[i] for i in rows],
        prefix=prefix,
        pad_to_multiple=pad_to_multiple,
    )


def scored(
    rollout: Rollout,
    score: Callable[[Packed], Sequence[mx.array]],
    size: int,
    prefix: Sequence[int] = (),
    pad_to_multiple: int = 1,
) -> list[mx.array]:
    """`score(packed)` gives (b, r) arrays; the same as (B, R) for all rows, `size` at a time."""
    parts = []
    for start in range(0, len(rollout), size):
        rows = range(start, min(start + size, len(rollout)))
        found = score(pack_rows(rollout, rows, prefix, pad_to_multiple))
        mx.eval(found)
        parts.append(found)
    width = rollout.mask.shape[1]
    return [
        mx.concatenate([fit_columns(part, width) for part in column])
        for column in zip(*parts, strict=True)
    ]


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
) -> None:
    """Fill in ref_logprobs (B, R), under `reference` or `model` with its adapter off."""
    with reference_of(model, tuning, reference) as other:
        (rollout.ref_logprobs,) = scored(
            rollout,
            lambda packed: (reference_logprobs(other, packed, temperature),),
            size,
            pad_to_multiple=pad_to_multiple,
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
) -> mx.array:
    """KL over the whole vocabulary (B, R); logits of `size` rows are held at a time."""
    prefix = tuning.prefix

    def score(packed: Packed) -> tuple[mx.array]:
        logits = picked_logits(model, packed, temperature)  # (N, V)
        mx.eval(logits)
        with reference_of(model, tuning, reference) as other:
            plain = packed.without_prefix(len(prefix))
            ref_logits = picked_logits(other, plain, temperature)  # (N, V)
            return (packed.spread(full_kl(logits, ref_logits)),)

    (kls,) = scored(rollout, score, size, prefix, pad_to_multiple)
    return kls
