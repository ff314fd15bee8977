"""Preference training: a model learns from answers that people prefer, without a reward model.

Pairs of a chosen and a rejected answer train DPO and its family, ORPO, CPO, SimPO and AlphaPO;
answers with a label each (thumbs up, thumbs down) train KTO. The reference is the model with its
adapter off, so that one copy of the base is held; an adapter that is loaded stays as the reference
in a second set of its own weights.

Within a minute on a laptop, on the embedded model:
    python preference_training.py --train --iters 100 --batch-size 16
With answers that were rated in the chat:
    python preference_training.py --model MODEL --train --algorithm kto --train-file ratings.jsonl
"""

import fast_blas  # noqa: F401

from command_line.adapter_file import load_copy, make_tuning
from command_line.curriculum_flags import difficulty, make_curriculum
from command_line.exits import run_main
from command_line.memory_fit import settle_supervised_memory
from command_line.model_limits import check_splits, fit_lengths
from command_line.preference_flags import WITH_REFERENCE, parse_arguments, task_options
from command_line.preference_rows import least_rows, load_rows, make_plan
from command_line.sft_rows import training_length, validation
from command_line.shared_flags import model_options, optimizer_options, schedule_options
from command_line.worker_flags import run_workers, starts_workers
from data_utils import easy_first, epoch_batches
from training.launch import (
    count_trained,
    run_training,
    say_peak_memory,
    shape_multiple,
    start,
    supervised_loop,
)
from training.results import fuse_command, say_written, show, talk_command
from waiting import watched

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    if starts_workers(args):
        return run_workers(args, __file__, words)
    loaded = start(args.seed, args.memory_limit, resume=args.resume, **model_options(args))
    fit_lengths(args, loaded.limits)
    rows = load_rows(args, loaded.tokenizer)
    if args.train:
        rows["difficulty"] = difficulty(args, loaded, rows["train"].rows)
    task = make_task(args, loaded)
    check_splits(rows, loaded.limits, task.tuning)
    if args.train or args.preview:
        beside = getattr(task.reference, "model", None)
        least = least_rows(args)
        settle_supervised_memory(args, loaded, task.tuning, rows["train"], beside, least=least)
    if args.preview:
        return 0
    if args.train:
        train(args, loaded, task, rows)
    if args.test:
        plan = make_plan(args, rows["test"], shuffle=False)
        batches = watched(epoch_batches(rows["test"].rows, plan), "test", len(plan))
        from mlx_sft_trainer import evaluate

        show("test", evaluate(task, batches))
    say_peak_memory()
    return 0


# ------------------------------------------------------------------------------ model and loss


def make_task(args, loaded):
    """The model with what is trained on it and its reference, as a task of mlx_sft_trainer."""
    from mlx_preference_tasks import make_task

    tuning = make_tuning(args, loaded, args.resume_adapter_file)
    return make_task(
        args.algorithm,
        loaded.model,
        tuning,
        reference=make_reference(args, loaded, tuning),
        pad_to_multiple=shape_multiple(),
        **task_options(args),
    )


def make_reference(args, loaded, tuning):
    """What the policy is compared with, or None for losses that need nothing."""
    from models.adapter_files import load_adapter
    from models.reference import adapter_as_it_is, adapter_off, frozen_copy
    from training.reference_cache import describe_model

    if args.algorithm not in WITH_REFERENCE:
        return None
    as_loaded = args.resume_adapter_file is not None and args.reference == "loaded"
    if tuning.kind != "full":
        return (adapter_as_it_is if as_loaded else adapter_off)(loaded.model, tuning)
    other = load_copy(args)
    if as_loaded:
        load_adapter(other, args.resume_adapter_file, any_base=args.any_base)
        other.model.freeze()
        return frozen_copy(other.model, describe_model(other.model))
    return frozen_copy(other.model)


def precompute(args, loaded, task, rows, folder) -> None:
    """The reference's log-probabilities of the rows of both splits, into the rows."""
    from training.reference_cache import describe_arrays, fill_in_split

    kept = task.reference.kept
    about = task.reference.fingerprint if kept is None else describe_arrays(kept)
    model = f"{loaded.fingerprint} {args.dtype} {args.quantize} {args.reference_quantize} {about}"
    for split in (name for name in ("train", "valid") if name in rows):
        plan = make_plan(args, rows[split], shuffle=False)
        said = fill_in_split(rows[split].rows, plan, task.reference_logprobs, folder, model)
        print(f"{split}: reference log-probabilities {said}")


# ------------------------------------------------------------------------------ loop


def train(args, loaded, task, rows) -> None:
    """The loop, and what is left behind at its end."""
    from mlx_sft_trainer import SupervisedTrainer
    from publishing.export import write_fused
    from training.optimizers import build_optimizer
    from training.preference_warnings import PreferenceWatch
    from training.reference_cache import NAME

    plan = make_plan(args, rows["train"], seed=args.seed, pad_to_multiple=shape_multiple())
    steps, batches = training_length(args, len(plan))
    order = make_curriculum(args, rows["difficulty"], steps)
    plan = easy_first(plan, order, args.gradient_accumulation_steps)
    trainer = SupervisedTrainer(
        task,
        build_optimizer(**optimizer_options(args), steps=steps),
        max_grad_norm=args.max_grad_norm,
        grad_checkpoint=args.grad_checkpoint,
    )
    make_loop = supervised_loop(
        args,
        loaded,
        trainer,
        rows,
        plan,
        (steps, batches),
        schedule_options(args),
        validation=validation(args, rows.get("valid"), least_rows(args)),
        reference=task.reference and task.reference.fingerprint,
        watch=PreferenceWatch(
            log_2={*args.loss_type} <= {"sigmoid", "sigmoid_norm"} and args.algorithm == "dpo",
            reference=task.reference is not None,
        ),
    )

    def said(loop) -> str:
        if args.precompute_ref_log_probs:
            precompute(args, loaded, task, rows, loop.run_folder.folder)
        size = f"{args.batch_size} x {args.gradient_accumulation_steps}"
        return f"{steps} updates of {size} rows, {count_trained(task.tuning)}"

    run_training(
        args,
        "preference",
        make_loop,
        said,
        lambda run, loop: finish(args, loaded, run, loop, rows),
        name=args.algorithm,
        outputs=(NAME,),
        write_fused=write_fused,
    )


# ------------------------------------------------------------------------------ save


def told(found, batches) -> dict:
    """Metrics of a validation on `batches`, the accuracy beside how many pairs it is over."""
    line = {}
    for name, value in found.items():
        line[name] = value
        if name == "rewards/accuracies":
            line["pairs"] = sum(len(batch.better) for batch in batches)
    return line


def finish(args, loaded, run, loop, rows) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    from models.adapter_files import save_adapter
    from reports.training_plots import plot_losses, plot_preferences
    from run_folder.run import read_rows

    task, found = loop.trainer.task, {}
    if args.save_best:
        loop.take_best()
    written = save_adapter(args.save_file, task.tuning, loaded, run=run.recorded)
    if "valid" in rows:
        found = loop.validation_of()
        show("validation", told(found, loop.validation()))
    logged = read_rows(run.folder)
    written.append(plot_losses(logged, run.plots / "loss.png", unit="loss"))
    written.append(plot_preferences(logged, run.plots / "preferences.png"))
    valid = {f"valid/{name}": value for name, value in found.items()}
    run.finish({"steps": loop.step, "best_valid_loss": loop.best, **loop.totals, **valid})
    fuse = [] if args.fused_dir else [fuse_command(args)]
    say_written(run, written, *fuse, talk_command(args))


if __name__ == "__main__":
    run_main(main, workers=True)
