"""Whole steps with and without a technique, on one model; a worker of techniques_cost.py.

Arguments: "ppo" or "sft"; a model folder, or "-" for the embedded one; responses or rows of a step;
most tokens of a response; names of calls. A PPO step is a turn of the loop: prompts, sampling,
rewards, update. An SFT step is a batch, made and trained on. The learning rate is 0, so that all
calls of a step read the same prompts and write the same texts to them, as often as they are asked.
"""

import itertools
import sys
from functools import partial

from side_by_side import ROOT, serve

sys.path.insert(0, str(ROOT))
import fast_blas  # noqa: E402, F401  before MLX

import mlx.optimizers as optim  # noqa: E402

from data_loading.conditioning import Conditioning, conditioned  # noqa: E402
from data_loading.curriculum import Curriculum, hard_by_length  # noqa: E402
from data_loading.labels import label_edges, label_of  # noqa: E402
from data_utils import (  # noqa: E402
    BatchIterator,
    BatchPlan,
    easy_first,
    read_records,
    tokenise_prompts,
    tokenise_sft,
)
from mlx_critique_trainer import CritiqueTrainer, with_critiques  # noqa: E402
from mlx_ppo_trainer import PPOConfig, PPOTrainer  # noqa: E402
from mlx_sft_trainer import ContrastiveTask, LanguageModelTask, SupervisedTrainer  # noqa: E402
from models.actor_critic import ActorCritic, ValueHead  # noqa: E402
from models.lora import LoraConfig, add_lora  # noqa: E402
from models.trunk import hidden_size  # noqa: E402
from rewards.composite import CompositeRewards  # noqa: E402
from rewards.internal import COMPONENTS  # noqa: E402
from rewards.learned import digits_rewards  # noqa: E402
from rewards.reward_set import RewardSet  # noqa: E402
from training.critique_loop import CritiqueLoop  # noqa: E402
from training.internal_signals import reference_signals  # noqa: E402
from training.launch import start  # noqa: E402
from training.rollout_loop import RolloutLoop  # noqa: E402

ROWS = ROOT / "data" / "reward_function_increasing_mult_2_train.jsonl"
TEMPLATES = {
    "critique_template": "{prompt} {response}?",
    "revision_template": "{prompt} {response} {critique}!",
}


def make_model(folder: str):
    loaded = start(0, None, model=None if folder == "-" else folder)
    return loaded, add_lora(loaded.model, LoraConfig(rank=8, scale=4.0))


# ------------------------------------------------------------------------------ PPO


def ppo_call(folder: str, count: int, tokens: int, name: str):
    """A loop of its own, and a call that goes one step."""
    loaded, tuning = make_model(folder)
    records = list(read_records(ROWS))
    prompts = tokenise_prompts(records, loaded.tokenizer, prompt_words=2).rows
    dynamic = {"use_dynamic_kl": True, "horizon": 2.0 * count} if name == "dynamic KL" else {}
    config = PPOConfig(
        batch_size=count,
        mini_batch_size=count,
        max_new_tokens=tokens,
        **dynamic,
    )
    critique = name == "self-critique"
    trainer = partial(CritiqueTrainer, weight=0.5) if critique else PPOTrainer
    trainer = trainer(
        with_critiques(config) if critique else config,
        ActorCritic(loaded.model, ValueHead(hidden_size(loaded.model)), tuning),
        None,
        loaded.tokenizer,
        optim.Adam(0.0),
        eos_ids=loaded.eos_ids,
    )
    true, _ = digits_rewards(increasing=True, multiple_of=2, min_length=5)
    rewards = RewardSet([true])
    if name == "internal rewards":
        signals = reference_signals(
            list(COMPONENTS),
            loaded=loaded,
            tuning=tuning,
            reference=None,
            prompts=prompts,
            eos_ids=loaded.eos_ids,
            max_new_tokens=tokens,
            batch_size=count,
            seed=0,
        )
        signals.settle()
        rewards = CompositeRewards(
            rewards, signals, 0.3, dict.fromkeys(COMPONENTS, 1.0), score_range=(0, 1)
        )
    make = CritiqueLoop if critique else RolloutLoop
    order = Curriculum(hard_by_length(prompts), 0.2, 10**6) if name == "curriculum" else None
    loop = make(
        None,
        trainer,
        rewards,
        loaded.tokenizer,
        prompts,
        [],
        {},
        None,
        backend=None,
        curriculum=order,
    )
    if critique:
        loop.encode = loaded.tokenizer.encode
        for key, template in TEMPLATES.items():
            setattr(loop, key, template)

    def call() -> dict:
        made = loop.collect()
        loop.learn(made)
        return {"tokens": sum(map(len, made.trained_on.responses))}

    return call


# ------------------------------------------------------------------------------ SFT


def sft_call(folder: str, count: int, tokens: int, name: str):
    """A trainer of its own, and a call that makes a batch and updates."""
    loaded, tuning = make_model(folder)
    records = list(read_records(ROWS))
    edges = label_edges(records)
    if name == "conditioning":
        scores = Conditioning("[Target Score: {score:.1f}] ", 1.0)
        records = [conditioned(record, scores) for record in records]
    rows = tokenise_sft(records, loaded.tokenizer, max_length=tokens).rows
    for row, record in zip(rows, records, strict=True):
        row.label = label_of(record, edges)
    order = Curriculum(hard_by_length(rows), 0.2, 10**6) if name == "curriculum" else None
    plan = easy_first(BatchPlan([len(row.tokens) for row in rows], count, seed=0), order, 1)
    task = LanguageModelTask(loaded.model, tuning)
    if name == "contrastive loss":
        task = ContrastiveTask(loaded.model, tuning, temperature=0.07, contrastive_weight=0.1)
    trainer = SupervisedTrainer(task, optim.Adam(0.0))
    iterator = BatchIterator(rows, plan)

    def call() -> dict:
        batches = list(itertools.islice(iterator, 1))
        trainer.step(batches)
        return {"tokens": float(sum(batch.mask.sum() for batch in batches))}

    return call


def main() -> None:
    kind, folder, count, tokens, *names = sys.argv[1:]
    make = {"ppo": ppo_call, "sft": sft_call}[kind]
    serve({name: make(folder, int(count), int(tokens), name) for name in names})


if __name__ == "__main__":
    main()
