"""Internal rewards: what they measure, that it is measured once, and that it is hard to game."""

import json
import math
from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT

import models.text_signals
import score
from data_utils import make_batch, read_records, tokenise_sft
from errors import UserError
from mlx_sft_trainer import LanguageModelTask, evaluate
from models.load import load_model
from models.text_signals import Text, measure
from models.trunk import hidden_states
from models.tuning import Tuning
from rewards.composite import CompositeRewards
from rewards.internal import COMPONENTS, Signals
from rewards.learned import digits_rewards
from rewards.reward_set import Reward, RewardSet

ALL = tuple(COMPONENTS)
DATA = ROOT / "data" / "increasing_mult_2_test.jsonl"


@pytest.fixture(scope="module")
def loaded():
    return load_model(None)


@pytest.fixture(scope="module")
def rows(loaded):
    """Prompts of the digits task and the answers of its rows: (prompt, answer)."""
    found = []
    for record in read_records(DATA):
        words = record.text.split()
        found.append((" ".join(words[:2]), " " + " ".join(words[2:])))
    return found


def columns(loaded, pairs, ended=True) -> dict:
    """What a loop gives to rewards for these texts."""
    encode = loaded.tokenizer.encode
    fronts = [list(encode(prompt)) for prompt, _ in pairs]
    backs = [list(encode(answer, add_special_tokens=False)) for _, answer in pairs]
    return {
        "prompts": [prompt for prompt, _ in pairs],
        "responses": [answer for _, answer in pairs],
        "token_ids": [
            [*a, *b, 2] if ended else [*a, *b] for a, b in zip(fronts, backs, strict=True)
        ],
        "response_start": [len(front) for front in fronts],
        "prompt_text": [prompt for prompt, _ in pairs],
    }


def make(loaded, rows, names=ALL, **options) -> Signals:
    signals = Signals(
        lambda: nullcontext(loaded.model), loaded.tokenizer, names, eos_ids={2}, **options
    )
    signals.calibrate(**columns(loaded, rows[:64]))
    return signals


# ---- oracles -----------------------------------------------------------------------------------


def test_the_perplexity_is_the_loss_of_fine_tuning_on_answers(loaded, rows):
    """Without EOS, which is no token of the response here."""
    signals = make(loaded, rows, ["fluency"])
    for prompt, answer in rows[:3]:
        given = columns(loaded, [(prompt, answer)])
        (row,) = signals.taken_apart(**given)
        signals.measure([row])
        record = next(iter(read_records(DATA)))
        record.kind, record.prompt, record.completion = "prompt_completion", prompt, answer
        trained = tokenise_sft([record], loaded.tokenizer, mask_prompt=True).rows[0]
        trained.tokens, trained.mask = trained.tokens[:-1], trained.mask[:-1]
        task = LanguageModelTask(loaded.model, Tuning())
        loss = evaluate(task, [make_batch([trained])])["loss"]
        assert row.log_ppl == pytest.approx(loss, abs=1e-5)


def test_padding_and_company_change_nothing(loaded, rows, monkeypatch):
    signals = make(loaded, rows)
    together = signals.scores(**columns(loaded, rows[:12]))
    for i in range(12):
        alone = signals.scores(**columns(loaded, rows[i : i + 1]))
        for name in ALL:
            assert alone[name][0] == pytest.approx(together[name][i], abs=1e-5), name
    monkeypatch.setitem(models.text_signals.BATCH_TOKENS, mx.default_device().type, 64)
    small = signals.scores(**columns(loaded, rows[:12]))
    for name in ALL:
        np.testing.assert_allclose(small[name], together[name], atol=1e-5)


def test_hidden_states_are_means_over_the_counted_tokens(loaded):
    tokens = (1, 20, 31, 42)
    found = measure(loaded.model, [Text(tokens, 1), Text((1, 50, 60, 61, 62, 63), 1)])
    whole = np.array(hidden_states(loaded.model, mx.array([tokens])))[0]
    np.testing.assert_allclose(found[Text(tokens, 1)], whole[1:].mean(axis=0), atol=1e-5)


# ---- one pass ----------------------------------------------------------------------------------


