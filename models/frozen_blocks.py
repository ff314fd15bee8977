"""The frozen blocks below the first trained one, whose hidden states no update changes.

A model is run up to its first trained block, or from there on with the states that enter it. The
trunk's own loop does both, so that masks, positions and windows stay the architecture's: calls go
through the class of a block, which is patched while the graph is being built.

Legend: B rows, L padded length, D width, N positions picked.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from models.packing import Packed
from models.trunk import hidden_states, picked_hidden


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


def packed_hidden(model: nn.Module, packed: Packed) -> mx.array:
    """The hidden states that predict the picked tokens, (N, D), after the final norm."""
    if packed.below is None:
        return picked_hidden(model, packed.tokens, packed.index)
    with entered(model, *packed.below):
        return picked_hidden(model, packed.tokens, packed.index)


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
