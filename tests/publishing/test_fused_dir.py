"""--fused-dir: every training script leaves the trained model itself, as fuse.py makes it."""

import contextlib
import importlib
import json

import mlx.core as mx
import numpy as np
import pytest
from script_table import DATA, SHORT, TRAINED, training_scripts
from short_runs import run

import fuse
import sft
from models.load import load_model
from models.reward_model import load_reward_model

pytestmark = pytest.mark.usefixtures("in_tmp")


def script_of(name):
    return importlib.import_module(name.removesuffix(".py"))


def test_every_training_script_has_a_case():
    assert {*training_scripts()} <= {SHORT[name].script for name in CASES}


CASES = TRAINED


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_fuse_makes_of_the_adapter(name, tmp_path):
    short = SHORT[name]
    out = run(script_of(short.script), *short.line, "--fused-dir", "deep/model")
    assert "wrote deep/model" in out and "model deep/model" in out.partition("wrote deep")[2]
    assert "fuse.py" not in out or short.script == "sft.py"
    run(fuse, "--adapter-file", short.saved, "--save-path", "again", "--run", "run")
    ours, theirs = (mx.load(f"{place}/model.safetensors") for place in ("deep/model", "again"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(np.array(ours[key]), np.array(theirs[key])) for key in ours)
    card = (tmp_path / "deep" / "model" / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card and "fused_dir" not in card
    if name == "reward":
        assert load_reward_model("deep/model").score([[3, 4, 5]])
    else:
        assert load_model("deep/model").model(mx.array([[3, 4, 5]])).shape[1] == 3


TINY = [
    "--train",
    "--max-rows",
    8,
    "--iters",
    2,
    "--batch-size",
    2,
    "--steps-per-eval",
    0,
    "--data",
    DATA,
]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["--prompt-tuning", "--fine-tune-type=full", "--quantize=8"])
def test_it_is_there_for_every_kind_of_training(kind):
    run(sft, *TINY, kind, "--output-dir", "run", "--save-file", "a.npz", "--fused-dir", "model")
    run(
        fuse,
        "--adapter-file",
        "a.npz",
        "--save-path",
        "again",
        *([kind] if "quantize" in kind else []),
    )
    ours, theirs = (mx.load(f"{place}/model.safetensors") for place in ("model", "again"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(np.array(ours[key]), np.array(theirs[key])) for key in ours)


def test_the_run_that_wrote_it_may_write_it_again_and_nobody_else(tmp_path):
    words = [*TINY, "--fused-dir", "model"]
    run(sft, *words, "--output-dir", "run")
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    run(sft, "--resume", "run", "--iters", 3)
    run(sft, *words, "--output-dir", "run", "--overwrite")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns > before
    letter = tmp_path / "model" / "letter.txt"
    letter.touch()
    assert "exists already" in run(sft, "--resume", "run", "--iters", 4, status=2)
    letter.unlink()
    assert "exists already" in run(sft, *words, "--output-dir", "run2", status=2)
    run(sft, *TINY, "--output-dir", "run3", "--fused-dir", "model3")
    said = run(sft, *words, "--output-dir", "run3", "--overwrite", status=2)
    assert "--fused-dir model: exists already" in said
    assert json.load(open("run3/config.json", encoding="utf-8"))["options"]["fused_dir"] == "model3"


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--fused-dir", ""], "the name is empty"),
        (["--fused-dir", "file"], "is no folder"),
        (["--fused-dir", "file/below"], "is no folder"),
        (["--fused-dir", "full"], "exists already"),
        (["--fused-dir", "out", "--output-dir", "out"], "--output-dir names"),
        (["--fused-dir", "out", "--output-dir", "out/run"], "--output-dir names"),
        (["--fused-dir", "run/plots", "--output-dir", "run"], "files of its own"),
        (["--fused-dir", "runs"], "--output-dir names"),
        (["--fused-dir", "out", "--save-file", "out"], "--save-file names"),
        (["--fused-dir", "out", "--save-file", "out/a.npz"], "--save-file names"),
        (["--fused-dir", "base", "--model", "base"], "--model names"),
    ],
)
def test_where_no_model_can_be_written_is_said_before_training(tmp_path, words, wrong):
    (tmp_path / "file").write_text("x")
    for name in ("full", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("x")
    said = run(sft, *TINY, *words, status=2)
    assert said.startswith("error: --fused-dir") and wrong in said
    assert {path.name for path in tmp_path.iterdir()} == {"file", "full", "base"}


@pytest.mark.parametrize("what", ["a model that came since", "a link"])
def test_what_comes_into_its_place_meanwhile_stays(tmp_path, what, monkeypatch):
    """The adapter is saved, and the run says what it could not write."""
    from training.supervised_loop import Loop

    trained = Loop.run

    def then(self, *words):
        trained(self, *words)
        if what == "a link":
            (tmp_path / "elsewhere").mkdir()
            (tmp_path / "elsewhere" / "kept").write_text("x")
            (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
        else:
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "kept").write_text("x")

    monkeypatch.setattr(Loop, "run", then)
    said = run(
        sft, *TINY, "--output-dir", "run", "--fused-dir", "model", "--save-file", "a.npz", status=2
    )
    assert "exists already" in said and (tmp_path / "a.npz").is_file()
    assert (tmp_path / "model" / "kept").read_text() == "x"
    with contextlib.suppress(FileNotFoundError):
        assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["kept"]
