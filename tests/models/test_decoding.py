"""Batched sampling: the right tokens, with the log-probabilities and values that belong to them."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import tiny_model

from errors import UserError
from models.actor_critic import ActorCritic, ValueHead
from models.decoding import Sampling, generate, padded_cache, pick
from models.lora import LoraConfig, add_lora
from models.packing import pack
from models.trunk import hidden_states, logits_from_hidden

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33]]
GREEDY = Sampling(temperature=0)
EOS = {1}
MANY_EOS = {1, 21, 30, 34, 50, 61}  # about one token in ten, so rows end at many lengths


def sampled(model, prompts=PROMPTS, **options):
    options = {"max_tokens": 24, "eos_ids": EOS, "key": mx.random.key(3), **options}
    return generate(model, prompts, **options)


# ------------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_log_probabilities_and_values_are_those_of_teacher_forcing(temperature, filters):
    model = tiny_model()
    head = ValueHead(32, init_std=0.3)
    adapter = add_lora(model, LoraConfig(rank=2))
    for layer in adapter.layers.values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(5)) * 0.1
    policy = ActorCritic(model, head, adapter)
    prompts = PROMPTS * 4
    sampling = Sampling(temperature, **filters)
    made = sampled(model, prompts, value_head=head, sampling=sampling, eos_ids=MANY_EOS)
    lengths = [len(r) for r in made.responses]
    if not filters:
        assert len(set(lengths)) > 6 and min(lengths) < 4  # rows were dropped at many steps
    logprobs, values = policy(pack(prompts, made.responses), temperature=temperature)
    for row, length in enumerate(lengths):
        assert len(made.logprobs[row]) == len(made.values[row]) == length
        np.testing.assert_allclose(made.logprobs[row], logprobs[row, :length], atol=1e-4)
        np.testing.assert_allclose(made.values[row], values[row, :length], atol=1e-4)


def test_without_a_value_head_there_are_no_values():
    assert sampled(tiny_model()).values is None


# ------------------------------------------------------------------------------ several samples


@pytest.mark.parametrize("prompts", [PROMPTS, [p[:1] for p in PROMPTS]])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss", "lfm2", "mamba"])
def test_samples_of_one_prompt_are_those_of_its_copies(kind, prompts):
    model = tiny_model(kind)
    if kind == "mamba":  # reads padding as text, so prompts have one length
        prompts = [[5, 6, 7], [8, 9, 10]]
    copies = [prompt for prompt in prompts for _ in range(4)]
    shared = sampled(model, prompts, samples=4, eos_ids=MANY_EOS)
    alone = sampled(model, copies, eos_ids=MANY_EOS)
    assert shared.responses == alone.responses and shared.finished == alone.finished
    assert len({tuple(r) for r in shared.responses[:4]}) > 1  # they are different samples
    for one, other in zip(shared.logprobs, alone.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)  # float32


def test_a_prompt_is_read_once_for_all_its_samples(monkeypatch):
    from models import decoding

    shapes, read = [], decoding.hidden_states

    def counted(model, tokens, cache=None):
        shapes.append(tokens.shape)
        return read(model, tokens, cache=cache)

    model = tiny_model()
    monkeypatch.setattr(decoding, "hidden_states", counted)
    sampled(model, [[5] * 20] * 2, samples=8, max_tokens=2, eos_ids=set())
    assert shapes == [(2, 20), (16, 1)]


# ------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3"])
def test_greedy_text_is_the_same_alone_and_in_a_batch(architecture):
    model = tiny_model(architecture)
    together = sampled(model, sampling=GREEDY)
    slow = [greedy_by_hand(model, prompt, 24) for prompt in PROMPTS]
    assert together.responses == slow
    alone = [sampled(model, [prompt], sampling=GREEDY).responses[0] for prompt in PROMPTS]
    assert alone == slow


def greedy_by_hand(model, prompt: list[int], limit: int) -> list[int]:
    """The obvious way: the whole sequence through the model for every token."""
    written = []
    while len(written) < limit and not (written and written[-1] in EOS):
        written.append(model(mx.array([[*prompt, *written]]))[0, -1].argmax().item())
    return written


def test_longer_neighbours_change_nothing():
    """More padding on the left, and rows that end earlier or later."""
    model = tiny_model()
    few = sampled(model, PROMPTS[:2], sampling=GREEDY)
    more = sampled(model, [*PROMPTS[:2], list(range(2, 42))], sampling=GREEDY)
    assert more.responses[:2] == few.responses
    for ours, theirs in zip(more.logprobs, few.logprobs, strict=False):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_rows_that_end_are_not_paid_for(monkeypatch):
    import models.decoding

    counts, model = [], tiny_model()
    sampled(model, PROMPTS, max_tokens=1)  # whether it heeds padding is tried once
    real = models.decoding.hidden_states

    def counting(model, tokens, cache=None):
        counts.append(tokens.shape[0])
        return real(model, tokens, cache=cache)

    monkeypatch.setattr(models.decoding, "hidden_states", counting)
    made = sampled(model, PROMPTS * 8, max_tokens=40, eos_ids=MANY_EOS)
    lengths = np.array([len(r) for r in made.responses])
    for step, rows in enumerate(counts):
        alive = (lengths > step).sum()
        assert alive <= rows <= np.ceil(alive / 0.875)  # DROP_SHARE: an eighth may be dead
    assert counts[0] == 40 and min(counts) < 10


def test_a_rows_numbers_do_not_depend_on_when_the_others_end():
    """The same (step, row) draws the same random number in another batch composition."""
    model = tiny_model()
    rows = [PROMPTS[0]] * 6
    first = sampled(model, rows)
    again = sampled(model, rows, max_tokens=[24, 2, 24, 5, 24, 1])
    assert len(set(map(tuple, first.responses))) == 6
    for row in (0, 2, 4):
        assert first.responses[row] == again.responses[row]


# ------------------------------------------------------------------------------ where rows end


def test_eos_is_kept_with_its_log_probability():
    model, prompts = tiny_model(), PROMPTS * 4
    made = sampled(model, prompts, eos_ids=MANY_EOS)
    ended = [row for row, response in enumerate(made.responses) if response[-1] in MANY_EOS]
    assert 5 <= len(ended) < 20
    for row in ended:
        response = made.responses[row]
        assert made.finished[row] and not MANY_EOS & set(response[:-1])
        logits = model(mx.array([[*prompts[row], *response[:-1]]]))[0, -1]
        wanted = nn.log_softmax(logits)[response[-1]]
        np.testing.assert_allclose(made.logprobs[row][-1], wanted, atol=1e-4)
    for row in set(range(20)) - set(ended):
        assert len(made.responses[row]) == 24 and not made.finished[row]


def test_each_row_may_have_a_limit_of_its_own():
    made = sampled(tiny_model(), max_tokens=[1, 4, 2, 7, 3], eos_ids=set())
    assert [len(r) for r in made.responses] == [1, 4, 2, 7, 3]
    assert made.finished == [False] * 5


def test_eos_is_not_written_before_the_least_length():
    model = tiny_model()
    model.lm_head = nn.Linear(32, 64)
    model.lm_head.weight = mx.zeros((64, 32))
    model.lm_head.bias = mx.where(mx.arange(64) == 1, 30.0, 0.0)  # EOS always
    assert [len(r) for r in sampled(model).responses] == [1] * 5
    made = sampled(model, min_tokens=4)
    assert [len(r) for r in made.responses] == [5] * 5 and all(made.finished)
    np.testing.assert_allclose(made.logprobs[0][0], -np.log(63), atol=1e-4)


def test_a_stop_function_ends_a_row():
    free = sampled(tiny_model(), eos_ids=set())
    wanted = free.responses[0][5]
    made = sampled(tiny_model(), eos_ids=set(), should_stop=lambda tokens: tokens[-1] == wanted)
    assert made.responses[0] == free.responses[0][: free.responses[0].index(wanted) + 1]
    assert made.finished[0]
    for response, finished in zip(made.responses, made.finished, strict=True):
        assert finished == (response[-1] == wanted) and wanted not in response[:-1]


@pytest.mark.parametrize(
    "prompts, limit", [([], 3), ([[1], []], 3), ([[1]], 0), ([[1]] * 2, [3, 0])]
)
def test_nothing_to_do_is_refused(prompts, limit):
    with pytest.raises(ValueError, match="every prompt needs a token"):
        sampled(tiny_model(), prompts, max_tokens=limit)


# ------------------------------------------------------------------------------ the distribution

LOGITS = np.random.default_rng(0).normal(scale=1.5, size=24).astype(np.float32)


def allowed(sampling: Sampling) -> np.ndarray:
    """The probabilities that `sampling` should give LOGITS, the obvious way."""
    p = np.exp(LOGITS / sampling.temperature)
    p /= p.sum()
    keep = np.ones(len(p), dtype=bool)
    order = np.argsort(-p)
    if sampling.top_k:
        keep[order[sampling.top_k :]] = False
    if 0 < sampling.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= sampling.top_p]] = False
    if sampling.min_p:
        keep &= p >= sampling.min_p * p.max()
    return np.where(keep, p, 0) / p[keep].sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.5),
        Sampling(2.0),
        Sampling(top_k=4),
        Sampling(top_p=0.6),
        Sampling(0.8, top_p=0.9),
        Sampling(min_p=0.2),
        Sampling(1.3, top_k=10, min_p=0.05),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probability_says(sampling):
    count = 20_000
    uniform = mx.random.uniform(shape=(count,), key=mx.random.key(11))
    logits = mx.broadcast_to(mx.array(LOGITS), (count, 24))
    picked, logprobs = pick(logits, sampling, uniform)
    seen = np.bincount(np.array(picked), minlength=24)
    expected = count * allowed(sampling)
    assert seen[expected == 0].sum() == 0
    some = expected > 0
    chi_square = ((seen - expected)[some] ** 2 / expected[some]).sum()
    freedom = some.sum() - 1
    # Mean `freedom`, deviation sqrt(2 freedom); the seed is fixed, so this passes always or never.
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)
    # Log-probabilities are those of the tempered distribution before any filter.
    p = np.exp(LOGITS / sampling.temperature)
    np.testing.assert_allclose(logprobs, np.log(p / p.sum())[np.array(picked)], atol=1e-5)


def test_the_extremes_of_the_random_number_pick_possible_tokens():
    logits = mx.array([[-mx.inf, 2.0, 1.0, -mx.inf]] * 3)
    picked, _ = pick(logits, Sampling(), mx.array([0.0, 1 - 2**-24, 1.0]))
    assert picked.tolist() == [1, 2, 2]


def test_greedy_picks_the_most_likely_and_gives_its_log_probability():
    picked, logprobs = pick(mx.array([[0.0, 3.0, 1.0]]), GREEDY, mx.array([0.99]))
    assert picked.tolist() == [1]
    np.testing.assert_allclose(logprobs, nn.log_softmax(mx.array([0.0, 3.0, 1.0]))[1], atol=1e-6)


def test_the_same_key_writes_the_same_text_and_another_does_not():
    model = tiny_model()
    first, again = sampled(model), sampled(model)
    assert first.responses == again.responses
    for ours, theirs in zip(first.logprobs, again.logprobs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sampled(model, key=mx.random.key(4)).responses != first.responses
    mx.random.seed(1)
    one = sampled(model, key=None).responses
    two = sampled(model, key=None).responses
    mx.random.seed(1)
    assert sampled(model, key=None).responses == one != two


# ------------------------------------------------------------------------------ caches


def test_a_model_that_reads_padding_is_refused():
    model = tiny_model("mamba")
    with pytest.raises(UserError, match="mamba: reads the padding in front of a prompt as text"):
        sampled(model)
    same = [[5, 6, 7], [9, 10, 11]]
    together = sampled(model, same, sampling=GREEDY).responses
    assert together == [sampled(model, [p], sampling=GREEDY).responses[0] for p in same]


def test_a_model_that_cannot_be_batched_is_refused(monkeypatch):
    model = tiny_model()

    def broken(*args, **kwargs):
        raise ValueError("Shapes cannot be broadcast.")

    monkeypatch.setattr("mlx_lm.models.cache.BatchKVCache.make_mask", broken)
    with pytest.raises(UserError, match=r"llama: cannot be batched .*Shapes cannot be broadcast"):
        sampled(model)


def test_the_check_is_made_once(monkeypatch):
    import models.decoding

    model = tiny_model()
    padded_cache(model, [0, 2])
    monkeypatch.setattr(models.decoding, "_check_padding", lambda model: 1 / 0)
    padded_cache(model, [0, 2])


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_cached_steps_equal_the_whole_sequence(architecture):
    """Beyond the window of 8 tokens, with padding, one token at a time."""
    model = tiny_model(architecture)
    rows = [list(range(5, 25)), list(range(30, 36))]
    cache = padded_cache(model, [0, 14])
    tokens = mx.array([rows[0], [0] * 14 + rows[1]])
    hidden = hidden_states(model, tokens, cache=cache)[:, -1]
    for step in range(12):
        for row, sequence in enumerate(rows):
            wanted = model(mx.array([sequence]))[0, -1]
            found = logits_from_hidden(model, hidden[row])
            np.testing.assert_allclose(found, wanted, atol=1e-4)
        rows = [[*row, 40 + step] for row in rows]
        hidden = hidden_states(model, mx.array([[40 + step]] * 2), cache=cache)[:, -1]
