"""PPO on a language model, against a ground-truth reward, a learned one, or one of your own.

It departs from Ziegler et al. 2019 in nothing that matters; docs/ppo.md lists every choice. One
copy of the base weights serves as policy (adapter on), reference (adapter off) and, where the
reward model is an adapter, reward model.

Within a minute on a laptop, on the embedded model:
    python ppo_training.py --ground_truth_reward
A real one:
    python ppo_training.py --model ./my_sft_model --reward_model ./my_reward_model \\
        --data my_folder --data-base "" --max-new-tokens 128
"""

import fast_blas  # noqa: F401

from functools import partial

from command_line.adapter_file import load_copy, make_tuning
from command_line.adlf_flags import make_composite
from command_line.conditioning_flags import ask_for_target
from command_line.critique_flags import critique_options
from command_line.curriculum_flags import difficulty, make_curriculum
from command_line.dataclass_flags import dataclass_from_arguments
from command_line.exits import run_main
from command_line.memory_fit import settle_rollout_memory
from command_line.model_limits import check_splits, fit_lengths
from command_line.ppo_flags import (
    ends,
    load_prompts,
    parse_arguments,
    settle_for_model,
    signal_options,
    stop_at,
    validation_prompts,
)
from command_line.reward_flags import make_learned_reward, make_rewards
from command_line.row_preview import show_prompts
from command_line.shared_flags import model_options, optimizer_options, schedule_options
from command_line.worker_flags import run_workers, starts_workers
from models.adapter_description import VALUE_HEAD
from rl.ppo_config import PPOConfig
from training.launch import ppo_said, rollout_loop, run_training, say_peak_memory, start
from training.results import finish_ppo, policy_commands

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    if starts_workers(args):
        return run_workers(args, __file__, words)
    from training.internal_signals import reference_signals

    loaded = start(args.seed, args.memory_limit, resume=args.resume, **model_options(args))
    settle_for_model(args, loaded.weights)
    fit_lengths(args, loaded.limits, response=args.max_new_tokens)
    prompts = load_prompts(args, loaded.tokenizer, loaded.weights)
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
    texts = 3 if args.use_self_critique else 1  # answer, critique, revision
    beside = (reference, learned and learned.model)
    settle_rollout_memory(
        args,
        loaded,
        policy.tuning,
        prompts["train"].rows,
        *beside,
        unit=args.num_training_workers,
        texts=texts,
        compared=reference is None,
    )
    if args.preview:
        show_prompts(args, loaded.tokenizer, prompts["train"].rows, rewards)
    else:
        order = make_curriculum(args, how_hard, args.num_steps)
        train(args, loaded, policy, reference, rewards, prompts, order)
    say_peak_memory()
    return 0


# ------------------------------------------------------------------------------ model


def make_policy(args, loaded):
    """(policy with a value head, reference model or None for "the policy without its adapter")."""
    from models.actor_critic import ActorCritic, ValueHead
    from models.adapter_files import read_head
    from models.trunk import hidden_size

    head = ValueHead(hidden_size(loaded.model), args.value_head_init_std)
    tuning = make_tuning(args, loaded, args.resume_file, ignore=("lora_dropout",))
    if args.resume_file is not None:
        if (saved := read_head(args.resume_file, VALUE_HEAD)) is not None:
            head.load_weights(list(saved[0].items()))
    reference = load_copy(args).model if tuning.kind == "full" else None
    return ActorCritic(loaded.model, head, tuning), reference


# ------------------------------------------------------------------------------ loop


def train(args, loaded, policy, reference, rewards, prompts, order) -> None:
    """The loop, and what is left behind at its end."""
    from mlx_critique_trainer import CritiqueTrainer, with_critiques
    from mlx_ppo_trainer import PPOTrainer
    from publishing.export import write_fused
    from training.critique_loop import CritiqueLoop
    from training.groups import Group
    from training.internal_signals import calibration_groups
    from training.optimizers import build_optimizer
    from training.rollout_loop import RolloutLoop

    config = dataclass_from_arguments(PPOConfig, args)
    updates = config.num_steps * config.updates_per_step
    critique, trainer, loop = critique_options(args, loaded), PPOTrainer, RolloutLoop
    if critique is not None:
        trainer = partial(CritiqueTrainer, weight=args.critique_weight)
        loop = partial(CritiqueLoop, **critique)
    trainer = trainer(
        config if critique is None else with_critiques(config),
        policy,
        reference,
        loaded.tokenizer,
        build_optimizer(**optimizer_options(args), steps=updates),
        eos_ids=ends(args, loaded.tokenizer),
        grad_checkpoint=args.grad_checkpoint,
        recompute_frozen=args.recompute_frozen,
    )
    head, stop_test = policy.value_head, stop_at(args.stop, loaded.tokenizer)
    told = {"compare_steps": args.compare_steps, "reference_samples": args.reference_samples}
    make_loop = rollout_loop(
        partial(loop, curriculum=order),
        args,
        loaded,
        trainer,
        rewards,
        prompts,
        validation_prompts(args, prompts),
        schedule_options(args) | told,
        stop_test,
        **{VALUE_HEAD: Group(head.arrays, lambda a: head.load_weights(list(a.items())))},
        **calibration_groups(rewards),
    )
    said = ppo_said(config, policy.tuning, rewards)
    run_training(
        args,
        "ppo",
        make_loop,
        lambda _: said,
        lambda run, loop: finish(args, loaded, run, loop),
        write_fused=write_fused,
    )


# ------------------------------------------------------------------------------ save


def finish(args, loaded, run, loop) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    from models.adapter_files import save_adapter, save_head

    policy = loop.trainer.model
    written = save_adapter(args.save_file, policy.tuning, loaded, head=VALUE_HEAD, run=run.recorded)
    written.append(save_head(args.save_file, VALUE_HEAD, policy.value_head.arrays(), {}))
    finish_ppo(args, run, loop, written, policy_commands(args, policy.tuning))


if __name__ == "__main__":
    run_main(main, workers=True)
