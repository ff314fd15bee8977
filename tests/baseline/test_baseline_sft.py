"""pytorch_sft_trainer.py: what it adds to TRL's trainers."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from baseline_setup import DIGITS, ROOT, close, torch, updates
from files import tree
from pytorch_models import Tuned, load_model
from pytorch_optimizers import build_optimizer, trainable
from pytorch_reward_model import RewardModel
from pytorch_sft import main as sft_main
from pytorch_sft_trainer import RewardTrainer, SFTTrainer

from data_utils import (
    BatchPlan,
    epoch_batches,
    read_records,
    tokenise_preferences,
    tokenise_scalar,
    tokenise_sft,
)
from errors import UserError
from mlx_sft_trainer import LanguageModelTask, RewardModelTask, SupervisedTrainer
from mlx_sft_trainer import evaluate as mlx_evaluate
from models.adapter_files import attach
from models.load import load_model as load_mlx
from models.reward_model import RewardModel as MlxRewardModel
from models.reward_model import load_reward_head
from run_folder.run import read_rows
from training.optimizers import build_optimizer as build_mlx_optimizer

pytestmark = pytest.mark.torch
FULL = {"fine_tune_type": "full"}
KINDS = ("text", "scalar", "pairs", "ranked")


def rows_of(kind: str, tokenizer, folder):
    """Rows of unlike lengths; "ranked" are lists of two and three, some with ties."""
    if kind == "ranked":
        file, lines = folder / "ranked.jsonl", []
        for first in range(2, 42, 2):
            answers = [f" {first + 2} {first + 4} {first + 6}", f" {first + 2} {first}", " 7"]
            lines.append({"prompt": f"{first}", "responses": answers[: 2 + first % 4 // 2]})
            lines[-1]["ranks"] = [0, 1, 1 + first % 3 % 2][: len(lines[-1]["responses"])]
        file.write_text("\n".join(map(json.dumps, lines)))
        return tokenise_preferences(read_records(file), tokenizer)
    name = {"text": "", "scalar": "reward_function_", "pairs": "preference_"}[kind]
    records = read_records(ROOT / "data" / f"{name}increasing_mult_2_train.jsonl")
    make = {"text": tokenise_sft, "scalar": tokenise_scalar, "pairs": tokenise_preferences}
    return make[kind](records, tokenizer)


def make_trainer(kind: str, tokenizer, optimizer="sgd", **options):
    """A trainer of every weight of the embedded model, the same one each time."""
    torch.manual_seed(0)
    model = Tuned(load_model(str(DIGITS)).model, FULL)
    trained = model if kind == "text" else RewardModel(model, pooling="last")
    linear = {"schedule": "linear", "steps": 10}
    if kind != "text":
        options["centering"] = 0.01
    return (SFTTrainer if kind == "text" else RewardTrainer)(
        trained,
        tokenizer,
        optimizer=build_optimizer(trainable(trained), optimizer, 1e-2, **linear),
        **options,
    )


def in_order(rows, batch_size: int) -> BatchPlan:
    return BatchPlan(rows.lengths, batch_size, shuffle=False)


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(str(DIGITS)).tokenizer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.parameters.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_several_batches_are_one_large_one(kind, tokenizer, tmp_path):
    """Weighted by tokens, rows and prompts: TRL's mean over batches would weigh rows unequally."""
    rows = rows_of(kind, tokenizer, tmp_path)
    rows.rows = rows.rows[:19]  # so that the last of the small batches has fewer rows
    small, large = make_trainer(kind, tokenizer), make_trainer(kind, tokenizer)
    (found,) = updates(small, rows.rows, in_order(rows, 4), 1, 5)
    (wanted,) = updates(large, rows.rows, in_order(rows, 19), 1)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        close(found[name], value, name, relative=1e-5)
    after = weights(large)
    for name, weight in weights(small).items():
        close(weight, after[name], name, relative=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_metrics_as_on_the_mlx_side(kind, tokenizer, tmp_path):
    """Of an evaluation, and of three updates of two batches; the last has one."""
    rows = rows_of(kind, tokenizer, tmp_path)
    rows.rows = rows.rows[:20]
    theirs = make_trainer(kind, tokenizer, max_grad_norm=0.5)
    base = load_mlx(DIGITS, dtype="float32")
    tuning = attach(base.model, FULL)
    if kind == "text":
        task = LanguageModelTask(base.model, tuning)
    else:
        theirs.trained.save_head(str(tmp_path / "a.safetensors"))
        model = MlxRewardModel(base.model, pooling="last", tuning=tuning)
        load_reward_head(model, tmp_path / "a.safetensors")
        task = RewardModelTask(model, centering=0.01)
    plan = in_order(rows, 4)

    def same(found: dict, wanted: dict) -> None:
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            close(found[name], value, name, relative=1e-4)

    evaluated = mlx_evaluate(task, epoch_batches(rows.rows, plan))
    same(theirs.evaluate(epoch_batches(rows.rows, plan)), evaluated)
    optimizer = build_mlx_optimizer("sgd", 1e-2, schedule="linear", steps=10)
    ours = SupervisedTrainer(task, optimizer, max_grad_norm=0.5)
    batches = list(epoch_batches(rows.rows, plan))
    for part in (batches[:2], batches[2:4], batches[4:]):
        same(theirs.step(part), ours.step(part))
        close(theirs.learning_rate, ours.learning_rate, relative=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "adafactor"])
