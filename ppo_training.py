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

from command_line.adapter_file import make_tuning
from command_line.dataclass_flags import dataclass_from_arguments
from command_line.model_limits import check_rows, fit_lengths
from command_line.parser import run_main
from command_line.ppo_flags import (
    ends,
    load_prompts,
    parse_arguments,
    settle_for_model,
    stop_at,
    validation_prompts,
)
from command_line.reward_flags import make_learned_reward, make_rewards
from command_line.shared_flags import model_options, optimizer_options, schedule_options
from models.adapter_description import VALUE_HEAD
from rl.ppo_config import PPOConfig
from training.launch import run_training, say_peak_memory, say_written, start

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    loaded = start(args.seed, args.memory_limit, **model_options(args))
    settle_for_model(args, loaded.weights)
    fit_lengths(args, loaded.limits, response=args.max_new_tokens)
    prompts = load_prompts(args, loaded.tokenizer, loaded.weights)
    policy, reference = make_policy(args, loaded)
    for split in prompts.values():
        check_rows(
            split.rows,
            loaded.limits,
            prefix=len(policy.tuning.prefix),
            response=args.max_new_tokens,
        )
    learned = make_learned_reward(args, loaded, policy.tuning)
    rewards = make_rewards(args, learned, unscored=True)
    train(args, loaded, policy, reference, rewards, prompts)
    say_peak_memory()
    return 0


# ------------------------------------------------------------------------------ model


def make_policy(args, loaded):
    """(policy with a value head, reference model or None for "the policy without its adapter")."""
    from models.actor_critic import ActorCritic, ValueHead
    from models.adapter_files import read_head
    from models.load import load_model
    from models.trunk import hidden_size

    head = ValueHead(hidden_size(loaded.model), args.value_head_init_std)
    tuning = make_tuning(args, loaded, args.resume_file, ignore=("lora_dropout",))
    if args.resume_file is not None:
        if (saved := read_head(args.resume_file, VALUE_HEAD)) is not None:
            head.load_weights(list(saved[0].items()))
    reference = None
    if tuning.kind == "full":
        options = model_options(args) | {"quantize": args.reference_quantize}
        reference = load_model(options.pop("model"), **options).model
    return ActorCritic(loaded.model, head, tuning), reference


# ------------------------------------------------------------------------------ loop


def train(args, loaded, policy, reference, rewards, prompts) -> None:
    """The loop, and what is left behind at its end."""
    from mlx_ppo_trainer import PPOTrainer
    from models.adapter_files import describe
    from publishing.trained import write_fused
    from training.groups import Group, adapter_group
    from training.optimizers import build_optimizer
    from training.rollout_loop import RolloutLoop, RolloutSchedule

    config = dataclass_from_arguments(PPOConfig, args)
    updates = config.num_steps * config.updates_per_step
    trainer = PPOTrainer(
        config,
        policy,
        reference,
        loaded.tokenizer,
        build_optimizer(**optimizer_options(args), steps=updates),
        eos_ids=ends(args, loaded.tokenizer),
        grad_checkpoint=args.grad_checkpoint,
    )
    tuning, head = policy.tuning, policy.value_head
    groups = {
        "adapters": adapter_group(tuning, describe(tuning, loaded)),
        VALUE_HEAD: Group(head.arrays, lambda a: head.load_weights(list(a.items()))),
    }
    schedule = RolloutSchedule(
        steps=config.num_steps,
        eval_every=args.eval_every,
        eval_samples=args.eval_samples,
        samples_per_step=args.samples_per_step,
        **schedule_options(args),
    )

    def make_loop(run) -> RolloutLoop:
        return RolloutLoop(
            run,
            trainer,
            rewards,
            loaded.tokenizer,
            prompts["train"].rows,
            validation_prompts(args, prompts),
            groups,
            schedule,
            stop_at(args.stop, loaded.tokenizer),
            loaded.fingerprint,
        )

    said = (
        f"{config.num_steps} steps of {config.batch_size} responses, "
        f"{config.ppo_epochs} epochs of minibatches of {config.mini_batch_size}; "
        f"{sum(a.size for a in tuning.arrays().values()):,} weights trained; rewards: {rewards}"
    )
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
    from reports.training_plots import plot_learned_and_true, plot_ppo
    from rewards.learned import GROUND_TRUTH, LEARNED
    from run_folder.next_line import command
    from run_folder.run import read_rows

    policy = loop.trainer.model
    written = save_adapter(args.save_file, policy.tuning, loaded, head=VALUE_HEAD)
    written.append(save_head(args.save_file, VALUE_HEAD, policy.value_head.arrays(), {}))
    rows = read_rows(run.folder)
    target = args.target if args.adap_kl_ctrl else None
    written.append(plot_ppo(rows, run.plots / "ppo.png", kl_target=target))
    if args.reward_model and args.true_score:
        names = {"learned": f"env/{LEARNED}_mean", "true": f"env/{GROUND_TRUTH}_mean"}
        place = run.plots / "learned_and_true.png"
        written.append(plot_learned_and_true(rows, place, **names))
    kls = [row["objective/kl"] for row in rows if row.get("objective/kl") is not None][-10:]
    kl = sum(kls) / len(kls) if kls else None
    evaluations = {"first": loop.evaluations[:1], "last": loop.evaluations[-1:]}
    run.finish({"steps": loop.step, "kl": kl, "evaluation": evaluations})
    talk = command("talk_to_model.py", model=args.model, resume_file=args.save_file)
    fuse = command("fuse.py", model=args.model, adapter_file=args.save_file, save_path="my_model/")
    say_written(
        run, written, *([] if policy.tuning.kind == "prompt" or args.fused_dir else [fuse]), talk
    )


if __name__ == "__main__":
    run_main(main)
