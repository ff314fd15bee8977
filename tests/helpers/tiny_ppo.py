"""PPO trainers on tiny models, and batches for them."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from tiny import flat, tiny_model

from mlx_ppo_trainer import PPOConfig, PPOTrainer
from models.actor_critic import ActorCritic, ValueHead
from models.lora import LoraConfig, add_lora
from models.soft_prompt import SoftPrompt
from models.trunk import hidden_size
from models.tuning import FullTuning, Tuning

SMALL = {
    "batch_size": 8,
    "mini_batch_size": 4,
    "ppo_epochs": 2,
    "max_new_tokens": 6,
    "max_grad_norm": None,
    "init_kl_coef": 0.1,
}
EOS = {1, 21, 30, 34, 50, 61}  # about one token in ten


def tuned(model, kind: str, blocks: int = -1) -> Tuning:
    if kind == "full":
        return FullTuning(model)
    if kind == "prompt":
        return SoftPrompt(model, 3)
    settings = {"rank": 2, "scale": 2.0, "dropout": 0.5, "use_dora": kind == "dora"}
    return add_lora(model, LoraConfig(num_layers=blocks, **settings))


def make_trainer(
    kind: str = "lora",
    model=None,
    optimizer=None,
    head_std: float = 0.0,
    grad_checkpoint: bool = False,
    blocks: int = -1,
    recompute_frozen: bool = False,
    **config,
) -> PPOTrainer:
    """A trainer of `kind` (lora, dora, prompt, full) with plain SGD at 0.1 unless told otherwise.

    `blocks`: the last ones, that an adapter is in.

    SGD moves the weights by the gradient itself; Adam would turn a gradient of 1e-9 into a whole
    learning rate.
    """
    model = tiny_model() if model is None else model
    reference = tiny_model() if kind == "full" else None
    policy = ActorCritic(model, ValueHead(hidden_size(model), head_std), tuned(model, kind, blocks))
    return PPOTrainer(
        PPOConfig(**{**SMALL, **config}),
        policy,
        reference,
        optimizer=optimizer or optim.SGD(0.1),
        eos_ids=EOS,
        grad_checkpoint=grad_checkpoint,
        recompute_frozen=recompute_frozen,
    )


def random_batch(count: int = 8, seed: int = 0, length: int | None = None):
    """(queries, responses, scores); responses of 2 to 6 tokens, or of `length`."""
    rng = np.random.default_rng(seed)
    queries = [rng.integers(2, 64, rng.integers(1, 5)).tolist() for _ in range(count)]
    lengths = rng.integers(2, 7, count) if length is None else [length] * count
    responses = [rng.integers(2, 64, n).tolist() for n in lengths]
    return queries, responses, rng.normal(size=count).tolist()


def weights(trainer: PPOTrainer) -> dict[str, np.ndarray]:
    """Copies of everything that is trained."""
    return {k: np.array(v) for k, v in flat(trainer.model.trainable_parameters()).items()}


def movement(trainer: PPOTrainer, *step_arguments, **options) -> dict[str, np.ndarray]:
    """What one `step` adds to the weights."""
    before = weights(trainer)
    trainer.step(*step_arguments, **options)
    return {name: after - before[name] for name, after in weights(trainer).items()}


def assert_close(ours: dict, theirs: dict, relative: float = 1e-4) -> None:
    """Equal up to `relative` of the largest number in any of the arrays."""
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(a).max() for a in theirs.values())
    assert largest > 0
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=relative * largest, err_msg=name)


def assert_same_bits(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(np.array(ours[name]), np.array(array), err_msg=name)


def shaken(trainer: PPOTrainer, size: float = 0.2) -> PPOTrainer:
    """The same trainer with its trained arrays moved, so that policy and reference differ."""
    key = mx.random.key(9)
    model = trainer.model
    moved = []
    for name, array in flat(model.trainable_parameters()).items():
        key, sub = mx.random.split(key)
        moved.append((name, array + size * mx.random.normal(array.shape, key=sub)))
    model.load_weights(moved, strict=False)
    return trainer


def rollout_of(trainer, queries, responses, scores, masks=None):
    """All that `step` computes before the update; `responses` may be a rollout."""
    rollout = responses
    if isinstance(responses, list):
        rollout = trainer.as_rollout(queries, responses)
    trainer.prepare(rollout, scores, masks)
    trainer.score_policy(rollout)
    trainer.score_reference(rollout)
    trainer.compute_rewards(rollout)
    trainer.compute_advantages(rollout)
    return rollout
