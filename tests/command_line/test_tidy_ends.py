"""Signals to the scripts that write one result: nothing half-written stays, and a line says it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from files import ROOT
from fuse_setup import make_adapter
from reliable_runs import NOW, clean_environment

import safe_files
from safe_files import scratch_folder

PAIRS = str(ROOT / "data" / "preference_increasing_mult_2_test.jsonl")
SLOW = f"""
import sys, time
def slow(prompts, responses):
    sys.stderr.write("{NOW}\\n")
    time.sleep(600)
"""
# Python imports it at its start: the first file that is opened in the scratch folder takes long.
CUSTOMIZE = f"""
import sys, time
seen = []
def hook(event, words):
    if event == "open" and "mlx-rlhf-fuse-" in str(words[0]) and not seen:
        seen.append(words)
        sys.stderr.write("{NOW}\\n")
        time.sleep(600)
sys.addaudithook(hook)
"""
SCRIPTS = {
    "judge.py": ["--input", PAIRS, "--reward-function", "slow.py:slow", "--output", "out.jsonl"],
    "score.py": ["--input", PAIRS, "--reward-function", "slow.py:slow", "--output", "out.jsonl"],
    "fuse.py": "--adapter-file a.npz --save-path fused --upload-repo a/b --dry-run".split(),
}
LONG = pytest.mark.long
CASES = [
    ("judge.py", signal.SIGHUP),
    ("fuse.py", signal.SIGTERM),
    pytest.param("score.py", signal.SIGTERM, marks=LONG),
    pytest.param("judge.py", signal.SIGINT, marks=LONG),
    pytest.param("fuse.py", signal.SIGHUP, marks=LONG),
]


def started(tmp_path: Path, script: str) -> subprocess.Popen:
    """A script in a process group of its own, in the middle of its work."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "first").mkdir(exist_ok=True)
    (tmp_path / "first" / "sitecustomize.py").write_text(CUSTOMIZE)
    (tmp_path / "temporary").mkdir(exist_ok=True)
    make_adapter(tmp_path / "a.npz", "lora")
    more = {"PYTHONPATH": str(tmp_path / "first"), "TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *SCRIPTS[script]],
        cwd=tmp_path,
        env=clean_environment() | more,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    while NOW not in (line := process.stderr.readline()):
        assert line, "it has ended"
    return process


@pytest.mark.parametrize("script, number", CASES)
def test_a_signal_leaves_nothing_half_written(tmp_path, script, number):
    process = started(tmp_path, script)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number and err.endswith("error: interrupted\n"), err
    assert "Traceback" not in err
    assert ("the same command goes on" in err) == (script == "judge.py")
    left = {path.name for path in tmp_path.rglob("*")}
    left -= {name for name in left if "pycache" in name or name.endswith((".pyc", "wandb-media"))}
    assert left == {"a.npz", "slow.py", "first", "sitecustomize.py", "temporary"}


@pytest.mark.long
def test_what_a_killed_dry_run_left_goes_at_the_next_start(tmp_path, monkeypatch):
    process = started(tmp_path, "fuse.py")
    process.kill()
    process.communicate()
    monkeypatch.setattr(safe_files.tempfile, "tempdir", str(tmp_path / "temporary"))
    (left,) = (tmp_path / "temporary").glob("mlx-rlhf-*")
    assert list(left.iterdir())
    with scratch_folder("fuse") as folder:
        assert list((tmp_path / "temporary").glob("mlx-rlhf-*")) == [folder]
    assert not list((tmp_path / "temporary").glob("mlx-rlhf-*"))


def test_a_scratch_folder_clears_away_what_dead_processes_left_and_nothing_else(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(safe_files.tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    gone = [f"mlx-rlhf-fuse-{dead.pid}-a", f"mlx-rlhf-fuse-{dead.pid}-b-c"]
    stay = [
        f"mlx-rlhf-fuse-{alive.pid}-a",
        f"mlx-rlhf-load-{dead.pid}-a",
        "mlx-rlhf-fuse-x-1",
        f"mlx-rlhf-fuse-{dead.pid}",
        f"fuse-{dead.pid}-a",
    ]
    for name in gone + stay:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("x")
    with scratch_folder("fuse") as folder:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*stay, folder.name])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)
    alive.communicate(b"\n")
