"""sft.py in PyTorch: supervised fine-tuning, and reward models with --reward-model.

Flags, data and their order, loop and run folder are those of sft.py; the model is transformers',
the adapter peft's, losses and updates are those of TRL's SFTTrainer and RewardTrainer. From the
same weights both sides give the same losses (tests/baseline/test_baseline_parity.py).

Within a minute on a laptop, on the embedded model:
    python pytorch_baseline/pytorch_sft.py --train --iters 100 --batch-size 32 --learning-rate 3e-3
"""

from functools import partial

import project_root  # noqa: F401
import pytorch_encoder
from pytorch_actor_critic import generate
from pytorch_backend import trained_group
from pytorch_files import is_adapter, save_trained
from pytorch_models import Tuned
from pytorch_optimizers import build_optimizer, trainable
from pytorch_reward_model import RewardModel
from pytorch_runs import load_base, make_tuned, parse, place, start
from pytorch_runs import train as run_and_finish

from command_line import sft_flags, sft_rows
from command_line.adapter_file import refuse_other_pooling
from command_line.data_flags import data_sources
from command_line.exits import run_main
from command_line.shared_flags import optimizer_options, schedule_options
from data_utils import BatchPlan, epoch_batches
from models.adapter_description import REWARD_HEAD
from run_folder.console import command
from training.launch import Parts, count_trained, say_peak_memory, supervised_loop
from training.results import agreement, finish_supervised, show
from training.sample_texts import log_answers, normalise_on, starts_of
from training.supervised_loop import Loop
from waiting import watched


def main(words=None) -> int:
    args = parse(sft_flags, words)
    encoder = pytorch_encoder.is_encoder(args)
    if encoder:
        pytorch_encoder.settle(args)
    loaded, backend = start(args, pytorch_encoder.load_encoder if encoder else load_base)
    if encoder:  # a classifier, which is trained whole and reads pairs of texts
        model = pytorch_encoder.Encoder(loaded)
        rows = pytorch_encoder.load_rows(args, data_sources(args), loaded)
    else:
        rows = sft_rows.load_rows(args, loaded.tokenizer)
    if args.preview:
        return 0
    if not encoder:
        model = make_model(args, loaded)
        if args.reward_model:
            model.reading = rows["reading"]
    if args.train:
        train(args, loaded, backend, model, rows)
    if args.test:
        plan = BatchPlan(rows["test"].lengths, args.batch_size, shuffle=False)
        batches = watched(epoch_batches(rows["test"].rows, plan), "test", len(plan))
        show("test", make_trainer(args, loaded, model).evaluate(batches))
        if args.reward_model:
            agreement(model, rows["test"].rows)
    say_peak_memory(backend.peak_memory())
    return 0


# ------------------------------------------------------------------------------ model


def make_model(args, loaded) -> Tuned | RewardModel:
    """The model with what is trained on it."""
    model = make_tuned(args, loaded, args.resume_adapter_file)
    if not args.reward_model:
        return model
    reward_model = RewardModel(model, pooling=args.pooling)
    if args.resume_adapter_file is not None:
        reward_model.load_head(args.resume_adapter_file)
        refuse_other_pooling(args, args.resume_adapter_file, reward_model.pooling)
    return reward_model


def make_trainer(args, loaded, model, **options):
    """What trains it; without `options` it evaluates alone."""
    # TRL comes after the command line: help and mistakes answer seconds earlier.
    from pytorch_sft_trainer import RewardTrainer, SFTTrainer

    options["seed"] = args.seed
    if not args.reward_model:
        return SFTTrainer(model, loaded.tokenizer, **options)
    losses = {"centering": args.centering, "use_margin": args.margins}
    return RewardTrainer(model, loaded.tokenizer, **losses, **options)


# ------------------------------------------------------------------------------ loop


def train(args, loaded, backend, model, rows) -> None:
    """The loop, and what is left behind at its end."""
    plan = BatchPlan(rows["train"].lengths, args.batch_size, seed=args.seed)
    steps, batches = sft_rows.training_length(args, len(plan))
    accumulation, parameters = args.gradient_accumulation_steps, trainable(model)
    trainer = make_trainer(
        args,
        loaded,
        model,
        optimizer=build_optimizer(parameters, **optimizer_options(args), steps=steps),
        max_grad_norm=args.max_grad_norm,
        grad_checkpoint=args.grad_checkpoint,
    )

    def write_samples(run, step: int) -> None:
        if args.sample_prompts:
            trainer.trained.eval()
            options = {"max_tokens": 100, "eos_ids": loaded.eos_ids, "temperature": 0.0}
            made = generate(trainer.tuned, rows["samples"], **options)
            log_answers(run, step, loaded.tokenizer, args.sample_prompts, made.responses)

    make_loop = supervised_loop(
        args,
        loaded,
        trainer,
        rows,
        plan,
        (steps, batches),
        schedule_options(args),
        parts=Parts(Loop, trained_group(parameters), backend, write_samples),
        validation=sft_rows.validation(args, rows.get("valid")),
    )
    said = (
        f"{steps} updates of {args.batch_size} x {accumulation} rows "
        f"({(batches or steps * accumulation) / len(plan):.1f} epochs), "
        f"{count_trained(trainer.tuned)}"
    )
    kind = "reward_model" if args.reward_model else "sft"
    run_and_finish(args, kind, make_loop, said, partial(finish, args, loaded, rows))


# ------------------------------------------------------------------------------ save


def finish(args, loaded, rows, run, loop) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    path, trainer, reward_model = place(args, run), loop.trainer, None
    if args.save_best:
        loop.take_best()
    if args.reward_model:
        reward_model = trainer.trained
    if isinstance(trainer.trained, pytorch_encoder.Encoder):
        written = pytorch_encoder.save_encoder(path, loaded)
        going_on = command("ppo_training.py", reward_model=path)
    else:
        written, going_on = save(args, loaded, trainer, rows, path, run.recorded)
    peak, valid = loop.backend.peak_memory(), sft_rows.validated(args, rows.get("valid"))
    finish_supervised(args, run, loop, written, valid, reward_model, going_on, peak_memory=peak)


def save(args, loaded, trainer, rows, path, run) -> tuple[list, str]:
    """Write an adapter or a merged model, and its reward head; what takes it next."""
    head = REWARD_HEAD if args.reward_model else None
    written = save_trained(path, trainer.tuned, loaded, args.tokenizer, head, run=run)
    adapter = is_adapter(path, trainer.tuned)
    base = args.model if adapter else None
    if args.reward_model:
        written.append(trainer.trained.save_head(path))
        if args.normalize_samples:  # may fail, and what was trained lies there already
            normalise_scores(args, loaded, trainer, rows["train"].rows)
            trainer.trained.save_head(path)
        return written, command("ppo_training.py", model=base, reward_model=path)
    if adapter:
        return written, command("fuse.py", model=base, adapter_file=path, save_path="my_model/")
    return written, command("talk_to_model.py", model=path)


def normalise_scores(args, loaded, trainer, rows) -> None:
    """Mean 0 and deviation 1 on texts that the base model writes after the beginning of rows."""
    starts = starts_of(rows, args.normalize_samples)
    trainer.trained.eval()
    longest = max(map(len, starts)) * 3
    with trainer.tuned.disabled():
        made = generate(trainer.tuned, starts, max_tokens=longest, eos_ids=loaded.eos_ids, seed=0)
    normalise_on(trainer.trained, loaded.tokenizer, starts, made.responses, made.ended)


if __name__ == "__main__":
    run_main(main)
