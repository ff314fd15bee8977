"""Runs by files of options are those of the flags that they stand for."""

import json

import mlx.core as mx
import numpy as np
import pytest
from short_runs import DATA, SMALL, TRAIN, Run, run, same

import ppo_training
import sft
import talk_to_model
from models.adapter_description import read_description
from models.adapter_files import load_adapter
from models.load import load_model

pytestmark = pytest.mark.usefixtures("in_tmp")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "optimizer: lion\nlora_rank: 3\nepochs: 1\nlr-schedule: linear\n"),
        ("c.json", '{"optimizer": "lion", "lora_rank": 3, "epochs": 1, "lr_schedule": "linear"}'),
    ],
)
def test_a_config_file_is_the_same_as_its_flags(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    words = ("--optimizer", "lion", "--lora-rank", 3, "--epochs", 1, "--lr-schedule", "linear")
    assert same(Run("--config", name, iters=None), Run(*words, iters=None))
    assert (
        Run("--config", name, "--lora-rank", 2, iters=None).config["lora_parameters"]["rank"] == 2
    )


def test_iters_on_the_command_line_replace_the_epochs_of_a_config_file(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 1\n")
    assert Run("--config", "c.yaml", iters=2).rows[-1]["step"] == 2
    (tmp_path / "d.yaml").write_text("iters: 2\n")
    assert Run("--config", "d.yaml", "--epochs", 1, iters=None).rows[-1]["step"] == 3
    (tmp_path / "null.yaml").write_text("iters: 2\nepochs: null\n")
    assert Run("--config", "null.yaml", iters=None).rows[-1]["step"] == 2
    (tmp_path / "both.yaml").write_text("iters: 2\nepochs: 1\n")
    assert "give one of them" in run(sft, *SMALL, "--config", "both.yaml", status=2)


# As the workflow's own files are written: a Python dictionary in sections, with dictionaries in
# them, comments, None, trailing commas, and keys that mean nothing here.
FINETUNE = """# I am python, not json
{
    "General": {
        "base_model": %(model)r,
        # for old tokenizers
        "gpt_base_model": True,
        "output_dir": "conf_run",
        "checkpoint_dir": %(fused)r,
        "config": {
            "trust_remote_code": False,
            "use_auth_token": None,
        },
        "lora_config": {
            "task_type": "CAUSAL_LM",
            "r": 3,
            "lora_alpha": 12,
            "lora_dropout": 0.1
        }
    },
    "Dataset": {
        "train_file": %(train)r,
        "validation_file": None,
        "validation_split_percentage": 20
    },
    "Training": {
        "optimizer": "AdamW",
        "batch_size": 10,
        "epochs": 1,
        "learning_rate": 1e-3,
        "lr_scheduler": "linear",
        "weight_decay": 0.0,
        "mixed_precision": "no",
        "device": "CPU",
        "num_training_workers": 2,
        "resources_per_worker": {
            "CPU": 32
        },
    },
}
"""
PPO = """{
    "General": {
        "model_name": %(model)r,
        "model_pretrain": %(trained)r,
        "rm_name": %(reward)r,
        "rm_pretrain": None,
        "output_dir": "ppo_run",
        "checkpoint_dir": %(fused)r,
    },
    "Dataset": {
        "train_file": %(train)r,
        "validation_file": None,
        "validation_split_percentage": 10
    },
    "Training": {
        "optimizer": "AdamW",
        "experience_batch_size": 8,
        "batch_size": 4,
        %(length)s,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "kl_coeff": 0.2,
        "num_training_workers": 1,
        "resources_per_worker": {
            "CPU": 56
        },
    },
}
"""


def options_of(folder) -> dict:
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        return json.load(file)["options"]


def test_a_conf_file_of_the_other_workflow_trains(tmp_path):
    values = {"model": str(DATA / "digits_model"), "train": str(TRAIN), "fused": "tuned/model"}
    (tmp_path / "finetune.conf").write_text(FINETUNE % values)
    out = run(sft, "--train", "--config", "finetune.conf")
    assert "lora_r -> --lora-rank 3" in out and "lr_scheduler -> --lr-schedule linear" in out
    assert "checkpoint_dir -> --fused-dir tuned/model" in out
    assert "batch_size -> --batch-size 20 (10 for each of 2 workers)" in out
    assert "resources_per_worker -> --cpus-per-worker" in out
    assert (tmp_path / "tuned" / "model" / "model.safetensors").is_file()
    options = options_of("conf_run")
    assert (options["optimizer"], options["weight_decay"], options["dtype"]) == (
        "adamw",
        0,
        "float32",
    )
    assert (options["lora_scale"], options["lora_dropout"]) == (4, 0.1)
    with open("conf_run/metrics.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    trained = [row for row in rows if "train/loss" in row]
    assert len(trained) == 6  # 150 rows less a fifth, twice ten at a time, once
    assert trained[-1]["train/learning_rate"] == pytest.approx(1e-3 / 6)
    assert any("valid/loss" in row for row in rows)


def test_a_conf_file_of_the_other_workflow_runs_ppo(tmp_path):
    run(
        sft,
        "--reward-model",
        "--train",
        "--data",
        DATA,
        "--data-base",
        "reward_function_increasing_mult_2_",
        "--max-rows",
        16,
        "--iters",
        1,
        "--save-file",
        "rm.npz",
        "--output-dir",
        "rm",
    )
    values = {
        "model": str(DATA / "digits_model"),
        "train": str(TRAIN),
        "reward": "rm.npz",
        "trained": None,
        "fused": None,
        "length": '"training_iteration": 2',
    }
    (tmp_path / "ppo.conf").write_text(PPO % values)
    out = run(ppo_training, "--config", "ppo.conf", "--max-new-tokens", 4, "--eval-every", 0)
    assert "experience_batch_size -> --batch-size 8" in out
    assert "kl_coeff -> --init-kl-coef 0.2" in out and "rm_name -> --reward-model rm.npz" in out
    options = options_of("ppo_run")
    assert (options["batch_size"], options["mini_batch_size"], options["num_steps"]) == (8, 4, 2)
    with open("ppo_run/metrics.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert rows[-1]["step"] == 2 and rows[-1]["objective/kl_coef"] == 0.2
    assert "env/reward_model_mean" in rows[-1]
    # what is said of a reward model means nothing in fine-tuning, and the other way round
    out = run(sft, "--preview", "--config", "ppo.conf")
    assert "rm_name is not used here" in out and "kl_coeff is not used here" in out


def test_entries_of_inner_dictionaries_count_in_lines_too(tmp_path):
    (tmp_path / "c.conf").write_text(
        "[General]\nlora_config = {'r': 5, 'lora_alpha': 10,}\n"
        f"[Dataset]\ntrain_file = {str(TRAIN)!r},\nvalidation_file = None\n"
        "[Training]\nmixed_precision = 'bf16'\nepochs = 1\n"
    )
    out = run(sft, "--preview", "--config", "c.conf")
    assert "lora_r -> --lora-rank 5" in out and "mixed_precision -> --dtype bfloat16" in out


@pytest.mark.parametrize(
    "length",
    [
        '"epochs": 1',
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ('"num_train_epochs": 2', '"epochs": 0.5')
        ),
    ],
)
def test_ppo_from_a_conf_starts_from_what_was_trained_and_leaves_a_model(tmp_path, length):
    """One conf file's checkpoint_dir is the next one's model_pretrain, as in that workflow."""
    rows = TRAIN.read_text(encoding="utf-8").splitlines(keepends=True)[:18]
    (tmp_path / "few.jsonl").write_text("".join(rows))
    values = {"model": str(DATA / "digits_model"), "train": "few.jsonl", "fused": "tuned"}
    (tmp_path / "finetune.conf").write_text(FINETUNE % values)
    run(sft, "--train", "--config", "finetune.conf")
    run(
        sft,
        "--reward-model",
        "--train",
        "--model",
        "tuned",
        "--data",
        DATA,
        "--data-base",
        "reward_function_increasing_mult_2_",
        "--max-rows",
        16,
        "--iters",
        1,
        "--save-file",
        "rm.npz",
        "--output-dir",
        "rm",
        "--fused-dir",
        "judge",
    )
    values |= {"trained": "tuned", "reward": "judge", "fused": "ppo_model", "length": length}
    (tmp_path / "ppo.conf").write_text(PPO % values)
    out = run(ppo_training, "--config", "ppo.conf", "--max-new-tokens", 4, "--eval-every", 0)
    passes = float(length.partition(": ")[2])
    steps = int(passes * 16) // 8  # a tenth of the rows validates
    assert "model_pretrain -> --model tuned" in out and f": {steps} steps of 8 responses" in out
    options = options_of("ppo_run")
    assert (options["model"], options["epochs"], options["num_steps"]) == ("tuned", passes, steps)
    # The adapter says what it was trained on; the model computes what both together do.
    assert read_description("ppo_weights.npz")["model"] == "tuned"
    whole, parts = load_model("ppo_model"), load_model("tuned")
    load_adapter(parts, "ppo_weights.npz")
    base = load_model("tuned")
    ids = mx.array([[3, 4, 5, 6, 7]])
    logits = [np.array(m.model(ids)) for m in (whole, parts, base)]
    assert abs(logits[0] - logits[1]).max() < 1e-3 < abs(logits[0] - logits[2]).max()
    assert run(talk_to_model, "2 4 6", "--model", "ppo_model", "--max-tokens", 4, "--temp", 0)


def test_a_conf_file_with_two_lengths_is_refused(tmp_path):
    values = {"model": "m", "train": "t", "reward": "r", "trained": None, "fused": None}
    values["length"] = '"epochs": 1, "training_iteration": 2'
    (tmp_path / "ppo.conf").write_text(PPO % values)
    said = run(ppo_training, "--config", "ppo.conf", status=2)
    assert "--num-steps and --epochs both say how long" in said
