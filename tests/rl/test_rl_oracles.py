"""The arithmetic of rl/ against numbers from TRL 0.11.4 (tests/oracles/README.md).

Within 1e-5 relative in float32. Where docs/ppo.md differs from the reference, the test says so
beside the word CORRECTED: there, a loop written here repeats what the reference does, is shown to
give the reference's numbers, and then, corrected, to give ours.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from models.trunk import token_logprobs
from rl.advantages import gae
from rl.kl import full_kl, kl_penalty
from rl.losses import (
    masked_mean,
    masked_var,
    masked_whiten,
    pairwise_loss,
    policy_loss,
    value_loss,
)
from rl.ppo_statistics import step_statistics
from rl.rollouts import Rollout
from rl.scores import (
    AdaptiveKLController,
    FixedKLController,
    RunningMoments,
    clip_scores,
    scale_scores,
)
from rl.shaping import per_token_rewards, rollout_stats

ORACLES = Path(__file__).resolve().parents[1] / "oracles"
PPO = dict(np.load(ORACLES / "ppo_arithmetic.npz", allow_pickle=False))
META = json.loads(str(PPO["meta"]))
# Means of terms of either sign and of size 1, which cancel: rounding is relative to the terms.
CANCELLED = 3e-7
CANCELLING = ("loss/policy", "loss/total", "policy/advantages_mean")
KL_MODES = ("kl", "abs", "mse", "full")
SCORE_SETTINGS = sorted({name.split("/")[2] for name in PPO if name.startswith("score/out/")})


class Case:
    """One case of ppo_arithmetic.npz: `case["values"]` is an input, `case.out(name)` a result."""

    def __init__(self, name: str):
        self.name = name
        self.options = META["cases"][name]["defaults"] | META["cases"][name]["config"]
        self.mask = mx.array(PPO[f"{name}/in/masks"]).astype(mx.float32)
        self.counted = PPO[f"{name}/in/masks"] == 1

    def __getitem__(self, name: str) -> mx.array:
        return mx.array(PPO[f"{self.name}/in/{name}"])

    def out(self, name: str) -> np.ndarray:
        return PPO[f"{self.name}/out/{name}"]

    def kls(self, mode: str) -> mx.array:
        if mode == "full":
            return full_kl(self["old_logits"], self["ref_logits"])
        return kl_penalty(self["old_logprobs"], self["ref_logprobs"], mode)

    def rewards(self, mode: str = "kl") -> tuple[mx.array, mx.array]:
        kl_coef = self.options["init_kl_coef"]
        return per_token_rewards(self["scores"], self.kls(mode), self.mask, kl_coef)

    def gae_options(self) -> dict:
        return {name: self.options[name] for name in ("gamma", "lam")}

    def advantages(self) -> tuple[mx.array, mx.array]:
        """(whitened advantages, returns) as the trainer makes them."""
        rewards = self.rewards()[0]
        advantages, returns = gae(rewards, self["values"], self.mask, **self.gae_options())
        return masked_whiten(advantages, self.mask), returns

    def policy_loss(self, logprobs: mx.array):
        return policy_loss(
            logprobs,
            self["old_logprobs"],
            self.advantages()[0],
            self.mask,
            cliprange=self.options["cliprange"],
        )

    def value_loss(self, values: mx.array):
        return value_loss(
            values,
            self["values"],
            self.advantages()[1],
            self.mask,
            cliprange_value=self.options["cliprange_value"],
        )


@pytest.fixture(params=sorted(META["cases"]), ids=lambda c: META["cases"][c]["name"])
def case(request) -> Case:
    return Case(request.param)


def assert_close(found, wanted, rtol: float = 1e-5, atol: float | None = None) -> None:
    """Element by element; near 0, within a tenth of `rtol` of the largest element."""
    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert found.shape == wanted.shape
    if atol is None:
        atol = 0.1 * rtol * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


# ---- rewards and KL ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", KL_MODES)
def test_kl_and_rewards(case, mode):
    kls = case.kls(mode)
    rewards, non_score = case.rewards(mode)
    assert_close(kls, case.out(f"kls_{mode}"), atol=1e-6)
    # CORRECTED: the reference leaves -beta KL at masked places; here they are 0.
    zero = np.zeros_like(kls)
    assert_close(rewards, np.where(case.counted, case.out(f"rewards_{mode}"), zero), atol=1e-6)
    assert_close(non_score, np.where(case.counted, case.out(f"non_score_{mode}"), zero), atol=1e-6)
    assert np.count_nonzero(case.out(f"rewards_{mode}")[~case.counted])  # what is corrected


@pytest.mark.parametrize("mode", KL_MODES)
def test_mean_kl(case, mode):
    stats = _rollout_stats(case, mode)
    assert_close(stats["objective/kl"], case.out(f"mean_kl_{mode}"))


@pytest.mark.parametrize("mode", ["k1", "k2", "k3"])
def test_kl_estimators(case, mode):
    assert_close(case.kls(mode), case.out(mode), atol=1e-6)


def test_full_kl_takes_logprobs_as_well_as_logits(case):
    logits = case["old_logits"]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert_close(full_kl(logprobs, case["ref_logits"]), case.out("kls_full"), atol=1e-6)


# ---- masked statistics -------------------------------------------------------------------------


def test_masked_mean_and_var(case):
    assert_close(masked_mean(case["values"], case.mask), case.out("masked_mean_values"))
    assert_close(masked_var(case["values"], case.mask), case.out("masked_var_values"))


@pytest.mark.parametrize("shift_mean, name", [(True, ""), (False, "_noshift")])
def test_masked_whiten(case, shift_mean, name):
    found = masked_whiten(case["values"], case.mask, shift_mean=shift_mean)
    # CORRECTED (row 12): masked places become 0 again.
    assert_close(found, case.out(f"whiten_values_masked{name}") * case.counted)


def test_whiten_without_a_mask(case):
    values = case["values"]
    assert_close(masked_whiten(values, mx.ones_like(values)), case.out("whiten_values_unmasked"))


# ---- advantages --------------------------------------------------------------------------------


def loop_gae(rewards, values, gamma, lam):
    """TRL's recursion, which knows nothing of masks; -> (advantages, returns), float64."""
    advantages, last = np.zeros_like(values), np.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        advantages[:, t] = last
    return advantages, advantages + values