def test_an_update_that_is_not_finite_is_as_if_it_had_not_been(optimizer, tokenizer, tmp_path):
    """Weights, moments and schedule; the updates after it have a loss again."""
    rows = rows_of("text", tokenizer, tmp_path)
    whole, broken = (make_trainer("text", tokenizer, optimizer) for _ in range(2))
    compute = broken.compute_loss

    def second_is_nan(model, inputs, *args, **options):
        loss = compute(model, inputs, *args, **options)
        return loss * float("nan") if inputs["input_ids"][0].tolist() == second else loss

    batches = list(epoch_batches(rows.rows, in_order(rows, 8)))[:3]
    second = batches[1].tokens[0].tolist()
    broken.compute_loss = second_is_nan
    found = [broken.step([batch]) for batch in batches]
    wanted = [whole.step([batch]) for batch in (batches[0], batches[2])]
    assert [m["not_finite"] for m in found] == [0, 1, 0] and np.isnan(found[1]["loss"])
    assert found[0] == wanted[0] and found[2] == wanted[1]
    assert broken.learning_rate == whole.learning_rate
    after = weights(whole)
    assert all(torch.equal(weight, after[name]) for name, weight in weights(broken).items())


def test_a_mixture_of_experts_has_no_other_loss(tokenizer, tmp_path):
    """TRL would add the balancing loss of its configuration to that of the tokens."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=0.5,
    )
    model = Tuned(MixtralForCausalLM(config), FULL)
    rows = rows_of("text", tokenizer, tmp_path)
    (batch,) = epoch_batches(rows.rows[:8], BatchPlan(rows.lengths[:8], 8, shuffle=False))
    found = SFTTrainer(model, tokenizer).evaluate([batch])["loss"]
    tokens, mask = torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.mask[:, 1:]) > 0
    with torch.no_grad():
        logits = model.logits(model.hidden_states(tokens))[:, :-1]
    close(
        found,
        torch.nn.functional.cross_entropy(logits[mask], tokens[:, 1:][mask]),
        "loss",
        relative=1e-5,
    )


def test_a_model_without_linear_layers_takes_no_adapter():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    described = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": None},
    }
    with pytest.raises(UserError, match="gpt2: has no linear layers for an adapter"):
        Tuned(GPT2LMHeadModel(config), described)


def test_trl_tells_nobody(tokenizer, tmp_path, monkeypatch):
    from trl.trainer import base_trainer

    def send(*_, **__):
        raise AssertionError("telemetry was sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", send)
    for kind in ("text", "pairs"):
        rows = rows_of(kind, tokenizer, tmp_path)
        updates(make_trainer(kind, tokenizer), rows.rows, in_order(rows, 8), 1)


def test_the_tokenizer_is_left_alone(tokenizer):
    """RewardTrainer wants a padding token; one that a model has not must not be saved with it."""
    before, tokenizer.pad_token = tokenizer.pad_token, None
    try:
        make_trainer("pairs", tokenizer)
        assert tokenizer.pad_token is None
    finally:
        tokenizer.pad_token = before


def test_epochs_end_with_the_last_batch(tmp_path):
    """150 rows in batches of 16 are 10 batches: 4 updates of at most 3, and no row comes twice."""
    words = ["--train", "--epochs", "1", "--batch-size", "16", "--gradient-accumulation-steps", "3"]
    sft_main([*words, "--steps-per-eval", "0", "--output-dir", str(tmp_path)])
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]  # the last one: of the validation
    rows.pop()
    lines = (ROOT / "data" / "increasing_mult_2_train.jsonl").read_text().splitlines()
    tokenizer = load_model(str(DIGITS)).tokenizer
    records = tokenise_sft(read_records(ROOT / "data" / "increasing_mult_2_train.jsonl"), tokenizer)
    assert len(records) == len(lines)
    assert rows[-1]["train/tokens_total"] == sum(sum(row.mask) for row in records.rows)
    before = tree(tmp_path)
    for flag, value in (("--epochs", "2"), ("--iters", "20")):
        with pytest.raises(UserError, match=f"{flag}: .* ended in an update of fewer than 3 batch"):
            sft_main(["--resume", str(tmp_path), flag, value])
        assert tree(tmp_path) == before
    sft_main(["--resume", str(tmp_path)])


def test_nothing_is_written_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--train", "--iters", "2", "--data", str(ROOT / "data"), "--output-dir", "run"]
    sft_main([*words, "--test", "--steps-per-eval", "0"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not list((tmp_path / "run").rglob("README.md"))


def test_ctrl_c_finishes_the_update_and_the_run_goes_on(tmp_path):
    command = [sys.executable, str(ROOT / "pytorch_baseline" / "pytorch_sft.py")]
    words = ["--train", "--iters", "100000", "--output-dir", str(tmp_path), "--steps-per-eval", "0"]
    run = subprocess.Popen([*command, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and f"--resume {tmp_path}" in said, said
    done = len(read_rows(tmp_path))
    assert (tmp_path / "checkpoints" / f"step-{done:08d}" / "state.pt").exists()
    sft_main(["--resume", str(tmp_path), "--iters", str(done + 2)])
    steps = [row["step"] for row in read_rows(tmp_path)]
    assert steps == [*range(1, done + 3), done + 2]  # a validation ends the run
