"""What every training script does around its loop: seed, memory, model; run folder, stop, save.

    loaded = start(seed, memory_limit, **model_options(args))
    ...                                     data, what is trained, a trainer
    make_loop = supervised_loop(...)        or rollout_loop(...)
    run_training(args, "sft", make_loop, said, finish)

MLX and what stands on it is imported when it is needed: help and mistakes answer at once.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.membership import member
from run_folder.checkpoint_folder import latest_checkpoint, saving
from run_folder.console import next_lines, say_gb
from run_folder.private import forget_private, keep_private
from run_folder.run import Run
from run_folder.run_config import MADE_BY, checkpoint_asked_for, read_run_config
from run_folder.stopping import GracefulStop, StepGivenUp
from safe_files import check_place
from training.results import talk_command
from training.together import begin, open_run, part


def start(seed: int, memory_limit: float | None, *, resume: str | None = None, **model: Any):
    """Seed everything, limit the memory (GB), and load the model (options of `load_model`).

    `resume`: a run to go on with, on the kernels and threads that it was computed with.
    """
    import fast_blas

    from models.load import load_model
    from training.memory import set_memory_limit
    from training.streams import seed_everything

    fast_blas.tell_of_slowness()
    seed_everything(seed)
    set_memory_limit(memory_limit)
    loaded = load_model(model.pop("model"), **model)
    recorded = None if resume is None else read_run_config(resume).get("machine") or {}
    fast_blas.settle(loaded.weights, recorded, alone=member() is None)
    return loaded


# ------------------------------------------------------------------------------ the loop


def supervised_loop(
    args: Namespace,
    loaded: Any,
    trainer: Any,
    rows: Mapping[str, Any],
    plan: Any,
    length: tuple[int, int | None],
    schedule: Mapping[str, Any],
    *,
    parts: "Parts | None" = None,
    **options: Any,
) -> Callable[[Run], Any]:
    """A function of a run that gives the loop of a trainer, with samples as it goes.

    `length` is training_length's (updates, batches), `schedule` schedule_options' of the flags,
    `plan` the BatchPlan of the rows to train on; `options` are further fields of the `Loop`.
    `parts` are the backend's; None: those of a SupervisedTrainer on MLX.
    """
    from data_utils import BatchIterator
    from training.supervised_loop import Schedule

    if parts is None:
        parts = mlx_parts(args, loaded, trainer, rows)
        begin(
            args,
            loaded.fingerprint,
            rows["train"].rows,
            lambda: trained_arrays(trainer.task.trained),
        )
    steps, batches = length
    numbers = Schedule(
        steps=steps,
        eval_every=args.steps_per_eval,
        accumulation=args.gradient_accumulation_steps,
        batches=batches,
        patience=args.early_stopping_patience,
        **schedule,
    )
    return lambda run: parts.loop(
        run,
        trainer,
        parts.groups,
        BatchIterator(rows["train"].rows, plan),
        numbers,
        after_validation=lambda step: parts.write_samples(run, step),
        base=loaded.fingerprint,
        backend=parts.backend,
        **options,
    )


@dataclass
class Parts:
    """What of a loop is a backend's own."""

    loop: type
    groups: Mapping[str, Any]  # of training/groups.py
    backend: Any  # of training/backend.py
    write_samples: Callable[[Run, int], None] = lambda run, step: None


def mlx_parts(args: Namespace, loaded: Any, trainer: Any, rows: Mapping[str, Any]) -> Parts:
    """The loop of a SupervisedTrainer."""
    from models.adapter_files import describe
    from training import mlx_backend
    from training.samples import write_samples
    from training.supervised_loop import Loop

    task = trainer.task
    return Parts(
        Loop,
        task.groups(describe(task.tuning, loaded)),
        mlx_backend,
        lambda run, step: write_samples(
            run, step, loaded, task, args.sample_prompts, rows.get("samples")
        ),
    )


def rollout_loop(
    loop: type,
    args: Namespace,
    loaded: Any,
    trainer: Any,
    rewards: Any,
    prompts: Mapping[str, Any],
    validation: Sequence,
    schedule: Mapping[str, Any],
    stop_test: Callable[[list[int]], bool] | None,
    *,
    backend: Any = None,
    **groups: Any,
) -> Callable[[Run], Any]:
    """A function of a run that gives the `loop` (RolloutLoop or a kind of it) of a trainer.

    `schedule` is schedule_options' of the flags; `groups` are arrays that belong into checkpoints
    (training/groups.py), by name, with those of a `backend` that is given also what is trained.
    """
    from training.rollout_loop import RolloutSchedule

    if backend is None:
        from models.adapter_files import describe
        from training import mlx_backend as backend
        from training.groups import adapter_group

        model, data = trainer.model, prompts["train"].rows
        begin(args, loaded.fingerprint, data, lambda: trained_arrays(model))
        tuning = trainer.model.tuning
        groups = {"adapters": adapter_group(tuning, describe(tuning, loaded))} | groups
    numbers = RolloutSchedule(
        steps=trainer.config.num_steps,
        eval_every=args.eval_every,
        eval_samples=args.eval_samples,
        samples_per_step=args.samples_per_step,
        **schedule,
    )
    return lambda run: loop(
        run,
        trainer,
        rewards,
        loaded.tokenizer,
        prompts["train"].rows,
        validation,
        groups,
        numbers,
        stop_test,
        loaded.fingerprint,
        backend=backend,
    )


