"""A disk that is full, read-only or gone: a clear error, and the last checkpoint whole."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from reliable_runs import (
    RUNS,
    SLOW,
    Ended,
    Server,
    differences,
    left_by,
    metrics,
    shared_server,
    whole,
)

from run_folder.checkpoint_folder import list_checkpoints, problem


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
    "name, saved", [("sft", "out.npz"), ("sft", "adapter"), ("ppo", "out.safetensors")]
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


def test_a_run_folder_that_vanishes(server, tmp_path):
    script, line = RUNS["ppo"]
    running = server.start(script, line, tmp_path, prelude=SLOW.format(seconds=0.1))
    running.wait_for_file(tmp_path / "run" / "metrics.jsonl")
    (tmp_path / "run").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    refused(running.wait(), "was deleted while the run", "cannot write")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out.npz").exists()
