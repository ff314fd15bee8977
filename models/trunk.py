"""A causal language model taken apart: tokens -> hidden states -> logits -> log-probabilities.

The (B, T, V) logits of a long batch are the largest array of RLHF. Here hidden states are made for
every position, and logits only for the positions that are asked for, a chunk at a time. A chunk's
logits are not kept: the gradient is made beside them, or they are made again in the backward pass.

Legend: B batch, L padded length, D width, V vocabulary, N positions picked from B x L.
"""

from fast_blas import exp

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from errors import UserError

TRUNK_NAMES = ("model", "transformer", "backbone", "gpt_neox")
# Logits held at once, in elements: 64 MiB in float32.
MAX_CHUNK_ELEMENTS = 1 << 24
# The same where the gradient is made beside them, and the fewest positions of such a chunk: fastest
# on a CPU (docs/LOG.md), and enough for a matrix product to be worth reading the head's weights.
GRADIENT_CHUNK_ELEMENTS, MIN_GRADIENT_CHUNK = 1 << 21, 128


def find_trunk(model: nn.Module) -> tuple[nn.Module, str]:
    """(owner, name): `owner.name` maps tokens to hidden states, `owner` adds the head.

    Raises UserError for an architecture whose parts are arranged in another way.
    """
    if isinstance(model.get("language_model"), nn.Module):
        return find_trunk(model["language_model"])
    for name in TRUNK_NAMES:
        if isinstance(model.get(name), nn.Module):
            return model, name
    kind = getattr(model, "model_type", type(model).__name__)
    raise UserError(
        f"model type {kind}: its hidden states cannot be reached "
        f"(no part named {', '.join(TRUNK_NAMES)})"
    )


def hidden_states(model: nn.Module, tokens: mx.array, cache=None) -> mx.array:
    """tokens (B, L) -> hidden states after the final norm (B, L, D)."""
    owner, name = find_trunk(model)
    return getattr(owner, name)(tokens, cache=cache)


def picked_hidden(model: nn.Module, tokens: mx.array, index: mx.array, cache=None) -> mx.array:
    """tokens (B, L), index (N,) into the flattened B x L -> hidden states after the norm (N, D)."""
    hidden = hidden_states(model, tokens, cache)
    return hidden.reshape(-1, hidden.shape[-1])[index]


def hidden_size(model: nn.Module) -> int:
    """D, read off the hidden states themselves (configurations name it differently)."""
    return hidden_states(model, mx.zeros((1, 1), dtype=mx.int32)).shape[-1]  # never evaluated


class _Replay:
    """Stands in for the trunk and returns `hidden`, so that the model's own head runs on it."""

    def __init__(self, trunk: nn.Module, hidden: mx.array):
        self._trunk, self._hidden = trunk, hidden

    def __call__(self, *args, **kwargs) -> mx.array:
        return self._hidden

    def __getattr__(self, name):
        return getattr(self._trunk, name)


def logits_from_hidden(model: nn.Module, hidden: mx.array) -> mx.array:
    """hidden (..., D) -> logits (..., V) through the model's own head: ties, scales, soft caps."""
    owner, name = find_trunk(model)
    shape = hidden.shape
    flat = hidden.reshape(1, math.prod(shape[:-1]), shape[-1])  # (1, N, D)
    tokens = mx.zeros(flat.shape[:2], dtype=mx.int32)
    # An instance attribute hides the module of the same name without touching the module's tree.
    owner.__dict__[name] = _Replay(owner[name], flat)
    try:
        logits = owner(tokens)  # (1, N, V)
    finally:
        del owner.__dict__[name]
    return logits.reshape(*shape[:-1], logits.shape[-1])


def _score(logits: mx.array, targets: mx.array, temperature: float, extras: tuple[str, ...]):
    """logits (N, V), targets (N,) -> log p(target) and each of `extras`; all (N,), float32."""
    logits = logits.astype(mx.float32)
    if temperature != 1.0:
        logits = logits / temperature
    shifted = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))  # (N, V)
    weights = exp(shifted)
    total = weights.sum(axis=-1)  # (N,)
    log_total = mx.log(total)
    picked = mx.take_along_axis(shifted, targets[:, None], axis=-1).squeeze(-1)  # (N,)
    found = [picked - log_total]
    for extra in extras:
        if extra == "entropy":
            # A probability of exactly 0 times a logit of -inf counts as 0.
            weighted = mx.where(weights > 0, weights * shifted, 0)
            found.append(log_total - weighted.sum(axis=-1) / total)
        elif extra == "top1":
            found.append((picked == 0).astype(mx.float32))
        elif extra == "mean_logit":
            found.append(logits.mean(axis=-1))
        elif extra == "log_sum_sq":
            found.append(mx.log(mx.square(weights).sum(axis=-1)) - 2 * log_total)
        else:
            raise ValueError(f"{extra!r} is none of entropy, top1, mean_logit, log_sum_sq")
    return tuple(found)


