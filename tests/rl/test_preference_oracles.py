"""The preference losses against numbers from TRL (tests/oracles/README.md).

Within 1e-5 of the largest entry of an array, or of 0.1: losses are sums that nearly cancel.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from rl.preference_losses import (
    DPO_LOSSES,
    KTO_LOSSES,
    Pairs,
    dpo_loss,
    kto_baseline,
    kto_loss,
    pair_sums,
    sequence_weights,
)
from rl.reference_free_losses import CPO_LOSSES, odds_ratio

ORACLES = Path(__file__).resolve().parents[1] / "oracles"
TOKENS = dict(np.load(ORACLES / "preference_tokens.npz", allow_pickle=False))
SUMS = dict(np.load(ORACLES / "preference.npz", allow_pickle=False))
META = json.loads(str(TOKENS["meta"]))
OF_THE_WHOLE = ("loss_type", "loss_weights", "ld_alpha", "use_weighting")


def close(found, wanted, least: float = 0.1) -> None:
    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert found.shape == wanted.shape
    bound = 1e-5 * max(np.abs(wanted).max(initial=0), least)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


def read(name: str) -> mx.array:
    return mx.array(TOKENS[name].astype(np.float32))


def plain_pairs(chosen, rejected, ref_chosen=None, ref_rejected=None) -> Pairs:
    one = mx.ones(chosen.shape)
    return Pairs(chosen, rejected, one, one, one, ref_chosen, ref_rejected)


# ---- DPO from tokens ---------------------------------------------------------------------------


def run_dpo(case: str, given: dict, logprobs: mx.array):
    mask = read(f"{case}/in/mask")
    count = len(mask) // 2
    better, worse = mx.arange(count), mx.arange(count, 2 * count)
    alpha = given.get("ld_alpha")
    names = given.get("loss_type", ["sigmoid"])
    rest = {k: v for k, v in given.items() if k not in OF_THE_WHOLE}
    shared = {k: v for k, v in rest.items() if k == "beta"}
    options = {name: {} if name == "sft" else rest for name in names}
    pairs = Pairs(
        *pair_sums(logprobs, mask, better, worse, alpha),
        *pair_sums(mask, mask, better, worse),
        mx.ones(count),
        *pair_sums(read(f"{case}/in/ref_logprobs"), mask, better, worse, alpha),
        nll=-pair_sums(logprobs, mask, better, worse)[0],
        nll_tokens=mask.sum(axis=1)[:count],
    )
    weighting = None
    if given.get("use_weighting"):
        weights = sequence_weights(logprobs, read(f"{case}/in/log_sum_sq_probs"), mask)
        weighting = weights[better] * weights[worse]
    return dpo_loss(
        pairs,
        loss_type=names,
        loss_weights=given.get("loss_weights"),
        weighting=weighting,
        options=options,
        **shared,
    )


@pytest.mark.parametrize("case", ["dpo/c0", "dpo/c1"])
@pytest.mark.parametrize("variant", META["dpo"])
def test_dpo(variant, case):
    out, given = f"{case}/out/{variant}", META["dpo"][variant]
    (loss, metrics), gradient = mx.value_and_grad(lambda x: run_dpo(case, given, x))(
        read(f"{case}/in/logprobs")
    )
    close(loss, TOKENS[f"{out}/loss"])
    close(gradient, TOKENS[f"{out}/grad_logprobs"])
    check_metrics(metrics, TOKENS[f"{out}/metrics"])


def check_metrics(metrics: dict, wanted: np.ndarray) -> None:
    wanted = json.loads(str(wanted))
    assert wanted.keys() <= metrics.keys()
    for name, number in wanted.items():
        total, weight = metrics[name]
        close((total / weight).item(), number)


def test_the_numbers_cover_every_dpo_loss():
    assert {n for v in META["dpo"].values() for n in v.get("loss_type", ())} == {*DPO_LOSSES}


@pytest.mark.parametrize("case", sorted({name.split("/")[1] for name in SUMS if "dpo/" in name}))
def test_dpo_from_sums(case):
    """TRL 0.11.4, whose sigmoid takes label smoothing."""
    name, beta, smoothing = case.rsplit("_", 2)
    options = {"beta": float(beta[4:])}
    if float(smoothing[2:]):
        options["label_smoothing"] = float(smoothing[2:])
    inputs = [
        mx.array(SUMS[f"in/{who}_{side}_logps"])
        for who in ("policy", "ref")
        for side in ("chosen", "rejected")
    ]
    pairs = plain_pairs(*inputs)
    close(DPO_LOSSES[name](pairs, **options), SUMS[f"dpo/{case}/losses"])
    close(options["beta"] * pairs.chosen_ratio, SUMS[f"dpo/{case}/chosen_rewards"])
    close(options["beta"] * pairs.rejected_ratio, SUMS[f"dpo/{case}/rejected_rewards"])


# ---- KTO ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["kto/c0", "kto/c1"])
@pytest.mark.parametrize("variant", META["kto"])
def test_kto(variant, case):
    mask, label = read(f"{case}/in/mask"), read(f"{case}/in/label")
    kl_mask = read(f"{case}/in/kl_mask")
    given = META["kto"][variant]

    def sums(name: str, mask: mx.array) -> mx.array:
        return (read(f"{case}/in/{name}") * mask).sum(axis=1)

    baseline = kto_baseline(sums("kl_logprobs", kl_mask) - sums("kl_ref_logprobs", kl_mask))
    if given.get("loss_type") == "apo_zero_unpaired":
        baseline = mx.zeros(())

    def run(logprobs: mx.array):
        return kto_loss(
            (logprobs * mask).sum(axis=1), sums("ref_logprobs", mask), label, baseline, **given
        )

    (loss, metrics), gradient = mx.value_and_grad(run)(read(f"{case}/in/logprobs"))
    out = f"{case}/out/{variant}"
    close(loss, TOKENS[f"{out}/loss"])
    close(gradient, TOKENS[f"{out}/grad_logprobs"])
    wanted = json.loads(str(TOKENS[f"{out}/metrics"]))
    margin = wanted.pop("rewards/margins", None)
    check_metrics(metrics, np.array(json.dumps(wanted)))
    if margin is not None:
        sides = (metrics[f"rewards/{side}"] for side in ("chosen", "rejected"))
        chosen, rejected = ((total / weight).item() for total, weight in sides)
        close(chosen - rejected, margin)


def test_the_numbers_cover_every_kto_loss():
    assert {v.get("loss_type", "kto") for v in META["kto"].values()} == {*KTO_LOSSES}


# ---- CPO, SimPO, AlphaPO, ORPO -----------------------------------------------------------------


def cpo_inputs(average: bool) -> list[mx.array]:
    return [read(f"cpo/in/{side}{'_avg' * average}_logps") for side in ("chosen", "rejected")]


def compare_sides(loss, inputs: list[mx.array], out: str, oracle: dict = TOKENS, sign: float = 1):
    losses, *rewards = loss(*inputs)
    close(sign * losses, oracle[f"{out}/losses"])
    close(rewards[0], oracle[f"{out}/chosen_rewards"])
    close(rewards[1], oracle[f"{out}/rejected_rewards"])
    if f"{out}/grad_chosen" not in oracle:
        return
    gradients = mx.grad(lambda *x: loss(*x)[0].mean(), argnums=(0, 1))(*inputs)
    close(gradients[0], oracle[f"{out}/grad_chosen"])
    close(gradients[1], oracle[f"{out}/grad_rejected"])


@pytest.mark.parametrize("variant", META["cpo"])
def test_cpo(variant):
    given = dict(META["cpo"][variant])
    name, average = given.pop("loss_type", "sigmoid"), given.pop("average")
    if "alpha" in given:
        name = "alphapo"  # TRL: simpo with an alpha
    loss = CPO_LOSSES[name]
    compare_sides(lambda *x: loss(*x, **given), cpo_inputs(average), f"cpo/out/{variant}")


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(beta):
    out = f"orpo/out/beta{beta}"
    # TRL's losses are what it takes off.
    compare_sides(lambda *x: odds_ratio(*x, beta=beta), cpo_inputs(True), out, sign=-1)


def test_orpo_of_trl_0_11():
    inputs = [mx.array(SUMS[f"in/{side}_avg_logps"]) for side in ("chosen", "rejected")]
    compare_sides(odds_ratio, inputs, "orpo/beta0.1", SUMS, sign=-1)
