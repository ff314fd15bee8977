"""What workers share, in one process: cut into sums, signals, the start of MLX's connections."""

import os
import signal
import subprocess
import sys
import threading

import mlx.core as mx
import pytest
from files import ROOT

import distributed.line
from distributed import group
from distributed.group import Workers, digest, join, raw_parts, together
from distributed.line import Absent, meet
from distributed.local import free_ports
from distributed.membership import Membership
from distributed.place import Place
from distributed.stopping import SharedStop
from errors import UserError
from run_folder.stopping import StepGivenUp

ARRAYS = {
    "a row of every kind": mx.arange(10).astype(mx.bfloat16),
    "transposed": mx.arange(12).reshape(3, 4).T,
    "bool": mx.array([True, False, True]),
    "number": mx.array(3.0),
    "none": mx.zeros((0, 3)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_bytes_of_large_arrays_go_in_pieces(name, monkeypatch):
    """MLX counts the numbers of an array in 32 bits; here the most is 7 bytes."""
    array, whole = ARRAYS[name], digest({"x": ARRAYS[name]})
    monkeypatch.setattr(group, "MOST", 7 if array.dtype.size < 4 else 8)
    parts = raw_parts(array)
    assert max(part.size for part in parts) <= group.MOST
    again = mx.concatenate([part.view(array.dtype) for part in parts]).reshape(array.shape)
    assert again.tolist() == array.tolist()
    assert digest({"x": array}) == whole


def test_gradients_are_added_up_in_sums_of_no_more_than_so_many_numbers(monkeypatch):
    monkeypatch.setattr(group, "MOST", 7)
    found = together([mx.zeros(count) for count in (3, 3, 3, 9, 1, 0, 6, 2)])
    sizes = [[part.size for part in some] for some in found]
    assert sizes == [[3, 3], [3], [9], [1, 0, 6], [2]]  # one array is not cut


# ------------------------------------------------------------------------------ signals


def of_two() -> Workers:
    workers = Workers()
    workers.size = 2
    return workers


def test_a_signal_counts_once_all_have_heard_of_it():
    workers = of_two()
    with SharedStop(workers) as stop, stop.giving_up():
        os.kill(os.getpid(), signal.SIGINT)
        assert workers.heard == signal.SIGINT and not stop.requested
        workers.stop = signal.SIGTERM  # what a sum brought
        workers.parted = True
        assert stop.requested and stop.signal == signal.SIGTERM


@pytest.mark.parametrize("rank", [0, 1])
def test_after_the_others_a_signal_is_of_worker_0_alone(rank):
    """Worker 1 has nothing to save: were it to fail, worker 0 would be ended."""
    workers = of_two()
    workers.rank, workers.parted = rank, True
    with SharedStop(workers) as stop:
        given_up = False
        try:
            with stop.giving_up():
                os.kill(os.getpid(), signal.SIGTERM)
        except StepGivenUp:
            given_up = True
        assert (given_up, stop.requested) == (rank == 0, rank == 0)


# ------------------------------------------------------------------------------ MLX's start


def test_a_backend_that_mlx_does_not_have_is_an_error_in_its_own_words(monkeypatch):
    """As `mpirun` starts it, with an MLX that has no MPI."""
    member = Membership(Place(0, 2))
    try:
        with pytest.raises(UserError, match=r"MLX cannot connect the workers: \[distributed\]"):
            join(member)
    finally:
        member.leave()


STUCK = """
import ctypes, sys
sys.path.insert(0, {root!r})
from distributed.guard import ended_after
with ended_after(0.3, "error: too long"):
    pass
with ended_after(0.3, "error: too long"):
    ctypes.PyDLL(None).sleep(30)  # holds Python's lock
"""


def test_a_wait_that_holds_pythons_lock_is_ended_and_said():
    found = subprocess.run(
        [sys.executable, "-c", STUCK.format(root=str(ROOT))], capture_output=True, timeout=25
    )
    assert found.returncode == -signal.SIGALRM
    assert found.stderr == b"error: too long\n"


# ------------------------------------------------------------------------------ addresses


def test_addresses_that_mlx_cannot_use_are_refused(monkeypatch):
    monkeypatch.setattr(distributed.line, "FAREWELL", 0.05)
    one, two = free_ports(2)
    place = Place(0, 2, (("127.0.0.1", one), ("::1", two)), "hosts.json")
    with pytest.raises(UserError, match=r"worker 1 \(::1:\d+\): MLX's ring needs an IPv4 address"):
        meet(place, 5.0)


def test_a_worker_that_calls_and_cannot_be_called_is_named(monkeypatch):
    """As behind a firewall; nobody listens at the address that worker 1 has."""
    one, two = free_ports(2)
    addresses = (("127.0.0.1", one), ("127.0.0.1", two))
    monkeypatch.setattr(distributed.line, "listening", no_listening(distributed.line.listening))
    said = {}

    def come(rank: int) -> None:
        try:
            meet(Place(rank, 2, addresses, "hosts.json"), 10.0)
        except (UserError, Absent) as wrong:
            said[rank] = str(wrong)

    run_together(come, (1, 0))
    assert said[0].startswith(f"worker 1 (127.0.0.1:{two}) reaches worker 0 and cannot be reached")
    assert "no firewall" in said[0] and said[1] == "worker 0 gave up"


def no_listening(inner):
    """`listening` whose socket worker 1 does not hold."""

    def listening(place):
        server = inner(place)
        if place.rank:
            server.close()
        return server

    return listening


def run_together(work, ranks) -> None:
    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
