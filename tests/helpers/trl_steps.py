"""Whole PPO steps of TRL 0.11.4 (tests/oracles/README.md), and what either backend has to equal."""

import json
from collections.abc import Callable

import numpy as np
from files import ROOT

ORACLES = ROOT / "tests" / "oracles"
STEPS = np.load(ORACLES / "ppo_step.npz", allow_pickle=False)
CASES = json.loads(str(STEPS["meta"]))["cases"]
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
# Arrays that TRL logs for its histograms, where we log scalars.
ARRAYS = {
    "objective/logprobs",
    "objective/ref_logprobs",
    "ppo/policy/advantages",
    "ppo/policy/ratio",
    "tokens/queries_dist",
    "tokens/responses_dist",
}
# Of a rollout, ours and TRL's.
STAGES = {
    "logprobs": "fwd_logprobs",
    "values": "values",
    "kls": "kls",
    "rewards": "rewards",
    "non_score_rewards": "non_score",
    "advantages": "advantages",
    "returns": "returns",
}


def step_config(case: str) -> dict:
    """The options of a case, for `PPOConfig`."""
    return {**TRL_DEFAULTS, **CASES[case]["config"]}


def given(root: str) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """(queries, responses, scores) of a step."""
    queries, responses = (
        [[int(t) for t in row if t >= 0] for row in STEPS[f"{root}/in/{name}"]]
        for name in ("queries", "responses")
    )
    return queries, responses, STEPS[f"{root}/in/scores"].tolist()


def names_under(prefix: str) -> list[str]:
    return [name for name in STEPS.files if name.startswith(prefix)]


def check_stages(trainer, rollout, root: str, close: Callable, numpy: Callable) -> None:
    """The arrays before the update, at response tokens; `rollout` is a prepared one."""
    trainer.score_policy(rollout)
    trainer.score_reference(rollout)
    trainer.compute_rewards(rollout)
    trainer.compute_advantages(rollout)
    mask = STEPS[f"{root}/out/masks"].astype(bool)
    counted = numpy(rollout.mask) > 0
    for ours, theirs in STAGES.items():
        close(numpy(getattr(rollout, ours))[counted], STEPS[f"{root}/out/{theirs}"][mask], ours)
    close(rollout.scores, STEPS[f"{root}/out/scores_used"], "scores")


def check_stats(stats: dict, root: str, close: Callable, **tolerance: float) -> None:
    """The statistics of a step, histograms aside."""
    prefix = f"{root}/out/stats/"
    names = {name[len(prefix) :] for name in names_under(prefix)} - ARRAYS
    assert names and names <= set(stats)
    for name in names:
        # Signed numbers around 0 cancel in sums: what is left is the rounding of the terms, which
        # for the KL are log-probabilities of size 5, summed over a response.
        absolute = 1e-5 if name == "objective/kl" else 1e-6
        close(stats[name], STEPS[prefix + name], name, absolute=absolute, **tolerance)
