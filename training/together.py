"""What a run on several workers does beside its steps: begin alike, share a checkpoint, stay alike.

Alone, nothing of it does anything. Collectives are those of distributed/group.py.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distributed.membership import member
from errors import UserError
from run_folder.resuming import HARMLESS, fingerprint
from run_folder.run import Run
from run_folder.run_config import OF_ONE_START, versions
from run_folder.silent_run import SilentRun
from safe_files import plain
from training.backend import Checkpoint

# ------------------------------------------------------------------------------ the beginning


def begin(args: Namespace, base: str | None, rows: Sequence, trained: Callable[[], dict]) -> None:
    """Join the other workers, where there are any, and make sure that all are about to do the same.

    `base`: fingerprint of the model; `rows`: to train on; `trained()`: arrays by name as they are
    at the start. Raises UserError at all of them where one differs; worker 0's says in what.
    """
    if (own := member()) is None or own.began:
        return
    from distributed.group import digest, here, join

    own.timeout = args.worker_timeout
    own.ready()
    join(own).seed = args.seed
    facts = {
        "options": plain(compared_options(args)),
        "versions": versions(),
        "the training data": fingerprint(rows),
        "the weights of the model": base,
        "the weights that are trained": digest(trained()),
    }
    refuse_differences(here().gather(facts, "the start check"))
    own.began = True


def compared_options(args: Namespace) -> dict[str, Any]:
    """Options that decide what is computed."""
    own = {"recompute_frozen"}  # of each machine's memory; the numbers are the same up to rounding
    return {k: v for k, v in vars(args).items() if k not in HARMLESS | OF_ONE_START | own}


def refuse_differences(facts: Sequence[Mapping[str, Any]]) -> None:
    """UserError where a worker is about to do something else than worker 0."""
    first, said = facts[0], []
    for rank, other in enumerate(facts[1:], 1):
        for kind, dashes in (("options", "--"), ("versions", "")):
            for name in first[kind]:
                own, its = first[kind][name], other[kind].get(name)
                if own != its:
                    shown = dashes + (name.replace("_", "-") if dashes else name)
                    said.append(f"worker {rank} has {shown} {its}, and worker 0 {own}")
        for name in ("the training data", "the weights of the model"):
            if first[name] != other[name]:
                said.append(f"worker {rank} differs from worker 0 in {name}")
        name = "the weights that are trained"
        if first[name] != other[name] and not said:  # else they follow from the rest
            said.append(f"worker {rank} differs from worker 0 in {name}")
    if said:
        raise UserError("; ".join(said) + "; all workers need the same")


def open_run(kind: str, options: Mapping[str, Any], **more: Any) -> Run | SilentRun:
    """The run of worker 0, or alone; that of another worker writes nothing."""
    if (own := member()) is None:
        return Run(kind, options, **more)
    from distributed.group import here

    run = here().once(
        lambda: Run(kind, options, **more), "the run folder", lambda run: str(run.folder)
    )
    own.note_run(str(run.folder if own.rank == 0 else run))
    return run if own.rank == 0 else SilentRun(run)


def part() -> bool:
    """The end of what all do together; whether this worker has more to do: worker 0 has.

    A signal that came after the last update is known to all from here on.
    """
    if (own := member()) is None:
        return True
    from distributed import group

    group.here().sum((), "the end")
    own.leave()
    group.part()
    return own.rank == 0


def speaks() -> bool:
    """Whether this process writes and prints for all: worker 0, or one that works alone."""
    return (own := member()) is None or own.rank == 0


def largest(value: float) -> float:
    """The largest of all workers' values."""
    if member() is None:
        return value
    from distributed.group import here

    return max(here().gather(value, "a comparison"))


def by_worker_0(work: Callable[[], Any]) -> Any:
    """`work()` of worker 0, which has the run's files, at all."""
    if member() is None:
        return work()
    from distributed.group import here

    return here().once(work, "the run's files")


def worker_metrics() -> dict[str, float]:
    """Of a step's row: nothing, alone."""
    if member() is None:
        return {}
    from distributed.group import here

    return here().metrics()


# ------------------------------------------------------------------------------ checkpoints


def from_worker_0(read: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """`read()` of worker 0, at all: only its disk has the run."""
    if member() is None:
        return read()
    from distributed.group import here

    workers, stage = here(), "the checkpoint"
    saved = workers.once(read, stage, described)
    if saved is None:
        return None
    if workers.rank:
        groups = dict.fromkeys(saved["groups"])
        saved = Checkpoint(Path(saved["path"]), saved["step"], groups, saved["state"])
    for name in saved.arrays:
        saved.arrays[name] = workers.arrays(saved.arrays[name], stage)
    return saved


def described(saved: Checkpoint | None) -> dict[str, Any] | None:
    """A checkpoint without its arrays, as JSON has it."""
    if saved is None:
        return None
    about = {"path": str(saved.path), "step": saved.step, "groups": list(saved.arrays)}
    return about | {"state": saved.state}


def stay_alike(arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """Worker 0's arrays of a checkpoint where those of another worker differ by a bit, else None.

    Unlike chips round differently.
    """
    from distributed.group import digest, here

    workers = here()
    flat = {f"{group}/{name}": a for group, some in arrays.items() for name, a in some.items()}
    if len({*workers.gather(digest(flat), "the comparison of weights")}) == 1:
        return None
    stage = "the weights of worker 0"
    return {name: workers.arrays(some, stage) for name, some in arrays.items()}


def largest_difference(one: Mapping[str, Mapping], other: Mapping[str, Mapping]) -> float:
    """Between two sets of arrays, the largest of all workers."""
    import mlx.core as mx

    from distributed.group import here

    found = [
        mx.abs(array.astype(mx.float32) - other[group][name].astype(mx.float32)).max().item()
        for group, arrays in one.items()
        for name, array in arrays.items()
        if array.size
    ]
    return max(here().gather(max(found, default=0.0), "the comparison of weights"))
