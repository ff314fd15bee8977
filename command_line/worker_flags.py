"""Flags of training on several workers. Loads no MLX."""

import argparse
import os
import sys
from pathlib import Path

from command_line.parser import Parser
from command_line.rules import Needs, flag_of
from command_line.shared_flags import at_least
from distributed.local import run_local
from distributed.membership import TIMEOUT
from distributed.place import place
from errors import UserError
from run_folder.secrets import tell

LARGEST = 256  # local workers; each is a process with a model of its own


def add_worker_arguments(parser: Parser) -> None:
    """How many processes train together, and what each gets."""
    add = parser.add_argument_group("several workers").add_argument
    add(
        "--num-training-workers",
        type=int,
        default=1,
        help="processes that train together, here; each holds the model. Batch sizes are of all "
        "together, and the result is that of one, but for what --lora-dropout draws",
    )
    add("--cpus-per-worker", type=int, help="threads of each one's matrix products on processors")
    add(
        "--worker-timeout",
        type=float,
        default=TIMEOUT,
        help="seconds that workers wait for each other before they give up",
    )
    parser.checks.append(check_workers)


NEEDS = (
    Needs(
        "cpus_per_worker worker_timeout",
        met=lambda args: args.num_training_workers > 1,
        why="with one worker; --num-training-workers 2 starts two",
    ),
)


def check_workers(args: argparse.Namespace) -> None:
    """Refuse what no workers can do; in a group that was started, their number is its size."""
    at_least(args, 1, "num_training_workers", "cpus_per_worker")
    if not 0 < args.worker_timeout <= 1e6:
        raise UserError("--worker-timeout: give a number of seconds above 0, up to 1e6")
    if args.num_training_workers > LARGEST:
        raise UserError(f"--num-training-workers: {LARGEST} is the most")
    if (found := place()) is not None:
        if "num_training_workers" in args.typed and args.num_training_workers != found.size:
            raise UserError(
                f"--num-training-workers {args.num_training_workers}: this is one of {found.size} "
                "workers that were started together; leave the flag out"
            )
        args.num_training_workers = found.size
    for row in NEEDS:
        row.check(args)


def refuse_across_rows(args: argparse.Namespace, what: str, why: str) -> None:
    """UserError where `what` compares rows of a batch that lie on several workers."""
    if args.num_training_workers > 1:
        raise UserError(
            f"{what} {why}, which lie on several workers; leave it out, or train with one "
            "(--num-training-workers 1)"
        )


def refuse_uneven(args: argparse.Namespace, unit: int = 1) -> None:
    """UserError where rows of a rollout or a minibatch, in units, cannot be shared out evenly."""
    each = args.num_training_workers * unit
    for name in ("batch_size", "mini_batch_size"):
        size = getattr(args, name)
        if args.num_training_workers > 1 and size is not None and size % each:
            pairs = " in pairs" if unit > 1 else ""
            raise UserError(
                f"{flag_of(name)} {size} cannot be shared out among {args.num_training_workers} "
                f"workers{pairs}: it counts the rows of all of them; give a multiple of {each}"
            )


def starts_workers(args: argparse.Namespace) -> bool:
    """Whether this process is to start several, rather than be one."""
    trains = getattr(args, "train", True) and not args.preview
    return trains and args.num_training_workers > 1 and place() is None


def run_workers(args: argparse.Namespace, script: str, words: list[str] | None) -> int:
    """Run `script` as several local workers, and wait; the exit status.

    `words`: its command line; None: that of this process.
    """
    words = list(map(str, sys.argv[1:] if words is None else words))
    cores = os.cpu_count() or 1
    wanted = args.num_training_workers * (args.cpus_per_worker or 1)
    if wanted > cores:
        tell(
            f"warning: {args.num_training_workers} workers with {args.cpus_per_worker or 1} "
            f"threads each are more than the {cores} cores of this machine: they slow each other "
            "down"
        )
    return run_local(
        [str(Path(script).resolve()), *words], args.num_training_workers, args.cpus_per_worker
    )
