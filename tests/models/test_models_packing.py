"""Which hidden state predicts which token, and how rows are laid out."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.packing import least_padding, pack, pick_targets
from padding import round_up


def test_the_exact_targets_that_count():
    tokens = np.array([[10, 11, 12, 13, 0, 0], [20, 21, 22, 23, 24, 25]])
    mask = np.array([[1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1]])
    inputs, index, targets = pick_targets(tokens, mask)
    assert inputs.tolist() == [[10, 11, 12, 13, 0], [20, 21, 22, 23, 24]]
    assert targets.tolist() == [12, 13, 23, 25]  # the first token of a row is predicted by nothing
    # The last token that a hidden state has seen is the one before its target.
    assert inputs.reshape(-1)[index].tolist() == [11, 12, 22, 24]
    assert index.tolist() == [1, 2, 7, 9]


def test_pack_lays_out_queries_and_responses():
    packed = pack([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]])
    assert packed.tokens.tolist() == [[1, 2, 3, 5], [4, 7, 8, 9]]
    assert packed.targets.tolist() == [5, 6, 7, 8, 9]
    assert packed.tokens.reshape(-1)[packed.index].tolist() == [3, 5, 4, 7, 8]
    assert packed.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert packed.spread(packed.targets).tolist() == [[5, 6, 0], [7, 8, 9]]


def test_masked_tokens_leave_no_hole():
    packed = pack([[1], [2]], [[5, 6, 7, 8], [9]], masks=[[1, 0, 0, 1], [1]])
    assert packed.tokens.tolist() == [[1, 5, 6, 7], [2, 9, 0, 0]]
    assert packed.targets.tolist() == [5, 8, 9]
    assert packed.tokens.reshape(-1)[packed.index].tolist() == [1, 7, 2]
    assert packed.mask.tolist() == [[1, 1], [1, 0]]
    assert packed.spread(packed.targets).tolist() == [[5, 8], [9, 0]]


def test_a_prefix_stands_in_front_and_can_be_taken_away():
    packed = pack([[1, 2], [3]], [[4], [5, 6]], prefix=(64, 65))
    assert packed.tokens.tolist() == [[64, 65, 1, 2], [64, 65, 3, 5]]
    assert packed.targets.tolist() == [4, 5, 6]
    without = packed.without_prefix(2)
    assert without.tokens.tolist() == [[1, 2], [3, 5]]
    assert without.tokens.reshape(-1)[without.index].tolist() == [2, 3, 5]
    assert without.targets.tolist() == [4, 5, 6]
    plain = pack([[1, 2], [3]], [[4], [5, 6]])
    assert plain.index.tolist() == without.index.tolist()


rows = st.lists(
    st.tuples(
        st.lists(st.integers(1, 60), min_size=1, max_size=9),
        st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=5,
)


@given(rows=rows, multiple=st.sampled_from([1, 4, 16]), prefix=st.integers(0, 3))
def test_every_layout_holds_the_same_tokens(rows, multiple, prefix):
    queries = [query for query, _ in rows]
    responses = [[token for token, _ in response] for _, response in rows]
    masks = [[int(counts) for _, counts in response] for _, response in rows]
    for mask in masks:
        mask[-1] = 1  # every row has a token that counts
    front = list(range(64, 64 + prefix))
    packed = pack(queries, responses, masks=masks, prefix=front, pad_to_multiple=multiple)
    counted = [
        [t for t, m in zip(r, mask, strict=True) if m]
        for r, mask in zip(responses, masks, strict=True)
    ]
    longest = max(map(len, counted))
    width = packed.mask.shape[1]
    assert width == round_up(longest, multiple) and packed.tokens.shape[1] % multiple == 0
    assert packed.mask.sum(axis=1).tolist() == [len(row) for row in counted]
    spread = packed.spread(packed.targets).tolist()
    assert spread == [row + [0] * (width - len(row)) for row in counted]
    # The hidden state of each target has seen everything in front of it and nothing more.
    length = packed.tokens.shape[1]
    for row, mask in enumerate(masks):
        whole = [*front, *queries[row], *responses[row]]
        start = len(whole) - len(responses[row])
        places = [start + i for i, counts in enumerate(mask) if counts]
        slots = packed.slot[row, : len(places)]
        assert (packed.index[slots] - row * length).tolist() == [place - 1 for place in places]
        assert packed.tokens[row, : len(whole) - 1].tolist() == whole[:-1]


def test_padding_makes_few_shapes():
    shapes = {
        tuple(a.shape for a in pack([[1] * q, [1, 2]], [[5] * r, [6]], pad_to_multiple=16).arrays())
        for q in (3, 5, 7)
        for r in (2, 4, 9)
    }
    assert len(shapes) == 1


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(ValueError):
        pack([[1]], [[2, 3, 4]], masks=[[1, 0]])


def test_padded_places_take_nothing_along():
    packed = pack([[1], [2]], [[5, 6], [7]])
    column = mx.array([1.0, 2.0, mx.nan])
    assert packed.spread(mx.array([mx.nan, 2.0, 3.0])).tolist()[1] == [3.0, 0.0]
    assert mx.isnan(packed.spread(column)).tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [1, 40, 200])
def test_least_padding_is_the_cheapest_of_all_ways_to_cut(seed, most):
    lengths = np.random.default_rng(seed).integers(1, 60, 9)
    groups = least_padding(lengths, most, 10)
    assert sorted(np.concatenate(groups).tolist()) == list(range(9))

    def cost(parts) -> float:
        fits = all(len(part) == 1 or len(part) * max(part) <= most for part in parts)
        return sum(len(part) * max(part) + 10 for part in parts) if fits else float("inf")

    ordered = sorted(lengths.tolist())
    ways = []
    for cuts in itertools.product([0, 1], repeat=8):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 9]
        ways.append(cost([ordered[a:b] for a, b in itertools.pairwise(places)]))
    assert cost([lengths[group].tolist() for group in groups]) == min(ways)


def test_two_kinds_of_lengths_do_not_share_a_pass():
    """Cut by equal tokens, these would be one pass, half of it padding."""
    groups = least_padding(np.array([195, 16, 195, 16, 195, 16, 195, 16]), 1024, 64)
    assert [group.tolist() for group in groups] == [[1, 3, 5, 7], [0, 2, 4, 6]]
