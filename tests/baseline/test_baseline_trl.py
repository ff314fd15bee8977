"""The baseline's trainers train as TRL's own do when those are given the rows and collate them.

From the same weights and the same rows, each step's loss is the same, and so are the weights after
the last.
"""

import json

import numpy as np
import pytest
from baseline_setup import DIGITS, ROOT, close, losses, torch
from pytorch_models import Tuned, load_model, mlx_layout
from pytorch_optimizers import Optimizer, trainable
from pytorch_reward_model import RewardModel
from pytorch_sft_trainer import RewardTrainer, SFTTrainer

from data_utils import (
    BatchPlan,
    read_records,
    tokenise_preferences,
    tokenise_sft,
)

pytestmark = pytest.mark.torch
trl = pytest.importorskip("trl", reason="make test-baseline installs TRL")
LORA = {
    "fine_tune_type": "lora",
    "num_layers": -1,
    "lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.0, "keys": None},
}
STEPS, BATCH, RATE = 5, 8, 1e-3
WEIGHTS = 1e-4  # of an array's largest; Adam's steps are as large where gradients are rounding


def options(kind, folder):
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        train_sampling_strategy="sequential",
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=False,
    )


def trl_losses(trainer) -> list[float]:
    trainer.train()
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


def our_losses(kind, model, tokenizer, rows, **options) -> list[float]:
    """The loss of each step; the model's weights move as they do in TRL's."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=RATE, weight_decay=0.0)
    plan = BatchPlan([0] * len(rows), BATCH, shuffle=False)  # lengths order shuffled rows alone
    trainer = kind(
        model,
        tokenizer,
        optimizer=Optimizer(optimizer),
        max_grad_norm=1.0,
        **options,
    )
    return losses(trainer, rows, plan, STEPS)


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_sft_trainer(mask_prompt, tmp_path):
    """LoRA; the loss is of every token, or of completions alone."""
    from datasets import Dataset

    ours, theirs = load_model(str(DIGITS)), load_model(str(DIGITS))
    records = read_records(ROOT / "data" / "increasing_mult_2_train.jsonl")
    if mask_prompt:
        file = tmp_path / "rows.jsonl"
        heads = [(record.text[:9].rpartition(" ")[0], record.text) for record in records]
        lines = [{"prompt": head, "completion": text[len(head) :]} for head, text in heads]
        file.write_text("\n".join(map(json.dumps, lines)))
        records = read_records(file)
    rows = tokenise_sft(records, ours.tokenizer, mask_prompt=mask_prompt).rows[: STEPS * BATCH]
    assert not mask_prompt or all(0 < sum(row.mask) < len(row.tokens) - 1 for row in rows)
    torch.manual_seed(0)
    model, same = Tuned(ours.model, LORA), Tuned(theirs.model, LORA)
    same.load_arrays({n: mlx_layout(n, a).clone() for n, a in model.arrays().items()}, "ours")
    columns = [{"input_ids": row.tokens} for row in rows]
    if mask_prompt:
        columns = [c | {"completion_mask": r.mask} for c, r in zip(columns, rows, strict=True)]
    config = options(trl.SFTConfig, tmp_path)
    config.completion_only_loss = mask_prompt
    trainer = trl.SFTTrainer(
        model=same.peft,
        args=config,
        train_dataset=Dataset.from_list(columns),
        processing_class=theirs.tokenizer,
    )
    wanted = trl_losses(trainer)
    found = our_losses(SFTTrainer, model, ours.tokenizer, rows)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len(set(wanted)) == STEPS
    moved = same.arrays()
    for name, found in model.arrays().items():
        close(found, moved[name], name, relative=WEIGHTS)


def test_reward_trainer(tmp_path):
    """Every weight is trained; pairs with margins, and scores drawn towards a mean of 0."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    loaded, untrained = load_model(str(DIGITS)), load_model(str(DIGITS)).model
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
    found = our_losses(RewardTrainer, model, loaded.tokenizer, rows, centering=0.01)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len(set(wanted)) == STEPS
    close(model.weight, classifier.score.weight, relative=WEIGHTS)
    trunk, start = loaded.model.model.state_dict(), untrained.model.state_dict()
    for name, weight in classifier.model.state_dict().items():
        close(trunk[name], weight, name, relative=WEIGHTS)
    assert any(not torch.equal(trunk[name], start[name]) for name in start)
