"""Whole PPO steps against numbers from TRL 0.11.4's own `step()`; tests/oracles/README.md.

Tolerance: 1e-5 of each array's largest number, float32, with the trainer's own optimizer. Only
statistics that are sums around 0 have a rounding of their terms on top.
"""

import mlx.core as mx
import numpy as np
import pytest
from trl_steps import (
    CASES,
    ORACLES,
    STEPS,
    check_stages,
    check_stats,
    given,
    names_under,
    step_config,
)

from mlx_ppo_trainer import PPOConfig, PPOTrainer
from models.actor_critic import ActorCritic, ValueHead
from models.interop import load_peft_adapter
from models.load import load_model
from models.tuning import FullTuning


def make_trainer(case: str) -> PPOTrainer:
    policy = load_model(ORACLES / "ppo_step_model").model
    reference = None
    if CASES[case]["extra"].get("lora"):
        tuning = load_peft_adapter(policy, ORACLES / "ppo_step_lora")
    else:
        tuning = FullTuning(policy)
        reference = load_model(ORACLES / "ppo_step_model").model
        reference.load_weights(str(ORACLES / "ppo_step_reference" / "model.safetensors"))
    head = ValueHead(32)
    saved = np.load(ORACLES / "ppo_step_value_head.npz", allow_pickle=False)
    head.weight, head.bias = mx.array(saved["weight"]), mx.array(saved["bias"])
    config = PPOConfig(**step_config(case))
    return PPOTrainer(config, ActorCritic(policy, head, tuning), reference, eos_ids={2})


def our_name(name: str) -> str:
    """TRL's parameter name -> ours."""
    name = name.replace("v_head.summary.", "value_head.").replace("pretrained_model.", "model.", 1)
    name = name.replace("base_model.model.", "").replace(".default.weight", "")
    return name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def close(ours, theirs, what: str, relative: float = 1e-5, absolute: float = 0.0) -> None:
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    allowed = relative * max(np.abs(theirs).max(), 1e-2) + absolute
    assert np.abs(ours - theirs).max() <= allowed, (what, np.abs(ours - theirs).max(), allowed)


def flat(tree) -> dict:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(tree))


class Recorder:
    """Replaces the order of minibatches by the recorded one, and keeps the first gradient."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer, self.first = trainer, None
        update = trainer.optimizer.update

        def recording(model, gradient):
            self.first = self.first or {k: np.array(v) for k, v in flat(gradient).items()}
            update(model, gradient)

        trainer.optimizer.update = recording

    def use(self, permutations: np.ndarray) -> None:
        self.first = None
        self.trainer.minibatch_order = lambda epoch: permutations[epoch]


@pytest.mark.parametrize("case", sorted(CASES))
def test_step_equals_trl(case):
    trainer = make_trainer(case)
    recorder = Recorder(trainer)
    for k in range(CASES[case]["steps"]):
        root = f"{case}/step{k}"
        queries, responses, scores = given(root)
        rollout = trainer.prepare(trainer.as_rollout(queries, responses), scores)
        check_stages(trainer, rollout, root, close, np.array)
        recorder.use(STEPS[f"{root}/out/perm"])
        stats = trainer.step(queries, responses, scores)
        check_stats(stats, root, close)
        close(trainer.kl_controller.value, STEPS[f"{root}/out/kl_coef_after"], "kl_coef_after")
        prefix = f"{root}/out/grad_first_optstep/"
        names = names_under(prefix)
        assert {our_name(n[len(prefix) :]) for n in names} == set(recorder.first)
        for name in names:
            ours = recorder.first[our_name(name[len(prefix) :])]
            theirs = STEPS[name].T if "lora_" in name else STEPS[name]
            # A gradient is a sum of terms of the largest gradient's size.
            close(ours, theirs, name)
    check_weights(trainer, case)


def check_weights(trainer, case) -> None:
    prefix = f"{case}/final/"
    ours = flat(trainer.model.trainable_parameters())
    names = names_under(prefix)
    assert len(names) == len(ours)
    for name in names:
        theirs = STEPS[name].T if "lora_" in name else STEPS[name]
        close(ours[our_name(name[len(prefix) :])], theirs, name)
