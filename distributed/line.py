"""A line from worker 0 to each of the others, beside MLX's own connections. Loads no MLX.

MLX's ring waits without end for a worker that never comes, holding Python's lock meanwhile, and
cannot say which one is lost. So the workers meet here first, at the address that worker 0 has in
the hostfile, and keep the line: each says once a second that it is there and what it waits for.
Messages are lines of JSON.
"""

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any

from distributed.place import Place
from errors import UserError

HELLO = "mlx-rlhf"
TRY = 2.0  # seconds for one attempt to connect
BEAT = 1.0  # seconds between signs of life
FAREWELL = 3.0  # seconds for the others to come and hear that nothing begins
SILENT = 5.0  # seconds without one after which a worker, or its machine, is held to be stopped


class Absent(Exception):
    """A worker that is needed did not come; the message names it, or is empty: another says it."""


class Line:
    """The connections of this worker: of worker 0 to all others, of another to worker 0."""

    def __init__(self, place: Place, peers: dict[int, socket.socket], given: Any) -> None:
        self.place, self.peers, self.given = place, peers, given
        now = time.monotonic()
        self.heard = dict.fromkeys(peers, now)
        self.stages: dict[int, str] = {}  # what each one said last that it waits for
        self.errors: dict[int, str] = {}
        self.ready: set[int] = set()
        self.go = threading.Event()
        self.gone: set[int] = set()
        self.told_to_stop = threading.Event()
        self.writing = threading.Lock()
        for rank, peer in peers.items():
            reader = threading.Thread(target=self._read, args=(rank, peer), daemon=True)
            reader.start()

    def _read(self, rank: int, peer: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            for text in peer.makefile("r", encoding="utf-8"):
                message = json.loads(text)
                self.heard[rank] = time.monotonic()
                self.stages[rank] = message.get("stage", "")
                if "error" in message:
                    self.errors[rank] = message["error"]
                if "stop" in message:
                    self.told_to_stop.set()
                if "ready" in message:
                    self.ready.add(rank)
                if "go" in message:
                    self.go.set()
        self.gone.add(rank)

    def send(self, **message: Any) -> None:
        """To all that are connected; one that is gone is noticed by its reader."""
        text = (json.dumps(message) + "\n").encode()
        with self.writing:
            for peer in self.peers.values():
                with contextlib.suppress(OSError):
                    peer.sendall(text)

    def silent(self, seconds: float) -> list[int]:
        """Workers without a sign of life for so long."""
        now = time.monotonic()
        return [rank for rank, then in self.heard.items() if now - then > seconds]

    def close(self) -> None:
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()


# ------------------------------------------------------------------------------ the meeting


def meet(place: Place, timeout: float, given: Any = None) -> Line:
    """All workers of a ring at worker 0's address; `given` is worker 0's, for all (Line.given).

    Raises UserError for an address of no use and Absent for a worker that does not come within
    `timeout` seconds. What goes wrong at another worker is told to worker 0, which raises it.
    """
    end = time.monotonic() + timeout
    return receive(place, end, timeout, given) if place.rank == 0 else call(place, end, timeout)


def listening(place: Place) -> socket.socket:
    """A socket at this worker's own address. UserError where it cannot be had."""
    try:
        family, kind, address = resolved(place, place.rank, socket.SOCK_STREAM)
        server = socket.socket(family, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen()
    except OSError as wrong:
        raise UserError(
            f"{place.hostfile}: {place.named(place.rank)} cannot listen at its address: "
            f"{wrong.strerror}"
        ) from None
    return server


def resolved(place: Place, rank: int, kind: int) -> tuple[int, int, Any]:
    """Family, kind and address of a socket, as MLX's ring looks a worker up: IPv4 alone.

    Raises OSError where there is no such host, and UserError where it has another address first.
    """
    host, port = place.addresses[rank]
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=kind)[0]
    if family != socket.AF_INET:
        raise UserError(
            f"{place.hostfile}: {place.named(rank)}: MLX's ring needs an IPv4 address, such as "
            "10.0.0.2"
        )
    return family, kind, address


def receive(place: Place, end: float, timeout: float, given: Any) -> Line:
    """Worker 0's side: wait for all others, then let them go on."""
    peers: dict[int, socket.socket] = {}
    errors: dict[int, str] = {}
    with listening(place) as server:
        try:
            refuse_unreachable(place)
        except UserError as wrong:
            errors[0], end = str(wrong), min(end, time.monotonic() + FAREWELL)
        while len(peers) < place.size - 1:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                peer, _ = server.accept()
                peer.settimeout(TRY)
                hello = json.loads(read_line(peer))
                rank, fits = int(hello["rank"]), hello[HELLO] == list(map(list, place.addresses))
            except TimeoutError:
                if time.monotonic() < end:
                    continue
                if errors:
                    break
                missing = [r for r in range(1, place.size) if r not in peers]
                for peer in peers.values():
                    peer.close()
                raise Absent(
                    f"{place.named(missing[0])} did not come within {timeout:g} s "
                    "(--worker-timeout); start it, and see that it reaches "
                    f"{place.named(0)}"
                ) from None
            except (OSError, ValueError, KeyError, TypeError):
                continue  # whoever that was
            if not fits:
                errors[rank] = f"worker {rank}: its hostfile names other addresses"
            elif rank in peers:
                errors[rank] = f"worker {rank} was started twice"
            elif hello.get("error"):
                errors[rank] = hello["error"]
            peers[rank] = peer
    errors = errors or unreached(place)
    answer = {"stop": True} if errors else {"given": given}
    for peer in peers.values():
        with contextlib.suppress(OSError):
            peer.sendall((json.dumps(answer) + "\n").encode())
        peer.settimeout(None)
    if errors:
        raise UserError(errors[min(errors)])
    return Line(place, peers, given)


def refuse_unreachable(place: Place) -> None:
    """UserError for an address that no way leads to; one where nobody listens yet is fine."""
    for rank in range(place.size):
        try:
            family, kind, address = resolved(place, rank, socket.SOCK_DGRAM)
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing: asks for a way there
        except OSError as wrong:
            raise UserError(
                f"{place.hostfile}: {place.named(rank)} cannot be reached: {wrong.strerror}"
            ) from None


def unreached(place: Place) -> dict[int, str]:
    """What is wrong with workers that came, and listen, but cannot be called: by rank."""
    found = {}
    for rank in range(1, place.size):
        try:
            socket.create_connection(place.addresses[rank], TRY).close()
        except OSError as wrong:
            found[rank] = (
                f"{place.named(rank)} reaches worker 0 and cannot be reached from there: "
                f"{wrong.strerror or wrong}; see that no firewall is between"
            )
    return found


def call(place: Place, end: float, timeout: float) -> Line:
    """Another worker's side: call worker 0 until it answers."""
    hello: dict[str, Any] = {HELLO: place.addresses, "rank": place.rank}
    try:
        server = listening(place)  # so that worker 0 can see whether it is reached
    except UserError as wrong:
        hello["error"], end = str(wrong), min(end, time.monotonic() + 2 * FAREWELL)
        server = socket.socket()
    with server:
        peer, answer = answered(place, end, timeout, hello)
    if "stop" in answer:
        raise UserError(hello.get("error", "worker 0 gave up"))
    peer.settimeout(None)
    return Line(place, {0: peer}, answer["given"])


def answered(place: Place, end: float, timeout: float, hello: dict) -> tuple[socket.socket, dict]:
    """The connection with worker 0, and what it says to the `hello`."""
    met = False
    while True:
        try:
            peer = socket.create_connection(place.addresses[0], TRY)
            peer.sendall((json.dumps(hello) + "\n").encode())
            met = True
            peer.settimeout(max(end - time.monotonic(), TRY))
            return peer, json.loads(read_line(peer))
        except (OSError, ValueError):
            if met or time.monotonic() > end:
                raise Absent(
                    ""
                    if met
                    else f"{place.named(0)} did not answer within {timeout:g} s (--worker-timeout)"
                ) from None
            time.sleep(0.1)


def read_line(peer: socket.socket) -> str:
    """Up to the first line's end; ValueError where the other side hangs up before."""
    found = b""
    while not found.endswith(b"\n"):
        part = peer.recv(1)
        if not part:
            raise ValueError
        found += part
    return found.decode()


def parent_is_gone(parent: str | None) -> bool:
    """Whether the process that started this one (`parent`: its id) is there no more."""
    return parent is not None and os.getppid() != int(parent)
