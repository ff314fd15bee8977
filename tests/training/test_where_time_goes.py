"""Metrics say where the time of a step went; the parts have TRL's names where it has them."""

import json

import pytest
from files import ROOT

import group_training
import ppo_training

PAUSE = 0.05
OWN = f"""
import time
def slow(prompts, responses):
    time.sleep({PAUSE})
    return [float(len(r)) for r in responses]
"""
WORDS = (
    "--reward-function own.py:slow --max-new-tokens 3 --num-steps 2 --eval-every 2 "
    "--eval-prompts 2 --eval-samples 1 --output-dir run --save-file out.npz --lora-rank 1 "
    f"--lora-layers 1 --data {ROOT}/data "
)
SCRIPTS = {
    ppo_training: "--batch-size 2 --ppo-epochs 1",
    group_training: "--batch-size 4 --num-generations 2",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_where_the_time_of_a_step_went(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    script.main([*WORDS.split(), *SCRIPTS[script].split()])
    rows = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    steps = [row for row in rows if "time/ppo/rollout" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row["time/ppo/reward"] >= PAUSE > 0  # which is in no other part
        if script is ppo_training:
            assert 0 < row["time/ppo/reference"] <= row["time/ppo/update"]
            assert row["time/ppo/optimize_step"] <= row["time/ppo/update"]
        length = row.get("tokens/responses_len_mean", row.get("completions/mean_length"))
        sampled = int(SCRIPTS[script].split()[1]) * length
        pace = row["time/rollout_tokens_per_second"]
        assert pace * row["time/ppo/rollout"] == pytest.approx(sampled, rel=1e-5)
        assert row["time/update_tokens_per_second"] > 0 and row["memory/peak_gb"] > 0
    looks = [row["time/ppo/evaluation"] for row in rows if "time/ppo/evaluation" in row]
    assert len(looks) == 2 and min(looks) >= 2 * PAUSE  # greedy and sampled ones are scored
