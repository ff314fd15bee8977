"""ReST: sample from the policy, keep what scores well, fine-tune on it, and again.

Gulcehre et al. 2023: every grow step samples several responses to each prompt and scores them with
any reward; every improve step after it fine-tunes on those that reach a threshold, which rises.
Only answers are trained, each once, as the token ids that were sampled.

Within a minute on a laptop, on the embedded model:
    python rest.py --ground_truth_reward --output-dir runs/rest
A real one:
    python rest.py --model MODEL --reward-model ./my_reward_model/ --train-file prompts.jsonl \\
        --validation-split-percentage 10 --samples-per-prompt 8 --quantiles .5 .75 .9
"""

import fast_blas  # noqa: F401

from functools import partial
from pathlib import Path

from command_line.adapter_file import make_tuning
from command_line.adlf_flags import make_composite
from command_line.conditioning_flags import ask_for_target
from command_line.exits import run_main
from command_line.model_limits import check_rows, fit_lengths
from command_line.ppo_flags import own_ends
from command_line.rest_flags import (
    load_prompts,
    mixed_rows,
    parse_arguments,
    settle_for_model,
)
from command_line.reward_flags import make_learned_reward, make_rewards
from command_line.shared_flags import model_options, optimizer_options, schedule_options
from data_utils import Conditioning, columns_of
from training.launch import (
    count_trained,
    mlx_parts,
    run_training,
    say_peak_memory,
    shape_multiple,
    start,
)
from training.results import policy_commands, say_written

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    loaded = start(args.seed, args.memory_limit, **model_options(args))
    settle_for_model(args, loaded.weights)
    fit_lengths(args, loaded.limits, response=args.max_new_tokens)
    prompts = load_prompts(args, loaded.tokenizer)
    tuning = make_tuning(args, loaded, args.resume_adapter_file)
    if not args.use_decision_transformer:
        ask_for_target(args, loaded, {split: rows for split, (_, rows) in prompts.items()})
    for _, rows in prompts.values():
        room = {"prefix": len(tuning.prefix), "response": args.max_new_tokens}
        check_rows(rows.rows, loaded.limits, **room)
    rewards = make_all_rewards(args, loaded, tuning, prompts)
    train(args, loaded, tuning, rewards, prompts)
    say_peak_memory()
    return 0


# ------------------------------------------------------------------------------ rewards


def make_all_rewards(args, loaded, tuning, prompts):
    """The rewards of the flags; internal ones see the model without what is trained on it."""
    from models.load import load_model
    from training.internal_signals import reference_signals

    rewards = make_rewards(args, make_learned_reward(args, loaded, tuning), unscored=True)
    for _, rows in prompts.values():
        rewards.check_prompts(rows.rows, args.max_new_tokens)
        rewards.check_columns(columns_of(rows.rows))

    def signals(names, **options):
        named = model_options(args)
        copy = load_model(named.pop("model"), **named).model if tuning.kind == "full" else None
        return reference_signals(
            names,
            loaded=loaded,
            tuning=tuning,
            reference=copy,
            prompts=prompts["train"][1].rows,
            eos_ids=own_ends(args, loaded.tokenizer),
            max_new_tokens=args.max_new_tokens,
            batch_size=args.sampling_batch_size,
            seed=args.seed,
            **options,
        )

    return make_composite(args, rewards, signals)


# ------------------------------------------------------------------------------ loop


