"""Adapters, fused models, checkpoints and runs of an older commit (machine.json says which) are
read, gone on with, and end in the same bytes; make_old_runs.py made them."""

import fast_blas  # noqa: F401  isort: skip

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT
from make_old_runs import ADAPTERS, RUNS, machine

import fuse
import ppo_training
import sft
from models.adapter_files import load_adapter
from models.load import load_model
from run_folder.run import read_rows

HERE = Path(__file__).resolve().parent
SAME_MACHINE = json.loads((HERE / "machine.json").read_text("utf-8"))["machine"] == machine()
# Of weights after six updates, where another processor rounds otherwise: Adam divides by the
# gradient's own size, so a rounding error in a small gradient moves a weight by a share of 3e-3.
ELSEWHERE = {"rtol": 1e-2, "atol": 1e-3}
# In a difference of two scores a head's bias cancels out: all of its gradient is rounding, and Adam
# takes full steps by it, six of at most 3e-3.
BIAS = {"rtol": 0, "atol": 2 * 6 * 3e-3}


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in mx.load(str(path)).items()}


def same(found_file: Path, wanted_file: Path) -> None:
    """The same arrays: to the bit on the machine that made them."""
    found, wanted = arrays(found_file), arrays(wanted_file)
    assert found.keys() == wanted.keys()
    # Of the description of an adapter in .npz: newer programs say more, and nothing else.
    said, told = (json.loads(bytes(a.pop("adapter_config", b"{}"))) for a in (found, wanted))
    assert {name: said[name] for name in told} == told
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        if SAME_MACHINE:
            assert found[name].tobytes() == array.tobytes(), name
        else:
            bounds = BIAS if name == "bias" and "preference" in wanted_file.name else ELSEWHERE
            np.testing.assert_allclose(found[name], array, **bounds, err_msg=name)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the old files in it, as the working directory."""
    shutil.copytree(HERE, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "reward.npz"])
def test_an_old_adapter_is_loaded_whole(name):
    loaded = load_model(None)
    tuning = load_adapter(loaded, HERE / name)
    path = HERE / name
    saved = arrays(path / "adapters.safetensors" if path.is_dir() else path)
    got = {key: np.array(array) for key, array in tuning.arrays().items()}
    saved = {key: array for key, array in saved.items() if key in got}
    assert got.keys() == saved.keys() and len(saved) >= 1
    assert all((got[key] == saved[key]).all() for key in got)


def test_an_old_adapter_fuses_into_the_same_model(place):
    assert fuse.main(["--adapter-file", "lora.npz", "--save-path", "again"]) in (0, None)
    same(place / "again" / "model.safetensors", HERE / "fused" / "model.safetensors")


def test_an_old_fused_model_and_an_old_reward_model_are_used(place, capsys):
    words = "--test --reward-model --data-base reward_function_increasing_mult_2_"
    assert sft.main([*words.split(), "--resume-adapter-file", "reward.npz"]) == 0
    assert sft.main(["--test", "--model", "fused"]) == 0
    assert capsys.readouterr().out.count("test: loss") == 2


def ended_the_same(place: Path, name: str) -> None:
    ends = sorted((HERE / "end").glob(f"{name}.*"))
    assert len(ends) == (1 if name == "sft" else 2)
    for end in ends:
        same(place / end.name, end)


@pytest.mark.parametrize("name", [*RUNS])
def test_an_old_run_goes_on_to_the_same_bytes(name, place):
    before = read_rows(place / name)
    script = sft if RUNS[name][0] == "sft.py" else ppo_training
    assert script.main(["--resume", name]) == 0
    rows = read_rows(place / name)
    assert rows[: len(before)] == before and len(rows) > len(before)
    ended_the_same(place, name)


@pytest.mark.parametrize("name", [*RUNS])
def test_an_old_command_gives_the_same_bytes(name, place):
    script, line = RUNS[name]
    words = [*line.split(), "--output-dir", "new", "--save-file", f"{name}.npz"]
    assert (sft if script == "sft.py" else ppo_training).main(words) == 0
    ended_the_same(place, name)
