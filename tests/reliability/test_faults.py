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
from pathlib import Path

import pytest
from reliable_runs import (
    Ended,
    Server,
    differences,
    fault_shim,
    left_by_short,
    quick,
    shared_server,
    start_of,
    whole_short,
)
from script_table import SHORT, TRAINED

from safe_files import TEMPORARY

FAIL, KILL = 1, 2
POINTS = 10  # of a script, in the quick version
LEFT_OVERS = re.compile(rf"{TEMPORARY.pattern}|\.tmp-.*|\..*\.lock")


@pytest.fixture(scope="module")
def server() -> Server:
    shim = fault_shim()
    if isinstance(shim, str):
        pytest.skip(shim)
    return shared_server()


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
    expected, touch = whole_short(name)[1], whole_short(name)[2][count - 1]
    start_of(name, folder)
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
    assert differences(expected, left_by_short(folder, name)) == [], f"{what}: {ended.err}"
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
    script, count = SHORT[name].script, len(whole_short(name)[2])
    assert count > 50
    runs = sum(short.script == script for short in SHORT.values())
    for number, at in enumerate(spread(count, POINTS // runs)):
        hit(server, name, tmp_path / str(at), at, (KILL, FAIL)[number % 2])


# ------------------------------------------------------------------------------ the beginning


def beginnings(name: str) -> list[int]:
    """Touches right behind those that give a run its first two files, whichever is first."""
    touches = [touch.split(" ", 1)[1] for touch in whole_short(name)[2]]
    named = touches.index("rename run/config.json")
    rows = next(i for i, touch in enumerate(touches) if touch.startswith("open run/metrics.jsonl"))
    return [min(named, rows) + 2, max(named, rows) + 1, max(named, rows) + 2]


def three_commands(server: Server, name: str, folder: Path) -> list[Ended]:
    """The same command, --resume and --overwrite, each in a copy of what a kill has left."""
    short, found = SHORT[name], []
    for how, line in (
        ("same", short.line),
        ("resume", ["--resume", "run"]),
        ("overwrite", [*short.line, "--overwrite"]),
    ):
        copy = folder.with_name(f"{folder.name}-{how}")
        shutil.copytree(folder, copy)
        found.append(server.run(short.script, line, copy))
        if found[-1].code == 0:
            assert differences(whole_short(name)[1], left_by_short(copy, name)) == [], how
    return found


def check_way_on(ended: list[Ended]) -> None:
    """One of the three works, and those that refuse name one that does."""
    works = {
        how
        for how, end in zip(("same", "resume", "overwrite"), ended, strict=True)
        if end.code == 0
    }
    said = [end.err for end in ended]
    assert works, said
    for end in ended:
        if end.code:
            named = {how for how in ("resume", "overwrite") if f"--{how}" in end.error}
            assert end.code == 2 and (named & works or "same" in works), end.error


@pytest.mark.parametrize("name", quick("sft", TRAINED))
def test_killed_between_metrics_and_config_one_of_three_commands_works(server, tmp_path, name):
    """The same command, --resume and --overwrite were all refused: a folder stuck for good."""
    short, points = SHORT[name], beginnings(name)
    for at in points[:1] if name == "sft" else points:
        folder = start_of(name, tmp_path / str(at))
        ended = server.run(short.script, short.line, folder, fault=(at, KILL))
        assert ended.code == -signal.SIGKILL
        check_way_on(three_commands(server, name, folder))


@pytest.mark.parametrize("left", [["metrics.jsonl"], ["metrics.jsonl", "samples.jsonl"], []])
@pytest.mark.parametrize("name", quick("", ["sft", "ppo", "group"]))
def test_what_older_versions_left_of_a_beginning_is_no_stuck_folder(server, tmp_path, name, left):
    """They opened metrics.jsonl before they wrote config.json."""
    (run := tmp_path / "x" / "run").mkdir(parents=True)
    for file in left:
        (run / file).touch()
    check_way_on(three_commands(server, name, tmp_path / "x"))


# ------------------------------------------------------------------------------ all of them


@pytest.mark.long
@pytest.mark.parametrize("action", [FAIL, KILL], ids=["fail", "kill"])
@pytest.mark.parametrize("name", SHORT)
def test_every_touch(server, tmp_path, name, action):
    """MLX_RLHF_TOUCHES=100-120 repeats some of them."""
    first, _, last = os.environ.get("MLX_RLHF_TOUCHES", f"1-{10**9}").partition("-")
    wrong, count = [], len(whole_short(name)[2])
    tried = range(int(first), min(count, int(last)) + 1)
    for at in tried:
        try:
            hit(server, name, tmp_path / str(at), at, action)
        except AssertionError as error:
            wrong.append(str(error).partition("\nassert")[0][:1500])
    print(f"{name}: {len(tried)} touches, {len(wrong)} wrong")
    assert not wrong, "\n\n".join(wrong)
