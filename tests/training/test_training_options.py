"""Every training option has an effect: sft.py and ppo_training.py as a person runs them, small."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from short_runs import DATA, ROWS, SMALL, TRAIN, Run, run, same

import sft
from data_utils import read_records
from mlx_sft_trainer import SupervisedTrainer
from models.load import load_model
from run_folder.checkpoint_folder import best_checkpoint, list_checkpoints
from training.checkpoints import load_checkpoint
from training.schedules import learning_rate_schedule

pytestmark = pytest.mark.usefixtures("in_tmp")


# ------------------------------------------------------------------------------ length


def tokens_of_an_epoch() -> int:
    tokenizer = load_model().tokenizer
    rows = list(read_records(TRAIN, max_rows=ROWS))
    return sum(len(tokenizer.encode(row.text)) for row in rows)  # BOS is no target, EOS is one


def test_iters_and_epochs():
    whole = tokens_of_an_epoch()
    assert len(Run(iters=3).column("train/loss")) == 3
    two = Run("--epochs", 2, iters=None)
    assert two.column("train/tokens_total")[-1] == 2 * whole and two.rows[-1]["step"] == 6
    half = Run("--epochs", 0.5, iters=None)
    assert half.rows[-1]["step"] == 2  # of three batches


def test_an_epoch_is_whole_where_accumulation_does_not_divide_it():
    run = Run("--epochs", 1, "--gradient-accumulation-steps", 2, iters=None)
    assert run.rows[-1]["step"] == 2  # two batches, then the one that is left
    assert run.column("train/tokens_total")[-1] == tokens_of_an_epoch()


def test_accumulated_batches_are_one_large_batch():
    plain = ("--optimizer", "sgd", "--learning-rate", 1, "--max-grad-norm", 1e9)
    large = Run("--batch-size", 12, *plain, iters=1)
    small = Run("--batch-size", 4, "--gradient-accumulation-steps", 3, *plain, iters=1)
    assert same(large, small, 2e-6) and not same(large, Run(*plain, iters=1), 1e-4)
    assert small.column("train/loss") == pytest.approx(large.column("train/loss"), abs=1e-5)


# ------------------------------------------------------------------------------ optimizers


def test_every_optimizer_goes_its_own_way():
    runs = [
        Run("--optimizer", name) for name in ("adam", "adamw", "adafactor", "lion", "sgd", "muon")
    ]
    for i, one in enumerate(runs):
        assert not any(same(one, other) for other in runs[:i])


def test_schedules_are_what_the_metrics_say():
    schedules = {
        "constant": ((), {}),
        "linear": (("--warmup-steps", 3, "--lr-end-factor", 0.1), {"warmup": 3, "end_factor": 0.1}),
        "cosine": ((), {}),
        "polynomial": (("--lr-power", 3), {"power": 3.0}),
        "cosine_with_restarts": (("--num-cycles", 2), {"cycles": 2}),
    }
    for name, (words, options) in schedules.items():
        rates = Run("--lr-schedule", name, *words, iters=8).column("train/learning_rate")
        rate = learning_rate_schedule(name, 1e-3, steps=8, **options)
        # A float32 cosine is right to 1e-7 of the peak, near its end too.
        expected = [rate(step).item() for step in range(8)]
        assert rates == pytest.approx(expected, rel=1e-6, abs=1e-10)
    restarts = [1e-3 * 0.5 * (1 + math.cos(math.pi * (k % 4) / 4)) for k in range(8)]
    assert rates == pytest.approx(restarts, rel=1e-6, abs=1e-10)


def test_weight_decay_clipping_and_the_other_numbers_of_optimizers():
    plain = Run("--optimizer", "adamw")
    for words in (
        ["--weight-decay", 10],
        ["--adam-beta1", 0.5],
        ["--adam-beta2", 0.5],
        ["--adam-eps", 1e-2],
        ["--max-grad-norm", 1e-7],
        ["--seed", 1],
    ):
        assert not same(plain, Run("--optimizer", "adamw", *words)), words
    assert not same(Run("--optimizer", "sgd"), Run("--optimizer", "sgd", "--momentum", 0.9))
    start = Run("--optimizer", "sgd", "--learning-rate", 0, iters=1)
    clipped = Run("--optimizer", "sgd", "--learning-rate", 1, "--max-grad-norm", 0.5, iters=1)
    (norm,) = clipped.column("train/grad_norm")  # before clipping
    moved = np.linalg.norm(clipped.flat() - start.flat())
    assert moved == pytest.approx(0.5, abs=1e-4) and norm > 0.5


# ------------------------------------------------------------------------------ model


def test_precision_of_the_base():
    losses = {}
    for words in ((), ("--dtype", "bfloat16"), ("--quantize", 8), ("--quantize", 4)):
        run = Run(*words, iters=1)
        losses[words] = run.column("train/loss")[0]
        assert {array.dtype for array in run.weights.values()} == {np.dtype("float32")}
    plain = losses.pop(())
    away = [abs(loss - plain) for loss in losses.values()]
    assert all(0 < difference < 0.2 for difference in away)
    assert away[1] < away[2]  # 8 bits are closer than 4


def test_gradient_checkpointing_runs_blocks_again_and_changes_nothing(monkeypatch):
    from mlx_lm.models.llama import TransformerBlock

    calls = []
    original = TransformerBlock.__call__

    def counted(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TransformerBlock, "__call__", counted)
    plain = Run(iters=1)
    forward = len(calls)
    calls.clear()
    again = Run("--grad-checkpoint", iters=1)
    assert len(calls) > forward and same(plain, again, 1e-6)


def test_lora_options():
    plain = Run()
    assert (
        plain.config["lora_parameters"]["scale"] == 4 and plain.config["fine_tune_type"] == "lora"
    )
    blocks = {name.split(".")[2] for name in plain.weights}
    assert len(blocks) > 1
    rank = Run("--lora-rank", 3)
    assert {a.shape[-1] for n, a in rank.weights.items() if n.endswith("lora_a")} == {3}
    one = Run("--lora-layers", 1)
    assert {name.split(".")[2] for name in one.weights} == {max(blocks)}
    keys = Run("--lora-keys", "q_proj,v_proj")
    assert {n.split(".")[4] for n in keys.weights} == {"q_proj", "v_proj"}
    dora = Run("--fine-tune-type", "dora")
    assert any(name.endswith(".m") for name in dora.weights)
    for words in (["--lora-scale", 2], ["--lora-alpha", 8], ["--lora-dropout", 0.5]):
        assert not same(plain, Run(*words)), words
    assert same(plain, Run("--lora-alpha", 32))  # of rank 8: a scale of 4
    rslora = Run("--rslora", "--lora-alpha", 8)
    assert rslora.config["lora_parameters"]["scale"] == pytest.approx(8 / 8**0.5)


def test_what_is_trained():
    prompt = Run("--prompt-tuning", "--num-prompt-tokens", 3)
    width = load_model().config["hidden_size"]
    assert [a.shape for a in prompt.weights.values()] == [(3, width)]
    full = Run("--fine-tune-type", "full")
    before = mx.load(str(DATA / "digits_model" / "model.safetensors"))
    moved = [k for k, a in before.items() if not np.array_equal(np.array(a), full.weights[k])]
    assert len(moved) == len(before)


# ------------------------------------------------------------------------------ evaluation


def test_validations_have_loss_perplexity_and_accuracy():
    run = Run("--steps-per-eval", 2, "--val-batches", -1, iters=5)
    rows = [row for row in run.rows if "valid/loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    for row in rows:
        assert row["valid/perplexity"] == pytest.approx(math.exp(row["valid/loss"]))
        assert 0 < row["valid/accuracy"] < 1
    with open(f"{run.folder}/summary.json", encoding="utf-8") as file:
        summary = json.load(file)
    assert summary["valid/loss"] == rows[-1]["valid/loss"] == summary["best_valid_loss"]
    assert "validation: loss" in run.out
    few = Run("--steps-per-eval", 2, "--val-batches", 1, iters=2)
    assert few.column("valid/loss")[0] != rows[0]["valid/loss"]


LOSSES = [3.0, 2.0, 1.0, 5.0, 6.0, 7.0, 0.5, 0.4, 0.3]


@pytest.fixture
def losses(monkeypatch):
    """Validations that give LOSSES, one after the other."""
    left = iter(LOSSES)

    def evaluate(self, batches):
        return {"loss": next(left), "accuracy": 0.5, "perplexity": 1.0}

    monkeypatch.setattr(SupervisedTrainer, "evaluate", evaluate)


def test_the_best_checkpoint_is_kept_and_can_be_what_is_saved(losses):
    run = Run(
        "--steps-per-eval", 1, "--save-every", 1, "--keep-checkpoints", 1, "--save-best", iters=5
    )
    kept = [path.name for path in list_checkpoints(f"{run.folder}/checkpoints")]
    assert kept == ["step-00000002", "step-00000005"]
    best = best_checkpoint(f"{run.folder}/checkpoints")
    assert best.name == kept[0] and "the best weights are those of step 2" in run.out
    adapters = load_checkpoint(best).arrays["adapters"]
    assert all(np.array_equal(run.weights[name], np.array(a)) for name, a in adapters.items())
    last = load_checkpoint(f"{run.folder}/checkpoints/{kept[1]}").arrays["adapters"]
    assert not all(np.array_equal(run.weights[name], np.array(a)) for name, a in last.items())


def test_early_stopping_waits_for_its_patience(losses):
    run = Run("--steps-per-eval", 1, "--early-stopping-patience", 3, iters=8)
    assert run.column("train/loss") and run.rows[-1]["step"] == 5  # 1.0 at step 2, then three


@pytest.mark.parametrize("save_every", [9, 1])  # 1: the worse ones are saved, and are no best
def test_no_gain_at_all_leaves_the_last_weights(monkeypatch, save_every):
    worse = iter([1.0, 3.0, 2.0, 4.0])
    monkeypatch.setattr(SupervisedTrainer, "evaluate", lambda self, _: {"loss": next(worse)})
    run = Run("--steps-per-eval", 1, "--save-every", save_every, "--save-best", iters=2)
    assert "no validation was better than the one before training" in run.out


def test_samples_are_generated_while_training():
    run = Run("--steps-per-eval", 2, "--sample-prompts", "8 20", "2 4", iters=4)
    with open(f"{run.folder}/samples.jsonl", encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    assert [(s["step"], s["prompt"]) for s in samples] == [
        (step, text) for step in (0, 2, 4) for text in ("8 20", "2 4")
    ]
    assert all(set(s["response"]) <= set(" 0123456789") and s["response"] for s in samples)
    again = Run("--steps-per-eval", 2, iters=4)
    assert same(run, again)  # sampling does not touch the random numbers of training


def test_sample_prompts_have_the_form_of_training_prompts(monkeypatch):
    asked = []

    def caught(model, prompts, **options):
        asked.extend(prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr("training.samples.generate", caught)
    questions = DATA / "samples" / "question_answer.jsonl"
    run(
        sft,
        "--train",
        "--train-file",
        questions,
        "--validation-file",
        questions,
        "--iters",
        1,
        "--prompt-template",
        "Question: {question}\\n\\nAnswer: ",
        "--sample-prompts",
        "Why?",
        status=130,
    )
    tokenizer = load_model().tokenizer
    assert tokenizer.decode(asked[0], skip_special_tokens=True) == "Question: Why?\n\nAnswer: "


# ------------------------------------------------------------------------------ data


def preview(*words, status=0) -> str:
    return run(sft, "--preview", *words, status=status)


def test_flags_about_data_reach_it(tmp_path, monkeypatch):
    pair = {"prompt": "8 20", "completion": " 22 24"}
    two = tmp_path / "two.jsonl"
    two.write_text("".join(json.dumps(pair) + "\n" for _ in range(10)))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(pair) + "\n{broken\n")
    assert "bad.jsonl:2" in preview("--train-file", bad, status=2)
    assert "1 refused" in preview("--train-file", bad, "--skip-bad-rows")
    out = preview("--train-file", two, "--validation-split-percentage", 20)
    assert "train: 8 rows" in out and "valid: 2 rows" in out
    out = preview("--train-file", two, "--validation-file", bad, "--skip-bad-rows")
    assert "train: 10 rows" in out and "valid: 1 rows" in out
    out = preview("--train-file", two, TRAIN, "--data-weights", 1, 3)
    assert "25% of an epoch" in out and "75% of an epoch" in out
    out = preview("--train-file", two, "--packing", "--max-length", 16)
    assert "packed into 5 rows of up to 16 tokens, 75% full" in out  # 2 rows of 6 in each
    assert "<s>8 20[[ 22 24</s>]]" in preview("--train-file", two, "--mask-prompt")
    questions = DATA / "samples" / "question_answer.jsonl"
    out = preview(
        "--train-file", questions, "--prompt-template", "Question: {question}\\n\\nAnswer: "
    )
    assert "Question: Who wrote Faust?\n\nAnswer: Goethe.</s>" in out
    out = preview("--train-file", questions, "--token-format", "turn_markers", "--mask-prompt")
    assert "<|user|>\nWho wrote Faust?\n<|assistant|>\n[[Goethe.</s>]]" in out
    monkeypatch.setattr("command_line.row_preview.use_colour", lambda stream: True)
    assert "\x1b[32m 22 24</s>\x1b[0m" in preview("--train-file", two, "--mask-prompt")


def test_a_data_set_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "8 20", "completion": f" {n}"} for n in range(7)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "set")
    assert "train: 7 rows" in preview("--dataset", tmp_path / "set")
    assert "train: 5 rows" in preview("--dataset", tmp_path / "set", "--max-rows", 5)


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", 0], "--epochs: give a number above 0"),
        (["--epochs", 1, "--iters", 1], "give one of them"),
        (["--save-best"], "--save-best needs validations"),
        (["--early-stopping-patience", 2], "--early-stopping-patience needs validations"),
        (["--sample-prompts", "x"], "--sample-prompts needs validations"),
        (["--save-best", "--steps-per-eval", 1], "--save-every 0 keeps none"),
        (
            ["--early-stopping-patience", 1, "--steps-per-eval", 5, "--iters", 5],
            "could stop nothing",
        ),
        (
            ["--save-best", "--steps-per-eval", 1, "--save-every", 1, "--train-file", TRAIN],
            "--save-best needs rows to validate on",
        ),
        (["--lora-keys", "nope"], "--lora-keys nope: no such layer"),
        (["--normalize-samples", 8], "has no effect without --reward-model"),
    ],
)
def test_what_would_have_no_effect_is_refused(words, message):
    assert message in run(sft, *SMALL, *words, status=2)


def test_an_adapter_is_not_what_other_flags_say(tmp_path):
    file = Run(iters=1).file
    more = ("--resume-adapter-file", file)
    assert Run(*more, "--lora-rank", 8, "--lora-alpha", 32).config["lora_parameters"]["rank"] == 8
    for words, message in (
        (["--lora-rank", 4], "--lora-rank 4: w"),
        (["--lora-alpha", 8], "--lora-scale 1: w"),
        (["--lora-keys", "q_proj"], "--lora-keys"),
        (["--prompt-tuning"], "holds lora, not prompt"),
    ):
        assert message in run(sft, *SMALL, *more, *words, status=2), words
