"""The PyTorch baseline against the numbers of TRL 0.11.4 (tests/oracles/README.md).

The same tolerances as for the MLX side: 1e-5 of each array's largest number, float32. Where both
depart from TRL on purpose, tests/rl/test_rl_oracles.py says why beside the word CORRECTED.
"""

import json

import numpy as np
import pytest
from baseline_setup import ORACLES, close, numpy, torch
from pytorch_actor_critic import ActorCritic, ValueHead, token_logprobs
from pytorch_arithmetic import (
    full_kl,
    gae,
    kl_penalty,
    masked_mean,
    masked_var,
    masked_whiten,
    pairwise_loss,
    per_token_rewards,
    policy_loss,
    rollout_stats,
    value_loss,
)
from pytorch_models import Tuned, load_model
from pytorch_ppo_trainer import PPOConfig, PPOTrainer
from safetensors.torch import load_file
from trl_steps import CASES, STEPS, check_stages, check_stats, given, names_under, step_config

from rl.scores import AdaptiveKLController, RunningMoments, clip_scores, scale_scores

pytestmark = pytest.mark.torch
PPO = dict(np.load(ORACLES / "ppo_arithmetic.npz", allow_pickle=False))
META = json.loads(str(PPO["meta"]))
CANCELLED = 3e-7  # rounding of means of terms of either sign and of size 1

# ---- the arithmetic ----------------------------------------------------------------------------


class Case:
    """One case of ppo_arithmetic.npz."""

    def __init__(self, name: str):
        self.name = name
        self.options = META["cases"][name]["defaults"] | META["cases"][name]["config"]
        self.mask = self["masks"].float()
        self.counted = PPO[f"{name}/in/masks"] == 1

    def __getitem__(self, name: str):
        return torch.from_numpy(PPO[f"{self.name}/in/{name}"])

    def out(self, name: str) -> np.ndarray:
        return PPO[f"{self.name}/out/{name}"]

    def kls(self, mode: str):
        if mode == "full":
            return full_kl(self["old_logits"], self["ref_logits"])
        return kl_penalty(self["old_logprobs"], self["ref_logprobs"], mode)

    def rewards(self, mode: str = "kl"):
        return per_token_rewards(
            self["scores"], self.kls(mode), self.mask, self.options["init_kl_coef"]
        )

    def advantages(self):
        options = {name: self.options[name] for name in ("gamma", "lam")}
        advantages, returns = gae(self.rewards()[0], self["values"], self.mask, **options)
        return masked_whiten(advantages, self.mask), returns


@pytest.fixture(params=sorted(META["cases"]), ids=lambda c: META["cases"][c]["name"])
def case(request) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("mode", ["kl", "abs", "mse", "full"])
def test_kl_and_rewards(case, mode):
    rewards, non_score = case.rewards(mode)
    close(case.kls(mode), case.out(f"kls_{mode}"))
    close(rewards, case.out(f"rewards_{mode}") * case.counted)
    close(non_score, case.out(f"non_score_{mode}") * case.counted)
    stats = rollout_stats(
        case["scores"],
        case["old_logprobs"],
        case["ref_logprobs"],
        case.kls(mode),
        non_score,
        case.mask,
    )
    close(stats["objective/kl"], case.out(f"mean_kl_{mode}"))


def test_kl_estimators(case):
    for mode in ("k1", "k2", "k3"):
        close(case.kls(mode), case.out(mode), mode)


def test_statistics_and_whitening(case):
    close(masked_mean(case["values"], case.mask), case.out("masked_mean_values"))
    close(masked_var(case["values"], case.mask), case.out("masked_var_values"))
    for shift, name in ((True, ""), (False, "_noshift")):
        wanted = case.out(f"whiten_values_masked{name}") * case.counted
        close(masked_whiten(case["values"], case.mask, shift_mean=shift), wanted)
    whitened = masked_whiten(case.rewards()[0], case.mask, shift_mean=False)
    close(whitened, case.out("rewards_whitened") * case.counted)