def test_advantages_and_returns(case):
    advantages, returns = case.advantages()
    # CORRECTED: at masked places the reference leaves what its recursion and its whitening put
    # there; here advantages and returns are 0 there. No loss reads either.
    assert_close(advantages, case.out("advantages") * case.counted)
    assert_close(returns, case.out("returns") * case.counted)
    values = np.where(case.counted, np.array(case["values"]), 0)
    assert_close(values, case.out("values_masked"))
    assert_close(np.array(returns)[~case.counted], np.zeros((~case.counted).sum()))


def test_whitened_rewards(case):
    whitened = masked_whiten(case.rewards()[0], case.mask, shift_mean=False)
    assert_close(whitened, case.out("rewards_whitened") * case.counted)  # CORRECTED (row 12)


def test_advantages_of_whitened_rewards(case):
    options, values = case.gae_options(), case.out("values_masked_whitenrew").astype(np.float64)
    # CORRECTED (row 12): the reference's GAE reads the numbers that whitening left on the padding.
    theirs = loop_gae(case.out("rewards_whitened").astype(np.float64), values, **options)
    assert_close(theirs[1], case.out("returns_whitenrew"))
    ours = loop_gae(
        case.out("rewards_whitened").astype(np.float64) * case.counted, values, **options
    )

    whitened = masked_whiten(case.rewards()[0], case.mask, shift_mean=False)
    advantages, returns = gae(whitened, case["values"], case.mask, **options)
    assert_close(returns, ours[1] * case.counted)
    assert_close(advantages, ours[0] * case.counted)
    if case.counted[:, -1].all():  # nothing on the right to correct: the reference is right
        assert_close(returns, case.out("returns_whitenrew") * case.counted)
        wanted = case.out("advantages_whitenrew") * case.counted
        assert_close(masked_whiten(advantages, case.mask), wanted)
    else:
        difference = np.abs(theirs[1] - ours[1])[case.counted].max()
        assert difference > 0.01  # the correction is no matter of rounding


