"""TRL's DPOTrainer, an epoch of its updates at a time; a worker of preference_speed.py.

Runs in the environment of the PyTorch baseline. Arguments: model folder, file of pairs.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from side_by_side import serve
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

BATCH, RATE = 4, 1e-4


def main(model: str, pairs: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    config = DPOConfig(
        output_dir=str(Path(pairs).parent / "trl"),
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        report_to=[],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_grad_norm=1.0,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.create_optimizer()
    loader = trainer.get_train_dataloader()
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.model.train()

    def epoch() -> dict:
        tokens, losses = 0, []
        for batch in loader:
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            tokens += int(batch["attention_mask"].sum())
            losses.append(loss.item())
        return {"tokens": tokens, "loss": losses[0]}

    serve({"epoch": epoch})


if __name__ == "__main__":
    main(*sys.argv[1:])
