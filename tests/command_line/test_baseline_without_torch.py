"""The scripts of the PyTorch baseline in a Python that has no PyTorch."""

import subprocess
import sys

import pytest
from script_table import ROOT

BASELINE = ROOT / "pytorch_baseline"
SCRIPTS = sorted(f.name for f in BASELINE.glob("pytorch_*.py") if "run_main(" in f.read_text())


def test_there_are_three():
    assert SCRIPTS == ["pytorch_ppo_training.py", "pytorch_sft.py", "pytorch_talk_to_model.py"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("words", [["--help"], ["--train"]])
def test_one_line_says_what_to_install(script, words, tmp_path):
    line = [sys.executable, "-S", str(BASELINE / script), *words]  # -S: nothing that was installed
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: ") and "has no torch: pip install -r" in said
    assert said.endswith("pytorch_baseline/requirements.txt")
    assert (BASELINE / "requirements.txt").exists() and list(tmp_path.iterdir()) == []
