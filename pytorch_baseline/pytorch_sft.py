"""sft.py in PyTorch: supervised fine-tuning, and reward models with --reward-model.

The flags, the data and their order are those of sft.py; the model is transformers', the adapter
peft's, loss and loop are those of TRL's SFTTrainer and RewardTrainer. From the same weights both
sides give the same losses (tests/baseline/test_baseline_parity.py).

Within a minute on a laptop, on the embedded model:
    python pytorch_baseline/pytorch_sft.py --train --iters 100 --batch-size 32 --learning-rate 3e-3
"""

import itertools
from pathlib import Path

import project_root  # noqa: F401
import pytorch_encoder
from pytorch_actor_critic import Sampling, generate
from pytorch_checkpoints import load_checkpoint
from pytorch_files import (
    WRITTEN,
    check_free,
    is_adapter,
    load_adapter,
    place_of_model,
    save_trained,
)
from pytorch_flags import parse
from pytorch_loops import Schedule, SupervisedLoop
from pytorch_models import Tuned, load_model, pick_device
from pytorch_reward_model import RewardModel, normalise
from pytorch_training import (
    note_versions,
    optimizer_and_schedule,
    peak_memory,
    seed_everything,
    trainable,
)

from command_line import sft_flags
from command_line.adapter_file import refuse_other_adapter, refuse_other_pooling
from command_line.data_flags import data_sources
from command_line.parser import run_main
from command_line.shared_flags import adapter_description, optimizer_options
from data_utils import BatchIterator, BatchPlan, epoch_batches
from models.adapter_description import REWARD_HEAD
from reports.reward_evaluation import evaluate_scores
from reports.training_plots import plot_losses
from run_folder.checkpoint_folder import best_checkpoint, latest_checkpoint, saving
from run_folder.run import Run, read_rows
from run_folder.run_config import checkpoint_asked_for
from run_folder.stopping import GracefulStop

SCRIPT = "pytorch_baseline/pytorch_sft.py"


# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse(sft_flags, words)
    check_free(args)
    seed_everything(args.seed)
    if pytorch_encoder.is_encoder(args):
        return encoder_main(args)
    loaded = load_model(
        args.model,
        tokenizer=args.tokenizer,
        device=pick_device(args.device),
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    rows = sft_flags.load_rows(args, loaded.tokenizer)
    if args.preview:
        return 0
    model = make_model(args, loaded)
    if args.reward_model:
        model.reading = rows["reading"]
    if args.train:
        train(args, loaded, model, rows)
    if args.test:
        test(args, loaded, model, rows["test"])
    print(f"peak memory {peak_memory(loaded.device):.2f} GB")
    return 0


def encoder_main(args) -> int:
    """The same for a classifier on an encoder, which is trained whole and reads pairs of texts."""
    pytorch_encoder.settle(args)
    loaded = pytorch_encoder.load_encoder(args, pick_device(args.device))
    rows = pytorch_encoder.load_rows(args, data_sources(args), loaded.model)
    if args.train:
        train(args, loaded, loaded.model, rows)
    if args.test:
        test(args, loaded, loaded.model, rows["test"])
    print(f"peak memory {peak_memory(loaded.device):.2f} GB")
    return 0


# ------------------------------------------------------------------------------ model


def make_model(args, loaded) -> Tuned | RewardModel:
    """The model with what is trained on it."""
    if args.resume_adapter_file is not None:
        model = load_adapter(loaded, args.resume_adapter_file, any_base=args.any_base)
        blocks = loaded.model.config.num_hidden_layers
        refuse_other_adapter(args, args.resume_adapter_file, model.description, blocks=blocks)
    else:
        model = Tuned(loaded.model, adapter_description(args)).to(loaded.device)
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


def train(args, loaded, model, rows) -> None:
    """The loop, and what is left behind at its end."""
    plan = BatchPlan(rows["train"].lengths, args.batch_size, seed=args.seed)
    steps, batches = sft_flags.training_length(args, len(plan))
    epochs = (batches or steps * args.gradient_accumulation_steps) / len(plan)
    iterator = BatchIterator(rows["train"].rows, plan)
    parameters = trainable(model)
    optimizer, scheduler = optimizer_and_schedule(parameters, optimizer_options(args), steps)
    trainer = make_trainer(
        args,
        loaded,
        model,
        batches=iterator,
        optimizer=optimizer,
        scheduler=scheduler,
        accumulation=args.gradient_accumulation_steps,
        max_grad_norm=args.max_grad_norm,
        grad_checkpoint=args.grad_checkpoint,
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
    name = "pytorch_reward_model" if args.reward_model else "pytorch_sft"
    with (
        Run(
            name,
            vars(args),
            output_dir=args.output_dir,
            resume=args.resume is not None,
            overwrite=args.overwrite,
            log_with=args.log_with,
            outputs=("model", WRITTEN),
        ) as run,
        GracefulStop() as stop,
    ):
        loop = SupervisedLoop(
            run,
            trainer,
            schedule,
            loaded.device,
            batches=iterator,
            validation=sft_flags.validation(args, rows.get("valid")),
            after_validation=lambda step: write_samples(args, loaded, trainer, rows, run, step),
            base=loaded.fingerprint,
        )
        if args.resume is not None:
            saved = checkpoint_asked_for(args.resume) or latest_checkpoint(run.checkpoints)
            loop.resume(saved, force=args.force_resume)
        note_versions(run)
        print(
            f"{run.folder}: {steps} updates of {args.batch_size} x "
            f"{args.gradient_accumulation_steps} rows ({epochs:.1f} epochs), "
            f"{sum(a.numel() for a in trainer.tuned.arrays().values()):,} weights trained"
        )
        loop.run(stop, name)
        if args.save_best and not stop.requested:
            take_best(loop, best_checkpoint(run.checkpoints))
        if not stop.requested:
            with saving(args.save_file or run.folder / "model"):
                finish(args, loaded, trainer, run, loop, rows)
    stop.exit_if_requested(SCRIPT, run.folder)


def take_best(loop, checkpoint) -> None:
    """Go back to the weights of the best validation."""
    if checkpoint is None:
        print("note: no validation was better than the one before training; the last weights stay")
        return
    saved = load_checkpoint(checkpoint)
    loop.take_weights(saved)
    print(f"the best weights are those of step {saved['step']}")


def write_samples(args, loaded, trainer, rows, run, step) -> None:
    """Continue --sample-prompts greedily; into samples.jsonl."""
    if not args.sample_prompts:
        return
    tokenizer = loaded.tokenizer
    trainer.trained.eval()
    made = generate(
        trainer.tuned,
        rows["samples"],
        max_tokens=100,
        eos_ids=loaded.eos_ids,
        sampling=Sampling(temperature=0),
    )
    texts = [tokenizer.decode(r, skip_special_tokens=True) for r in made.responses]
    pairs = zip(args.sample_prompts, texts, strict=True)
    run.log_samples(step, [{"prompt": p, "response": r} for p, r in pairs])


# ------------------------------------------------------------------------------ save


def finish(args, loaded, trainer, run, loop, rows) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    state, memory = loop.state, peak_memory(loaded.device)
    summary = {"steps": loop.step, "best_valid_loss": state["best"], "peak_memory": memory}
    summary |= {name: state[name] for name in ("tokens", "skipped")}
    path = place_of_model(args, run.folder)
    head = REWARD_HEAD if args.reward_model else None
    encoder = isinstance(loaded, pytorch_encoder.LoadedEncoder)
    if encoder:
        written = pytorch_encoder.save_encoder(Path(path), loaded)
        summary |= (
            evaluate_reward_model(trainer, rows["valid"], run.plots) if "valid" in rows else {}
        )
    else:
        written = save_trained(path, trainer.tuned, loaded, args.tokenizer, head)
    if args.reward_model and not encoder:
        written.append(trainer.trained.save_head(path))
        if args.normalize_samples:  # may fail, and what was trained lies there already
            normalise_scores(args, loaded, trainer, rows["train"])
            trainer.trained.save_head(path)
        if "valid" in rows:
            summary |= evaluate_reward_model(trainer, rows["valid"], run.plots)
    elif "valid" in rows and not encoder:
        found = trainer.evaluate(sft_flags.validation(args, rows["valid"])())
        print("validation: " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
        summary |= {f"valid/{name}": value for name, value in found.items()}
    unit = "loss" if args.reward_model else "nats per token"
    written.append(plot_losses(read_rows(run.folder), run.plots / "loss.png", unit=unit))
    run.finish(summary)
    print("wrote " + "\n      ".join(map(str, [*written, run.folder / "metrics.jsonl"])))
    adapter = not encoder and is_adapter(path, trainer.tuned)
    print(f"next: python {what_next(args, path, adapter)}")


def what_next(args, path, adapter: bool) -> str:
    """The command that takes what was trained."""
    model = f" --model {args.model}" if args.model and adapter else ""
    if args.reward_model:
        return f"ppo_training.py{model} --reward_model {path}"
    if adapter:
        return f"fuse.py{model} --adapter-file {path} --save-path my_model/"
    return f"talk_to_model.py --model {path}"


def normalise_scores(args, loaded, trainer, rows) -> None:
    """Mean 0 and deviation 1 on texts that the base model writes after the beginning of rows."""
    starts = [getattr(row, "tokens", None) or row.chosen for row in rows.rows]
    starts = list(itertools.islice(itertools.cycle(starts), args.normalize_samples))
    starts = [tokens[: max(1, len(tokens) // 4)] for tokens in starts]
    trainer.trained.eval()
    longest = max(map(len, starts)) * 3
    with trainer.tuned.disabled():
        made = generate(trainer.tuned, starts, max_tokens=longest, eos_ids=loaded.eos_ids, seed=0)
    texts = [start + response for start, response in zip(starts, made.responses, strict=True)]
    normalise(trainer.trained, texts)


def evaluate_reward_model(trainer, rows, plots=None) -> dict[str, float]:
    """Agreement of scores with rewards or preferences; with `plots`, drawn there."""
    model = trainer.trained
    report = evaluate_scores(model.score, rows.rows, plots, gain=model.gain, offset=model.offset)
    print("held-out rows: " + "  ".join(f"{k} {v:.3f}" for k, v in report.items()))
    return {f"heldout/{name}": value for name, value in report.items()}


def test(args, loaded, model, rows) -> None:
    """Loss and agreement on the test rows."""
    trainer = make_trainer(args, loaded, model)
    plan = BatchPlan(rows.lengths, args.batch_size, shuffle=False)
    metrics = trainer.evaluate(epoch_batches(rows.rows, plan))
    print("test: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    if args.reward_model:
        evaluate_reward_model(trainer, rows)


if __name__ == "__main__":
    run_main(main)
