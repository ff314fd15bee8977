"""Workers that are started by hand, as a launcher does: they meet, compare, and refuse."""

import json
import threading
import time

import pytest
from together import ended, started

import distributed.line
from distributed.line import Absent, meet
from distributed.local import free_ports
from distributed.membership import workers_named
from distributed.place import Place, of_ring
from errors import UserError

LINE = (
    "--train --data DATA --iters 2 --batch-size 4 --steps-per-eval 0 --output-dir run "
    "--save-file out.npz"
)


def hostfile(folder, addresses=None):
    addresses = addresses or [f"127.0.0.1:{port}" for port in free_ports(2)]
    file = folder / "hosts.json"
    file.write_text(json.dumps([[address] for address in addresses]), encoding="utf-8")
    return file


def both(folder, lines, **env):
    """Two workers with a command line each."""
    file = hostfile(folder)
    processes = [
        started(folder, "sft.py", line, MLX_RANK=str(rank), MLX_HOSTFILE=str(file), **env)
        for rank, line in enumerate(lines)
    ]
    return [ended(process) for process in processes]


DIFFERENT = {
    "options": (f"{LINE} --seed 4", "worker 1 has --seed 4, and worker 0 0; all workers need"),
    "data": (f"{LINE} --max-rows 9", "worker 1 has --max-rows 9, and worker 0 None"),
    "no data": (f"{LINE} --data nowhere", "worker 1: nowhere: no such folder"),
    "number": (f"{LINE} --num-training-workers 3", "worker 1: --num-training-workers 3: this is"),
}


@pytest.mark.parametrize(
    "name", ["options", *(pytest.param(n, marks=pytest.mark.long) for n in [*DIFFERENT][1:])]
)
def test_workers_that_would_do_different_things_are_refused(name, tmp_path):
    """One line from worker 0, and both end before a run is begun."""
    other, said = DIFFERENT[name]
    first, second = both(tmp_path, [LINE, other])
    assert (first.code, second.code) == (2, 2)
    assert first.error.startswith(f"error: {said}")
    assert second.err == second.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_other_rows_in_a_file_of_the_same_name_are_refused(tmp_path):
    rows = [json.dumps({"text": f"{n} {n + 1} {n + 2}"}) for n in range(4)]
    for rank in (0, 1):
        (tmp_path / f"{rank}").mkdir()
        (tmp_path / f"{rank}" / "rows.jsonl").write_text("\n".join(rows[rank:]), encoding="utf-8")
    file = hostfile(tmp_path)
    line = "--train --train-file rows.jsonl --iters 2 --output-dir run --save-file out.npz"
    processes = [
        started(tmp_path / rank, "sft.py", line, MLX_RANK=rank, MLX_HOSTFILE=str(file))
        for rank in ("0", "1")
    ]
    first, second = map(ended, processes)
    assert (first.code, second.code) == (2, 2)
    said = "error: worker 1 differs from worker 0 in the training data; all workers need the same"
    assert first.error == said


def test_a_script_that_works_alone_is_not_started_as_several(tmp_path):
    """Two of it would write into one folder."""
    env = {"MLX_HOSTFILE": str(hostfile(tmp_path))}
    processes = [started(tmp_path, "rest.py", "", MLX_RANK=rank, **env) for rank in ("0", "1")]
    first, second = map(ended, processes)
    assert (first.code, second.code) == (2, 2)
    assert first.error.startswith("error: rest.py works alone") and second.err == ""


@pytest.mark.long
def test_an_error_of_all_is_said_once(tmp_path):
    first, second = both(tmp_path, [f"{LINE} --use-contrastive"] * 2)
    assert (first.code, second.code) == (2, 2)
    assert "--use-contrastive" in first.error and second.err == ""


@pytest.mark.long
def test_the_run_that_is_resumed_is_needed_at_worker_0_alone(tmp_path):
    """As on two machines: the other one's disk has neither run nor checkpoint."""
    for rank in (0, 1):
        (tmp_path / f"{rank}").mkdir()
    for line in (f"{LINE} --save-every 1", "--resume run --iters 4"):
        file = hostfile(tmp_path)
        processes = [
            started(tmp_path / rank, "sft.py", line, MLX_RANK=rank, MLX_HOSTFILE=str(file))
            for rank in ("0", "1")
        ]
        for found in map(ended, processes):
            assert found.code == 0, found.err
    assert not [*(tmp_path / "1").iterdir()]
    assert json.loads((tmp_path / "0" / "run" / "summary.json").read_text())["steps"] == 4


# ------------------------------------------------------------------------------ addresses


WRONG = {
    '[["127.0.0.1:5000"], ["127.0.0.1:5000"]]': "workers 0 and 1 have one address, 127.0.0.1:5000",
    "[[]]": "a list of addresses for each worker is needed",
    '[["127.0.0.1"]]': "a list of addresses for each worker is needed",
    "{": "a list of addresses for each worker is needed",
    '[["127.0.0.1:5000"], ["127.0.0.1:5001"]]': "names 2 workers, and this is number 2",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_hostfile_of_no_use_is_refused(text, tmp_path):
    file = tmp_path / "hosts.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=WRONG[text]):
        of_ring(2, str(file))


def place(rank: int, *addresses) -> Place:
    return Place(rank, len(addresses), tuple(addresses), "hosts.json")


def test_an_address_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr(distributed.line, "FAREWELL", 0.05)
    (port,) = free_ports(1)
    lost = place(0, ("127.0.0.1", port), ("no-such-mac.invalid", 5000))
    with pytest.raises(UserError, match=r"worker 1 \(no-such-mac.invalid:5000\) cannot be reached"):
        meet(lost, 5.0)


def test_a_worker_that_does_not_come_is_named():
    one, two = free_ports(2)
    with pytest.raises(Absent, match=r"worker 1 \(127.0.0.1:\d+\) did not come within 0.1 s"):
        meet(place(0, ("127.0.0.1", one), ("127.0.0.1", two)), 0.1)


def test_workers_meet_and_hear_of_each_other():
    addresses = [("127.0.0.1", port) for port in free_ports(3)]
    lines = {}

    def come(rank: int) -> None:
        lines[rank] = meet(place(rank, *addresses), 10.0, {"date": "today"} if not rank else None)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(line.given == {"date": "today"} for line in lines.values())
    lines[2].send(error="it broke", stage="loading")
    limit = time.monotonic() + 10
    while 2 not in lines[0].errors and time.monotonic() < limit:
        time.sleep(0.01)
    assert lines[0].errors == {2: "it broke"} and lines[0].stages == {2: "loading"}
    lines[1].close()
    while 1 not in lines[0].gone and time.monotonic() < limit:
        time.sleep(0.01)
    assert lines[0].gone == {1} and lines[0].silent(1000) == []
    for line in lines.values():
        line.close()


def test_workers_are_named():
    assert [workers_named([1]), workers_named([1, 2, 4])] == ["worker 1", "workers 1, 2 and 4"]
