"""Our PPO: `generate`, then `update`; a worker of ppo_step.py. Arguments as of trl_worker.py."""

import fast_blas  # noqa: F401

import sys

import mlx.core as mx
import numpy as np
from side_by_side import serve

from mlx_ppo_trainer import PPOConfig, PPOTrainer
from models.actor_critic import ActorCritic, ValueHead
from models.load import load_model
from models.lora import LoraConfig, add_lora

PROMPT_TOKENS, EPOCHS, FIRST_WORD = 16, 4, 3


def make_trainer(folder: str, batch_size: int, tokens: int, mini_batch_size: int | None = None):
    model = load_model(folder).model
    tuning = add_lora(model, LoraConfig(rank=8, scale=4.0, keys=["q_proj", "v_proj"]))
    config = PPOConfig(
        batch_size=batch_size,
        mini_batch_size=mini_batch_size or batch_size,
        ppo_epochs=EPOCHS,
        max_new_tokens=tokens,
        learning_rate=1e-4,
    )
    # No token ends a response, so that all have the length asked for.
    return PPOTrainer(config, ActorCritic(model, ValueHead(256), tuning), eos_ids=set())


def random_queries(random: np.random.Generator, count: int) -> list[list[int]]:
    return random.integers(FIRST_WORD, 512, (count, PROMPT_TOKENS)).tolist()


def score(response: list[int]) -> float:
    """The share of even token ids."""
    return float(np.mean([token % 2 == 0 for token in response]))


def make_call(folder: str, batch_size: int, tokens: int, mini_batch_size: int | None = None):
    trainer = make_trainer(folder, batch_size, tokens, mini_batch_size)
    random = np.random.default_rng(0)

    def call() -> dict:
        queries = random_queries(random, batch_size)
        rollout = trainer.generate(queries)
        trainer.update(rollout, [score(response) for response in rollout.responses])
        return {"tokens": sum(map(len, rollout.responses))}

    return call


def main() -> None:
    mx.random.seed(0)
    folder, *sizes = sys.argv[1:]
    shapes = [tuple(map(int, size.split("x"))) for size in sizes]
    serve({f"{b}x{t}": make_call(folder, b, t) for b, t in shapes})


if __name__ == "__main__":
    main()
