"""W&B and TensorBoard beside a run folder."""

import json
import math
import os
from pathlib import Path

import pytest
from child_python import python

from errors import UserError
from run_folder.run import Run

# ------------------------------------------------------------------------------ W&B

TRACKED = """
    import random, sys
    import numpy as np
    from PIL import Image
    from run_folder.run import Run
    folder, steps = sys.argv[1], int(sys.argv[2])
    options = {"learning_rate": 0.125, "hub_token": "tok_in_options"}
    with Run("ppo", options, output_dir=folder, log_with="wandb") as run:
        random.seed(0), np.random.seed(0)
        before = random.getstate(), np.random.get_state()[1].tolist()
        for step in range(1, steps + 1):
            run.log(step, {"ppo/mean_scores": step / 8, "objective/kl": float("nan")})
            run.log_samples(step, [{"prompt": "2 4", "response": "6 8", "score": 1.0}])
            run.log_values(step, "scores", [1.0, 2.5, float("nan")])
            if step == 2:  # a look at held-out rows sends the samples so far
                run.log(step, {"eval/greedy/score": 0.5})
        run.plots.mkdir()
        Image.new("RGB", (4, 4)).save(run.plots / "ppo.png")
        # Seeded draws must not depend on whether W&B listens.
        assert before == (random.getstate(), np.random.get_state()[1].tolist())
        run.finish({"score": 0.875})
"""


def tracked(folder: Path, steps: int, **env: str) -> tuple[list[Path], str]:
    """Files that a run of ``steps`` leaves in its folder with W&B, and its standard error."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    process = python(TRACKED, str(folder), str(steps), env={**clean, "HOME": str(home), **env})
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert not [path for path in home.rglob("*") if path.is_file()]
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()], err


def test_wandb_offline_makes_a_table_an_evaluation_and_no_file_per_step(folder, tmp_path):
    pytest.importorskip("wandb")
    secret = "value_of_a_secret_variable"
    files, _ = tracked(folder, 50, WANDB_MODE="offline", MY_API_TOKEN=secret)
    few, _ = tracked(tmp_path / "few", 2, WANDB_MODE="offline")
    assert len(files) == len(few) + 1 < 20  # both tables of two steps are one file
    tables = [path for path in files if path.name.endswith(".table.json")]
    assert sorted(len(json.loads(table.read_text())["data"]) for table in tables) == [2, 50]
    assert len([path for path in files if path.suffix == ".png" and "media" in path.parts]) == 1
    (record,) = [path for path in files if path.suffix == ".wandb"]
    written = record.read_bytes()
    numbers = (b"ppo/mean_scores", b"6.25", b"learning_rate", b"0.125", b"0.875")
    for text in (*numbers, b"histogram", b"plots/ppo"):
        assert text in written, text
    for path in files:
        data = path.read_bytes()
        assert b"tok_in_options" not in data and secret.encode() not in data, path


def test_wandb_without_a_key_or_a_terminal_asks_nothing(folder):
    pytest.importorskip("wandb")
    files, err = tracked(folder, 2)
    assert "logging offline" in err
    assert any(path.suffix == ".wandb" for path in files)


def test_without_wandb_a_resumed_run_stays_as_it_was(folder, monkeypatch):
    Run("sft", {"log_with": "none"}, output_dir=folder).close()
    before = (folder / "config.json").read_bytes()
    monkeypatch.setattr("run_folder.loggers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--log-with wandb: not installed"):
        Run("sft", {"log_with": "wandb"}, output_dir=folder, resume=True, log_with="wandb")
    with pytest.raises(UserError, match="--log-with wandb: not installed"):
        Run("sft", {}, output_dir=folder.with_name("new"), log_with="wandb")
    assert (folder / "config.json").read_bytes() == before and not folder.with_name("new").exists()


# ------------------------------------------------------------------------------ TensorBoard


def events(folder: Path) -> list:
    """Every event of a run's files, by TensorBoard's record format: length, sum, bytes, sum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def test_tensorboard_gets_the_numbers_and_no_secret(folder):
    pytest.importorskip("tensorboardX")
    with Run("sft", {"token": "hf_" + "a" * 34}, output_dir=folder, log_with="tensorboard") as run:
        for step in (1, 2):
            run.log(step, {"train/loss": step / 4, "what": "text", "nothing": math.nan})
        run.log_samples(2, [{"prompt": "8 20", "response": " 22"}])
        run.finish({"steps": 2})
    assert scalars(folder) == [(1, "train/loss", 0.25), (2, "train/loss", 0.5)]
    written = b"".join(file.read_bytes() for file in (folder / "tensorboard").iterdir())
    assert b"8 20" in written and b"hf_" + b"a" * 34 not in written


def test_a_resumed_run_voids_what_tensorboard_had_of_later_steps(folder):
    pytest.importorskip("tensorboardX")
    first = Run("sft", {}, output_dir=folder, log_with="tensorboard")
    first.log(1, {"loss": 1.0})
    state = first.state_dict()
    first.log(2, {"loss": 2.0})
    first.close()
    with Run("sft", {}, output_dir=folder, resume=True, log_with="tensorboard") as again:
        again.load_state_dict(state)
        again.log(2, {"loss": 3.0})
    starts = [event.step for event in events(folder) if event.session_log.status == 1]
    assert starts == [2]  # from this step on, TensorBoard forgets what came before
    assert scalars(folder)[-1] == (2, "loss", 3.0)


def test_without_a_logger_s_library_nothing_is_touched(folder, monkeypatch):
    monkeypatch.setattr("run_folder.loggers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--log-with tensorboard: not installed; pip install ten"):
        Run("sft", {}, output_dir=folder, log_with="tensorboard")
    assert not folder.exists()
