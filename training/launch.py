"""What every training script does around its loop: seed, memory, model; run folder, stop, save.

    loaded = start(seed, memory_limit, **model_options(args))
    ...                                     data, what is trained, a loop
    run_training(args, "sft", make_loop, said, finish)

MLX and what stands on it is imported when it is needed: help and mistakes answer at once.
"""

import fast_blas

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from run_folder.checkpoint_folder import latest_checkpoint, saving
from run_folder.next_line import next_lines
from run_folder.run import Run
from run_folder.run_config import MADE_BY, checkpoint_asked_for
from run_folder.stopping import GracefulStop, StepGivenUp


def start(seed: int, memory_limit: float | None, **model: Any):
    """Seed everything, limit the memory (GB), and load the model (options of `load_model`)."""
    from models.load import load_model
    from training.memory import set_memory_limit
    from training.streams import seed_everything

    if notice := fast_blas.notice():
        print(notice, file=sys.stderr)
    seed_everything(seed)
    set_memory_limit(memory_limit)
    return load_model(model.pop("model"), **model)


def run_training(
    args: Namespace,
    kind: str,
    make_loop: Callable[[Run], Any],
    said: Callable[[Any], str],
    finish: Callable[[Run, Any], None],
    *,
    name: str | None = None,
    outputs: Sequence[str] = (),
    place: Callable[[Run], str | Path] | None = None,
    write_fused: Callable[[Namespace, Path], list[str]] | None = None,
) -> None:
    """A run of `kind` (run_folder/run_config.py) from its folder to what it leaves behind.

    `make_loop(run)` gives a loop with `run(stop, name)` and `resume`; `said(loop)` is called, and
    printed, when it is about to begin; `finish(run, loop)` saves to --save-file, or where
    `place(run)` says, once the loop is through. Of `args`, the flags of `add_run_arguments` are
    read. `outputs`: names of what the script itself writes into the folder. `write_fused(args,
    run folder)` makes --fused-dir of what was saved and gives commands to go on with. Exits with
    130 or 143 after a stop.
    """
    resuming = args.resume is not None
    run = Run(
        kind,
        vars(args),
        output_dir=args.output_dir,
        resume=resuming,
        overwrite=args.overwrite,
        log_with=args.log_with,
        outputs=outputs,
        blas=fast_blas.NAME,
    )
    with run, GracefulStop() as stop:
        loop = make_loop(run)
        if resuming:
            last = checkpoint_asked_for(args.resume) or latest_checkpoint(run.checkpoints)
            loop.resume(last, force=args.force_resume)
        print(f"{run.folder}: {said(loop)}")
        loop.run(stop, name or kind)
        if not stop.requested:
            path = args.save_file if place is None else place(run)
            with suppress(StepGivenUp), stop.giving_up():
                with saving(path):
                    finish(run, loop)
                if write_fused is not None and args.fused_dir is not None:
                    print(next_lines(write_fused(args, run.folder)))
    stop.exit_if_requested(MADE_BY[kind], run.folder)


def say_peak_memory() -> None:
    from training.memory import peak_memory, say_gb

    print(f"peak memory {say_gb(peak_memory())}")


def say_written(run: Run, written: Iterable[Any], *commands: str) -> None:
    """The last words of a run: where everything lies, and what to do with it."""
    print("wrote " + "\n      ".join(map(str, [*written, run.folder / "metrics.jsonl"])))
    print(next_lines(commands))


def shape_multiple() -> int:
    """What lengths are padded to multiples of: on a GPU each new shape is compiled anew."""
    import mlx.core as mx

    return 16 if mx.default_device().type == mx.DeviceType.gpu else 1
