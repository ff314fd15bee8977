"""The baseline's plain loop trains on exactly what TRL's own trainers train on.

pytorch_baseline/README.md says why it is a loop of its own all the same. From the same weights and
the same batches, each step's loss is TRL's.
"""

import numpy as np
import pytest
from baseline_setup import DIGITS, ROOT, torch
from pytorch_models import Tuned, load_model, mlx_layout
from pytorch_reward_model import RewardModel
from pytorch_sft_trainer import LanguageModelTask, RewardModelTask, SupervisedTrainer, trainable

from data_utils import make_batch, read_records, tokenise_preferences, tokenise_sft

pytestmark = pytest.mark.torch
trl = pytest.importorskip("trl", reason="only this test needs it: pip install trl")
LORA = {
    "fine_tune_type": "lora",
    "num_layers": -1,
    "lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.0, "keys": None},
}
STEPS, BATCH, RATE = 5, 8, 1e-3


def options(kind, folder):
    return kind(
        output_dir=str(folder), per_device_train_batch_size=BATCH, max_steps=STEPS,
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1,
        report_to=[], use_cpu=True, bf16=False, train_sampling_strategy="sequential",
        save_strategy="no", disable_tqdm=True, activation_checkpointing=False,
    )  # fmt: skip


def trl_losses(trainer) -> list[float]:
    trainer.train()
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


def our_losses(task, rows) -> list[float]:
    optimizer = torch.optim.AdamW(trainable(task.trained).values(), lr=RATE, weight_decay=0.0)
    trainer = SupervisedTrainer(task, optimizer, max_grad_norm=1.0)
    return [
        trainer.step([make_batch(rows[start : start + BATCH])])["loss"]
        for start in range(0, STEPS * BATCH, BATCH)
    ]


def test_sft_trainer(tmp_path):
    from datasets import Dataset

    ours, theirs = load_model(str(DIGITS)), load_model(str(DIGITS))
    records = read_records(ROOT / "data" / "increasing_mult_2_train.jsonl")
    rows = tokenise_sft(records, ours.tokenizer).rows[: STEPS * BATCH]
    torch.manual_seed(0)
    model, same = Tuned(ours.model, LORA), Tuned(theirs.model, LORA)
    same.load_arrays({n: mlx_layout(n, a).clone() for n, a in model.arrays().items()}, "ours")
    trainer = trl.SFTTrainer(
        model=same.peft,
        args=options(trl.SFTConfig, tmp_path),
        train_dataset=Dataset.from_list([{"input_ids": row.tokens} for row in rows]),
        processing_class=theirs.tokenizer,
    )
    wanted = trl_losses(trainer)
    np.testing.assert_allclose(our_losses(LanguageModelTask(model), rows), wanted, rtol=1e-5)
    assert len(set(wanted)) == STEPS


def test_reward_trainer(tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    loaded = load_model(str(DIGITS))
    records = read_records(ROOT / "data" / "preference_increasing_mult_2_train.jsonl")
    rows = tokenise_preferences(records, loaded.tokenizer).rows[: STEPS * BATCH]
    model = RewardModel(Tuned(loaded.model, {"fine_tune_type": "full"}), pooling="last")
    model.bias.requires_grad_(False)  # TRL's head has none, and centering would move it
    classifier = AutoModelForSequenceClassification.from_pretrained(
        DIGITS, num_labels=1, dtype=torch.float32
    )
    with torch.no_grad():
        classifier.score.weight.copy_(model.weight)
    columns = [
        {"chosen_ids": row.chosen, "rejected_ids": row.rejected, "margin": row.margin}
        for row in rows
    ]
    config = options(trl.RewardConfig, tmp_path)
    config.center_rewards_coefficient = 0.01
    trainer = trl.RewardTrainer(
        model=classifier,
        args=config,
        train_dataset=Dataset.from_list(columns),
        processing_class=loaded.tokenizer,
    )
    wanted = trl_losses(trainer)
    found = our_losses(RewardModelTask(model, centering=0.01), rows)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len(set(wanted)) == STEPS
