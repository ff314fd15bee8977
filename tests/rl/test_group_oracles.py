"""Group advantages and losses against numbers from TRL 1.16.0 (tests/oracles/README.md).

Within 1e-5 of the largest entry of an array (or of 0.1: losses are sums that nearly cancel).
Where docs/group.md differs from the reference, the test says so beside the word CORRECTED.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from rl.group_advantages import ESTIMATORS, reward_metrics
from rl.group_losses import Pass, group_loss
from rl.response_losses import rloo_loss

ORACLES = Path(__file__).resolve().parents[1] / "oracles"
GROUP = dict(np.load(ORACLES / "group.npz", allow_pickle=False))
META = json.loads(str(GROUP["meta"]))
# Options of the whole loss; the others are the surrogate's.
WHOLE = (
    "loss_type beta use_bias_correction_kl top_entropy_quantile entropy_coef "
    "off_policy_mask_threshold"
).split()
# What says how TRL was driven, and is no option here.
DRIVEN = (
    "trainer items_times on_policy importance_sampling_ratio gradient_accumulation_steps "
    "steps_per_generation importance_sampling_level"
).split()
# gmpo is an experiment that TRL keeps apart; the corrections of another sampler's log-probabilities
# have no use here, where the sampler is the policy itself.
VARIANTS = [
    name
    for name, v in META["loss_variants"].items()
    if v["trainer"] == "grpo" and not v["importance_sampling_ratio"]
]
CASES = range(3)


def close(found, wanted) -> None:
    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert found.shape == wanted.shape
    bound = 1e-5 * max(np.abs(wanted).max(initial=0), 0.1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


def array(name: str) -> mx.array:
    return mx.array(GROUP[name].astype(np.float32))


class Loss:
    """One loss case and variant: `run(logprobs, entropies)` is TRL's loss of one pass."""

    def __init__(self, case: int, variant: str):
        self.inputs = f"loss/c{case}/in"
        self.out = f"loss/c{case}/out/{variant}"
        self.given = META["loss_variants"][variant]
        self.mask = array(f"{self.inputs}/mask")
        self.longest = META["loss_cases"][case]["max_completion_length"]

    def __getitem__(self, name: str) -> mx.array:
        return array(f"{self.inputs}/{name}")

    def run(self, logprobs: mx.array, entropies: mx.array):
        given = self.given
        rest = {k: v for k, v in given.items() if k not in (*WHOLE, *DRIVEN)}
        if given["loss_type"] == "cispo":
            rest.setdefault("epsilon_high", 0.2)  # TRL's default, ours is 5
        old = mx.stop_gradient(logprobs) if given["on_policy"] else self["old_logprobs"]
        items = given["items_times"] * self.mask.sum()
        loss, metrics = group_loss(
            Pass(
                logprobs,
                old,
                self["advantages"][:, None],
                self.mask,
                entropies,
                self["ref_logprobs"],
            ),
            level=given.get("importance_sampling_level", "token"),
            tokens_per_pass=items / given["steps_per_generation"],
            max_completion_length=self.longest,
            options=rest,
            **{k: v for k, v in given.items() if k in WHOLE},
        )
        return loss / given["gradient_accumulation_steps"], metrics


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_gradient_and_metrics(variant, case):
    loss = Loss(case, variant)
    (value, metrics), (of_logprobs, of_entropies) = mx.value_and_grad(loss.run, argnums=(0, 1))(
        loss["logprobs"], loss["entropies"]
    )
    close(value, GROUP[f"{loss.out}/loss"])
    close(of_logprobs, GROUP[f"{loss.out}/grad_logprobs"])
    if "entropy_coef" in loss.given:
        close(of_entropies, GROUP[f"{loss.out}/grad_entropies"])
    wanted = json.loads(str(GROUP[f"{loss.out}/metrics"]))
    wanted.pop("entropy_coef", None)  # the coefficient itself
    if "delta" in loss.given:
        # CORRECTED: TRL counts high clips after delta has cut the ratios that would be counted.
        for name in ("high_mean", "high_max", "region_mean"):
            theirs = wanted.pop(f"clip_ratio/{name}")
            assert metrics[f"clip_ratio/{name}"].item() >= theirs - 1e-6
    assert wanted.keys() <= metrics.keys()
    for name, number in wanted.items():
        close(metrics[name].item(), number)


