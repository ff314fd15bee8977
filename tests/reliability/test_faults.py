"""Each touch of a file fails once, or kills the run: the printed next command ends the same.

A library that is loaded before all others (fault_shim.c) counts every write, sync, rename, unlink,
mkdir and open below the folder of a run, those of MLX too. The quick version takes a few touches
of each script of the table, the long one all.
"""

import fast_blas  # noqa: F401  isort: skip

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from reliable_runs import Ended, Server, differences, left_by
from script_table import SHORT

from safe_files import TEMPORARY

LIST, FAIL, KILL = 0, 1, 2
POINTS = 10  # of a script, in the quick version
LEFT_OVERS = re.compile(rf"{TEMPORARY.pattern}|\.tmp-.*|.*\.npz\.lock")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("faults")
    source, shim = Path(__file__).with_name("fault_shim.c"), folder / "shim.so"
    words = [compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(shim), "-ldl"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the shim is for Linux: {done.stderr[:200]}")
    with Server(folder, shim) as started:
        started.ends = {}
        yield started


def start_of(server: Server, name: str, folder: Path) -> Path:
    """A folder with what a run of SHORT needs to begin."""
    folder.mkdir()
    if needs := SHORT[name].needs:
        shutil.copytree(whole(server, needs)[0], folder, dirs_exist_ok=True)
    return folder


def whole(server: Server, name: str) -> tuple[Path, dict, list[str]]:
    """The folder that a run leaves which nothing stops, what is in it, and every touch of it."""
    if name not in server.ends:
        folder = start_of(server, name, server.folder / f"whole {name}")
        short = SHORT[name]
        ended = server.run(short.script, short.line, folder, fault=(0, LIST))
        assert ended.code == 0, ended.err
        touches = [line[6:] for line in ended.err.splitlines() if line.startswith("touch ")]
        server.ends[name] = (folder, contents(folder, name), touches)
    return server.ends[name]


def contents(folder: Path, name: str) -> dict:
    """What has to be the same: all bytes of what was saved, and of the run."""
    short = SHORT[name]
    if (folder / short.saved).is_dir():
        return {p.name: p.read_bytes() for p in (folder / short.saved).rglob("*") if p.is_file()}
    return left_by(folder / "run", short.saved)


def go_on(server: Server, name: str, folder: Path, first: Ended) -> Ended:
    """The same command again, and where it refuses the one that it prints."""
    short = SHORT[name]
    ended = server.run(short.script, short.line, folder)
    if ended.code == 0:
        return ended
    printed = re.search(r"--resume (\S+?),? (?:choose|.)|(--force)\b|(--overwrite)\b", ended.error)
    assert printed, f"no way on: {ended.err}\nafter: {first.err}"
    more = [printed[2] or printed[3]] if printed[2] or printed[3] else None
    line = [*short.line, *more] if more else ["--resume", *shlex.split(printed[1].rstrip(","))]
    return server.run(short.script, line, folder)


def hit(server: Server, name: str, folder: Path, count: int, action: int) -> None:
    """One run with a fault at its `count`-th touch, and what follows."""
    expected, touch = whole(server, name)[1], whole(server, name)[2][count - 1]
    start_of(server, name, folder)
    short, what = SHORT[name], f"{'fail' if action == FAIL else 'kill'} at {touch}"
    ended = server.run(short.script, short.line, folder, fault=(count, action))
    assert "Traceback" not in ended.err, f"{what}: {ended.err}"
    assert ended.code in ((0, 2) if action == FAIL else (-signal.SIGKILL,)), f"{what}: {ended.err}"
    if ended.code == 2:
        errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, f"{what}: {ended.err}"
    if ended.code:
        again = go_on(server, name, folder, ended)
        assert again.code == 0, f"{what}: {again.err}\nafter: {ended.err}"
    assert differences(expected, contents(folder, name)) == [], f"{what}: {ended.err}"
    if action == KILL or ended.code:
        left = [p.name for p in folder.rglob(".*") if LEFT_OVERS.fullmatch(p.name)]
        assert not left, f"{what}: {left}"
    shutil.rmtree(folder)


def spread(count: int, points: int) -> list[int]:
    """`points` numbers from 1 to `count`, evenly and with the last one."""
    return [round(count * (at + 1) / points) for at in range(points)]


@pytest.mark.parametrize("name", SHORT)
def test_some_touches(server, tmp_path, name):
    """Ten of a script, by turns a failure and a kill."""
    script, count = SHORT[name].script, len(whole(server, name)[2])
    assert count > 50
    runs = sum(short.script == script for short in SHORT.values())
    for number, at in enumerate(spread(count, POINTS // runs)):
        hit(server, name, tmp_path / str(at), at, (KILL, FAIL)[number % 2])


@pytest.mark.long
@pytest.mark.parametrize("action", [FAIL, KILL], ids=["fail", "kill"])
@pytest.mark.parametrize("name", SHORT)
def test_every_touch(server, tmp_path, name, action):
    """MLX_RLHF_TOUCHES=100-120 repeats some of them."""
    first, _, last = os.environ.get("MLX_RLHF_TOUCHES", f"1-{10**9}").partition("-")
    wrong, count = [], len(whole(server, name)[2])
    tried = range(int(first), min(count, int(last)) + 1)
    for at in tried:
        try:
            hit(server, name, tmp_path / str(at), at, action)
        except AssertionError as error:
            wrong.append(str(error).partition("\nassert")[0][:1500])
    print(f"{name}: {len(tried)} touches, {len(wrong)} wrong")
    assert not wrong, "\n\n".join(wrong)
