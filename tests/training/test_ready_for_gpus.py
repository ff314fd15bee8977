"""What Apple GPUs ask for, seen on the CPU: limits, decoding ahead, few shapes, bfloat16."""

import gc
import json
import platform
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT
from tiny import ARCHITECTURES, tiny_model
from tiny_group import make_trainer as make_group_trainer
from tiny_group import random_groups
from tiny_ppo import make_trainer, random_batch

sys.path.insert(0, str(ROOT / "benchmarks"))
import apple  # noqa: E402

from models import decoding  # noqa: E402
from models.actor_critic import ValueHead  # noqa: E402
from models.decoding import Sampling, generate  # noqa: E402
from training import memory  # noqa: E402

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33]] * 3
MANY_EOS = {1, 21, 30, 34, 50, 61}  # about one token in ten, so rows end at many lengths


# ------------------------------------------------------------------------------ limits


def test_what_metal_recommends_is_wired_and_bounds_the_cache(monkeypatch):
    told, calls = {"max_recommended_working_set_size": 8_000}, []
    monkeypatch.setattr(mx, "device_info", lambda: told)
    for name in ("set_wired_limit", "set_cache_limit", "set_memory_limit"):
        monkeypatch.setattr(mx, name, lambda size, name=name: calls.append((name, size)))
    memory.set_memory_limit(None)
    assert calls == [("set_wired_limit", 8_000), ("set_cache_limit", 2_000)]
    calls.clear()
    memory.set_memory_limit(2e-6)
    assert calls[2:] == [("set_memory_limit", 2_000), ("set_cache_limit", 500)]
    calls.clear()
    told.clear()  # as on Linux
    memory.set_memory_limit(None)
    assert calls == []


# ------------------------------------------------------------------------------ decoding


