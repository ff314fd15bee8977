"""Batches: every row once an epoch, sorted by length, the same again from (seed, epoch, index)."""

import numpy as np
import pytest

from data_utils import (
    BatchIterator,
    BatchPlan,
    PreferenceRow,
    ScalarRow,
    TextRow,
    epoch_batches,
    make_batch,
    pack_rows,
    prompt_batch,
    wrap_rows,
)
from errors import UserError

RANDOM = np.random.default_rng(0)
LENGTHS = RANDOM.integers(20, 401, 3001).tolist()


def text_rows(lengths):
    """Rows with ids that name the row, so that each can be found again in a batch."""
    return [TextRow([i + 1] * n, [0] + [1] * (n - 1), f"f:{i}") for i, n in enumerate(lengths)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "size"), [(3001, 16), (5, 8), (8, 8), (1, 1), (17, 4)])
def test_an_epoch_covers_every_row_once_with_the_tail(count, size, shuffle):
    plan = BatchPlan(LENGTHS[:count], size, seed=3, shuffle=shuffle)
    for epoch in (0, 1):
        batches = plan.epoch(epoch)
        assert len(batches) == len(plan) == -(-count // size)
        assert sorted(np.concatenate(batches).tolist()) == list(range(count))
        sizes = sorted(len(batch) for batch in batches)
        assert sizes[1:] == [size] * (len(plan) - 1)


@pytest.mark.parametrize("pad_to_multiple", [1, 8])
def test_padding_efficiency_on_mixed_lengths(pad_to_multiple):
    """Sorted into buckets at least 0.9; the figure printed is that of the arrays made."""
    rows = text_rows(LENGTHS)
    plan = BatchPlan(LENGTHS, 16, pad_to_multiple=pad_to_multiple)
    batches = list(epoch_batches(rows, plan))
    real = sum(LENGTHS) / sum(batch.tokens.size for batch in batches)
    assert plan.padding_efficiency() == pytest.approx(real)
    assert real >= 0.9
    assert all(batch.tokens.shape[1] % pad_to_multiple == 0 for batch in batches)
    in_file_order = BatchPlan(LENGTHS, 16, shuffle=False).padding_efficiency()
    assert in_file_order < 0.7


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return [b.tolist() for b in BatchPlan(LENGTHS, 16, seed=seed).epoch(epoch)]

    assert order(1, 5) == order(1, 5)
    assert order(1, 5) != order(1, 6) and order(1, 5) != order(2, 5)
    assert order(-1, 0) != order(1, 0)
    # Within one sorting window, too, batches of like length do not follow each other.
    widths = [max(LENGTHS[i] for i in b) for b in BatchPlan(LENGTHS[:160], 16).epoch(0)]
    assert widths not in (sorted(widths), sorted(widths, reverse=True))


def test_a_resumed_iterator_goes_on_with_the_same_batches():
    rows = text_rows(LENGTHS[:40])
    plan = BatchPlan(LENGTHS[:40], 7, seed=2)
    whole = BatchIterator(rows, plan)
    first = [next(whole).tokens.tolist() for _ in range(9)]
    position = whole.state_dict()
    assert position == {"epoch": 1, "index": 3}
    rest = [next(whole).tokens.tolist() for _ in range(9)]
    again = BatchIterator(rows, BatchPlan(LENGTHS[:40], 7, seed=2), **position)
    assert [next(again).tokens.tolist() for _ in range(9)] == rest
    again.load_state_dict({"epoch": 0, "index": 0})
    assert [next(again).tokens.tolist() for _ in range(9)] == first


def test_no_pad_token_is_a_target():
    rows = [TextRow([5, 6, 7], [0, 1, 1]), TextRow([8], [0]), TextRow([9, 0, 9], [0, 1, 1])]
    batch = make_batch(rows, pad_id=0, pad_to_multiple=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [9, 0, 9, 0]]
    assert batch.mask.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]
    assert batch.lengths.tolist() == [3, 1, 3]
    assert (batch.tokens.dtype, batch.mask.dtype) == (np.int32, np.float32)


def test_scalar_batch():
    batch = make_batch([ScalarRow([1, 2], 0.5), ScalarRow([3], -1.0)], pad_id=7)
    assert batch.tokens.tolist() == [[1, 2], [3, 7]]
    assert batch.rewards.tolist() == [0.5, -1.0] and batch.lengths.tolist() == [2, 1]


