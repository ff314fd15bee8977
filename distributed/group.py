"""Several workers as one: what a training run shares between processes or machines.

`here()` is this process's part. Alone, which is how every run without other workers is, each method
gives back what it is given, so that no branch stands in the loops. Rank r of N takes places r,
r + N, ... of a list. Collectives are MLX's (`mx.distributed`): each is evaluated at once, none
stands in a lazy graph or in `mx.compile`, where rings were seen to hang. They run on the device
that MLX chooses for its backend: sums of NCCL on the processor would fail.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from errors import Lost, UserError

if TYPE_CHECKING:
    from distributed.membership import Membership

Kind = TypeVar("Kind")
SIGNALS = (2, 15)  # SIGINT, SIGTERM: what is shared of a signal that one worker was sent
MOST = 2**29  # numbers, or bytes, in one sum: MLX counts those of an array in 32 bits


class Workers:
    """This process among `size` workers; alone where `member` is None."""

    def __init__(self, member: "Membership | None" = None) -> None:
        self.member = member
        self.rank, self.size = (0, 1) if member is None else (member.rank, member.size)
        self.seed = 0  # of the run
        self.heard: int | None = None  # a signal that this process was sent
        self.stop: int | None = None  # one that some worker was sent, known to all alike
        self.told = False  # whether there was a sum, and all heard of signals, in this step
        self.parted = False  # whether what is done together is over
        self.sent = 0  # bytes of arrays that were added up or handed round
        self.waited, self.since = 0.0, time.monotonic()
        self.shares = np.zeros(self.size)  # of their time that workers waited, when last told

    @property
    def alone(self) -> bool:
        return self.size == 1

    def share(self, items: Sequence[Kind]) -> Sequence[Kind]:
        """The items of a list that are this worker's."""
        return items if self.alone else items[self.rank :: self.size]

    # ------------------------------------------------------------------ collectives

    def sum(self, tree: Any, stage: str) -> Any:
        """A tree of arrays added up over the workers, in float32 and one collective up to `MOST`.

        With it goes what every update has to agree on: signals to stop, and who waited.
        """
        if self.alone:
            return tree
        flat = [array for _, array in tree_flatten(tree)]
        told = np.zeros(len(SIGNALS) + self.size, dtype=np.float32)
        if self.heard in SIGNALS:
            told[SIGNALS.index(self.heard)] = 1
        told[len(SIGNALS) + self.rank] = self.own_wait_share()
        parts = [array.astype(mx.float32).reshape(-1) for array in flat]
        pieces = []
        for some in together([*parts, mx.array(told)]):
            summed = self._all_sum(mx.concatenate(some), stage)
            pieces += mx.split(summed, np.cumsum([part.size for part in some[:-1]]).tolist())
        self._listen(np.array(pieces.pop()))
        pieces = iter(pieces)
        return tree_map(lambda old: next(pieces).reshape(old.shape).astype(old.dtype), tree)

    def _listen(self, told: np.ndarray) -> None:
        """What the others said beside the numbers of a sum."""
        signals = [number for number, sent in zip(SIGNALS, told, strict=False) if sent]
        if signals and self.stop is None:
            self.stop = signals[0]
        self.shares, self.told = told[len(SIGNALS) :], True

    def _all_sum(self, array: mx.array, stage: str) -> mx.array:
        mx.eval(array)  # so that what is waited for below is the others alone
        self.sent += array.nbytes
        begun = time.monotonic()
        with self.member.waiting(stage):
            try:
                total = mx.distributed.all_sum(array)
                mx.eval(total)
            except RuntimeError as wrong:
                raise Lost(f"{stage}: {wrong}") from None
        self.waited += time.monotonic() - begun
        return total

    def rows(self, own: np.ndarray, places: Sequence[int], count: int, stage: str) -> np.ndarray:
        """Rows of all workers in their places: own (b, ...) float32 -> (count, ...).

        Added up with zeros at the places of the others, which is exact.
        """
        if self.alone:
            return own
        whole = np.zeros((count, *own.shape[1:]), dtype=np.float32)
        whole[places] = own
        return np.array(self._all_sum(mx.array(whole), stage)) if whole.size else whole

    def gather(self, value: Any, stage: str) -> list:
        """What each worker says, by rank; values that JSON has, NaN and infinity included."""
        if self.alone:
            return [value]
        own = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        lengths = np.zeros(self.size, dtype=np.int32)
        lengths[self.rank] = len(own)
        lengths = np.array(self._all_sum(mx.array(lengths), stage)).tolist()
        whole = np.zeros(sum(lengths), dtype=np.uint8)
        starts = np.cumsum([0, *lengths])
        whole[starts[self.rank] : starts[self.rank + 1]] = own
        data = np.array(self._all_sum(mx.array(whole), stage)).tobytes()
        pairs = zip(starts[:-1], starts[1:], strict=True)
        return [json.loads(data[start:end]) for start, end in pairs]

    def once(self, work: Callable[[], Kind], stage: str, told: Callable = lambda made: made) -> Any:
        """`work()` done by worker 0 alone; the others get `told` of it, in JSON's own types.

        A UserError of it is raised at all of them; any other exception ends worker 0, and by that
        the rest.
        """
        if self.alone:
            return work()
        made, said = None, {}
        if self.rank == 0:
            try:
                made = work()
                said = {"value": told(made)}
            except UserError as wrong:
                said = {"error": str(wrong)}
        answer = self.gather(said, stage)[0]
        if "error" in answer:
            raise self.error_of_all(answer["error"])
        return made if self.rank == 0 else answer["value"]

    def error_of_all(self, message: str) -> UserError:
        """An error that is raised at every worker, and said by worker 0."""
        self.member.shared_error = message
        return UserError(message)

    def arrays(self, arrays: Mapping[str, mx.array] | None, stage: str) -> dict[str, mx.array]:
        """Worker 0's arrays by name, at all; to the bit, whatever their types. Others give None."""
        if self.alone:
            return dict(arrays)
        about = {n: [list(a.shape), str(a.dtype)] for n, a in (arrays or {}).items()}
        about = self.gather(about, stage)[0]
        found = {}
        for name, (shape, kind) in about.items():
            dtype = getattr(mx, kind.removeprefix("mlx.core."))
            own = arrays[name] if self.rank == 0 else mx.zeros(shape, dtype=dtype)
            raw = [self._all_sum(part, stage) if part.size else part for part in raw_parts(own)]
            found[name] = mx.concatenate([part.view(dtype) for part in raw]).reshape(shape)
        return found

    # ------------------------------------------------------------------ what is logged

    def own_wait_share(self) -> float:
        """The share of its time that this worker waited for others since the last row."""
        return min(1.0, self.waited / max(time.monotonic() - self.since, 1e-9))

    def metrics(self) -> dict[str, float]:
        """Of a step's row: nothing, alone; else how many there are and who waits the most.

        A step without an update had no sum: there is one now, or a signal would never be heard.
        """
        if self.alone:
            return {}
        if not self.told:
            self.sum((), "the end of a step")
        self.told = False
        shares = np.where(np.arange(self.size) == self.rank, self.own_wait_share(), self.shares)
        self.waited, self.since = 0.0, time.monotonic()
        return {
            "distributed/workers": float(self.size),
            "distributed/wait_share": float(shares.max()),
        }

    # ------------------------------------------------------------------ random numbers

    @contextmanager
    def own_draws(self, optimizer: Any) -> Iterator[None]:
        """Within it MLX's global numbers (dropout draws them) are those of (seed, update, rank).

        The update is the one that `optimizer` makes next.
        """
        if self.alone:
            yield
            return
        ((high, low),) = [key.tolist() for key in mx.random.state]
        update = int(optimizer.step)
        own = np.random.default_rng([self.seed % 2**64, update, self.rank]).integers(2**63)
        mx.random.seed(int(own))
        try:
            yield
        finally:
            mx.random.seed(high << 32 | low)


