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

import fast_blas  # noqa: F401

from command_line.adapter_file import make_tuning, refuse_other_pooling
from command_line.contrastive_flags import LEAST
from command_line.curriculum_flags import difficulty, make_curriculum
from command_line.data_flags import flags_of_rows
from command_line.exits import run_main
from command_line.memory_fit import settle_supervised_memory
from command_line.model_limits import check_splits, fit_lengths
from command_line.sft_flags import parse_arguments
from command_line.sft_rows import load_rows, training_length, validated, validation
from command_line.shared_flags import model_options, optimizer_options, schedule_options
from command_line.worker_flags import run_workers, starts_workers
from data_utils import BatchPlan, easy_first, epoch_batches
from models.adapter_description import REWARD_HEAD
from training.launch import (
    count_trained,
    run_training,
    say_peak_memory,
    shape_multiple,
    start,
    supervised_loop,
)
from training.results import agreement, finish_supervised, fuse_command, show
from waiting import watched

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    if starts_workers(args):
        return run_workers(args, __file__, words)
    from models.adapter_files import SCORES

    loaded = start(args.seed, args.memory_limit, resume=args.resume, **model_options(args))
    fit_lengths(args, loaded.limits)
    rows = load_rows(args, loaded.tokenizer)
    if args.train:
        rows["difficulty"] = difficulty(args, loaded, rows["train"].rows)
    task = make_task(args, loaded)
    if rows["scores"] is not None:
        loaded.config[SCORES] = rows["scores"].described()
    check_splits(rows, loaded.limits, task.tuning)
    if args.train or args.preview:
        least = LEAST if args.use_contrastive else 1
        settle_supervised_memory(args, loaded, task.tuning, rows["train"], least=least)
    if args.preview:
        return 0
    if args.reward_model:
        task.reward_model.reading = rows["reading"]
    if args.train:
        train(args, loaded, task, rows)
    if args.test:
        test(args, task, rows["test"])
    say_peak_memory()
    return 0


# ------------------------------------------------------------------------------ model


def make_task(args, loaded):
    """The model with what is trained on it, as a task of mlx_sft_trainer."""
    from mlx_sft_trainer import ContrastiveTask, LanguageModelTask, RewardModelTask
    from models.reward_model import RewardModel, load_reward_head

    tuning = make_tuning(args, loaded, args.resume_adapter_file)
    if args.use_contrastive:
        return ContrastiveTask(
            loaded.model,
            tuning,
            shape_multiple(),
            temperature=args.contrastive_temp,
            contrastive_weight=args.contrastive_weight,
        )
    if not args.reward_model:
        return LanguageModelTask(loaded.model, tuning, pad_to_multiple=shape_multiple())
    reward_model = RewardModel(loaded.model, pooling=args.pooling, tuning=tuning)
    if args.resume_adapter_file is not None:
        load_reward_head(reward_model, args.resume_adapter_file)
        refuse_other_pooling(args, args.resume_adapter_file, reward_model.pooling)
    return RewardModelTask(
        reward_model,
        centering=args.centering,
        use_margin=args.margins,
        soft_labels=args.soft_labels,
    )


# ------------------------------------------------------------------------------ loop


def train(args, loaded, task, rows) -> None:
    """The loop, and what is left behind at its end."""
    from mlx_sft_trainer import SupervisedTrainer
    from publishing.export import write_fused
    from training.optimizers import build_optimizer

    plan = BatchPlan(
        rows["train"].lengths,
        args.batch_size,
        seed=args.seed,
        pad_to_multiple=shape_multiple(),
        least=LEAST if args.use_contrastive else 1,
    )
    steps, batches = training_length(args, len(plan))
    order = make_curriculum(args, rows["difficulty"], steps)
    plan = easy_first(plan, order, args.gradient_accumulation_steps)
    epochs = (batches or steps * args.gradient_accumulation_steps) / len(plan)
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
        validation=validation(args, rows.get("valid")),
    )

    def said(_) -> str:
        passes = task.passes if args.reward_model else None
        return (
            f"{steps} updates of {args.batch_size} x {args.gradient_accumulation_steps} rows "
            f"({epochs:.1f} epochs), padding efficiency "
            f"{plan.padding_efficiency(rows['train'].sequences, passes):.2f}, "
            f"{count_trained(task.tuning)}"
        )

    kind = "reward_model" if args.reward_model else "sft"
    run_training(
        args,
        kind,
        make_loop,
        said,
        lambda run, loop: finish(args, loaded, run, loop, rows),
        write_fused=write_fused,
    )


# ------------------------------------------------------------------------------ save


def finish(args, loaded, run, loop, rows) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    from models.adapter_files import save_adapter
    from models.reward_model import save_reward_head
    from run_folder.console import command
    from training.samples import normalise_on_samples

    task, reward_model = loop.trainer.task, None
    if args.save_best:
        loop.take_best()
    head = REWARD_HEAD if args.reward_model else None
    written = save_adapter(args.save_file, task.tuning, loaded, head=head, run=run.recorded)
    going_on = None
    if args.reward_model:
        reward_model = task.reward_model
        written.append(save_reward_head(args.save_file, reward_model))
        if args.normalize_samples:  # may fail, and what was trained lies there already
            normalise_on_samples(task, loaded, rows["train"].rows, args.normalize_samples)
            save_reward_head(args.save_file, reward_model)
        going_on = command(
            "ppo_training.py",
            *flags_of_rows(args),
            model=args.model,
            tokenizer=args.tokenizer,
            reward_model=args.save_file,
        )
    going_on = going_on or fuse_command(args)
    valid = validated(args, rows.get("valid"))
    finish_supervised(args, run, loop, written, valid, reward_model, going_on)


def test(args, task, rows) -> None:
    """Loss and agreement on the test rows."""
    from mlx_sft_trainer import evaluate

    plan = BatchPlan(rows.lengths, args.batch_size, shuffle=False)
    metrics = evaluate(task, watched(epoch_batches(rows.rows, plan), "test", len(plan)))
    show("test", metrics)
    if args.reward_model:
        agreement(task.reward_model, rows.rows)


if __name__ == "__main__":
    run_main(main, workers=True)