@pytest.mark.parametrize("variant", ["grpo_delta1.5", "dapo_delta1.1", "gspo_delta1.02"])
def test_delta_hides_no_clip(variant):
    with_delta = Loss(2, variant)
    without = Loss(2, variant)
    without.given = {k: v for k, v in without.given.items() if k != "delta"}
    found = [
        loss.run(loss["logprobs"], loss["entropies"])[1]["clip_ratio/high_mean"].item()
        for loss in (with_delta, without)
    ]
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", META["rloo_variants"])
def test_rloo_loss(variant, case):
    def read(name: str) -> mx.array:
        return array(f"rloo_loss/c{case}/in/{name}")

    def run(logprobs: mx.array):
        rows = Pass(
            logprobs,
            read("old_logprobs"),
            read("advantages")[:, None],
            read("completion_mask"),
            read("entropies"),
        )
        return rloo_loss(rows, **META["rloo_variants"][variant])

    (value, metrics), gradient = mx.value_and_grad(run)(read("logprobs"))
    out = f"rloo_loss/c{case}/out/{variant}"
    close(value, GROUP[f"{out}/loss"])
    close(gradient, GROUP[f"{out}/grad_logprobs"])
    for name, number in json.loads(str(GROUP[f"{out}/metrics"])).items():
        close(metrics[name].item(), number)


# ---- advantages --------------------------------------------------------------------------------

GRPO = {
    "grpo_group": {},
    "grpo_batch": {"scale_rewards": "batch"},
    "grpo_none": {"scale_rewards": "none"},
    "grpo_group_normalize_then_sum": {"multi_objective_aggregation": "normalize_then_sum"},
}
RLOO = META["rloo_advantage_variants"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", [*GRPO, *RLOO])
def test_advantages(variant, case):
    inputs, out = f"advantages/c{case}/in", f"advantages/c{case}/out/{variant}"
    rewards = GROUP[f"{inputs}/rewards_per_func"].astype(np.float64)
    mask = GROUP[f"{inputs}/completion_mask"].astype(np.float64)
    given = META["advantage_cases"][case]
    weights = np.array(given["reward_weights"] or [1.0] * rewards.shape[1])
    options = dict(GRPO[variant] if variant in GRPO else RLOO[variant])
    drift = (GROUP[f"{inputs}/old_logprobs"] - GROUP[f"{inputs}/ref_logprobs"]) * mask
    penalties = options.pop("beta", 0.0) * drift.astype(np.float64)
    size = given["num_generations"]
    found = ESTIMATORS["grpo" if variant in GRPO else "rloo"](
        rewards, penalties, mask, weights=weights, group_size=size, **options
    )
    assert found.shape == (len(rewards), 1)
    close(found[:, 0], GROUP[f"{out}/advantages"])
    metrics = json.loads(str(GROUP[f"{out}/metrics"]))
    metrics.pop("kl", None)  # the trainer's
    if variant not in ("grpo_group", "grpo_none"):
        # CORRECTED: the share of groups with equal rewards, whatever is done with them later.
        metrics.pop("frac_reward_zero_std")
    names = [f"reward{i}" for i in range(rewards.shape[1])]
    ours = reward_metrics(rewards, names, weights=weights, group_size=size)
    for name, number in metrics.items():
        close(ours[name], number)
    # Each case has one group of equal rewards.
    assert ours["frac_reward_zero_std"] == pytest.approx(size / len(rewards))
