"""A disk that is full, read-only or gone: a clear error, and the last checkpoint whole."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from files import tree
from fuse_setup import make_adapter
from reliable_runs import (
    DATA,
    RUNS,
    SHORT,
    SLOW,
    Ended,
    Server,
    differences,
    left_by,
    metrics,
    quick,
    shared_server,
    whole,
    whole_short,
)
from script_table import TRAINED

import fuse
import score
from chat.rating import Ratings
from errors import UserError
from run_folder.checkpoint_folder import list_checkpoints, problem

SETS = "preference_increasing_mult_2"


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


class SmallDisk:
    """A file system of a given size, of its own; skips the test where none can be mounted."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def mount(self, options: str) -> None:
        """`options`: of mount, such as "size=1m", or "remount,ro" once it is there."""
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.place)]
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount command here")
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")

    def unmount(self) -> None:
        if os.path.ismount(self.place):
            subprocess.run(["umount", str(self.place)], check=True)


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    small = SmallDisk(place)
    yield small
    small.unmount()


def all_whole(run: Path) -> bool:
    """Whether there is a checkpoint, every one is whole, and nothing half-written lies about."""
    there = list_checkpoints(run / "checkpoints")
    return bool(there) and not any(map(problem, there)) and not list(run.rglob(".tmp*"))


def refused(ended: Ended, *reasons: str) -> None:
    assert ended.code == 2, ended.err
    assert any(reason in ended.error for reason in reasons), ended.error
    assert ended.err.count("error: ") == 1 and "Exception ignored" not in ended.err


# ------------------------------------------------------------------------------ full


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_full_disk_ends_the_run_and_with_room_it_goes_on(server, tmp_path, disk, name):
    script, line = RUNS[name]
    disk.mount("size=250k")
    ended = server.run(script, [*line, "--keep-checkpoints", "100"], disk.place)
    refused(ended, "No space left on device", "MB free on this disk")
    assert all_whole(disk.place / "run")
    (elsewhere := tmp_path / "larger").mkdir()
    shutil.copytree(disk.place / "run", elsewhere / "run")
    ended = server.run(script, ["--resume", "run"], elsewhere)
    assert ended.code == 0, ended.err
    assert differences(whole(name)[0], left_by(elsewhere / "run", "out.npz")) == []


# The rows are made to reach a limit on the size of files; checkpoints stay below it.
LONG_ROWS = """
import signal, run_folder.run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
inner = run_folder.run.Run.log
def log(self, step, row):
    return inner(self, step, dict(row, padding="x" * ({limit} // 4)))
run_folder.run.Run.log = log
"""


def test_a_limit_on_file_sizes_is_a_full_disk(server, tmp_path):
    """Needs no mounting."""
    script, line = RUNS["sft"]
    largest = max(map(len, (x for x in whole("sft")[0]["last"].values() if type(x) is bytes)))
    ended = server.run(script, line, tmp_path, prelude=LONG_ROWS.format(limit=2 * largest))
    refused(ended, "run/metrics.jsonl: cannot write: File too large")
    assert all_whole(tmp_path / "run")
    ended = server.run(script, ["--resume", "run"], tmp_path)
    assert ended.code == 0, ended.err
    rows = [{k: v for k, v in row.items() if k != "padding"} for row in metrics(tmp_path / "run")]
    assert rows == whole("sft")[0]["metrics"]
    assert (tmp_path / "out.npz").read_bytes() == whole("sft")[0]["out.npz"]


@pytest.mark.parametrize(
    "name, saved",
    [
        ("sft", "out.npz"),
        ("ppo", "out.safetensors"),
        pytest.param("sft", "adapter", marks=pytest.mark.long),
    ],
)
def test_no_room_for_the_trained_weights_leaves_no_half_of_them(
    server, tmp_path, disk, name, saved
):
    script, line = RUNS[name]
    disk.mount("size=16k")
    target = str(disk.place / saved)
    ended = server.run(script, [*line, "--save-file", target], tmp_path)
    refused(ended, f"{target}: cannot write: ")
    assert "--resume" in ended.error
    assert [path for path in disk.place.rglob("*") if path.is_file()] == []
    ended = server.run(script, ["--resume", "run", "--save-file", "out.npz"], tmp_path)
    assert ended.code == 0, ended.err
    assert differences(whole(name)[0], left_by(tmp_path / "run", "out.npz")) == []


