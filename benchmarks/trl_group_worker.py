"""TRL 1.16's GRPO step; a worker of group_step.py. Argument: the model folder.

Runs in the environment of pytorch_baseline/requirements.txt. The trainer's own loop runs; before
each of its steps it waits to be told.
"""

import sys
import tempfile
import warnings

import torch
from datasets import Dataset
from peft import LoraConfig
from side_by_side import Answers
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PROMPTS, SAMPLES, TOKENS, PROMPT_TOKENS, FIRST_WORD = 4, 8, 24, 16, 3


class Turns(TrainerCallback):
    """A step whenever the parent asks for one."""

    def __init__(self):
        self.answers = Answers()

    def on_step_begin(self, *args, **options):
        self.answers.wait()

    def on_step_end(self, *args, **options):
        self.answers.done({"tokens": PROMPTS * SAMPLES * TOKENS})


def even(completions, completion_ids, **columns) -> list[float]:
    return [sum(t % 2 == 0 for t in row) / len(row) for row in completion_ids]


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = sys.argv[1]
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_WORD, 512, (4000, PROMPT_TOKENS), generator=random).tolist()
    data = Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)} for row in ids])
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=TOKENS,
        gradient_accumulation_steps=1,
        learning_rate=1e-4,
        max_steps=1000,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        logging_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    lora = LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    GRPOTrainer(
        model,
        even,
        config,
        data,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Turns()],
    ).train()


if __name__ == "__main__":
    main()
