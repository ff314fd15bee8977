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

import fast_blas

import functools
import sys

from command_line.adapter_file import refuse_other_adapter
from command_line.parser import run_main
from command_line.preference_flags import (
    WITH_REFERENCE,
    load_rows,
    loss_options,
    make_plan,
    parse_arguments,
)
from command_line.sft_flags import training_length, validation
from command_line.shared_flags import adapter_description, optimizer_options
from data_utils import BatchIterator, epoch_batches, make_batch

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    # MLX and what stands on it come after the command line: help and mistakes answer at once.
    from models.load import load_model
    from training.memory import peak_memory, set_memory_limit
    from training.streams import seed_everything

    if notice := fast_blas.notice():
        print(notice, file=sys.stderr)
    seed_everything(args.seed)
    set_memory_limit(args.memory_limit)
    loaded = load_model(
        args.model,
        dtype=args.dtype,
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
    )
    rows = load_rows(args, loaded.tokenizer)
    if args.preview:
        return 0
    task = make_task(args, loaded)
    if args.train:
        train(args, loaded, task, rows)
    if args.test:
        batches = epoch_batches(rows["test"].rows, make_plan(args, rows["test"], shuffle=False))
        from mlx_sft_trainer import evaluate

        show("test", evaluate(task, batches))
    print(f"peak memory {peak_memory():.2f} GB")
    return 0


# ------------------------------------------------------------------------------ model and loss


def make_task(args, loaded):
    """The model with what is trained on it and its reference, as a task of mlx_sft_trainer."""
    import mlx.core as mx

    from mlx_preference_tasks import PairTask, UnpairedTask
    from models.adapter_files import attach, load_adapter
    from rl.preference_losses import cpo_loss, dpo_loss, orpo_loss

    if args.resume_adapter_file is not None:
        tuning = load_adapter(loaded, args.resume_adapter_file, any_base=args.any_base)
        blocks = len(loaded.model.layers)
        there = tuning.description(blocks)
        refuse_other_adapter(args, args.resume_adapter_file, there, blocks=blocks)
    else:
        tuning = attach(loaded.model, adapter_description(args))
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    common = {
        "reference": make_reference(args, loaded, tuning),
        "pad_to_multiple": 16 if on_gpu else 1,
    }
    losses = {name: loss_options(args, name) for name in args.loss_type}
    own = losses[args.loss_type[0]]
    if args.algorithm == "kto":
        return UnpairedTask(
            loaded.model, tuning, loss_type=args.loss_type[0], loss_options=own, **common
        )
    if args.algorithm == "orpo":
        loss = functools.partial(orpo_loss, **own)
        return PairTask(loaded.model, tuning, loss, nll_of_prompt=True, **common)
    if args.algorithm != "dpo":
        loss = functools.partial(
            cpo_loss, loss_type=args.loss_type[0], cpo_alpha=args.cpo_alpha, **own
        )
        return PairTask(loaded.model, tuning, loss, **common)
    loss = functools.partial(
        dpo_loss, loss_type=args.loss_type, loss_weights=args.loss_weights, options=losses,
        beta=args.beta,
    )  # fmt: skip
    return PairTask(
        loaded.model, tuning, loss, ld_alpha=args.ld_alpha, use_weighting=args.use_weighting,
        **common,
    )  # fmt: skip


def make_reference(args, loaded, tuning):
    """What the policy is compared with, or None for losses that need nothing."""
    from models.adapter_files import load_adapter
    from models.load import load_model
    from models.reference import adapter_as_it_is, adapter_off, frozen_copy

    if args.algorithm not in WITH_REFERENCE:
        return None
    as_loaded = args.resume_adapter_file is not None and args.reference == "loaded"
    if tuning.kind != "full":
        return (adapter_as_it_is if as_loaded else adapter_off)(loaded.model, tuning)
    other = load_model(
        args.model,
        dtype=args.dtype,
        quantize=args.reference_quantize,
        trust_remote_code=args.trust_remote_code,
    )
    if as_loaded:
        load_adapter(other, args.resume_adapter_file, any_base=args.any_base)
        other.model.freeze()
    return frozen_copy(other.model)


def precompute(args, loaded, task, rows, folder) -> None:
    """The reference's log-probabilities of the rows of both splits, into the rows."""
    from training.reference_cache import NAME, describe_arrays, fill_in, key_of

    if not args.precompute_ref_log_probs:
        return
    kept = task.reference.kept
    about = describe_arrays(kept) if kept is not None else f"{args.resume_adapter_file}"
    model = f"{loaded.fingerprint} {args.dtype} {args.quantize} {args.reference_quantize} {about}"
    for split in ("train", "valid"):
        if split not in rows:
            continue
        every = rows[split].rows
        plan = make_plan(args, rows[split], shuffle=False)
        batches = ((numbers, make_batch([every[i] for i in numbers])) for numbers in plan.epoch(0))
        file = folder / NAME / f"{key_of(every, model)}.safetensors"
        known = fill_in(every, batches, task.reference_logprobs, file)
        print(f"{split}: reference log-probabilities {'read from' if known else 'kept in'} {file}")


