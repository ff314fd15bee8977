"""Which of several workers this process is, from what MLX's launchers leave in its environment.

`mlx.launch` and `distributed/local.py` say it alike: a rank, and for the ring backend the name of a
file with the address of every worker. Loads no MLX.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

from errors import UserError

RANK, HOSTFILE = "MLX_RANK", "MLX_HOSTFILE"
PARENT = "MLX_RLHF_PARENT"  # id of the process that started local workers
TERMINAL = "MLX_RLHF_TERMINAL"  # number of the file that local worker 0 says things on
NOTES = "MLX_RLHF_NOTES"  # folder in which local workers leave word for it
# Where other backends say how many workers there are, and which one this is.
SIZES = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
RANKS = (RANK, "OMPI_COMM_WORLD_RANK", "PMI_RANK")


@dataclass(frozen=True)
class Place:
    """A worker among `size`; `addresses` (host, port) of all of them, None where only MLX knows."""

    rank: int
    size: int
    addresses: tuple[tuple[str, int], ...] | None = None
    hostfile: str = ""

    @property
    def started_here(self) -> bool:
        """Whether another process of this machine, which waits for it, started the worker."""
        return PARENT in os.environ

    def named(self, rank: int) -> str:
        """``worker 1 (10.0.0.2:5000)``."""
        if self.addresses is None:
            return f"worker {rank}"
        host, port = self.addresses[rank]
        return f"worker {rank} ({host}:{port})"


@functools.cache
def place() -> Place | None:
    """This process's place; None where it works alone. UserError for a hostfile of no use."""
    rank = next((os.environ[name] for name in RANKS if name in os.environ), None)
    if rank is None:
        return None
    if HOSTFILE in os.environ:
        return of_ring(int(rank), os.environ[HOSTFILE])
    devices = os.environ.get("MLX_IBV_DEVICES")  # jaccl's: a row for each worker
    size = len(json.loads(Path(devices).read_text())) if devices else first_size()
    return Place(int(rank), size) if size > 1 else None


def first_size() -> int:
    return next((int(os.environ[name]) for name in SIZES if name in os.environ), 1)


def of_ring(rank: int, hostfile: str) -> Place | None:
    """The place by a ring's hostfile: for every worker a list of its addresses, HOST:PORT."""
    try:
        found = json.loads(Path(hostfile).read_text(encoding="utf-8"))
        addresses = tuple(split(row[0]) for row in found)
    except OSError as wrong:
        raise UserError(f"{hostfile}: cannot read the hostfile: {wrong.strerror}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise UserError(
            f'{hostfile}: a list of addresses for each worker is needed, [["HOST:PORT"], ...]'
        ) from None
    for number, address in enumerate(addresses):
        if address in addresses[:number]:
            raise UserError(
                f"{hostfile}: workers {addresses.index(address)} and {number} have one address, "
                f"{address[0]}:{address[1]}; every worker needs its own"
            )
    if not 0 <= rank < len(addresses):
        raise UserError(f"{hostfile}: names {len(addresses)} workers, and this is number {rank}")
    return Place(rank, len(addresses), addresses, hostfile) if len(addresses) > 1 else None


def split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not 0 < int(port) < 65536:
        raise ValueError
    return host.strip("[]"), int(port)