def test_all_components_share_one_pass_of_the_reference(loaded, rows, monkeypatch):
    """Every text goes through the reference once, whatever the number of components."""
    signals, calls, tokens = make(loaded, rows), [], []
    whole, forward = models.text_signals.measure, models.text_signals.hidden_states

    def counted(model, texts, watched_as=None):
        calls.append(len(texts))
        return whole(model, texts, watched_as)

    def passed(model, inputs):
        tokens.extend(map(tuple, inputs.tolist()))
        return forward(model, inputs)

    monkeypatch.setattr(models.text_signals, "measure", counted)
    monkeypatch.setattr(models.text_signals, "hidden_states", passed)
    external = RewardSet([Reward("one", lambda prompts, responses: [1.0] * len(responses))])
    rewards = CompositeRewards(external, signals, 0.5, dict.fromkeys(ALL, 1.0))
    given = columns(loaded, rows[:8] * 2)  # each prompt and answer twice
    rewards(given.pop("prompts"), given.pop("responses"), ended=[True] * 16, **given)
    assert len(calls) == 1
    assert len(tokens) == len(set(tokens)) <= 3 * 8


# ---- what each component sees ------------------------------------------------------------------


def test_no_component_is_a_constant(loaded, rows):
    found = make(loaded, rows, length_target=12).scores(**columns(loaded, rows[:32]))
    for name in ("length", "fluency", "faithfulness"):
        assert np.std(found[name]) > 0.01, name
    long = [(rows[0][0], rows[i][1] + rows[i + 1][1] + rows[i + 2][1]) for i in range(16)]
    assert np.std(make(loaded, rows).scores(**columns(loaded, long))["coherence"]) > 0.001


def test_fluency_is_the_model_s_and_not_the_variety_of_words(loaded, rows):
    rng = np.random.default_rng(0)
    shuffled = [(p, " " + " ".join(rng.permutation(a.split()))) for p, a in rows]
    signals = make(loaded, rows)
    real = signals.scores(**columns(loaded, rows))["fluency"]
    assert np.median(real) > 2 * np.median(signals.scores(**columns(loaded, shuffled))["fluency"])


def test_faithfulness_sees_the_prompt(loaded, rows):
    swapped = [(rows[(i + 5) % len(rows)][0], answer) for i, (_, answer) in enumerate(rows)]
    signals = make(loaded, rows)
    own = signals.scores(**columns(loaded, rows))
    other = signals.scores(**columns(loaded, swapped))
    assert own["faithfulness"] != other["faithfulness"]
    assert own["length"] == other["length"]


def test_an_ending_is_no_token_of_a_response(loaded, rows):
    signals = make(loaded, rows)
    ended = signals.scores(**columns(loaded, rows[:8]))
    cut = signals.scores(**columns(loaded, rows[:8], ended=False))
    assert ended == cut


