"""TRL 0.11.4's classic PPO: `generate`, then `step`; a worker of ppo_step.py.

Runs in the environment of requirements-trl.txt. Arguments: model folder, then one or more
BATCHxRESPONSE_TOKENS.
"""

import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig
from side_by_side import serve
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

PROMPT_TOKENS, EPOCHS, FIRST_WORD = 16, 4, 3


def make_trainer(folder: Path, batch_size: int) -> PPOTrainer:
    lora = LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], bias="none", task_type="CAUSAL_LM"
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder), peft_config=lora)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    config = PPOConfig(
        batch_size=batch_size,
        mini_batch_size=batch_size,
        ppo_epochs=EPOCHS,
        learning_rate=1e-4,
        max_grad_norm=1.0,
        log_with=None,
        seed=0,
    )
    return PPOTrainer(config, model, None, tokenizer)


def make_call(folder: Path, batch_size: int, tokens: int):
    trainer = make_trainer(folder, batch_size)
    random = torch.Generator().manual_seed(0)
    settings = dict(
        # TRL's documented settings for PPO; -1 as EOS, so that no response ends early.
        min_length=-1,
        top_k=0.0,
        top_p=1.0,
        do_sample=True,
        eos_token_id=-1,
        pad_token_id=trainer.tokenizer.pad_token_id,
        max_new_tokens=tokens,
        batch_size=batch_size,
        return_prompt=False,
    )

    def call() -> dict:
        shape = (batch_size, PROMPT_TOKENS)
        queries = list(torch.randint(FIRST_WORD, 512, shape, generator=random))
        responses = trainer.generate(queries, **settings)
        scores = [(r % 2 == 0).float().mean() for r in responses]
        trainer.step(queries, responses, scores)
        return {"tokens": sum(map(len, responses))}

    return call


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, *sizes = sys.argv[1:]
    shapes = [tuple(map(int, size.split("x"))) for size in sizes]
    serve({f"{b}x{t}": make_call(Path(folder), b, t) for b, t in shapes})


if __name__ == "__main__":
    main()