def digest(arrays: Mapping[str, mx.array]) -> str:
    """What tells one set of named arrays from another, to the bit."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode())
        for part in raw_parts(arrays[name]):
            found.update(np.array(part).tobytes())
    return found.hexdigest()[:16]


def raw_parts(array: mx.array) -> list[mx.array]:
    """The bytes of an array, `MOST` at a time."""
    flat, step = mx.contiguous(array).reshape(-1), MOST // array.dtype.size
    return [part.view(mx.uint8) for part in mx.split(flat, [*range(step, flat.size, step)])]


def together(parts: Sequence[mx.array]) -> list[list[mx.array]]:
    """Flat arrays that adjoin in lists, each of no more than `MOST` numbers or of one array."""
    found, count = [], MOST
    for part in parts:
        count += part.size
        if count > MOST:
            found.append([])
            count = part.size
        found[-1].append(part)
    return found


_here = Workers()


def here() -> Workers:
    """This process's part; `join` makes it one of several."""
    return _here


def join(member: "Membership") -> Workers:
    """Become one of several workers: MLX's own connections are made."""
    global _here
    if _here.alone:
        with member.connecting():
            try:
                group = mx.distributed.init(strict=True, backend=member.backend)
            except (RuntimeError, ValueError) as wrong:
                if member.line is None:  # which MLX's own words tell more of
                    raise UserError(f"MLX cannot connect the workers: {wrong}") from None
                raise Lost(f"the start: {wrong}") from None
        if (group.rank(), group.size()) != (member.rank, member.size):
            raise Lost(f"MLX counts {group.size()} workers, and {member.size} came")
        _here = Workers(member)
    return _here


def part() -> None:
    """The end of what is done together: what comes now this worker does alone."""
    global _here
    _here.parted = True
    _here = Workers()
