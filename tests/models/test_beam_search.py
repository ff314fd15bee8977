"""Beam search against transformers (make_beam_search_oracle.py) and against every text there is."""

import itertools
import json
from functools import cache

import mlx.core as mx
import pytest
from files import ROOT
from mlx_lm.sample_utils import make_repetition_penalty
from mlx_lm.utils import load_model

from models.beam_search import _best, beam_search
from models.decoding import Sampling

CASES = json.loads((ROOT / "tests/oracles/beam_search.json").read_text(encoding="utf-8"))
MODEL = "tests/oracles/ppo_step_model"


@cache
def model_of(name: str):
    return load_model(ROOT / name)[0]  # one of them has no tokenizer


def search(case: dict, **changes):
    options = case | changes
    penalty = options.pop("repetition_penalty", 1.0)
    processor = None
    if penalty != 1:
        penalise = make_repetition_penalty(penalty, context_size=1000)

        def processor(tokens, logprobs):
            return penalise(mx.array(tokens), logprobs)

    kept = ("num_beams", "max_tokens", "length_penalty", "should_stop", "sampling")
    return beam_search(
        model_of(options["model"]),
        options["prompt"],
        eos_ids=set(options["eos_ids"]),
        processor=processor,
        **{name: options[name] for name in kept if name in options},
    )


def test_the_stored_cases_cover_replies_that_end_and_that_are_cut():
    ended = [reply[-1] in case["eos_ids"] for case in CASES for reply in case["replies"]]
    assert len(CASES) > 50 and 0.1 < sum(ended) / len(ended) < 0.9


@pytest.mark.parametrize("name", sorted({case["model"] for case in CASES}))
def test_replies_and_scores_are_those_of_transformers(name):
    for case in CASES:
        if case["model"] == name:
            beams = search(case)
            assert [beam.tokens for beam in beams] == case["replies"], case
            assert [beam.score for beam in beams] == pytest.approx(case["scores"], rel=2e-5), case
            for beam in beams:
                assert beam.finished == (beam.tokens[-1] in case["eos_ids"])


def test_one_beam_is_the_greedy_reply():
    model, prompt = model_of(MODEL), [1, 40, 41]
    greedy = list(prompt)
    for _ in range(8):
        greedy.append(int(mx.argmax(model(mx.array([greedy]))[0, -1])))
    case = {"model": MODEL, "prompt": prompt, "eos_ids": [2], "max_tokens": 8}
    assert prompt + search(case, num_beams=1)[0].tokens == greedy


def test_enough_beams_find_the_likeliest_of_all_texts():
    """With 21 beams and length 2 the first step keeps more than half of the 64 tokens."""
    model, prompt = model_of(MODEL), [1, 5]

    def logprobs(tokens):
        logits = model(mx.array([tokens]))[0, -1]
        return (logits - mx.logsumexp(logits)).tolist()

    first = logprobs(prompt)
    second = [logprobs([*prompt, token]) for token in range(64)]
    total, best = max(
        (first[a] + second[a][b], [a, b])
        for a, b in itertools.product(range(64), range(64))
        if 2 != a
    )
    case = {"model": MODEL, "prompt": prompt, "eos_ids": [2], "length_penalty": 0.0}
    found = search(case, num_beams=21, max_tokens=2)[0]
    assert found.tokens == best or found.tokens == [2]
    assert found.score == pytest.approx(max(total, first[2]), abs=1e-4)


def test_a_stop_returns_what_the_beams_have_written():
    calls = []

    def stop():
        calls.append(1)
        return len(calls) == 3

    case = {"model": MODEL, "prompt": [1, 40, 41], "eos_ids": [2]}
    beams = search(case, num_beams=2, max_tokens=50, should_stop=stop)
    assert {len(beam.tokens) for beam in beams if not beam.finished} == {3}
    assert len(beams) == 2


def test_more_beams_than_the_first_step_can_fill():
    """After one step there are 64 texts; from the second on there is enough for 80 beams."""
    case = {"model": MODEL, "prompt": [1], "eos_ids": [2]}
    beams = search(case, num_beams=80, max_tokens=3)
    assert len({tuple(beam.tokens) for beam in beams}) == 80
    assert beams[0].score >= search(case, num_beams=4, max_tokens=3)[0].score - 1e-5


SAMPLED = {"model": MODEL, "prompt": [1, 40, 41], "eos_ids": [2], "max_tokens": 8}


def sampled(seed: int, temperature: float, **filters):
    mx.random.seed(seed)
    case = {**SAMPLED, "sampling": Sampling(temperature, **filters)}
    return search(case, num_beams=4)


def test_beam_sampling_at_a_temperature_near_0_is_the_beam_search():
    wanted = [(beam.tokens, pytest.approx(beam.score)) for beam in search(SAMPLED, num_beams=4)]
    for seed in range(5):
        assert [(b.tokens, b.score) for b in sampled(seed, 1e-5)] == wanted


def test_beam_sampling_draws_by_the_seed_and_scores_by_the_model():
    replies = [sampled(seed, 0.6, top_k=10)[0] for seed in range(12)]
    assert replies[3] == sampled(3, 0.6, top_k=10)[0]
    assert len({tuple(reply.tokens) for reply in replies}) > 3
    best = search(SAMPLED, num_beams=64)[0].score
    model = model_of(MODEL)
    for reply in replies:
        text = mx.array([[*SAMPLED["prompt"], *reply.tokens]])
        logits = model(text[:, :-1])[0, len(SAMPLED["prompt"]) - 1 :]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        picked = [logprobs[i, token].item() for i, token in enumerate(reply.tokens)]
        assert reply.score == pytest.approx(sum(picked) / len(picked), rel=1e-4)
        assert reply.score <= best + 1e-5
        ranks = [int((logprobs[i] > logprobs[i, t]).sum()) for i, t in enumerate(reply.tokens)]
        assert max(ranks) < 10  # what --top-k leaves out is never drawn


def test_continuations_are_drawn_as_often_as_their_softmax_says():
    """The first of one step, against the probabilities at the temperature."""
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    mx.random.seed(0)
    firsts = [_best(logprobs, [0.0], 2, Sampling(0.5))[0][1] for _ in range(2000)]
    weights = [0.25, 0.09, 0.0225, 0.0025]
    for token, weight in enumerate(weights):
        share = weight / sum(weights)
        assert firsts.count(token) / 2000 == pytest.approx(share, abs=0.04)