# ------------------------------------------------------------------------------ the run


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
    computing: Mapping[str, Any] | None = None,
) -> None:
    """A run of `kind` (run_folder/run_config.py) from its folder to what it leaves behind.

    `make_loop(run)` gives a loop with `run(stop, name)` and `resume`; `said(loop)` is called, and
    printed, when it is about to begin; `finish(run, loop)` saves to --save-file, or where
    `place(run)` says, once the loop is through. Of `args`, the flags of `add_run_arguments` are
    read. `outputs`: names of what the script itself writes into the folder. `write_fused(args,
    run folder)` makes --fused-dir of what was saved and gives commands to go on with. `computing`:
    what is recorded of a library that computes in MLX's place. Exits with 130 or 143 after a stop.
    """
    import fast_blas

    resuming = args.resume is not None
    if args.fused_dir is not None:
        check_place(args.fused_dir)
    run = open_run(
        kind,
        vars(args),
        output_dir=args.output_dir,
        resume=resuming,
        overwrite=args.overwrite,
        log_with=args.log_with,
        outputs=outputs,
        computing=fast_blas.settings() if computing is None else computing,
    )
    with run, shared_stop() as stop:
        loop = make_loop(run)
        if resuming:
            last = checkpoint_asked_for(args.resume) or latest_checkpoint(run.checkpoints)
            loop.resume(last, force=args.force_resume)
            where = f"after step {loop.step}" if loop.step else "at the start"
            where += ": it has no checkpoint" * (last is None)
            print(f"{run.folder}: goes on {where}")
        with suppress(StepGivenUp), stop.giving_up():  # what it says may take long to find out
            told = fast_blas.told() if computing is None else ""
            print(f"{run.folder}: {said(loop)}" + f"; {told}" * bool(told))
        loop.run(stop, name or kind)
        more = part()
        stopped = stop.requested
        if not more:
            sys.exit(128 + stop.signal if stopped else 0)
        if not stopped:
            path = args.save_file if place is None else place(run)
            with suppress(StepGivenUp), stop.giving_up():
                with saving(path):
                    finish(run, loop)
                guard(run, path)
                if write_fused is not None and args.fused_dir is not None:
                    commands = write_fused(args, run.folder)
                    guard(run, args.fused_dir)
                    print(next_lines(commands))
    stop.exit_if_requested(MADE_BY[kind], run.folder, checkpoint_is_adapter(args, run))


def guard(run: Run, path: str | Path) -> None:
    """What a private run saved outside of its folder is private as well."""
    if run.private:
        keep_private(Path(path))
    else:
        forget_private(Path(path))


def shared_stop() -> GracefulStop:
    """What turns signals into a flag, of all workers where there are several."""
    if member() is None:
        return GracefulStop()
    from distributed.group import here
    from distributed.stopping import SharedStop

    return SharedStop(here())


def trained_arrays(model: Any) -> dict[str, Any]:
    """The arrays that an optimizer moves, by name."""
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.trainable_parameters()))


def checkpoint_is_adapter(args: Namespace, run: Run) -> str:
    """For a run that was stopped: what its last checkpoint is good for, and the command."""
    last = latest_checkpoint(run.checkpoints)
    if last is None or args.fine_tune_type == "full":
        return ""
    return f"its last checkpoint is an adapter as well:\n  {talk_command(args, last)}"


# ------------------------------------------------------------------------------ figures


def ppo_said(config: Any, trained: Any, rewards: Any) -> str:
    """What a run of PPO says before it begins."""
    return (
        f"{config.num_steps} steps of {config.batch_size} responses, "
        f"{config.ppo_epochs} epochs of minibatches of {config.mini_batch_size}; "
        f"{count_trained(trained)}; rewards: {rewards}"
    )


def count_trained(tuning: Any) -> str:
    """How many numbers of the model move, for people."""
    return f"{sum(math.prod(array.shape) for array in tuning.arrays().values()):,} weights trained"


def shape_multiple() -> int:
    """What lengths are padded to multiples of: on a GPU each new shape is compiled anew."""
    import mlx.core as mx

    return 16 if mx.default_device().type == mx.DeviceType.gpu else 1


def say_peak_memory(peak: float | None = None) -> None:
    """The most memory that was held, in GB; None: that of MLX."""
    if peak is None:
        from training.memory import peak_memory

        peak = peak_memory()
    print(f"peak memory {say_gb(peak)}")
