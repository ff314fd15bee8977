"""Our GRPO step; a worker of group_step.py. Argument: the model folder."""

import fast_blas  # noqa: F401

import sys

import mlx.core as mx
import numpy as np
from side_by_side import serve

from mlx_group_trainer import GroupConfig, GroupTrainer
from models.decoding import generate
from models.load import load_model
from models.lora import LoraConfig, add_lora
from models.policy import Policy

PROMPTS, SAMPLES, TOKENS, PROMPT_TOKENS, FIRST_WORD = 4, 8, 24, 16, 3


def main() -> None:
    mx.random.seed(0)
    model = load_model(sys.argv[1]).model
    tuning = add_lora(model, LoraConfig(rank=8, scale=4.0, keys=["q_proj", "v_proj"]))
    config = GroupConfig(
        batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_new_tokens=TOKENS,
        learning_rate=1e-4,
    )
    trainer = GroupTrainer(config, Policy(model, tuning), eos_ids={1})
    random = np.random.default_rng(0)

    def prompts() -> list[list[int]]:
        return random.integers(FIRST_WORD, 512, (PROMPTS, PROMPT_TOKENS)).tolist()

    def step() -> dict:
        rollout = trainer.generate(prompts())
        rewards = [float(np.mean([t % 2 == 0 for t in r])) for r in rollout.responses]
        trainer.update(rollout, rewards)
        return {"tokens": sum(map(len, rollout.responses))}

    def one_token(samples: int) -> dict:
        rows = [p for p in prompts() for _ in range(SAMPLES // samples)]
        generate(model, rows, max_tokens=1, eos_ids={1}, samples=samples)
        return {}

    serve({"step": step, "shared": lambda: one_token(SAMPLES), "unshared": lambda: one_token(1)})


if __name__ == "__main__":
    main()
