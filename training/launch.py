"""What every training script does around its loop: seed, memory, model; run folder, stop, save.

    loaded = start(seed, memory_limit, **model_options(args))
    ...                                     data, what is trained, a trainer
    make_loop = supervised_loop(...)        or rollout_loop(...)
    run_training(args, "sft", make_loop, said, finish)

MLX and what stands on it is imported when it is needed: help and mistakes answer at once.
"""

import fast_blas

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from run_folder.checkpoint_folder import latest_checkpoint, saving
from run_folder.console import command, next_lines, watched
from run_folder.run import Run, read_rows
from run_folder.run_config import MADE_BY, checkpoint_asked_for
from run_folder.stopping import GracefulStop, StepGivenUp
from safe_files import check_place


def start(seed: int, memory_limit: float | None, **model: Any):
    """Seed everything, limit the memory (GB), and load the model (options of `load_model`)."""
    from models.load import load_model
    from training.memory import set_memory_limit
    from training.streams import seed_everything

    fast_blas.tell_of_slowness()
    seed_everything(seed)
    set_memory_limit(memory_limit)
    return load_model(model.pop("model"), watch=lambda parts: watched(parts, "loading"), **model)


# ------------------------------------------------------------------------------ the loop


def supervised_loop(
    args: Namespace,
    loaded: Any,
    trainer: Any,
    rows: Mapping[str, Any],
    plan: Any,
    length: tuple[int, int | None],
    schedule: Mapping[str, Any],
    **options: Any,
) -> Callable[[Run], Any]:
    """A function of a run that gives the loop of a SupervisedTrainer, with samples as it goes.

    `length` is training_length's (updates, batches), `schedule` schedule_options' of the flags,
    `plan` the BatchPlan of the rows to train on; `options` are further fields of the `Loop`.
    """
    from data_utils import BatchIterator
    from models.adapter_files import describe
    from training.samples import write_samples
    from training.supervised_loop import Loop, Schedule

    task, (steps, batches) = trainer.task, length
    numbers = Schedule(
        steps=steps,
        eval_every=args.steps_per_eval,
        accumulation=args.gradient_accumulation_steps,
        batches=batches,
        patience=args.early_stopping_patience,
        **schedule,
    )
    return lambda run: Loop(
        run,
        trainer,
        task.groups(describe(task.tuning, loaded)),
        BatchIterator(rows["train"].rows, plan),
        numbers,
        after_validation=lambda step: write_samples(
            run, step, loaded, task, args.sample_prompts, rows.get("samples")
        ),
        base=loaded.fingerprint,
        **options,
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
    **groups: Any,
) -> Callable[[Run], Any]:
    """A function of a run that gives the `loop` (RolloutLoop or a kind of it) of a trainer.

    `schedule` is schedule_options' of the flags; `groups` are arrays that belong into checkpoints
    beside what is trained (training/groups.py), by name.
    """
    from models.adapter_files import describe
    from training.groups import adapter_group
    from training.rollout_loop import RolloutSchedule

    tuning = trainer.model.tuning
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
        {"adapters": adapter_group(tuning, describe(tuning, loaded))} | groups,
        numbers,
        stop_test,
        loaded.fingerprint,
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
    if args.fused_dir is not None:
        check_place(args.fused_dir)
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
            where = f"after step {loop.step}" if loop.step else "at the start: it has no checkpoint"
            print(f"{run.folder}: goes on {where}")
        with suppress(StepGivenUp), stop.giving_up():  # what it says may take long to find out
            print(f"{run.folder}: {said(loop)}")
        loop.run(stop, name or kind)
        if not stop.requested:
            path = args.save_file if place is None else place(run)
            with suppress(StepGivenUp), stop.giving_up():
                with saving(path):
                    finish(run, loop)
                if write_fused is not None and args.fused_dir is not None:
                    print(next_lines(write_fused(args, run.folder)))
    stop.exit_if_requested(MADE_BY[kind], run.folder, checkpoint_is_adapter(args, run))


def checkpoint_is_adapter(args: Namespace, run: Run) -> str:
    """For a run that was stopped: what its last checkpoint is good for, and the command."""
    last = latest_checkpoint(run.checkpoints)
    if last is None or args.fine_tune_type == "full":
        return ""
    talk = command("talk_to_model.py", model=args.model, resume_file=last)
    return f"its last checkpoint is an adapter as well:\n  {talk}"


# ------------------------------------------------------------------------------ what is left


def finish_rollouts(
    args: Namespace,
    loaded: Any,
    run: Run,
    loop: Any,
    plot: Path,
    *,
    metric: str,
    head: str | None = None,
    **summary: Any,
) -> None:
    """Write the trained policy, plots and a summary; say where everything lies.

    `plot` was drawn by the script; `metric` names a reward's mean in the metrics, from its {name};
    the value head is written beside the adapter under the name `head`.
    """
    from models.adapter_files import save_adapter, save_head
    from reports.training_plots import plot_learned_and_true
    from rewards.learned import GROUND_TRUTH, LEARNED

    policy = loop.trainer.model
    written = save_adapter(args.save_file, policy.tuning, loaded, head=head, run=run.recorded)
    if head is not None:
        written.append(save_head(args.save_file, head, policy.value_head.arrays(), {}))
    written.append(plot)
    if args.reward_model and args.true_score:
        names = {"learned": metric.format(name=LEARNED), "true": metric.format(name=GROUND_TRUTH)}
        place = run.plots / "learned_and_true.png"
        written.append(plot_learned_and_true(read_rows(run.folder), place, **names))
    evaluations = {"first": loop.evaluations[:1], "last": loop.evaluations[-1:]}
    run.finish({"steps": loop.step, **summary, "evaluation": evaluations})
    fused = policy.tuning.kind == "prompt" or args.fused_dir
    say_written(run, written, *([] if fused else [fuse_command(args)]), talk_command(args))


def fuse_command(args: Namespace) -> str:
    named = {"model": args.model, "tokenizer": args.tokenizer}
    return command("fuse.py", **named, adapter_file=args.save_file, save_path="my_model/")


def talk_command(args: Namespace) -> str:
    named = {"model": args.model, "tokenizer": args.tokenizer}
    return command("talk_to_model.py", **named, resume_file=args.save_file)


def say_peak_memory() -> None:
    from training.memory import peak_memory, say_gb

    print(f"peak memory {say_gb(peak_memory())}")


def say_written(run: Run, written: Iterable[Any], *commands: str) -> None:
    """The last words of a run: where everything lies, and what to do with it."""
    print("wrote " + "\n      ".join(map(str, [*written, run.folder / "metrics.jsonl"])))
    print(next_lines(commands))


def show(what: str, metrics: Mapping[str, float]) -> None:
    """One line of metrics."""
    print(f"{what}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


def count_trained(tuning: Any) -> str:
    """How many numbers of the model move, for people."""
    return f"{sum(array.size for array in tuning.arrays().values()):,} weights trained"


def shape_multiple() -> int:
    """What lengths are padded to multiples of: on a GPU each new shape is compiled anew."""
    import mlx.core as mx

    return 16 if mx.default_device().type == mx.DeviceType.gpu else 1
