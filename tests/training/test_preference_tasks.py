"""Preference tasks: the reference, passes and updates that add up, and what is trained."""

import math
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from tiny import flat, tiny_model
from tiny_ppo import assert_close, assert_same_bits

from data_utils import PreferenceRow, UnpairedRow, make_batch
from mlx_preference_tasks import PairTask, UnpairedTask
from mlx_sft_trainer import SupervisedTrainer, evaluate
from models.lora import LoraConfig, add_lora
from models.reference import adapter_as_it_is, adapter_off, frozen_copy
from models.shared_prompts import can_share_prompts
from models.soft_prompt import SoftPrompt
from models.tuning import FullTuning
from rl.preference_losses import dpo_loss
from rl.reference_free_losses import cpo_loss, orpo_loss

KINDS = ("lora", "dora", "prompt", "full")
MIXTURE = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
LOSSES = {
    "dpo": (dpo_loss, {}),
    "dpo and sft": (partial(dpo_loss, **MIXTURE), {}),
    "ipo, ld_alpha": (partial(dpo_loss, loss_type=["ipo"]), {"ld_alpha": 0.3}),
    "wpo": (dpo_loss, {"use_weighting": True}),
    "cpo": (cpo_loss, {}),
    "orpo": (orpo_loss, {"nll_of_prompt": True}),
}


def answer(rng, prompt: list[int]) -> tuple[list[int], list[int]]:
    tokens = rng.integers(3, 64, rng.integers(2, 9)).tolist() + [2]
    return prompt + tokens, [0] * len(prompt) + [1] * len(tokens)


def pair_rows(count: int = 6, responses: int = 2, seed: int = 0) -> list[PreferenceRow]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt = rng.integers(3, 64, rng.integers(1, 6)).tolist()
        tokens, masks = zip(*(answer(rng, prompt) for _ in range(responses)), strict=True)
        rows.append(PreferenceRow(list(tokens), list(range(responses)), masks=list(masks)))
    return rows


def unpaired_rows(count: int = 6) -> list[UnpairedRow]:
    return [
        UnpairedRow(row.chosen, row.masks[0], i % 3 > 0, max_length=64)
        for i, row in enumerate(pair_rows(count, seed=5))
    ]


def tune(kind: str, model, dropout: float = 0.0):
    if kind == "full":
        return FullTuning(model)
    if kind == "prompt":
        return SoftPrompt(model, 3)
    return add_lora(model, LoraConfig(rank=2, scale=2.0, dropout=dropout, use_dora=kind == "dora"))


def move(tuning, seed: int = 0) -> None:
    arrays = tuning.arrays()
    keys = mx.random.split(mx.random.key(seed), len(arrays))
    tuning.load_arrays(
        {
            name: array + 0.05 * mx.random.normal(array.shape, key=key)
            for (name, array), key in zip(sorted(arrays.items()), keys, strict=True)
        }
    )


def make_task(loss: str = "dpo", kind: str = "lora", *, shaken: bool = True, **options):
    """A task on a model that differs from its reference, unless not `shaken`."""
    model = options.pop("model", None) or tiny_model()
    tuning = tune(kind, model, options.pop("dropout", 0.0))
    kept = options.pop("as_loaded", False)
    if kept:
        move(tuning)
    if kind == "full":
        reference = frozen_copy(tiny_model())
    else:
        reference = adapter_as_it_is(model, tuning) if kept else adapter_off(model, tuning)
    if shaken:
        move(tuning, seed=7)
    if loss == "kto":
        return UnpairedTask(model, tuning, reference=reference, **options)
    function, own = LOSSES[loss]
    if loss in ("cpo", "orpo"):
        reference = None
    return PairTask(model, tuning, function, reference=reference, **own, **options)


def rows_for(loss: str, count: int = 6) -> list:
    return unpaired_rows(count) if loss == "kto" else pair_rows(count)


def gradient_of(task, *groups: list) -> tuple[dict, dict]:
    """(gradient, metrics) of one update from a batch of each group of rows."""
    trainer = SupervisedTrainer(task, optim.SGD(1.0))
    before = {k: np.array(v) for k, v in flat(task.trained.trainable_parameters()).items()}
    metrics = trainer.step([make_batch(rows) for rows in groups])
    after = flat(task.trained.trainable_parameters())
    return {k: before[k] - np.array(after[k]) for k in before}, metrics


