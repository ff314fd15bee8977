"""Reinforcement learning without a critic: GRPO, RLOO, REINFORCE++ or online DPO.

Each prompt gets several responses, and each response is compared with the others. It departs from
TRL 1.16's GRPOTrainer and RLOOTrainer where docs/group.md says so. One copy of the base weights
serves as policy (adapter on), reference (adapter off) and, where the reward model is an adapter,
reward model; without a KL (--beta 0, GRPO's default) no reference is run.

Within a minute on a laptop, on the embedded model:
    python group_training.py --ground_truth_reward
A real one, rewards that can be checked:
    python group_training.py --model ./my_sft_model --train-file problems.jsonl \\
        --answer_reward answer --format_reward '<answer>.*</answer>' --max-new-tokens 512 \\
        --num-generations 8 --batch-size 64 --mini-batch-size 8 --gradient-accumulation-steps 8
"""

import fast_blas

import contextlib
import sys

from command_line.adapter_file import refuse_other_adapter
from command_line.group_flags import config_of, default_learning_rate, parse_arguments
from command_line.parser import run_main
from command_line.ppo_flags import ends, load_prompts, stop_at, validation_prompts
from command_line.reward_flags import make_rewards
from command_line.shared_flags import adapter_description, optimizer_options

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    # MLX and what stands on it come after the command line: help and mistakes answer at once.
    from data_utils import columns_of
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
    prompts = load_prompts(args, loaded.tokenizer)
    policy, reference = make_policy(args, loaded)
    learned = make_learned_reward(args, loaded, policy) if args.reward_model else None
    rewards = make_rewards(args, learned, unscored=True)
    rewards.check_columns([*columns_of(prompts["train"].rows), "group_ids"])
    train(args, loaded, policy, reference, rewards, prompts)
    print(f"peak memory {peak_memory():.2f} GB")
    return 0


# ------------------------------------------------------------------------------ model


def make_policy(args, loaded):
    """(policy, reference model or None for "the policy without its adapter", or for no KL)."""
    from mlx.utils import tree_flatten

    from models.adapter_files import attach, load_adapter
    from models.load import load_model
    from models.policy import Policy

    size = sum(array.size for _, array in tree_flatten(loaded.model.parameters()))
    if args.resume_file is not None:
        tuning = load_adapter(loaded, args.resume_file, any_base=args.any_base)
        blocks = len(loaded.model.layers)
        there = tuning.description(blocks)
        refuse_other_adapter(args, args.resume_file, there, blocks=blocks, ignore=("lora_dropout",))
    else:
        tuning = attach(loaded.model, adapter_description(args))
    if args.learning_rate is None:
        args.learning_rate = default_learning_rate(tuning.kind, size)
    reference = None
    if tuning.kind == "full" and config_of(args).beta:
        reference = load_model(
            args.model,
            dtype=args.dtype,
            quantize=args.reference_quantize,
            trust_remote_code=args.trust_remote_code,
        ).model
    return Policy(loaded.model, tuning), reference


def make_learned_reward(args, loaded, policy):
    """The reward model of --reward-model as a reward."""
    from rewards.learned import reward_beside

    return reward_beside(
        loaded,
        policy.tuning,
        args.reward_model,
        model=args.model,
        batch_size=args.batch_size,
        any_base=args.any_base,
        quantize=args.quantize,
        prompt_template=args.prompt_template,
        token_format=args.token_format,
        template_date=args.template_date,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )


# ------------------------------------------------------------------------------ loop


