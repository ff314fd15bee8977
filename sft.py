"""Supervised fine-tuning of a language model; with --reward-model, training of a reward model.

What is trained is a LoRA adapter (the default), a soft prompt (--prompt-tuning) or every weight
(--fine-tune-type full), on data in any format that data/README.md lists. A run folder keeps
options, metrics, plots and checkpoints; --save-file gets the trained weights.

Within a minute on a laptop, on the embedded model:
    python sft.py --train --iters 100 --batch-size 32 --learning-rate 3e-3
A real one:
    python sft.py --model mlx-community/Llama-3.2-1B-Instruct-bf16 --train --data my_folder \
        --data-base "" --epochs 2 --mask-prompt --save-file my_adapter
"""

import fast_blas

import itertools
import sys
from contextlib import suppress

from command_line.adapter_file import refuse_other_adapter, refuse_other_pooling
from command_line.parser import run_main
from command_line.sft_flags import load_rows, parse_arguments, training_length, validation
from command_line.shared_flags import adapter_description, optimizer_options
from data_utils import BatchIterator, BatchPlan, epoch_batches
from models.adapter_description import REWARD_HEAD

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
    if args.reward_model:
        task.reward_model.reading = rows["reading"]
    if args.train:
        train(args, loaded, task, rows)
    if args.test:
        test(args, task, rows["test"])
    print(f"peak memory {peak_memory():.2f} GB")
    return 0


# ------------------------------------------------------------------------------ model


def make_task(args, loaded):
    """The model with what is trained on it, as a task of mlx_sft_trainer."""
    import mlx.core as mx

    from mlx_sft_trainer import LanguageModelTask, RewardModelTask
    from models.adapter_files import attach, load_adapter
    from models.reward_model import RewardModel, load_reward_head

    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    if args.resume_adapter_file is not None:
        tuning = load_adapter(loaded, args.resume_adapter_file, any_base=args.any_base)
        blocks = len(loaded.model.layers)
        there = tuning.description(blocks)
        refuse_other_adapter(args, args.resume_adapter_file, there, blocks=blocks)
    else:
        tuning = attach(loaded.model, adapter_description(args))
    if not args.reward_model:
        return LanguageModelTask(loaded.model, tuning, pad_to_multiple=16 if on_gpu else 1)
    reward_model = RewardModel(loaded.model, pooling=args.pooling, tuning=tuning)
    if args.resume_adapter_file is not None:
        load_reward_head(reward_model, args.resume_adapter_file)
        refuse_other_pooling(args, args.resume_adapter_file, reward_model.pooling)
    return RewardModelTask(reward_model, centering=args.centering, use_margin=args.margins)


# ------------------------------------------------------------------------------ loop


def train(args, loaded, task, rows) -> None:
    """The loop, and what is left behind at its end."""
    import mlx.core as mx

    from mlx_sft_trainer import SupervisedTrainer
    from models.adapter_files import describe
    from run_folder.checkpoint_folder import best_checkpoint, latest_checkpoint, saving
    from run_folder.run import Run
    from run_folder.run_config import checkpoint_asked_for
    from run_folder.stopping import GracefulStop, StepGivenUp
    from training.optimizers import build_optimizer
    from training.samples import write_samples
    from training.supervised_loop import Loop, Schedule

    multiple = 16 if mx.default_device().type == mx.DeviceType.gpu else 1
    plan = BatchPlan(
        rows["train"].lengths, args.batch_size, seed=args.seed, pad_to_multiple=multiple
    )
    steps, batches = training_length(args, len(plan))
    epochs = (batches or steps * args.gradient_accumulation_steps) / len(plan)
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
    resuming = args.resume is not None
    script = "reward_model" if args.reward_model else "sft"
    with (
        Run(
            script, vars(args), output_dir=args.output_dir, resume=resuming,
            overwrite=args.overwrite, log_with=args.log_with, blas=fast_blas.NAME,
        ) as run,
        GracefulStop() as stop,
    ):  # fmt: skip
        groups = task.groups(describe(task.tuning, loaded))
        loop = Loop(
            run, trainer, groups, BatchIterator(rows["train"].rows, plan), schedule,
            validation=validation(args, rows.get("valid")),
            after_validation=lambda step: write_samples(
                run, step, loaded, task, args.sample_prompts, rows.get("samples")
            ),
            base=loaded.fingerprint,
        )  # fmt: skip
        if resuming:
            last = checkpoint_asked_for(args.resume) or latest_checkpoint(run.checkpoints)
            loop.resume(last, force=args.force_resume)
        passes = task.passes if args.reward_model else None
        efficiency = plan.padding_efficiency(rows["train"].sequences, passes)
        print(
            f"{run.folder}: {steps} updates of {args.batch_size} x "
            f"{args.gradient_accumulation_steps} rows ({epochs:.1f} epochs), "
            f"padding efficiency {efficiency:.2f}, "
            f"{sum(a.size for a in task.tuning.arrays().values()):,} weights trained"
        )
        loop.run(stop, script)
        if args.save_best and not stop.requested:
            loop.take_best(best_checkpoint(run.checkpoints))
        if not stop.requested:
            with suppress(StepGivenUp), stop.giving_up(), saving(args.save_file):
                finish(args, loaded, task, run, loop, rows)
    stop.exit_if_requested("sft.py", run.folder)