# ------------------------------------------------------------------------------ loop


def train(args, loaded, task, rows) -> None:
    """The loop, and what is left behind at its end."""
    import mlx.core as mx

    from mlx_sft_trainer import SupervisedTrainer
    from models.adapter_files import describe
    from run_folder.checkpoint_folder import best_checkpoint, latest_checkpoint, saving
    from run_folder.run import Run
    from run_folder.run_config import checkpoint_asked_for
    from run_folder.stopping import GracefulStop
    from training.optimizers import build_optimizer
    from training.preference_warnings import PreferenceWatch
    from training.reference_cache import NAME
    from training.samples import write_samples
    from training.supervised_loop import Loop, Schedule

    multiple = 16 if mx.default_device().type == mx.DeviceType.gpu else 1
    plan = make_plan(args, rows["train"], seed=args.seed, pad_to_multiple=multiple)
    steps, batches = training_length(args, len(plan))
    optimizer = build_optimizer(**optimizer_options(args), steps=steps)
    trainer = SupervisedTrainer(
        task, optimizer, max_grad_norm=args.max_grad_norm, grad_checkpoint=args.grad_checkpoint
    )
    schedule = Schedule(
        steps=steps,
        report_every=args.steps_per_report,
        eval_every=args.steps_per_eval,
        save_every=args.save_every,
        accumulation=args.gradient_accumulation_steps,
        batches=batches,
        keep_checkpoints=args.keep_checkpoints,
        patience=args.early_stopping_patience,
        max_bad_steps=args.max_bad_steps,
        memory_limit=args.memory_limit,
    )
    least, resuming = 2 if args.algorithm == "kto" else 1, args.resume is not None
    with (
        Run(
            "preference", vars(args), output_dir=args.output_dir, resume=resuming,
            overwrite=args.overwrite, log_with=args.log_with, blas=fast_blas.NAME, outputs=(NAME,),
        ) as run,
        GracefulStop() as stop,
    ):  # fmt: skip
        loop = Loop(
            run, trainer, task.groups(describe(task.tuning, loaded)),
            BatchIterator(rows["train"].rows, plan), schedule,
            validation=validation(args, rows.get("valid"), least),
            after_validation=lambda step: write_samples(
                run, step, loaded, task, args.sample_prompts, rows.get("samples")
            ),
            base=loaded.fingerprint,
            watch=PreferenceWatch(
                log_2={*args.loss_type} <= {"sigmoid", "sigmoid_norm"} and args.algorithm == "dpo",
                reference=task.reference is not None,
            ),
        )  # fmt: skip
        if resuming:
            last = checkpoint_asked_for(args.resume) or latest_checkpoint(run.checkpoints)
            loop.resume(last, force=args.force_resume)
        precompute(args, loaded, task, rows, run.folder)
        count = sum(a.size for a in task.tuning.arrays().values())
        print(f"{run.folder}: {steps} updates of {args.batch_size} x "
              f"{args.gradient_accumulation_steps} rows, {count:,} weights trained")  # fmt: skip
        loop.run(stop, args.algorithm)
        if args.save_best and not stop.requested:
            loop.take_best(best_checkpoint(run.checkpoints))
        if not stop.requested:
            with saving(args.save_file):
                finish(args, loaded, task, run, loop, rows)
    stop.exit_if_requested("preference_training.py", run.folder)


# ------------------------------------------------------------------------------ save


def finish(args, loaded, task, run, loop, rows) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    from models.adapter_files import save_adapter
    from reports.training_plots import plot_losses, plot_preferences
    from run_folder.next_line import command, next_lines
    from run_folder.run import read_rows

    summary = {"steps": loop.step, "best_valid_loss": loop.best, **loop.totals}
    written = save_adapter(args.save_file, task.tuning, loaded)
    if "valid" in rows:
        least = 2 if args.algorithm == "kto" else 1
        found = loop.trainer.evaluate(validation(args, rows["valid"], least)())
        show("validation", found)
        summary |= {f"valid/{name}": value for name, value in found.items()}
    logged = read_rows(run.folder)
    plots = [
        plot_losses(logged, run.plots / "loss.png", unit="loss"),
        plot_preferences(logged, run.plots / "preferences.png"),
    ]
    run.finish(summary)
    print(f"wrote {', '.join(map(str, [*written, *plots]))}\n      {run.folder}/metrics.jsonl")
    fuse = command("fuse.py", model=args.model, adapter_file=args.save_file, save_path="my_model/")
    talk = command("talk_to_model.py", model=args.model, resume_file=args.save_file)
    print(next_lines([fuse, talk]))


def show(what: str, metrics: dict[str, float]) -> None:
    """One line of metrics."""
    print(f"{what}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


if __name__ == "__main__":
    run_main(main)