def train(args, loaded, policy, reference, rewards, prompts) -> None:
    """The loop, and what is left behind at its end."""
    from mlx_group_trainer import GroupTrainer
    from models.adapter_files import describe
    from run_folder.checkpoint_folder import latest_checkpoint, saving
    from run_folder.run import Run
    from run_folder.run_config import checkpoint_asked_for
    from run_folder.stopping import GracefulStop, StepGivenUp
    from training.checkpointed import adapter_group
    from training.group_loop import GroupLoop
    from training.optimizers import build_optimizer
    from training.rollout_loop import RolloutSchedule

    config = config_of(args)
    updates = config.num_steps * config.updates_per_step
    optimizer = build_optimizer(**optimizer_options(args), steps=updates)
    trainer = GroupTrainer(
        config,
        policy,
        reference,
        loaded.tokenizer,
        optimizer,
        eos_ids=ends(args, loaded.tokenizer),
        grad_checkpoint=args.grad_checkpoint,
    )
    schedule = RolloutSchedule(
        steps=config.num_steps,
        report_every=args.steps_per_report,
        eval_every=args.eval_every,
        save_every=args.save_every,
        eval_samples=args.eval_samples,
        samples_per_step=args.samples_per_step,
        keep_checkpoints=args.keep_checkpoints,
        max_bad_steps=args.max_bad_steps,
        memory_limit=args.memory_limit,
    )
    groups = {"adapters": adapter_group(policy.tuning, describe(policy.tuning, loaded))}
    if config.sync_ref_model:
        groups["reference"] = reference_group(trainer)
    with (
        Run(
            "group", vars(args), output_dir=args.output_dir, resume=args.resume is not None,
            overwrite=args.overwrite, log_with=args.log_with, blas=fast_blas.NAME,
        ) as run,
        GracefulStop() as stop,
    ):  # fmt: skip
        loop = GroupLoop(
            run, trainer, rewards, loaded.tokenizer, prompts["train"].rows,
            validation_prompts(args, prompts), groups, schedule,
            stop_at(args.stop, loaded.tokenizer), loaded.fingerprint,
        )  # fmt: skip
        if args.resume is not None:
            last = checkpoint_asked_for(args.resume) or latest_checkpoint(run.checkpoints)
            loop.resume(last, force=args.force_resume)
        print(
            f"{run.folder}: {config.num_steps} steps of {config.prompts_per_step} prompts x "
            f"{config.num_generations} responses, {config.updates_per_step} updates each; "
            f"{sum(a.size for a in policy.tuning.arrays().values()):,} weights trained; rewards: "
            + ", ".join(f"{w:g} x {n}" for n, w in zip(rewards.names, rewards.weights, strict=True))
        )
        if config.updates_per_step == 1 and not config.online_dpo:
            print("the loss stays near 0, as one update a rollout has ratios of 1 and advantages "
                  "that add up to 0; the reward is what should move")  # fmt: skip
        loop.run(stop, "group")
        if not stop.requested:
            with contextlib.suppress(StepGivenUp), stop.giving_up(), saving(args.save_file):
                finish(args, loaded, policy, run, loop)
    stop.exit_if_requested("group_training.py", run.folder)


def reference_group(trainer):
    """The blended reference as a part of checkpoints."""
    from training.checkpointed import Group

    return Group(trainer.reference_arrays, trainer.load_reference)


# ------------------------------------------------------------------------------ save


def finish(args, loaded, policy, run, loop) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    from models.adapter_files import save_adapter
    from reports.training_plots import plot_groups, plot_learned_and_true
    from rewards.learned import GROUND_TRUTH, LEARNED
    from run_folder.next_line import command, next_lines
    from run_folder.run import read_rows

    written = save_adapter(args.save_file, policy.tuning, loaded)
    rows = read_rows(run.folder)
    written.append(plot_groups(rows, run.plots / "group.png"))
    if args.reward_model and args.true_score:
        written.append(
            plot_learned_and_true(
                rows,
                run.plots / "learned_and_true.png",
                learned=f"rewards/{LEARNED}/mean",
                true=f"rewards/{GROUND_TRUTH}/mean",
            )
        )
    evaluations = {"first": loop.evaluations[:1], "last": loop.evaluations[-1:]}
    run.finish({"steps": loop.step, "evaluation": evaluations})
    print("wrote " + "\n      ".join(map(str, [*written, run.folder / "metrics.jsonl"])))
    talk = command("talk_to_model.py", model=args.model, resume_file=args.save_file)
    fuse = command("fuse.py", model=args.model, adapter_file=args.save_file, save_path="my_model/")
    print(next_lines([talk] if policy.tuning.kind == "prompt" else [fuse, talk]))


if __name__ == "__main__":
    run_main(main)