def test_preference_batch_holds_every_response_once_and_every_pair():
    rows = [
        PreferenceRow([[1, 2], [1, 3, 4]], [0, 1], margin=0.5),
        PreferenceRow([[5], [6], [7], [8]], [0, 1, 1, 2]),
    ]
    batch = make_batch(rows)
    assert batch.tokens[:, 0].tolist() == [1, 1, 5, 6, 7, 8]
    pairs = list(zip(batch.better.tolist(), batch.worse.tolist(), strict=True))
    assert pairs == [(0, 1), (2, 3), (2, 4), (2, 5), (3, 5), (4, 5)]
    assert batch.margins.tolist() == [0.5] + [0.0] * 5
    assert batch.weights[0] == 1 and batch.weights[1:].sum() == pytest.approx(1)
    assert batch.mask.dtype == np.float32 and batch.mask.shape == batch.tokens.shape
    assert batch.mask[:2].tolist() == [[0, 1, 0], [0, 1, 1]]  # of rows without a prompt


def test_preference_masks_are_padded_with_their_responses():
    row = PreferenceRow([[1, 2, 3], [1, 4]], [0, 1], masks=[[0, 0, 1], [0, 1]])
    batch = make_batch([row], pad_id=9, pad_to_multiple=4)
    assert batch.tokens.tolist() == [[1, 2, 3, 9], [1, 4, 9, 9]]
    assert batch.mask.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (3, 8), (7, 7)])
def test_prompt_batches_are_full_and_take_every_prompt_once_an_epoch(count, size):
    steps = [prompt_batch(count, size, step, seed=5) for step in range(3 * count)]
    assert all(len(step) == size for step in steps)
    taken = sum(steps, [])
    epochs = [taken[i : i + count] for i in range(0, len(taken), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]
    assert prompt_batch(count, size, 2, seed=5) == steps[2]


@pytest.mark.parametrize("length", [2, 3, 7, 100])
def test_wrapping_cuts_at_exactly_the_length_and_keeps_every_token_once(length):
    eos = 9
    rows = [
        TextRow([1, 2, 3, eos], [0, 1, 1, 1], "a:1"),
        TextRow([1, 4], [0, 1], "a:2"),  # was cut, or ends with another token
        TextRow([1, 5, 6, 7, 8, eos], [0, 0, 0, 1, 1, 1], "a:3"),
    ]
    text = [1, 2, 3, eos, 1, 4, eos, 1, 5, 6, 7, 8, eos]
    mask = [0, 1, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1]
    made = wrap_rows(rows, length, eos)
    pieces = [(text[i : i + length], [0, *mask[i + 1 : i + length]]) for i in range(0, 13, length)]
    assert [(row.tokens, row.mask) for row in made] == [p for p in pieces if any(p[1])]
    assert all(len(row.tokens) == length for row in made[:-1])
    if length == 7:
        assert [row.where for row in made] == ["a:1", "a:3"]


def test_packing_keeps_every_token_and_wastes_little():
    rows = text_rows(LENGTHS)
    packs = pack_rows(rows, 1024)
    assert all(len(pack.tokens) <= 1024 for pack in packs)
    assert sum(len(pack.tokens) for pack in packs) == sum(LENGTHS)
    counted = np.bincount([token for pack in packs for token in pack.tokens])[1:]
    assert counted.tolist() == LENGTHS
    assert sum(LENGTHS) / (1024 * len(packs)) >= 0.97
    targets = sum(sum(pack.mask) for pack in packs)
    assert targets == sum(LENGTHS) - len(LENGTHS)  # the first token of each document is none
    for pack in packs[:20]:
        starts = [i for i, t in enumerate(pack.tokens) if i == 0 or pack.tokens[i - 1] != t]
        assert [i for i, bit in enumerate(pack.mask) if not bit] == starts
    with pytest.raises(UserError, match="f:0: .* do not fit into packs of 10"):
        pack_rows(rows[:1], 10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([3], 0), "batch size 0"),
        (([], 4), "no rows"),
    ],
)
def test_impossible_plans_are_errors(arguments, says):
    with pytest.raises(UserError, match=says):
        BatchPlan(*arguments)
