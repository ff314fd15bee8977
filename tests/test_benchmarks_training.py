"""benchmarks/sft_speed.py and reward_training.py: both sides of each do the same. No times here."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import reward_training  # noqa: E402
import sft_speed  # noqa: E402
from tiny_llama import make_model  # noqa: E402

from data_utils import make_batch, read_records, tokenise_sft  # noqa: E402
from mlx_sft_trainer import LanguageModelTask, evaluate  # noqa: E402
from models.load import load_model  # noqa: E402
from models.lora import LoraConfig, add_lora  # noqa: E402

SMALL = {
    "text": sft_speed.Case("text"),
    "answers": sft_speed.Case("answers", answers=True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_model(tmp_path_factory.mktemp("model")))


def mlx_lm_batches(model, folder, case, batch_size=sft_speed.BATCH) -> list:
    """[(tokens (B, L), lengths (B, 2)), ...] of its command, in the order of the file."""
    from mlx_lm.tuner.datasets import CacheDataset, load_dataset
    from mlx_lm.tuner.trainer import iterate_batches

    options = sft_speed.mlx_lm_options("", str(folder), case, steps=1)
    rows = CacheDataset(load_dataset(options, model.tokenizer)[0])
    batches = list(iterate_batches(rows, batch_size, max_seq_length=2048, seed=0))
    order = np.argsort(np.random.RandomState(0).permutation(len(batches)))
    return [batches[i] for i in order]


def our_rows(model, folder, case) -> list:
    records = read_records(folder / "train.jsonl")
    return tokenise_sft(records, model.tokenizer, mask_prompt=case.answers).rows


@pytest.mark.parametrize("name", SMALL)
def test_both_sides_of_sft_train_the_same_tokens_to_the_same_loss(model, tmp_path, name):
    from mlx_lm.tuner.trainer import default_loss

    case = SMALL[name]
    folder = sft_speed.make_data(tmp_path, case, rows=8)
    rows, batches = our_rows(model, folder, case), mlx_lm_batches(model, folder, case)
    ours = evaluate(LanguageModelTask(model.model, add_lora_once(model)), [make_batch(rows)])
    nats = count = seen = 0
    for tokens, lengths in batches:  # in the file's order: its sort by length has no effect
        for row, (offset, length) in zip(np.array(tokens), lengths.tolist(), strict=True):
            own = rows[seen]
            assert row[:length].tolist() == own.tokens
            assert sum(own.mask) == length - max(1, offset)
            assert all(own.mask[max(1, offset) :])
            seen += 1
        with_pads = default_loss(model.model, tokens, lengths)[1].item()
        loss, counted = default_loss(model.model, tokens, lengths - mx.array([0, 1]))
        assert with_pads == counted.item() + len(lengths)  # one pad token a row
        nats, count = nats + loss.item() * counted.item(), count + counted.item()
    assert seen == len(rows) and count == sum(sum(row.mask) for row in rows)
    assert ours["loss"] == pytest.approx(nats / count, abs=1e-4)


def add_lora_once(model):
    if not hasattr(model, "tuning"):
        model.tuning = add_lora(model.model, LoraConfig(**sft_speed.LORA))
    return model.tuning


@pytest.mark.parametrize("name", SMALL)
def test_rows_have_the_lengths_that_the_benchmark_speaks_of(model, tmp_path, name):
    case = SMALL[name]
    lengths = [
        len(row.tokens) for row in our_rows(model, sft_speed.make_data(tmp_path, case), case)
    ]
    assert len(lengths) == sft_speed.ROWS and lengths != sorted(lengths)
    assert sft_speed.SHORTEST <= min(lengths) < 50 and 370 < max(lengths) <= sft_speed.LONGEST
    by_length = sft_speed.Case("", by_length=True, answers=case.answers)
    folder = sft_speed.make_data(tmp_path, by_length)
    assert [len(row.tokens) for row in our_rows(model, folder, by_length)] == sorted(lengths)


@pytest.mark.long
def test_the_workers_of_sft_run_and_count_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")  # spares g++, whose runs take most of the time
    row = sft_speed.measure(SMALL["answers"], tmp_path, repeats=1, rows=sft_speed.BATCH)
    assert row["tokens"] == row["ours"]["tokens"]["median"] == row["mlx_lm"]["tokens"]["median"] > 0
    assert row["peaks"]["ours"] > 1e6 and row["peaks"]["mlx_lm"] > 1e6
    for who in ("ours", "mlx_lm"):  # random weights, 512 words
        assert row["first_epoch"][who]["loss"]["median"] == pytest.approx(np.log(512), abs=0.3)
    assert "answers" in sft_speed.report([row])


@pytest.mark.parametrize("case", ["preferences", "rewards"])
def test_rewards_are_trained_alike_in_batches_and_row_by_row(tmp_path, case, monkeypatch):
    monkeypatch.setitem(reward_training.ROWS, case, 20)
    losses = []
    for in_batches in (True, False):
        epoch = reward_training.make_call(str(tmp_path), case, in_batches)
        losses.append([epoch()["loss"] for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] < losses[0][0]


@pytest.mark.long
def test_the_reward_worker_answers(tmp_path):
    (row,) = reward_training.measure(tmp_path, repeats=1, cases=("preferences",))
    assert row["case"] in reward_training.report([row])


@pytest.mark.parametrize("benchmark", [sft_speed, reward_training])
def test_stored_figures_meet_their_targets_and_make_a_table(benchmark):
    name = benchmark.__name__
    stored = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert benchmark.missed(stored["rows"]) == []
    assert all(len(row) == 4 for row in benchmark.headline(stored))
    text = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text()
    assert text == benchmark.report(stored["rows"]) + "\n"
