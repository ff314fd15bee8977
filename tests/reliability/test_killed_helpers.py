"""W&B's process dies, memory has a limit, an upload is cut off, one --save-file has two runs."""

import fast_blas  # noqa: F401  isort: skip

import contextlib
import os
import signal
from pathlib import Path

import pytest
from files import tree
from hub_server import TOKEN, Hub
from reliable_runs import SLOW, Server, differences, left_by, quick, shared_server, whole_short
from script_table import SHORT, TRAINED


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


# ------------------------------------------------------------------------------ W&B

NO_SERVICE = """
import glob, os, signal, sys, run_folder.run
inner = run_folder.run.Run.log
def log(self, step, row):
    for place in glob.glob("/proc/[0-9]*/cmdline") if step == {step} else ():
        try:
            words, pid = open(place, "rb").read(), int(place.split("/")[2])
            parent = int(open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if b"wandb-core" in words and parent == os.getpid():
            os.kill(pid, signal.SIGKILL)
            sys.stderr.write("W&B is dead\\n")
    return inner(self, step, row)
run_folder.run.Run.log = log
"""


@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", quick("sft", TRAINED))
def test_a_run_outlives_the_process_of_wandb(server, tmp_path, name, step):
    pytest.importorskip("wandb")
    short, prelude = SHORT[name], NO_SERVICE.format(step=step)
    line = [*short.line, "--log-with", "wandb"]
    ended = server.run(short.script, line, tmp_path, prelude=prelude, WANDB_MODE="offline")
    assert ended.code == 0 and "W&B is dead" in ended.err, ended.err
    assert ended.err.count("warning: --log-with wandb: ") == 1 and "Traceback" not in ended.err
    assert "goes on without it, and run/metrics.jsonl has every row" in ended.err
    assert differences(whole_short(name)[1], left_by(tmp_path / "run", "out.npz")) == []


# ------------------------------------------------------------------------------ memory

GREEDY = """
import os, run_folder.run
with open("{group}/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
inner = run_folder.run.Run.log
def log(self, step, row):
    if step == 2:
        self.taken = b"x" * ({limit} * 2)
    return inner(self, step, row)
run_folder.run.Run.log = log
"""


@pytest.fixture
def memory_group():
    """(a group of processes that may have so much memory together, the bytes)."""
    limit, name = 300 << 20, f"mlx-rlhf-test-{os.getpid()}"
    first = Path("/sys/fs/cgroup/memory")
    folder = (first if first.is_dir() else first.parent) / name
    file = "memory.limit_in_bytes" if first.is_dir() else "memory.max"
    try:
        folder.mkdir()
        (folder / file).write_text(str(limit))
    except OSError as wrong:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no group with a limit of memory can be made here: {wrong}")
    yield folder, limit
    folder.rmdir()


@pytest.mark.parametrize("name", quick("ppo", TRAINED))
def test_a_run_that_the_system_ends_for_its_memory_goes_on(server, tmp_path, memory_group, name):
    short, (group, limit) = SHORT[name], memory_group
    prelude = GREEDY.format(group=group, limit=limit)
    ended = server.run(short.script, short.line, tmp_path, prelude=prelude)
    assert ended.code == -signal.SIGKILL, ended.err
    ended = server.run(short.script, ["--resume", "run"], tmp_path)
    assert ended.code == 0, ended.err
    assert differences(whole_short(name)[1], left_by(tmp_path / "run", "out.npz")) == []


# ------------------------------------------------------------------------------ uploads

LOCAL_HUB = """
from huggingface_hub import constants
constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = "{endpoint}", True
constants.HF_TOKEN_PATH = "nowhere"
"""


def upload(server: Server, hub: Hub, folder):
    """A run of fuse.py that sends `folder`'s model to a hub on this machine."""
    words = ["--model", "fused", "--upload-repo", "someone/model"]
    prelude = LOCAL_HUB.format(endpoint=hub.endpoint)
    return server.start(
        "fuse.py", words, folder, prelude=prelude, HF_TOKEN=TOKEN, NO_PROXY="127.0.0.1"
    )


def test_an_upload_that_is_killed_at_any_request_is_made_by_the_same_command(server, tmp_path):
    """The branch has all of the model or nothing of it, and the folder is as it was."""
    fused = whole_short("fuse")[0]
    (folder := tmp_path / "x").symlink_to(fused)
    with Hub() as hub:
        assert upload(server, hub, folder).wait().code == 0
        count, expected = len(hub.log), hub.repos["someone/model"].branches["main"]
    assert count > 4 and "model.safetensors" in expected
    before = tree(fused)
    for at in range(1, count + 1):
        with Hub() as hub:
            running = []

            def heard(number, at=at, running=running):
                if number == at:
                    while not running:  # the request may be faster than the answer of the server
                        pass
                    running[0].signal(signal.SIGKILL)

            hub.heard = heard
            running.append(upload(server, hub, folder))
            assert running[0].wait().code in (0, -signal.SIGKILL)
            there = hub.repos.get("someone/model")
            assert there is None or there.branches["main"] in ({}, expected), at
            hub.heard = lambda number: None
            ended = upload(server, hub, folder).wait()
            assert ended.code == 0, ended.err
            assert hub.repos["someone/model"].branches["main"] == expected
    assert tree(fused) == before


# ------------------------------------------------------------------------------ one --save-file


@pytest.mark.parametrize("other", ["out.npz", "run/../out.npz", "out.safetensors"])
def test_a_second_run_with_the_same_save_file_is_refused(server, tmp_path, other):
    """By another name of it, too, and by one whose heads would lie beside the same name."""
    short = SHORT["sft"]
    running = server.start(short.script, short.line, tmp_path, prelude=SLOW.format(seconds=60))
    running.wait_for_file(tmp_path / "run" / "config.json")
    second = [*short.line, "--output-dir", "second", "--save-file", other]
    ended = server.run(short.script, second, tmp_path)
    assert ended.code == 2
    assert f"is going to be written by process {running.pid}" in ended.error
    assert not (tmp_path / "second" / "config.json").exists()
    running.signal(signal.SIGKILL)
    running.wait()
    ended = server.run(short.script, second, tmp_path)  # a dead one holds no lock
    assert ended.code == 0, ended.err
    assert (tmp_path / other).is_file()