# ------------------------------------------------------------------------------ read-only, gone


def test_a_disk_that_has_become_read_only(server, tmp_path, disk):
    script, line = RUNS["sft"]
    disk.mount("size=8m")
    running = server.start(script, line, disk.place, prelude=SLOW.format(seconds=0.05))
    running.wait_for_file(disk.place / "run" / "checkpoints" / "step-00000002" / "manifest.json")
    running.signal(signal.SIGKILL)
    running.wait()
    disk.mount("remount,ro")
    refused(server.run(script, ["--resume", "run"], disk.place), "Read-only file system")
    assert all_whole(disk.place / "run")
    other = [*line, "--output-dir", str(disk.place / "other")]
    refused(server.run(script, other, tmp_path), "other: cannot write: Read-only file system")
    disk.mount("remount,rw")
    ended = server.run(script, ["--resume", "run"], disk.place)
    assert ended.code == 0, ended.err
    assert differences(whole("sft")[0], left_by(disk.place / "run", "out.npz")) == []


def test_a_place_that_cannot_be_written_is_refused_before_training(server, tmp_path):
    script, line = RUNS["sft"]
    (tmp_path / "file").write_text("")
    ended = server.run(script, [*line, "--output-dir", "file/run"], tmp_path)
    refused(ended, "file/run: cannot write: Not a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", quick("sft ppo", TRAINED))
def test_every_place_of_a_result_is_tried_before_training(server, tmp_path, name):
    """Not the name of the file alone: that of its temporary, and of a head beside it."""
    short, long = SHORT[name], "x" * 245
    for more, said in (
        (["--save-file", f"{long}.npz"], f"{long}.npz: cannot write: File name too long"),
        (["--fused-dir", long], f"{long}: cannot write: File name too long"),
        (["--fused-dir", "/proc/nowhere/model"], "/proc/nowhere/model: cannot write: "),
        (["--save-file", "/proc/nowhere/out.npz"], "/proc/nowhere/out.npz: cannot write: "),
    ):
        ended = server.run(short.script, [*short.line, *more], tmp_path)
        refused(ended, said)
        assert "steps/s" not in ended.err and not list(tmp_path.glob("run/c*/*")), more
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["plots", "checkpoints", "metrics.jsonl", "summary.json", "plots/loss.png"]
)
def test_what_is_in_the_way_of_a_resumed_run_is_said_before_training(server, tmp_path, name):
    short, place = SHORT["sft"], tmp_path / "run" / name
    shutil.copytree(whole_short("sft")[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    if "." in name:
        (place / "precious").mkdir(parents=True)
    else:
        place.write_text("precious")
    before = tree(tmp_path)
    ended = server.run(short.script, ["--resume", "run", "--iters", "4"], tmp_path)
    refused(ended, f"run/{name}: is a ")
    assert "steps/s" not in ended.err and tree(tmp_path) == before


def test_places_of_other_scripts_are_tried_before_their_work(tmp_path, capsys):
    """In this process: nothing may have been loaded when the place is refused."""
    make_adapter(tmp_path / "a.npz", "lora")
    for script, line in (
        (fuse, ["--adapter-file", str(tmp_path / "a.npz"), "--save-path"]),
        (score, ["--input", str(DATA / f"{SETS}_test.jsonl"), "--ground-truth-reward", "--output"]),
    ):
        for place in ("/proc/nowhere/out", str(tmp_path / "a.npz" / "out"), "y" * 245):
            with pytest.raises((UserError, SystemExit)) as end:
                script.main([*line, place])
            assert "cannot write: " in f"{end.value}{capsys.readouterr().err}"
    with pytest.raises(UserError, match="cannot write: "):
        Ratings("/proc/ratings.jsonl", "unpaired")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_run_folder_that_vanishes(server, tmp_path):
    script, line = RUNS["ppo"]
    running = server.start(script, line, tmp_path, prelude=SLOW.format(seconds=0.1))
    running.wait_for_file(tmp_path / "run" / "metrics.jsonl")
    (tmp_path / "run").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    refused(running.wait(), "was deleted while the run", "cannot write")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out.npz").exists()
