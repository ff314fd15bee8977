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

import fast_blas  # noqa: F401

from functools import partial

from command_line.adapter_file import load_copy, make_tuning
from command_line.adlf_flags import component_weights, make_composite
from command_line.conditioning_flags import ask_for_target
from command_line.curriculum_flags import difficulty, make_curriculum
from command_line.exits import run_main
from command_line.group_flags import config_of, parse_arguments, settle_for_model
from command_line.memory_fit import settle_rollout_memory
from command_line.model_limits import check_splits, fit_lengths
from command_line.ppo_flags import ends, load_prompts, signal_options, stop_at, validation_prompts
from command_line.reward_flags import make_learned_reward, make_rewards
from command_line.row_preview import show_prompts
from command_line.shared_flags import model_options, optimizer_options, schedule_options
from command_line.worker_flags import run_workers, starts_workers
from training.launch import count_trained, rollout_loop, run_training, say_peak_memory, start
from training.results import finish_rollouts, policy_commands

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    if starts_workers(args):
        return run_workers(args, __file__, words)
    from data_utils import columns_of
    from training.internal_signals import reference_signals

    loaded = start(args.seed, args.memory_limit, resume=args.resume, **model_options(args))
    settle_for_model(args, loaded.weights)
    fit_lengths(args, loaded.limits, response=args.max_new_tokens)
    per_step = config_of(args).prompts_per_step
    prompts = load_prompts(args, loaded.tokenizer, loaded.weights, per_step)
    how_hard = difficulty(args, loaded, prompts["train"].rows)
    policy, reference = make_policy(args, loaded)
    ask_for_target(args, loaded, prompts)
    check_splits(prompts, loaded.limits, policy.tuning, response=args.max_new_tokens)
    learned = make_learned_reward(args, loaded, policy.tuning)
    rewards = make_rewards(args, learned, unscored=True)
    for split in prompts.values():
        rewards.check_prompts(split.rows, args.max_new_tokens)
    options = signal_options(args, loaded, policy.tuning, reference, prompts)
    rewards = make_composite(args, rewards, partial(reference_signals, **options))
    rewards.check_columns([*columns_of(prompts["train"].rows), "group_ids"])
    unit = args.num_training_workers * (2 if args.online_dpo else 1)
    beside = (reference, learned and learned.model)
    compared = reference is None and bool(config_of(args).beta)
    rows = prompts["train"].rows
    settle_rollout_memory(args, loaded, policy.tuning, rows, *beside, unit=unit, compared=compared)
    if args.preview:
        show_prompts(args, loaded.tokenizer, prompts["train"].rows, rewards)
    else:
        order = make_curriculum(args, how_hard, args.num_steps)
        train(args, loaded, policy, reference, rewards, prompts, order)
    say_peak_memory()
    return 0


# ------------------------------------------------------------------------------ model


def make_policy(args, loaded):
    """(policy, reference model or None for "the policy without its adapter", or for no KL)."""
    from models.policy import Policy

    tuning = make_tuning(args, loaded, args.resume_file, ignore=("lora_dropout",))
    compared = tuning.kind == "full" and (config_of(args).beta or component_weights(args))
    reference = load_copy(args).model if compared else None
    return Policy(loaded.model, tuning), reference


# ------------------------------------------------------------------------------ loop


def train(args, loaded, policy, reference, rewards, prompts, order) -> None:
    """The loop, and what is left behind at its end."""
    from mlx_group_trainer import GroupTrainer
    from publishing.export import write_fused
    from training.group_loop import GroupLoop
    from training.groups import Group
    from training.internal_signals import calibration_groups
    from training.optimizers import build_optimizer

    config = config_of(args)
    updates = config.num_steps * config.updates_per_step
    trainer = GroupTrainer(
        config,
        policy,
        reference,
        loaded.tokenizer,
        build_optimizer(**optimizer_options(args), steps=updates),
        eos_ids=ends(args, loaded.tokenizer),
        grad_checkpoint=args.grad_checkpoint,
        recompute_frozen=args.recompute_frozen,
    )
    groups = calibration_groups(rewards)
    if trainer.blend is not None:  # the blended reference is a part of checkpoints
        groups["reference"] = Group(trainer.blend.arrays, trainer.blend.load_arrays)
    make_loop = rollout_loop(
        partial(GroupLoop, curriculum=order),
        args,
        loaded,
        trainer,
        rewards,
        prompts,
        validation_prompts(args, prompts),
        schedule_options(args),
        stop_at(args.stop, loaded.tokenizer),
        **groups,
    )
    said = (
        f"{config.num_steps} steps of {config.prompts_per_step} prompts x "
        f"{config.num_generations} responses, {config.updates_per_step} updates each; "
        f"{count_trained(policy.tuning)}; rewards: {rewards}"
    )
    if config.updates_per_step == 1 and not config.online_dpo:
        said += (
            "\nthe loss stays near 0, as one update a rollout has ratios of 1 and advantages "
            "that add up to 0; the reward is what should move"
        )
    run_training(
        args,
        "group",
        make_loop,
        lambda _: said,
        lambda run, loop: finish(args, loaded, run, loop),
        write_fused=write_fused,
    )


# ------------------------------------------------------------------------------ save


def finish(args, loaded, run, loop) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    from models.adapter_files import save_adapter
    from reports.training_plots import plot_groups
    from run_folder.run import read_rows

    tuning = loop.trainer.model.tuning
    written = save_adapter(args.save_file, tuning, loaded, run=run.recorded)
    written.append(plot_groups(read_rows(run.folder), run.plots / "group.png"))
    commands = policy_commands(args, tuning)
    finish_rollouts(args, run, loop, written, commands, metric="rewards/{name}/mean")


if __name__ == "__main__":
    run_main(main, workers=True)
