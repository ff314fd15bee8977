"""--use-dynamic-kl: a coefficient that follows the KL of a token, and is used."""

import json

import numpy as np
import pytest
from files import ROOT
from tiny_ppo import assert_same_bits, make_trainer, random_batch, shaken, weights

import ppo_training
from errors import UserError
from rl.ppo_config import PPOConfig


def test_the_controller_gets_the_mean_kl_of_the_batch_s_tokens():
    options = {"use_dynamic_kl": True, "init_kl_coef": 0.2, "horizon": 16.0}
    trainer = shaken(make_trainer(kl_target=1e-3, **options))
    queries, responses, scores = random_batch()
    rollout = trainer.as_rollout(queries, responses)
    stats = trainer.update(rollout, scores)
    kls, mask = np.array(rollout.kls), np.array(rollout.mask)
    per_token = (kls * mask).sum() / mask.sum()
    assert stats["objective/kl_per_token"] == pytest.approx(per_token, rel=1e-5)
    error = np.clip(per_token / 1e-3 - 1, -0.2, 0.2)
    assert trainer.kl_controller.value == pytest.approx(0.2 * (1 + error * 8 / 16))


def test_the_coefficient_is_what_is_taken_from_the_reward():
    """-beta_t * KL_t, step by step: one that is logged and not used would stay at the first."""
    trainer = shaken(make_trainer(use_dynamic_kl=True, kl_target=1e-4, horizon=16.0))
    seen = []
    for step in range(4):
        queries, responses, scores = random_batch(seed=step)
        rollout = trainer.as_rollout(queries, responses)
        beta = trainer.kl_controller.value
        trainer.update(rollout, scores)
        np.testing.assert_allclose(
            np.array(rollout.non_score_rewards), -beta * np.array(rollout.kls), rtol=1e-5
        )
        seen.append(beta)
    assert len(set(seen)) == 4


def test_without_the_flag_nothing_is_logged_or_changed():
    plain, named = make_trainer(), make_trainer(kl_target=7.0)
    batch = random_batch()
    assert "objective/kl_per_token" not in plain.step(*batch)
    named.step(*batch)
    assert_same_bits(weights(plain), weights(named))


def test_two_controllers_are_refused():
    with pytest.raises(UserError, match="give one of them"):
        PPOConfig(use_dynamic_kl=True, adap_kl_ctrl=True)


@pytest.mark.parametrize("given, horizon", [("", 128.0), ("--horizon 500", 500.0)])
def test_the_horizon_is_two_batches_unless_it_is_given(given, horizon):
    line = f"--ground_truth_reward --use_dynamic_kl --kl_target 0.05 {given}"
    args = ppo_training.parse_arguments(line.split())
    assert (args.horizon, args.kl_target) == (horizon, 0.05)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_the_kl_comes_to_its_target(seed, tmp_path, monkeypatch):
    """Two targets four times apart; the mean of the last 20 of 120 steps is within half of each."""
    monkeypatch.chdir(tmp_path)
    for target in (0.08, 0.32):
        line = (
            f"--ground_truth_reward --use-dynamic-kl --kl-target {target} --num-steps 120 "
            f"--eval-every 0 --seed {seed} --output-dir run{target}"
        )
        ppo_training.main(line.split() + ["--data", str(ROOT / "data")])
        rows = [json.loads(line) for line in open(f"run{target}/metrics.jsonl")]
        found = np.mean([row["objective/kl_per_token"] for row in rows[-20:]])
        assert found == pytest.approx(target, rel=0.5)