# ---- losses and gradients ----------------------------------------------------------------------


def test_policy_loss_and_gradient(case):
    (loss, _), gradient = mx.value_and_grad(case.policy_loss)(case["new_logprobs"])
    assert_close(loss, case.out("loss_policy"), atol=CANCELLED)
    assert_close(gradient, case.out("grad_new_logprobs"))


def test_value_loss_and_gradient(case):
    (loss, _), gradient = mx.value_and_grad(case.value_loss)(case["new_values"])
    scaled = case.options["vf_coef"] * np.array([loss])
    assert_close(scaled, case.out("loss_value_scaled").reshape(1))
    assert_close(case.options["vf_coef"] * np.array(gradient), case.out("grad_new_values"))


class Logits(nn.Module):
    """A trunk whose hidden states are V wide."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary

    def __call__(self, tokens, cache=None):
        return mx.zeros((*tokens.shape, self.vocabulary))


class Bypass(nn.Module):
    """A language model whose logits are its hidden states: `token_logprobs` on given logits."""

    layers = ()

    def __init__(self, vocabulary: int):
        super().__init__()
        self.model = Logits(vocabulary)

    def __call__(self, tokens):
        return self.model(tokens)


@pytest.mark.parametrize("chunk", [None, 7])
def test_policy_gradient_of_the_logits(case, chunk):
    labels = case["labels"].reshape(-1)
    shape = case.mask.shape

    def loss(logits):
        flat = logits.reshape(-1, logits.shape[-1])
        (logprobs,) = token_logprobs(Bypass(flat.shape[-1]), flat, labels, chunk=chunk)
        return case.policy_loss(logprobs.reshape(shape))[0]

    gradient = mx.grad(loss)(case["new_logits"])
    assert_close(gradient, case.out("grad_new_logits_policy"))


def test_entropy_and_logprobs(case):
    logits = case["new_logits"].reshape(-1, case["new_logits"].shape[-1])
    logprobs, entropy = token_logprobs(
        Bypass(logits.shape[-1]), logits, case["labels"].reshape(-1), extras=("entropy",)
    )
    logprobs, entropy = logprobs.reshape(case.mask.shape), entropy.reshape(case.mask.shape)
    assert_close(entropy, case.out("entropy_per_token"))
    assert_close(masked_mean(entropy, case.mask), case.out("stat/policy/entropy"))
    assert_close(logprobs, case["new_logprobs"], atol=1e-6)


# ---- statistics --------------------------------------------------------------------------------


def minibatch_metrics(case) -> dict[str, float]:
    policy, policy_metrics = case.policy_loss(case["new_logprobs"])
    value, value_metrics = case.value_loss(case["new_values"])
    metrics = {"loss/total": policy + case.options["vf_coef"] * value}
    metrics |= policy_metrics | value_metrics
    return {name: value.item() for name, value in metrics.items()}


def test_minibatch_statistics(case):
    found = minibatch_metrics(case)
    names = {name.split("/", 3)[3] for name in PPO if name.startswith(f"{case.name}/out/stat/")}
    # TRL keeps these two as arrays: ours is the mean, and the whitened advantages (above).
    arrays = {"policy/ratio", "policy/advantages"}
    elsewhere = {"policy/entropy"}  # test_entropy_and_logprobs
    assert set(found) == names - {"policy/advantages"} - elsewhere
    for name in names - arrays - elsewhere:
        atol = CANCELLED if name in CANCELLING else None
        assert_close(found[name], case.out(f"stat/{name}"), atol=atol)
    ratio = case.out("stat/policy/ratio")
    assert_close(found["policy/ratio"], ratio[case.counted].mean())
    # A mean over everything would be another number: the mask counts.
    assert abs(found["policy/ratio"] - ratio.mean()) > 1e-5 or case.counted.all()


def _rollout_stats(case, mode="kl"):
    return rollout_stats(
        case["scores"],
        case["old_logprobs"],
        case["ref_logprobs"],
        case.kls(mode),
        case.rewards(mode)[1],
        case.mask,
    )


def test_step_statistics(case):
    prefix = f"{case.name}/out/step_stat/"
    wanted = {name.removeprefix(prefix): PPO[name] for name in PPO if name.startswith(prefix)}
    rollout = Rollout(
        queries=[[0] * int(n) for n in wanted.pop("tokens/queries_dist")],
        responses=[[0] * int(n) for n in wanted.pop("tokens/responses_dist")],
        masks=list(case.counted),
        ended=[True] * len(case.counted),
        scores=case["scores"],
        mask=case.mask,
        logprobs=case["old_logprobs"],
        ref_logprobs=case["ref_logprobs"],
        kls=case.kls("kl"),
        non_score_rewards=case.rewards()[1],
    )
    minibatch = minibatch_metrics(case) | {"policy/entropy": case.out("stat/policy/entropy").item()}
    found = step_statistics(
        rollout, [minibatch, minibatch], rollout_stats
    )  # their mean is each of them
    # Arrays in TRL, means over counted tokens here.
    for name in ("objective/logprobs", "objective/ref_logprobs"):
        assert_close(found[name], wanted.pop(name)[case.counted].mean())
    # The coefficient itself is test_kl_controllers'; the two arrays test_minibatch_statistics'.
    for name in ("objective/kl_coef", "ppo/policy/advantages", "ppo/policy/ratio"):
        wanted.pop(name)
    for name, value in wanted.items():
        atol = CANCELLED if name.removeprefix("ppo/") in CANCELLING else None
        assert_close(np.ravel(found[name]), np.ravel(value), atol=atol)


# ---- score scaling and KL controllers ----------------------------------------------------------


@pytest.mark.parametrize("setting", SCORE_SETTINGS)
def test_score_scaling(setting):
    scale, norm, clip = setting.split("_")
    wanted = PPO[f"score/out/{setting}/scores"]
    wanted_moments = PPO[f"score/out/{setting}/moments_mean_std_var_count"]
    moments = RunningMoments()
    for step, batch in enumerate(PPO["score/in/batches"]):
        scores = batch.tolist()
        if scale == "scale1":
            scores = scale_scores(scores, moments, subtract_mean=norm == "norm1")
            found = [moments.mean, moments.std, moments.squares / moments.count, moments.count]
            assert_close(found, wanted_moments[step])
        if clip != "clipNone":
            scores = clip_scores(scores, float(clip.removeprefix("clip")))
        assert_close(scores, wanted[step])


@pytest.mark.parametrize("name", ["default", "bs8", "fast"])
def test_adaptive_kl_controller(name):
    init, target, horizon, n_steps = PPO[f"klctl/in/{name}/init_target_horizon_nsteps"]
    controller, found = AdaptiveKLController(init, target, horizon), []
    for kl in PPO["klctl/in/kls"]:
        controller.update(kl, int(n_steps))
        found.append(controller.value)
    assert_close(found, PPO[f"klctl/out/{name}/coef_after"], rtol=1e-12)


def test_fixed_kl_controller():
    controller = FixedKLController(0.3)
    controller.update(100.0, 256)
    assert controller.value == 0.3


# ---- reward models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, margin, centering",
    [("loss", False, 0.0), ("loss_margin", True, 0.0), ("loss_center0.01", False, 0.01)],
)
def test_pairwise_loss(name, margin, centering):
    oracle = {k: mx.array(v) for k, v in np.load(ORACLES / "reward_model.npz").items()}
    margins = oracle["in/rm_margin"] if margin else None
    loss, metrics = pairwise_loss(
        oracle["in/rm_chosen"], oracle["in/rm_rejected"], margins, centering=centering
    )
    assert_close(loss, oracle[f"rm/{name}"])
    assert_close(metrics["accuracy"], oracle["rm/accuracy"])