# ------------------------------------------------------------------------------ save


def finish(args, loaded, task, run, loop, rows) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    from models.adapter_files import save_adapter
    from models.reward_model import save_reward_head
    from reports.training_plots import plot_losses
    from run_folder.next_line import command, next_lines
    from run_folder.run import read_rows

    summary = {"steps": loop.step, "best_valid_loss": loop.best, **loop.totals}
    head = REWARD_HEAD if args.reward_model else None
    written = save_adapter(args.save_file, task.tuning, loaded, head=head)
    if args.reward_model:
        written.append(save_reward_head(args.save_file, task.reward_model))
        if args.normalize_samples:  # may fail, and what was trained lies there already
            normalise_scores(args, loaded, task, rows["train"])
            save_reward_head(args.save_file, task.reward_model)
        if "valid" in rows:
            summary |= evaluate_reward_model(task, rows["valid"], run.plots)
    elif "valid" in rows:
        found = loop.trainer.evaluate(validation(args, rows["valid"])())
        print("validation: " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
        summary |= {f"valid/{name}": value for name, value in found.items()}
    unit = "loss" if args.reward_model else "nats per token"
    plot = plot_losses(read_rows(run.folder), run.plots / "loss.png", unit=unit)
    run.finish(summary)
    print(f"wrote {', '.join(map(str, written))}\n      {plot}\n      {run.folder}/metrics.jsonl")
    if args.reward_model:
        going_on = command("ppo_training.py", model=args.model, reward_model=args.save_file)
    else:
        going_on = command(
            "fuse.py", model=args.model, adapter_file=args.save_file, save_path="my_model/"
        )
    print(next_lines([going_on]))


def normalise_scores(args, loaded, task, rows) -> None:
    """Mean 0 and deviation 1 on texts that the base model writes after the beginning of rows."""
    import mlx.core as mx

    from models.decoding import generate
    from models.reading import Ending
    from models.reward_model import normalise

    starts = [getattr(row, "tokens", None) or row.chosen for row in rows.rows]
    starts = list(itertools.islice(itertools.cycle(starts), args.normalize_samples))
    starts = [tokens[: max(1, len(tokens) // 4)] for tokens in starts]
    with task.tuning.disabled():
        longest = max(map(len, starts)) * 3
        made = generate(
            loaded.model, starts, max_tokens=longest, eos_ids=loaded.eos_ids, key=mx.random.key(0)
        )
    ending = Ending(loaded.tokenizer, task.reward_model.reading)
    made = zip(starts, made.responses, made.finished, strict=True)
    texts = [ending.put(start + response, end) for start, response, end in made]
    normalise(task.reward_model, texts)


def evaluate_reward_model(task, rows, plots=None) -> dict[str, float]:
    """Agreement of scores with rewards or preferences; with `plots`, drawn there."""
    from reports.reward_evaluation import evaluate_scores

    model = task.reward_model
    report = evaluate_scores(model.score, rows.rows, plots, gain=model.gain, offset=model.offset)
    print("held-out rows: " + "  ".join(f"{k} {v:.3f}" for k, v in report.items()))
    return {f"heldout/{name}": value for name, value in report.items()}


def test(args, task, rows) -> None:
    """Loss and agreement on the test rows."""
    from mlx_sft_trainer import evaluate

    plan = BatchPlan(rows.lengths, args.batch_size, shuffle=False)
    metrics = evaluate(task, epoch_batches(rows.rows, plan))
    print("test: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    if args.reward_model:
        evaluate_reward_model(task, rows)


if __name__ == "__main__":
    run_main(main)