def train(args, loaded, tuning, rewards, prompts) -> None:
    """The loop, and what is left behind at its end."""
    from mlx_sft_trainer import LanguageModelTask, SupervisedTrainer
    from publishing.export import write_fused
    from training import mlx_backend
    from training.internal_signals import calibration_groups
    from training.optimizers import build_optimizer
    from training.rest_loop import RestLoop
    from training.supervised_loop import Schedule

    how = make_improve(args, loaded, prompts, len(tuning.prefix))
    make_optimizer = partial(build_optimizer, **optimizer_options(args), steps=args.iters)
    trainer = SupervisedTrainer(
        LanguageModelTask(loaded.model, tuning, pad_to_multiple=shape_multiple()),
        make_optimizer(),
        max_grad_norm=args.max_grad_norm,
        grad_checkpoint=args.grad_checkpoint,
    )
    groups = mlx_parts(args, loaded, trainer, {}).groups | calibration_groups(rewards)
    schedule = Schedule(
        steps=how.updates,
        eval_every=args.iters,
        accumulation=args.gradient_accumulation_steps,
        **schedule_options(args),
    )

    def make_loop(run):
        return RestLoop(
            run,
            trainer,
            groups,
            None,  # batches, which each improve step makes
            schedule,
            base=loaded.fingerprint,
            backend=mlx_backend,
            grower=make_grower(args, loaded, tuning, rewards, prompts),
            improve=how,
            make_optimizer=make_optimizer,
            initial=tuning.arrays(),
        )

    said = (
        f"{how.grows} x (grow: {args.samples_per_prompt} responses to each of "
        f"{len(prompts['train'][1])} prompts; {how.steps} x improve: {how.iters} updates); "
        f"{count_trained(tuning)}; rewards: {rewards}"
    )
    run_training(
        args,
        "rest",
        make_loop,
        lambda _: said,
        lambda run, loop: finish(args, loaded, run, loop),
        outputs=grow_files(args),
        write_fused=write_fused,
    )


def make_improve(args, loaded, prompts, prefix):
    """How rows are chosen and trained on, with those of --mix-data."""
    from training.rest_loop import Improve

    template = args.score_template if args.use_decision_transformer else None
    conditioning = None if template is None else Conditioning(template, 0.0)
    there = len(prompts["valid"][1]) if "valid" in prompts else 0
    wanted = there if args.eval_prompts < 0 else args.eval_prompts
    return Improve(
        args.grow_steps,
        args.iters,
        args.batch_size,
        args.seed,
        shape_multiple(),
        thresholds=args.thresholds,
        quantiles=args.quantiles,
        template=template,
        target=args.target_score,
        from_base=args.start_from == "base",
        mixed=mixed_rows(args, prompts["train"][0], loaded, prefix, conditioning),
        eval_prompts=min(there, wanted),
        eval_samples=args.eval_samples,
    )


def make_grower(args, loaded, tuning, rewards, prompts):
    """What samples and scores."""
    from models.decoding import Sampling
    from training.grow import Grower

    return Grower(
        loaded,
        tuning,
        rewards,
        prompts,
        args.samples_per_prompt,
        own_ends(args, loaded.tokenizer),
        Sampling(args.temperature, args.top_k, args.top_p, args.min_p),
        args.max_new_tokens,
        args.sampling_batch_size,
        args.seed,
        {"token_format": args.token_format},
    )


def grow_files(args) -> list[str]:
    """Names of the files that this run writes into its folder, and of those that are there."""
    there = Path(args.output_dir).glob("grow_*.jsonl") if args.output_dir else ()
    made = (f"grow_{number}.jsonl" for number in range(1, args.grow_steps + 1))
    return sorted({*made, *(path.name for path in there)})


# ------------------------------------------------------------------------------ save


def finish(args, loaded, run, loop) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    from models.adapter_files import SCORES, save_adapter
    from reports.training_plots import plot_losses
    from run_folder.run import read_rows
    from training.grow import grow_file

    tuning, found = loop.trainer.task.tuning, read_rows(run.folder)
    last = grow_file(run.folder, int(loop.stage["grow"]))
    conditioning = loop.asked(int(loop.stage["grow"]))
    if conditioning is not None:
        loaded.config[SCORES] = conditioning.described()
    written = save_adapter(args.save_file, tuning, loaded, run=run.recorded)
    written.append(plot_losses(found, run.plots / "loss.png"))
    scores = [s for row in found if (s := row.get("eval/sampled/score")) is not None]
    summary = {"first_score": scores[0], "last_score": scores[-1]} if scores else {}
    if scores:
        print("held-out score: " + " -> ".join(f"{score:.3f}" for score in scores))
    run.finish({"steps": loop.step, **loop.totals, **summary})
    say_written(run, [*written, last], *policy_commands(args, tuning))


if __name__ == "__main__":
    run_main(main)