def test_advantages(case):
    advantages, returns = case.advantages()
    close(advantages, case.out("advantages") * case.counted)
    close(returns, case.out("returns") * case.counted)


def test_losses_and_gradients(case):
    advantages, returns = case.advantages()
    logprobs = case["new_logprobs"].requires_grad_()
    loss, metrics = policy_loss(
        logprobs, case["old_logprobs"], advantages, case.mask, cliprange=case.options["cliprange"]
    )
    close(loss, case.out("loss_policy"), absolute=CANCELLED)
    close(torch.autograd.grad(loss, logprobs)[0], case.out("grad_new_logprobs"))
    values, weight = case["new_values"].requires_grad_(), case.options["vf_coef"]
    loss, value_metrics = value_loss(
        values,
        case["values"],
        returns,
        case.mask,
        cliprange_value=case.options["cliprange_value"],
    )
    close(weight * loss, case.out("loss_value_scaled"))
    close(weight * torch.autograd.grad(loss, values)[0], case.out("grad_new_values"))
    metrics |= value_metrics
    ratio = case.out("stat/policy/ratio")[case.counted].mean()  # TRL keeps the array
    close(metrics.pop("policy/ratio"), ratio)
    for name, value in metrics.items():
        close(value, case.out(f"stat/{name}"), name, absolute=CANCELLED)


def test_logprobs_entropy_and_gradient_of_logits(case):
    logits = case["new_logits"].requires_grad_()
    logprobs, entropy = token_logprobs(logits, case["labels"].long(), with_entropy=True)
    close(logprobs, case["new_logprobs"])
    close(entropy, case.out("entropy_per_token"))
    loss, _ = policy_loss(
        logprobs,
        case["old_logprobs"],
        case.advantages()[0],
        case.mask,
        cliprange=case.options["cliprange"],
    )
    close(torch.autograd.grad(loss, logits)[0], case.out("grad_new_logits_policy"))


@pytest.mark.parametrize(
    "setting", sorted({name.split("/")[2] for name in PPO if name.startswith("score/out/")})
)
def test_score_scaling(setting):
    scale, norm, clip = setting.split("_")
    moments = RunningMoments()
    for step, batch in enumerate(PPO["score/in/batches"]):
        scores = batch.tolist()
        if scale == "scale1":
            scores = scale_scores(scores, moments, subtract_mean=norm == "norm1")
            found = [moments.mean, moments.std, moments.squares / moments.count, moments.count]
            close(found, PPO[f"score/out/{setting}/moments_mean_std_var_count"][step])
        if clip != "clipNone":
            scores = clip_scores(scores, float(clip.removeprefix("clip")))
        close(scores, PPO[f"score/out/{setting}/scores"][step])


@pytest.mark.parametrize("name", ["default", "bs8", "fast"])
def test_adaptive_kl_controller(name):
    init, target, horizon, n_steps = PPO[f"klctl/in/{name}/init_target_horizon_nsteps"]
    controller, found = AdaptiveKLController(init, target, horizon), []
    for kl in PPO["klctl/in/kls"]:
        controller.update(float(kl), int(n_steps))
        found.append(controller.value)
    close(found, PPO[f"klctl/out/{name}/coef_after"], relative=1e-9)


@pytest.mark.parametrize(
    "name, margin, centering",
    [("loss", False, 0.0), ("loss_margin", True, 0.0), ("loss_center0.01", False, 0.01)],
)
def test_pairwise_loss(name, margin, centering):
    data = np.load(ORACLES / "reward_model.npz")
    oracle = {k: torch.from_numpy(np.asarray(v)) for k, v in data.items()}
    margins = oracle["in/rm_margin"] if margin else None
    loss, metrics = pairwise_loss(
        oracle["in/rm_chosen"], oracle["in/rm_rejected"], margins, centering=centering
    )
    close(loss, oracle[f"rm/{name}"])
    close(metrics["accuracy"], oracle["rm/accuracy"])