def same(one: dict, other: dict) -> None:
    assert_close(one, other, relative=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_is_its_reference_has_log_2_and_learns_from_it(kind):
    if kind == "prompt":  # a soft prompt is never nothing
        task = make_task(kind=kind, as_loaded=True, shaken=False)
    else:
        task = make_task(kind=kind, shaken=False)
    gradient, metrics = gradient_of(task, pair_rows())
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert max(np.abs(g).max() for g in gradient.values()) > 1e-4


def test_a_row_s_loss_is_that_of_its_response_tokens_alone():
    """By the model's own logits, a token at a time; elsewhere prompts count as answers."""
    task = make_task()
    (row,) = pair_rows(1)

    def log_p(tokens: list[int], mask: list[int]) -> float:
        logits = task.model(mx.array([tokens[:-1]]))[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return sum(logprobs[t - 1, tokens[t]].item() for t in range(1, len(tokens)) if mask[t])

    def both() -> list[float]:
        return [log_p(t, m) for t, m in zip(row.responses, row.masks, strict=True)]

    policy = both()
    with task.tuning.disabled():
        reference = both()
    ratio = (policy[0] - reference[0]) - (policy[1] - reference[1])
    found = evaluate(task, [make_batch([row])])
    assert found["loss"] == pytest.approx(math.log1p(math.exp(-0.1 * ratio)), rel=1e-5)
    assert found["logps/chosen"] == pytest.approx(policy[0], rel=1e-5)
    assert found["rewards/margins"] == pytest.approx(0.1 * ratio, abs=2e-6)
    assert ratio != 0


@pytest.mark.parametrize("loss", [*LOSSES, "kto"])
@pytest.mark.parametrize("pass_tokens", [0, 20])
def test_passes_and_padding_change_nothing(loss, pass_tokens):
    rows = rows_for(loss)
    one = gradient_of(make_task(loss, pass_tokens=0), rows)
    other = gradient_of(make_task(loss, pass_tokens=pass_tokens, pad_to_multiple=16), rows)
    same(one[0], other[0])
    assert one[1]["loss"] == pytest.approx(other[1]["loss"], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_accumulated_batches_are_one_large_batch(loss):
    """Elsewhere means of means: sft, CPO's and ORPO's NLL change with the number of passes."""
    rows = pair_rows(6)
    whole, metrics = gradient_of(make_task(loss), rows)
    parts, summed = gradient_of(make_task(loss), rows[:1], rows[1:4], rows[4:])
    same(whole, parts)
    assert metrics.keys() == summed.keys()
    for name, value in metrics.items():
        assert summed[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


def test_evaluation_does_not_depend_on_the_batches():
    for loss in LOSSES:
        task, rows = make_task(loss), pair_rows(5)
        one = evaluate(task, [make_batch(rows)])
        several = evaluate(task, [make_batch(rows[:2]), make_batch(rows[2:])])
        assert one.keys() == several.keys()
        assert one["loss"] == pytest.approx(several["loss"], rel=1e-5)
        assert "num_tokens" not in one


@pytest.mark.parametrize("loss", ["dpo", "ipo, ld_alpha", "kto"])
def test_a_reference_computed_before_gives_the_same_bits(loss):
    rows = rows_for(loss)
    task = make_task(loss)
    for row in rows:
        found = task.reference_logprobs(make_batch([row]))
        lengths = [len(row.tokens)] if loss == "kto" else map(len, row.responses)
        cut = [column[:n] for column, n in zip(found, lengths, strict=True)]
        row.reference = cut[0] if loss == "kto" else cut
    known = gradient_of(task, rows)
    plain = [replace(row, reference=None) for row in rows]
    computed = gradient_of(make_task(loss), plain)
    same(known[0], computed[0])
    assert known[1]["loss"] == pytest.approx(computed[1]["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "prompt"])
def test_the_adapter_as_it_was_loaded_is_the_reference(kind):
    task = make_task(kind=kind, as_loaded=True, shaken=False)
    before = {k: np.array(v) for k, v in task.tuning.arrays().items()}
    trainer = SupervisedTrainer(task, optim.SGD(0.5))
    batch = make_batch(pair_rows())
    first = task.reference_logprobs(batch)
    for _ in range(2):
        trainer.step([batch])
    np.testing.assert_array_equal(first, task.reference_logprobs(batch))
    after = task.tuning.arrays()
    assert all(not np.array_equal(before[k], np.array(after[k])) for k in before)
    # A checkpoint keeps it, and gives it back.
    group = task.groups({})["reference"]
    assert_same_bits(before, group.get())
    group.put({k: v + 1 for k, v in group.get().items()})
    assert not np.array_equal(first, task.reference_logprobs(batch))


def test_the_adapter_that_is_off_needs_no_copy():
    assert make_task().reference.kept is None
    assert set(make_task().groups({})) == {"adapters"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("responses", [2, 3])
def test_a_long_prompt_is_read_once_and_changes_nothing(kind, responses):
    prompts = [list(range(3, 63)) * 3, [7, 8, 9], list(range(63, 3, -1)) * 3]
    rng, rows = np.random.default_rng(3), []
    for prompt in prompts:
        tokens, masks = zip(*(answer(rng, prompt) for _ in range(responses)), strict=True)
        rows.append(PreferenceRow(list(tokens), list(range(responses)), masks=list(masks)))
    options = {"kind": kind, "as_loaded": kind == "prompt"}
    shared, plain = make_task(**options), make_task(**options)
    assert shared.share_prompts
    plain.share_prompts = False
    passes = shared.arrays(make_batch(rows))[0][0]
    prefix = len(shared.tuning.prefix)
    assert [found[2].size - prefix for found in passes if len(found) == 3] == [179, 179]
    assert all(len(found) == 2 for found in plain.arrays(make_batch(rows))[0][0])
    one, other = gradient_of(shared, rows), gradient_of(plain, rows)
    same(one[0], other[0])
    for name, value in other[1].items():
        assert one[1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_prompts_are_not_shared_where_layers_keep_something_else_or_are_computed_again():
    task = make_task()
    SupervisedTrainer(task, optim.SGD(1.0), grad_checkpoint=True)
    assert not task.share_prompts
    assert not can_share_prompts(tiny_model("gemma3_text"))  # windows
    assert not make_task("orpo").shared(make_batch(pair_rows()), np.ones((12, 15), bool))[0][1]


@pytest.mark.parametrize("loss", ["dpo", "kto", "orpo"])
@pytest.mark.parametrize("as_loaded", [False, True])
def test_a_quantised_base_is_held_once_and_stays_as_it_is(loss, as_loaded):
    model = tiny_model()
    nn.quantize(model, group_size=32, bits=4)
    base = {name: np.array(array) for name, array in flat(model).items()}
    task = make_task(loss, model=model, as_loaded=as_loaded, shaken=False)
    kept = task.reference.kept if task.reference else None
    held = sum(array.size for array in (kept or {}).values())
    assert held == as_loaded * (loss != "orpo") * sum(a.size for a in task.tuning.arrays().values())
    if loss == "dpo":
        first = task.reference_logprobs(make_batch(pair_rows()))
    gradient, metrics = gradient_of(task, rows_for(loss))
    assert max(np.abs(g).max() for g in gradient.values()) > 1e-6
    assert set(gradient) == set(task.tuning.arrays())  # nothing but the adapter moves
    assert_same_bits(base, base_of(task))
    if loss == "dpo":
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
        np.testing.assert_array_equal(first, task.reference_logprobs(make_batch(pair_rows())))


def base_of(task) -> dict:
    """The arrays of a task's model with its adapter off."""
    with task.tuning.disabled():
        return {name: np.array(array) for name, array in flat(task.model).items()}


def test_ranked_lists_count_like_one_pair_each():
    task = make_task()
    lists, pairs = pair_rows(2, responses=3), pair_rows(2)
    found = evaluate(task, [make_batch([*lists, *pairs])])
    losses = []
    for row in lists:
        own = []
        for i, j in ((0, 1), (0, 2), (1, 2)):
            two = PreferenceRow(
                [row.responses[i], row.responses[j]], [0, 1], masks=[row.masks[i], row.masks[j]]
            )
            own.append(evaluate(task, [make_batch([two])])["loss"])
        losses.append(np.mean(own))
    losses += [evaluate(task, [make_batch([row])])["loss"] for row in pairs]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_dropout_is_off():
    """With it, policy and reference would differ from the start, as they do not in TRL."""
    task = make_task(dropout=0.5, shaken=False)
    assert any(isinstance(m, nn.Dropout) for m in task.model.modules())
    _, metrics = gradient_of(task, pair_rows())
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_mismatched_rows_are_prompts_with_the_response_of_the_row_before():
    rows = [
        UnpairedRow([3, 4, 5, 2], [0, 0, 1, 1], True),
        UnpairedRow([6, 7, 2], [0, 1, 1], False),
        UnpairedRow([8, 9, 9, 9, 2], [0, 0, 0, 1, 1], True, max_length=4),
    ]
    batch = make_batch(rows)
    assert batch.tokens[3:].tolist() == [[3, 4, 9, 2, 0], [6, 5, 2, 0, 0], [8, 9, 9, 7, 0]]
    assert batch.mask[3:].tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert batch.lengths.tolist() == [4, 3, 5, 4, 3, 4]
    assert batch.label.tolist() == [1, 0, 1]


def test_kto_of_one_label_has_metrics_of_that_label_alone():
    rows = [replace(row, label=True) for row in unpaired_rows(3)]
    found = evaluate(make_task("kto"), [make_batch(rows)])
    assert "rewards/chosen" in found
    assert not {"rewards/rejected", "logps/rejected", "logits/rejected"} & found.keys()
