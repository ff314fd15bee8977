"""Our PPO: `generate`, then `step`; a worker of ppo_step.py. Arguments as of trl_worker.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fast_blas  # noqa: F401

import mlx.core as mx
import numpy as np
from side_by_side import serve

from mlx_ppo_trainer import PPOConfig, PPOTrainer
from models.actor_critic import ActorCritic
from models.heads import ValueHead
from models.load import load_model
from models.lora import LoraConfig, add_lora

PROMPT_TOKENS, EPOCHS, FIRST_WORD = 16, 4, 3


def make_trainer(folder: Path, batch_size: int, tokens: int, **settings) -> PPOTrainer:
    model = load_model(folder).model
    tuning = add_lora(model, LoraConfig(rank=8, scale=4.0, keys=["q_proj", "v_proj"]))
    config = PPOConfig(**dict(
        batch_size=batch_size, ppo_epochs=EPOCHS, max_new_tokens=tokens, learning_rate=1e-4,
    ) | settings)  # fmt: skip
    return PPOTrainer(config, ActorCritic(model, ValueHead(256), tuning), eos_ids=set())


def make_call(folder: Path, batch_size: int, tokens: int):
    trainer = make_trainer(folder, batch_size, tokens)
    random = np.random.default_rng(0)

    def call() -> dict:
        queries = random.integers(FIRST_WORD, 512, (batch_size, PROMPT_TOKENS)).tolist()
        responses = trainer.generate(queries)
        scores = [float(np.mean([token % 2 == 0 for token in r])) for r in responses]
        trainer.step(queries, responses, scores)
        return {"tokens": sum(map(len, responses))}

    return call


def main() -> None:
    mx.random.seed(0)
    folder, *sizes = sys.argv[1:]
    shapes = [tuple(map(int, size.split("x"))) for size in sizes]
    serve({f"{b}x{t}": make_call(Path(folder), b, t) for b, t in shapes})


if __name__ == "__main__":
    main()
