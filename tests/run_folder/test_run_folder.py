"""The run folder itself: what is in it, who may write there, and what stays."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
from child_python import python

from errors import UserError
from run_folder.run import Run, read_rows

# ------------------------------------------------------------------------------ the folder


def test_config_holds_options_versions_and_machine(folder):
    options = {"iters": 3, "keys": ["a"], "resume": None, "explicit": {"iters"}, "path": Path("x")}
    with Run("sft", options, output_dir=folder, computing={"blas": "libopenblas.so.0"}):
        pass
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == "sft" and config["machine"]["blas"] == "libopenblas.so.0"
    assert config["options"] == {"iters": 3, "keys": ["a"], "path": "x"}
    assert config["versions"]["mlx"] and config["versions"]["transformers"]
    assert config["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_default_folder_is_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(3):
        with Run("ppo", {}) as run:
            folders.append(run.folder)
    assert len(set(folders)) == 3
    assert all(re.fullmatch(r"runs/ppo-\d{8}-\d{6}(-\d)?", str(folder)) for folder in folders)


def test_a_folder_with_a_run_in_it_is_refused_or_overwritten_never_mixed(folder):
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with Run("sft", {}, output_dir=folder) as run:
        run.log(1, {"x": 1})
        run.checkpoints.mkdir()
        (run.checkpoints / "old").write_text("")
        (folder / "adapters.npz").write_text("")
        run.finish({"score": float("nan")})
    assert json.loads((folder / "summary.json").read_text())["score"] is None
    with pytest.raises(UserError, match="--resume.*--overwrite"):
        Run("sft", {}, output_dir=folder)
    with Run("sft", {}, output_dir=folder, overwrite=True, outputs=("adapters.npz",)) as run:
        there = sorted(path.name for path in folder.iterdir())
        rows = ["bad_rows.jsonl", "config.json", "metrics.jsonl", "mine.txt", "samples.jsonl"]
        assert there == [".lock", *rows]
        assert read_rows(folder) == []


def test_overwrite_does_not_follow_links_out_of_the_folder(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("")
    Run("sft", {}, output_dir=folder).close()
    (folder / "checkpoints").symlink_to(outside)
    with pytest.raises(UserError, match="checkpoints: is a symbolic link"):
        Run("sft", {}, output_dir=folder, overwrite=True)
    assert (outside / "precious").exists()


LINKS = [
    ".lock",
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "bad_rows.jsonl",
    "summary.json",
    "checkpoints",
    "plots",
    "wandb",
    "checkpoints/step-00000001",
    "checkpoints/best.json",
    "checkpoints/step-00000001/state.json",
    "plots/loss.png",
    "wandb/run-id",
]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("way", ["anew", "overwrite", "resume"])
def test_links_within_a_run_are_refused_before_anything_is_written(folder, tmp_path, name, way):
    (outside := tmp_path / "outside").mkdir()
    (precious := outside / "precious").write_text("mine")
    Run("sft", {"a": 1}, output_dir=folder).close()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name == "config.json":
        (folder / name).rename(precious)
    (folder / name).unlink(missing_ok=True)
    before = precious.read_text()
    (folder / name).symlink_to(outside if "." not in name and "id" not in name else precious)
    there = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(UserError, match="is a (symbolic link|link that leads out)|holds a run"):
        Run(
            "sft", {"a": 1}, output_dir=folder, resume=way == "resume", overwrite=way == "overwrite"
        )
    assert precious.read_text() == before and list(outside.iterdir()) == [precious]
    assert sorted(path.name for path in folder.rglob("*")) == there


def test_w_and_b_s_own_links_stay(folder):
    """latest-run, say: within its folder."""
    Run("sft", {}, output_dir=folder).close()
    (folder / "wandb" / "run-1").mkdir(parents=True)
    (folder / "wandb" / "latest-run").symlink_to("run-1")
    Run("sft", {}, output_dir=folder, resume=True).close()


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    Run("sft", {}, output_dir=tmp_path / "link").close()
    assert (folder / "config.json").exists()


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", '{"model_type": "llama", "options": {}}'),
        ("config.json", '{"script": "sft"'),
        ("config.json", "[" * 100_000),
        ("summary.json", "{}"),
        ("plots", None),
        ("model", None),  # what the script itself writes there
    ],
)
def test_files_under_the_names_of_a_run_that_are_none_stay(folder, name, text):
    folder.mkdir()
    (folder / name).write_text(text) if text else (folder / name / "mine").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"holds {name}, and no run that it belongs to"):
            Run("sft", {}, output_dir=folder, overwrite=overwrite, outputs=("model",))
    there = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    assert sorted(there) == ([name] if text else [name, f"{name}/mine"])
    assert text is None or (folder / name).read_text() == text


def test_an_overwrite_that_is_cut_short_can_be_repeated(folder, monkeypatch):
    """What is left of the old run is still a run's folder."""
    Run("sft", {}, output_dir=folder).close()

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("run_folder.run.write_json", cut)
        Run("sft", {}, output_dir=folder, overwrite=True)
    Run("sft", {}, output_dir=folder, overwrite=True).close()


def test_a_place_where_no_folder_can_be_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Run("sft", {}, output_dir=tmp_path / "file" / "run")


# ------------------------------------------------------------------------------ the lock

HOLDER = """
    import sys, time
    from run_folder.run import Run
    run = Run("sft", {}, output_dir=sys.argv[1])
    print("open", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_dead_one_leaves_no_lock(folder):
    holder = python(HOLDER, str(folder))
    assert holder.stdout.readline() == "open\n"
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=f"by process {holder.pid}"):
            Run("sft", {}, output_dir=folder, **options)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with Run("sft", {}, output_dir=folder, resume=True) as run:
        run.log(1, {"x": 1})
    assert read_rows(folder) == [{"step": 1, "x": 1}]


def test_a_closed_run_frees_its_folder(folder):
    Run("sft", {}, output_dir=folder).close()
    with pytest.raises(UserError, match="holds a run"):
        Run("sft", {}, output_dir=folder)
    Run("sft", {}, output_dir=folder, resume=True).close()