# ---- whole steps -------------------------------------------------------------------------------


def make_trainer(case: str) -> PPOTrainer:
    policy = load_model(str(ORACLES / "ppo_step_model")).model
    reference = None
    if CASES[case]["extra"].get("lora"):
        model = Tuned(policy, peft_description(ORACLES / "ppo_step_lora"))
        arrays = load_file(ORACLES / "ppo_step_lora" / "adapter_model.safetensors")
        model.load_arrays({mlx_name(k): v.T for k, v in arrays.items()}, "oracle")
    else:
        model = Tuned(policy, {"fine_tune_type": "full"})
        reference = load_model(str(ORACLES / "ppo_step_model")).model
        reference.load_state_dict(
            load_file(ORACLES / "ppo_step_reference" / "model.safetensors"), strict=False
        )
        reference = Tuned(reference, {"fine_tune_type": "full"})
    head, saved = ValueHead(32), np.load(ORACLES / "ppo_step_value_head.npz", allow_pickle=False)
    head.load_state_dict({name: torch.from_numpy(saved[name]) for name in saved.files})
    config = PPOConfig(**step_config(case))
    return PPOTrainer(config, ActorCritic(model, head), reference, eos_ids={2})


def peft_description(folder) -> dict:
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["r"]
    return {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": rank,
            "scale": config["lora_alpha"] / rank,
            "dropout": 0.0,
            "keys": sorted(config["target_modules"]),
        },
    }


def mlx_name(peft_name: str) -> str:
    name = peft_name.removeprefix("base_model.model.").replace(".default", "")
    return name.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")


def our_name(name: str) -> str:
    """TRL's parameter name -> the one in `ActorCritic.trainable_parameters`."""
    name = name.replace("v_head.summary.", "value_head.")
    return name.replace("pretrained_model.base_model.model.", "model.base.").replace(
        "pretrained_model.", "model.base."
    )


@pytest.mark.parametrize("case", sorted(CASES))
def test_step_equals_trl(case):
    trainer = make_trainer(case)
    gradients = record_first_gradient(trainer)
    for k in range(CASES[case]["steps"]):
        root = f"{case}/step{k}"
        queries, responses, scores = given(root)
        rollout = trainer.prepare(trainer.as_rollout(queries, responses), scores)
        check_stages(trainer, rollout, root, close, numpy)
        gradients.clear()
        trainer.minibatch_order = lambda epoch, root=root: STEPS[f"{root}/out/perm"][epoch]
        stats = trainer.step(queries, responses, scores)
        check_stats(stats, root, close, relative=2e-5)
        close(trainer.kl_controller.value, STEPS[f"{root}/out/kl_coef_after"], "kl_coef_after")
        check_gradients(gradients, f"{root}/out/grad_first_optstep/")
    prefix = f"{case}/final/"
    names = names_under(prefix)
    assert len(names) == len(trainer.parameters)
    for name in names:
        # Adam divides by the root of the squared gradient: a gradient near 0 costs digits.
        close(trainer.parameters[our_name(name[len(prefix) :])], STEPS[name], name, absolute=3e-6)


def record_first_gradient(trainer) -> dict:
    """What the optimizer's first step is given, filled in when it is."""
    found, step = {}, trainer.optimizer.step

    def recording():
        if not found:
            found.update({name: p.grad.clone() for name, p in trainer.parameters.items()})
        step()

    trainer.optimizer.step = recording
    return found


def check_gradients(gradients: dict, prefix: str) -> None:
    names = names_under(prefix)
    assert {our_name(name[len(prefix) :]) for name in names} == set(gradients)
    for name in names:
        close(gradients[our_name(name[len(prefix) :])], STEPS[name], name, absolute=1e-6)
