"""Whole PPO steps against numbers from TRL 0.11.4's own `step()`; tests/oracles/README.md.

Tolerance: 1e-5 of each array's largest number, float32, with the trainer's own optimizer. Only
statistics that are sums around 0 have a rounding of their terms on top.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ppo_trainer import PPOConfig, PPOTrainer
from models.actor_critic import ActorCritic, ValueHead
from models.interop import load_peft_adapter
from models.load import load_model
from models.tuning import FullTuning

ORACLES = Path(__file__).resolve().parents[1] / "oracles"
DATA = np.load(ORACLES / "ppo_step.npz", allow_pickle=False)
CASES = json.loads(str(DATA["meta"]))["cases"]
TRL_DEFAULTS = dict(
    adap_kl_ctrl=True,
    init_kl_coef=0.2,
    target=6.0,
    horizon=10000.0,
    gamma=1.0,
    lam=0.95,
    cliprange=0.2,
    cliprange_value=0.2,
    vf_coef=0.1,
    max_grad_norm=None,
    kl_penalty="kl",
    rollout_logprobs=False,
)


def make_trainer(case: str) -> PPOTrainer:
    settings = CASES[case]
    policy = load_model(ORACLES / "ppo_step_model").model
    reference = None
    if settings["extra"].get("lora"):
        tuning = load_peft_adapter(policy, ORACLES / "ppo_step_lora")
    else:
        tuning = FullTuning(policy)
        reference = load_model(ORACLES / "ppo_step_model").model
        reference.load_weights(str(ORACLES / "ppo_step_reference" / "model.safetensors"))
    head = ValueHead(32)
    saved = np.load(ORACLES / "ppo_step_value_head.npz", allow_pickle=False)
    head.weight, head.bias = mx.array(saved["weight"]), mx.array(saved["bias"])
    config = PPOConfig(**{**TRL_DEFAULTS, **settings["config"]})
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
        queries, responses = (
            [[int(t) for t in row if t >= 0] for row in DATA[f"{root}/in/{name}"]]
            for name in ("queries", "responses")
        )
        scores = DATA[f"{root}/in/scores"].tolist()
        check_stages(trainer, root, queries, responses, scores)
        recorder.use(DATA[f"{root}/out/perm"])
        stats = trainer.step(queries, responses, scores)
        check_stats(stats, root)
        close(trainer.kl_controller.value, DATA[f"{root}/out/kl_coef_after"], "kl_coef_after")
        prefix = f"{root}/out/grad_first_optstep/"
        names = [name for name in DATA.files if name.startswith(prefix)]
        assert {our_name(n[len(prefix) :]) for n in names} == set(recorder.first)
        for name in names:
            ours = recorder.first[our_name(name[len(prefix) :])]
            theirs = DATA[name].T if "lora_" in name else DATA[name]
            # A gradient is a sum of terms of the largest gradient's size.
            close(ours, theirs, name)
    check_weights(trainer, case)


def check_stages(trainer, root, queries, responses, scores) -> None:
    """The arrays before the update, at response tokens."""
    rollout = trainer.prepare(trainer.as_rollout(queries, responses), scores)
    trainer.score_policy(rollout)
    trainer.score_reference(rollout)
    trainer.compute_rewards(rollout)
    trainer.compute_advantages(rollout)
    mask = DATA[f"{root}/out/masks"].astype(bool)
    counted = np.array(rollout.mask, dtype=bool)
    for ours, theirs in (
        ("logprobs", "fwd_logprobs"),
        ("values", "values"),
        ("kls", "kls"),
        ("rewards", "rewards"),
        ("non_score_rewards", "non_score"),
        ("advantages", "advantages"),
        ("returns", "returns"),
    ):
        close(np.array(getattr(rollout, ours))[counted], DATA[f"{root}/out/{theirs}"][mask], ours)
    close(rollout.scores, DATA[f"{root}/out/scores_used"], "scores")


# Arrays that TRL logs for its histograms, where we log scalars.
ARRAYS = {
    "objective/logprobs",
    "objective/ref_logprobs",
    "ppo/policy/advantages",
    "ppo/policy/ratio",
    "tokens/queries_dist",
    "tokens/responses_dist",
}


def check_stats(stats: dict, root: str) -> None:
    prefix = f"{root}/out/stats/"
    names = {name[len(prefix) :] for name in DATA.files if name.startswith(prefix)}
    assert names - ARRAYS <= set(stats)
    for name in names - ARRAYS:
        # Signed numbers around 0 cancel in sums: what is left is the rounding of the terms, which
        # for the KL are log-probabilities of size 5, summed over a response.
        absolute = 1e-5 if name == "objective/kl" else 1e-6
        close(stats[name], DATA[prefix + name], name, absolute=absolute)


def check_weights(trainer, case) -> None:
    prefix = f"{case}/final/"
    ours = flat(trainer.model.trainable_parameters())
    names = [name for name in DATA.files if name.startswith(prefix)]
    assert len(names) == len(ours)
    for name in names:
        theirs = DATA[name].T if "lora_" in name else DATA[name]
        close(ours[our_name(name[len(prefix) :])], theirs, name)