def both_ways(**options) -> tuple:
    """The same responses, waited for at each step and handed over one step ahead."""
    model, head = tiny_model(), ValueHead(32, init_std=0.3)
    options = {"max_tokens": 24, "eos_ids": MANY_EOS, "value_head": head} | options
    mx.eval(head.parameters())
    return tuple(
        generate(model, PROMPTS, key=mx.random.key(3), ahead=ahead, **options)
        for ahead in (False, True)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": Sampling(temperature=0)},
        {"value_head": None, "samples": 2},
        {"max_tokens": [1 + k for k in range(15)]},
        {"max_tokens": 1},
        {"should_stop": lambda tokens: len(tokens) > 3 and tokens[-1] % 3 == 0},
        {"min_tokens": 5, "eos_ids": set(range(40))},
    ],
    ids=["plain", "greedy", "samples", "limits", "one", "stop", "least"],
)
def test_a_decode_that_runs_ahead_writes_the_same(options):
    waited, ahead = both_ways(**options)
    assert waited.responses == ahead.responses and waited.finished == ahead.finished
    for one, other in zip(waited.logprobs, ahead.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)  # other batches round in another way
    if waited.values is not None:
        for one, other in zip(waited.values, ahead.values, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_each_step_is_handed_over_before_the_last_one_is_read(monkeypatch):
    """One evaluation a token, and none that Python waits for before the next is on its way."""
    events, model = [], tiny_model()
    hand_over, record = mx.async_eval, decoding._Rows.record
    monkeypatch.setattr(mx, "async_eval", lambda *a: (events.append("begun"), hand_over(*a)))
    monkeypatch.setattr(mx, "eval", lambda *a: events.append("waited"))
    monkeypatch.setattr(decoding._Rows, "record", lambda *a: (events.append("read"), record(*a))[1])
    generate(model, PROMPTS[:1], max_tokens=6, eos_ids=set(), ahead=True)
    assert events == ["begun"] + ["begun", "read"] * 5 + ["read"]


def test_buffers_of_past_shapes_are_given_back(monkeypatch):
    cleared = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    monkeypatch.setattr(decoding, "CLEAR_EVERY", 4)
    generate(tiny_model(), [[5, 6]], max_tokens=11, eos_ids=set())
    assert len(cleared) == 2 + 1  # after 4 and 8 tokens, and at the end


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES)))
def test_long_prompts_are_read_in_chunks(monkeypatch, architecture):
    seen, whole = [], decoding.hidden_states
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 60, size=size).tolist() for size in (21, 3, 30)]
    options = {"max_tokens": 6, "eos_ids": set(), "sampling": Sampling(temperature=0)}
    model = tiny_model(architecture)
    at_once = generate(model, prompts, **options)

    def watched(model, tokens, cache=None):
        seen.append(tokens.shape[1])
        return whole(model, tokens, cache=cache)

    monkeypatch.setattr(decoding, "hidden_states", watched)
    monkeypatch.setattr(decoding, "PREFILL", 8)
    in_chunks = generate(model, prompts, **options)
    assert seen[:4] == [8, 8, 8, 6] and set(seen[4:]) == {1}
    assert in_chunks.responses == at_once.responses
    for one, other in zip(in_chunks.logprobs, at_once.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


# ------------------------------------------------------------------------------ shapes, types


def shapes_of_steps(monkeypatch, **config) -> tuple[int, int]:
    """(kinds of shapes that reach the loss, minibatches) of steps on texts of many lengths."""
    trainer, seen = make_trainer(**config), []
    loss = trainer._loss_and_grad

    def watched(packed, columns):
        seen.append(tuple(a.shape for a in (*packed, *columns)))
        return loss(packed, columns)

    monkeypatch.setattr(trainer, "_loss_and_grad", watched)
    for seed in range(6):
        trainer.step(*random_batch(seed=seed))
    return len(set(seen)), len(seen)


def test_few_shapes_reach_the_compiler(monkeypatch):
    """Compiled code is made once for each: padding to 16 leaves few of them."""
    padded, count = shapes_of_steps(monkeypatch, pad_to_multiple=16)
    plain, _ = shapes_of_steps(monkeypatch)
    assert count == 6 * 2 * 2 and padded <= 3 < 10 < plain


@pytest.mark.long  # g++ compiles each shape
def test_the_compiler_is_called_once_for_each_padded_shape(monkeypatch):
    trainer, traced = make_trainer(), []
    loss = type(trainer)._loss
    monkeypatch.setattr(type(trainer), "_loss", lambda *words: (traced.append(1), loss(*words))[1])
    trainer = make_trainer(compile=True)  # which pads to 16
    assert trainer.pad_to_multiple == 16
    for seed in range(4):
        trainer.step(*random_batch(seed=seed))
    assert 1 <= len(traced) <= 3


def test_bfloat16_through_ppo():
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    trainer = make_trainer(model=model)
    queries, _, _ = random_batch()
    before = {k: np.array(v) for k, v in trainer.model.tuning.arrays().items()}
    rollout = trainer.generate(queries)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = trainer.update(rollout, [float(n) for n in range(8)])
    assert {str(a.dtype) for a in trainer.model.tuning.arrays().values()} == {"mlx.core.float32"}
    assert {str(a.dtype) for a in (rollout.logprobs, rollout.ref_logprobs, rollout.values)} == {
        "mlx.core.float32"
    }
    assert stats["ppo/skipped"] == 0 and np.isfinite(stats["ppo/loss/total"])
    # The first epoch's policy is the one that sampled: bfloat16 keeps 3 digits of a logit.
    assert stats["objective/kl"] == pytest.approx(0, abs=0.05)
    moved = [
        np.abs(np.array(v) - before[k]).max() for k, v in trainer.model.tuning.arrays().items()
    ]
    assert max(moved) > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bfloat16_through_grpo():
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    trainer = make_group_trainer(model=model, beta=0.1)
    queries, _, rewards = random_groups()
    before = {k: np.array(v) for k, v in trainer.model.tuning.arrays().items()}
    rollout = trainer.generate(queries[::4])  # each prompt once
    stats = trainer.update(rollout, rewards)
    after = trainer.model.tuning.arrays()
    kept = [*after.values(), rollout.logprobs, rollout.ref_logprobs]
    assert {str(a.dtype) for a in kept} == {"mlx.core.float32"}
    assert stats["loss"] is not None and np.isfinite(stats["loss"])
    assert stats["kl"] == pytest.approx(0, abs=0.05)  # as above
    assert max(np.abs(np.array(v) - before[k]).max() for k, v in after.items()) > 0


def test_the_memory_of_a_group_batch_is_that_of_its_minibatch():
    """Four times the responses, as many in a gradient: the update takes what it took."""
    peaks = []
    for count in (4, 16):
        trainer = make_group_trainer(
            batch_size=4 * count, mini_batch_size=4, num_generations=4, beta=0.1
        )
        queries, responses, rewards = random_groups(4 * count, length=6)
        rollout = trainer.as_rollout(queries, responses)
        gc.collect()
        start = mx.get_active_memory()
        mx.reset_peak_memory()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.update(rollout, rewards)
        peaks.append(mx.get_peak_memory() - start)
    assert peaks[1] < 1.3 * peaks[0]  # all but what there is of each response


# ------------------------------------------------------------------------------ the script to send


def test_the_script_for_macs_tells_figures_and_nothing_private(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(apple, "REPEATS", 1)
    monkeypatch.setattr(apple, "RESPONSE", 4)
    few = {name: apple.CASES[name] for name in ("sampling, ahead", "SFT update", "PPO step")}
    monkeypatch.setattr(apple, "CASES", few)
    assert apple.main(["--small"]) == 0
    text = (tmp_path / "apple.json").read_text()
    found = json.loads(text)
    assert len(found["cases"]) == 2 * 2 * 3 and found["machine"]["mlx"]
    for case in found["cases"]:
        assert case["tokens_per_second"] > 0 and case["peak_gb"] > 0, case
    assert "wrote apple.json" in capsys.readouterr().out
    private = (platform.node(), str(tmp_path), str(ROOT), str(Path.home()))
    assert not [word for word in private if len(word) > 3 and word in text]


def test_a_case_that_fails_leaves_the_others():
    def breaks(*_):
        raise RuntimeError("no such kernel")

    assert apple.attempt(breaks, "float32", 2, apple.SMALL) == {
        "error": "RuntimeError: no such kernel"
    }