DEGENERATE = {
    "one word repeated": lambda rng, p, a: " 42" * len(a.split()),
    "prompt copied": lambda rng, p, a: " " + p,
    "random words": lambda rng, p, a: "".join(f" {n}" for n in rng.integers(0, 99, len(a.split()))),
    "empty": lambda rng, p, a: "",
    "very long": lambda rng, p, a: a * 12,
    "punctuation": lambda rng, p, a: " . , ! ? ; : -" * 3,
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_responses_stay_below_the_median_of_real_ones(loaded, rows, kind):
    """The mean of all components, for each kind of gaming; docs/techniques.md has the table."""
    rng = np.random.default_rng(0)
    signals = make(loaded, rows, length_target=10)
    made = [(p, DEGENERATE[kind](rng, p, a)) for p, a in rows]
    means = {}
    for name, pairs in (("real", rows), (kind, made)):
        found = signals.scores(**columns(loaded, pairs))
        means[name] = np.mean([found[component] for component in ALL], axis=0)
    assert np.median(means[kind]) < np.median(means["real"])
    assert np.mean(means[kind] < np.median(means["real"])) >= 0.95


# ---- as one reward -----------------------------------------------------------------------------


def composite(loaded, rows, alpha, **options):
    external = RewardSet(
        [Reward("ends", lambda prompts, responses: [float(r[-1:] == "8") * 5 for r in responses])]
    )
    weights = options.pop("weights", {"length": 1.0, "fluency": 1.0})
    names = [name for name in weights if name != "external"]
    return CompositeRewards(external, make(loaded, rows, names), alpha, weights, **options)


def called(rewards, loaded, pairs):
    given = columns(loaded, pairs)
    return rewards(given.pop("prompts"), given.pop("responses"), ended=[True] * len(pairs), **given)


@pytest.mark.parametrize("score_range", [None, (0, 5)])
def test_half_is_the_mean_of_the_ends_and_parts_add_up(loaded, rows, score_range):
    totals = {}
    for alpha in (0.0, 0.5, 1.0):
        rewards = composite(loaded, rows, alpha, score_range=score_range)
        totals[alpha], parts = called(rewards, loaded, rows[:16])
        added = np.array(rewards.weights) @ np.array(list(parts.values()))
        np.testing.assert_allclose(totals[alpha], added, atol=1e-9)  # what group methods do
        assert list(parts) == rewards.names
        assert rewards.metrics(parts)["adlf/fluency_std"] > 0
    np.testing.assert_allclose(totals[0.5], np.add(totals[0.0], totals[1.0]) / 2, atol=1e-9)
    assert max(totals[0.0]) == (5 if score_range is None else 1)


def test_a_row_s_own_score_is_not_paid_to_new_responses(loaded, rows):
    """Two responses to one prompt whose row says 5 get external scores of their own."""
    true, _ = digits_rewards(increasing=True, multiple_of=2, min_length=5)
    signals = make(loaded, rows, ["fluency"])
    rewards = CompositeRewards(RewardSet([true]), signals, 0.5, {"fluency": 1}, score_range=(0, 1))
    pairs = [("2 4", " 6 8 10 12"), ("2 4", " 7 3 9 5")]
    given = columns(loaded, pairs) | {"meta_eval_score": [5, 5], "reward": [5, 5]}
    _, parts = rewards(given.pop("prompts"), given.pop("responses"), ended=[True] * 2, **given)
    assert parts["external"] == [1.0, pytest.approx(1 / 3)]


@pytest.mark.parametrize("score_range", [None, (0, 5)])
@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_signals_do_not_stand_in_for_a_score_that_is_missing(loaded, rows, score_range, missing):
    """Neither in PPO's sums nor in the parts that group methods add up."""
    scores = [missing, 3.0]
    external = RewardSet([Reward("own", lambda prompts, responses: scores)], unscored=True)
    for alpha, there in ((0.5, False), (1.0, True)):
        signals = make(loaded, rows, ["fluency"])
        rewards = CompositeRewards(
            external, signals, alpha, {"fluency": 1}, score_range=score_range
        )
        totals, parts = called(rewards, loaded, rows[:2])
        assert [math.isfinite(total) for total in totals] == [there, True]
        assert math.isfinite(parts["fluency"][0]) == there and math.isfinite(parts["fluency"][1])


def test_objectives_log_what_none_beats(loaded, rows):
    weights = {"fluency": 0.3, "faithfulness": 0.3, "external": 0.4}
    rewards = composite(loaded, rows, 0.5, weights=weights, score_range=(0, 5), objectives=True)
    totals, parts = called(rewards, loaded, rows[:16])
    inner = 0.3 * np.array(parts["fluency"]) + 0.3 * np.array(parts["faithfulness"])
    expected = 0.5 * np.array(parts["external"]) + 0.5 * (inner + 0.4 * np.array(parts["external"]))
    np.testing.assert_allclose(totals, expected, atol=1e-9)
    assert 0 < rewards.metrics(parts)["objectives/pareto"] < 1


def test_a_calibration_goes_into_a_checkpoint_and_back(loaded, rows):
    signals = make(loaded, rows)
    other = Signals(lambda: nullcontext(loaded.model), loaded.tokenizer, ALL, eos_ids={2})
    kept = {name: mx.array(value) for name, value in signals.numbers().items()}  # float32
    other.take_numbers(kept)
    given = columns(loaded, rows[:8])
    for name in ALL:
        assert other.scores(**given)[name] == signals.scores(**given)[name]


def test_a_reference_that_writes_nothing_is_an_error(loaded, rows):
    with pytest.raises(UserError, match="writes nothing"):
        make(loaded, [(prompt, "") for prompt, _ in rows])


# ---- score.py ----------------------------------------------------------------------------------


def test_score_py_takes_internal_rewards(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    score.main(
        f"--input {ROOT}/data/preference_increasing_mult_2_test.jsonl --ground-truth-reward "
        "--adlf-alpha 0.5 --use-multi-objective --score-range 0 1 --output out.jsonl".split()
    )
    rows = [json.loads(line) for line in open("out.jsonl")]
    assert {"fluency", "faithfulness", "external"} <= rows[0]["rewards"].keys()
    first = next(r for r in rows if r["rewards"]["external"] != r["score"])
    parts = first["rewards"]
    inner = 0.3 * parts["fluency"] + 0.3 * parts["faithfulness"] + 0.4 * parts["external"]
    assert first["score"] == pytest.approx(0.5 * parts["external"] + 0.5 * inner, abs=1e-6)
    # Chosen answers are more fluent, as the model was trained on such.
    ranked = {0: [], 1: []}
    for row in rows:
        ranked[row["rank"]].append(row["rewards"]["fluency"])
    assert np.mean(ranked[0]) > np.mean(ranked[1])
