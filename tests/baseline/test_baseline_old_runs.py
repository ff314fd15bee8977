"""Runs of an older commit, in whose state.pt the parts of a run stood side by side, go on.

Each was made to step 4, and its checkpoint of step 2 kept; metrics.jsonl has all of its rows.
"""

import shutil

import pytest
from baseline_setup import ROOT, close
from pytorch_ppo_training import main as ppo_main
from pytorch_sft import main as sft_main

from run_folder.run import read_rows

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name, main", [("pytorch_sft", sft_main), ("pytorch_ppo", ppo_main)])
def test_an_old_run_ends_as_it_did(name, main, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = shutil.copytree(ROOT / "tests" / "old_runs" / name, tmp_path / name)
    wanted = read_rows(run)
    main(["--resume", str(run)])
    found = read_rows(run)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, old in zip(found, wanted, strict=True):
        # Moments, schedule, position in the data, dropout; of PPO what no other processor rounds.
        names = old if name == "pytorch_sft" else {"objective/kl_coef"} & {*old}
        for key in names:
            close(row[key], old[key], key, relative=1e-3)
    assert any("objective/kl_coef" in row or "train/loss" in row for row in wanted)