def _head_parameters(model: nn.Module) -> dict:
    """The trainable arrays that the head may read: all but those of the blocks; often none."""
    owner, _ = find_trunk(model)
    blocks = tree_flatten([block.trainable_parameters() for block in model.layers])
    inside = {id(array) for _, array in blocks}
    return {k: v for k, v in tree_flatten(owner.trainable_parameters()) if id(v) not in inside}


def token_logprobs(
    model: nn.Module,
    hidden: mx.array,
    targets: mx.array,
    *,
    temperature: float = 1.0,
    extras: tuple[str, ...] = (),
    chunk: int | None = None,
    gradient: bool = False,
) -> tuple[mx.array, ...]:
    """Log-probabilities of `targets`, without all logits at once.

    hidden (N, D), targets (N,) int -> (logprobs (N,), *extras), float32. Extras, all (N,):
    "entropy" in nats; "top1", 1 where the target is the most likely token; "mean_logit", the mean
    over the vocabulary; "log_sum_sq", the log of the sum of squared probabilities. Logits are
    divided by `temperature` first. `chunk` positions are worked on at a time; by default as many as
    MAX_CHUNK_ELEMENTS allows.

    `gradient`: that of the log-probabilities will be asked for, and none of the extras'. A frozen
    head then makes it in the forward pass, a product of matrices that would be in vain otherwise,
    and smaller chunks cost nothing.
    """
    owner, _ = find_trunk(model)
    count = hidden.shape[0]
    if not count:  # MLX's sums over nothing can take minutes
        return tuple(mx.zeros((0,)) for _ in range(1 + len(extras)))
    named = _head_parameters(model)
    names, parameters = tuple(named), tuple(named.values())
    beside = gradient and not names
    if chunk is None:
        width = logits_from_hidden(model, mx.zeros((1, hidden.shape[-1]))).shape[-1]
        chunk = max(1, MAX_CHUNK_ELEMENTS // width)
        if beside:
            chunk = max(MIN_GRADIENT_CHUNK, GRADIENT_CHUNK_ELEMENTS // width)
    if beside:
        score_chunk = _with_gradient(model, temperature, extras)
    elif count <= chunk:
        return _score(logits_from_hidden(model, hidden), targets, temperature, extras)
    else:
        score_chunk = _recomputed(model, owner, names, temperature, extras)
    parts, turn = [], mx.zeros(())
    for start in range(0, count, chunk):
        h, t = hidden[start : start + chunk], targets[start : start + chunk]
        *scores, turn = score_chunk(mx.depends(h, turn), t, turn, *parameters)
        parts.append(scores[: 1 + len(extras)])
    owner.update(tree_unflatten(list(zip(names, parameters, strict=True))))
    columns = [mx.concatenate(column) for column in zip(*parts, strict=True)]
    return (columns[0] + turn, *columns[1:])


def _recomputed(model, owner, names: tuple[str, ...], temperature: float, extras):
    """`_score` of one chunk as a function that makes its logits again in the backward pass.

    ``f(hidden, targets, turn, *parameters) -> (logprobs, *extras, turn)``. `turn` is always 0:
    handed from chunk to chunk, and its gradient back again, it makes them run one at a time.
    """

    def scores(h: mx.array, t: mx.array, *parameters: mx.array):
        owner.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        return _score(logits_from_hidden(model, h), t, temperature, extras)

    @mx.custom_function
    def score_chunk(h: mx.array, t: mx.array, turn: mx.array, *parameters: mx.array):
        result = scores(h, t, *parameters)
        return (*result, mx.depends(turn, result[0]))

    @score_chunk.vjp
    def _(primals, cotangents, outputs):
        h, t, turn, *parameters = primals
        *cotangents, turn_cotangent = cotangents
        h = mx.depends(h, turn_cotangent)
        _, (dh, *dp) = mx.vjp(
            lambda h, *parameters: scores(h, t, *parameters), [h, *parameters], list(cotangents)
        )
        return (dh, mx.zeros_like(t), mx.depends(turn_cotangent, [dh, *dp]), *dp)

    return score_chunk


def _with_gradient(model, temperature: float, extras):
    """`_score` of one chunk as a function that makes the gradient in the forward pass.

    ``f(hidden, targets, turn) -> (logprobs, *extras, slopes, turn)``. A position's log-probability
    depends on its own hidden state alone, so that the slopes (N, D), times the cotangent of each
    position, are the gradient. `turn` as in `_recomputed`. The extras have no gradient.
    """

    @mx.custom_function
    def score_chunk(h: mx.array, t: mx.array, turn: mx.array):
        def scores(h: mx.array):
            logprobs, *rest = _score(logits_from_hidden(model, h), t, temperature, extras)
            return logprobs, *map(mx.stop_gradient, rest)

        cotangents = [mx.ones(t.shape), *(mx.zeros(t.shape) for _ in extras)]
        found, (slopes,) = mx.vjp(scores, [h], cotangents)
        return (*found, slopes, mx.depends(turn, [*found, slopes]))

    @score_chunk.vjp
    def _(primals, cotangents, outputs):
        h, t, turn = primals
        dh = cotangents[0][:, None] * outputs[-2].astype(mx.float32)
        return dh.astype(h.dtype), mx.zeros_like(t), mx.zeros_like(turn)

    return score_chunk


def vocabulary_size(model: nn.Module) -> int:
    """V, the number of logits."""
    return logits_from_hidden(model, mx.zeros((1, hidden_size(model)))).shape[-1]


# ---- the frozen blocks below the first trained one, whose hidden states no update changes --------
#
# A model is run up to its first trained block, or from there on with the states that enter it. The
# trunk's own loop does both, so that masks, positions and windows stay the architecture's: calls go
# through the class of a block, which is patched while the graph is being built.


@contextmanager
def patched_blocks(model: nn.Module, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within this context a block of `model` is called as ``wrap(its call)(block, ...)``.

    The class is restored on the way out; another model of that class is never left with it.
    """
    kinds = {type(block): type(block).__call__ for block in model.layers}
    for kind, call in kinds.items():
        kind.__call__ = wrap(call)
    try:
        yield
    finally:
        for kind, call in kinds.items():
            kind.__call__ = call


def frozen_below(model: nn.Module) -> int:
    """How many blocks lie below all that is trained and can be left out of a pass; 0: none.

    None where anything outside of the blocks is trained, such as virtual tokens, or where an
    architecture hands more than hidden states from block to block, which is tried out.
    """
    blocks = [tree_flatten(block.trainable_parameters()) for block in model.layers]
    first = next((place for place, arrays in enumerate(blocks) if arrays), 0)
    inside = sum(map(len, blocks))
    if not first or len(tree_flatten(model.trainable_parameters())) > inside:
        return 0
    return first if _can_be_split(model, first) else 0


def entering_states(model: nn.Module, first: int, tokens: mx.array) -> mx.array:
    """tokens (B, L) -> what enters block `first` (B, L, D); blocks from there on are not run."""
    found, places = [], {id(block): place for place, block in enumerate(model.layers)}

    def wrap(call: Callable) -> Callable:
        def run(block, states, *args, **kwargs):
            place = places.get(id(block), -1)
            if place < first:
                return call(block, states, *args, **kwargs)
            if place == first:
                found.append(states)
            return states

        return run

    with patched_blocks(model, wrap):
        hidden_states(model, tokens)
    (states,) = found
    return states


@contextmanager
def entered(model: nn.Module, first: int, states: mx.array) -> Iterator[None]:
    """Within this context a pass begins at block `first`, with `states` (B, L, D)."""
    below = {id(block) for block in model.layers[:first]}

    def wrap(call: Callable) -> Callable:
        def run(block, *args, **kwargs):
            return states if id(block) in below else call(block, *args, **kwargs)

        return run

    with patched_blocks(model, wrap):
        yield


def _can_be_split(model: nn.Module, first: int) -> bool:
    """Whether a pass in two parts gives the bits of a whole one."""
    tokens, others = mx.array([[3, 1, 2, 0, 3]]), mx.array([[0, 2, 2, 1, 1]])
    try:
        whole, states = hidden_states(model, tokens), entering_states(model, first, tokens)
        mx.eval(whole, states)
        mx.eval(hidden_states(model, others))  # a state that blocks keep would be that of these
        with entered(model, first, states):
            parts = hidden_states(model, tokens)
        return states.shape[:2] == tokens.shape and mx.array_equal(whole, parts).item()
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError):
        return False
