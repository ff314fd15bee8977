"""PPO on a language model, against a ground-truth reward, a learned one, or one of your own.

It departs from Ziegler et al. 2019 in nothing that matters; docs/ppo.md lists every choice. One
copy of the base weights serves as policy (adapter on), reference (adapter off) and, where the
reward model is an adapter, reward model.

Within a minute on a laptop, on the embedded model:
    python ppo_training.py --ground_truth_reward
A real one:
    python ppo_training.py --model ./my_sft_model --reward_model ./my_reward_model \\
        --data my_folder --data-base "" --max-new-tokens 128 --batch-size 32 --learning-rate 1e-4
"""

import fast_blas

import contextlib
import sys

from command_line.adapter_file import refuse_other_adapter
from command_line.dataclass_flags import dataclass_from_arguments
from command_line.parser import run_main
from command_line.ppo_flags import ends, load_prompts, parse_arguments, stop_at, validation_prompts
from command_line.reward_flags import make_rewards
from command_line.shared_flags import adapter_description, optimizer_options
from models.adapter_description import VALUE_HEAD
from rl.ppo_config import PPOConfig

# ------------------------------------------------------------------------------ model


def make_policy(args, loaded):
    """(policy with a value head, reference model or None for "the policy without its adapter")."""
    from models.actor_critic import ActorCritic
    from models.adapter_files import attach, load_adapter, read_head
    from models.heads import ValueHead
    from models.load import load_model
    from models.trunk import hidden_size

    head = ValueHead(hidden_size(loaded.model), args.value_head_init_std)
    if args.resume_file is not None:
        tuning = load_adapter(loaded, args.resume_file, any_base=args.any_base)
        blocks = len(loaded.model.layers)
        there = tuning.description(blocks)
        refuse_other_adapter(args, args.resume_file, there, blocks=blocks, ignore=("lora_dropout",))
        if (saved := read_head(args.resume_file, VALUE_HEAD)) is not None:
            head.load_weights(list(saved[0].items()))
    else:
        tuning = attach(loaded.model, adapter_description(args))
    reference = None
    if tuning.kind == "full":
        reference = load_model(
            args.model,
            dtype=args.dtype,
            quantize=args.reference_quantize,
            trust_remote_code=args.trust_remote_code,
        ).model
    return ActorCritic(loaded.model, head, tuning), reference


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
    prompts = load_prompts(args, loaded.tokenizer)
    policy, reference = make_policy(args, loaded)
    learned = make_learned_reward(args, loaded, policy) if args.reward_model else None
    rewards = make_rewards(args, learned, unscored=True)
    train(args, loaded, policy, reference, rewards, prompts)
    print(f"peak memory {peak_memory():.2f} GB")
    return 0


def train(args, loaded, policy, reference, rewards, prompts) -> None:
    """The loop, and what is left behind at its end."""
    from mlx_ppo_trainer import PPOTrainer
    from models.adapter_files import describe
    from run_folder.checkpoint_folder import latest_checkpoint, saving
    from run_folder.run import Run
    from run_folder.run_config import checkpoint_asked_for
    from run_folder.stopping import GracefulStop, StepGivenUp
    from training.checkpointed import Group, adapter_group
    from training.optimizers import build_optimizer
    from training.rollout_loop import RolloutLoop, RolloutSchedule

    config = dataclass_from_arguments(PPOConfig, args)
    updates = config.num_steps * config.updates_per_step
    optimizer = build_optimizer(**optimizer_options(args), steps=updates)
    trainer = PPOTrainer(
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
    tuning, head = policy.tuning, policy.value_head
    groups = {
        "adapters": adapter_group(tuning, describe(tuning, loaded)),
        VALUE_HEAD: Group(head.arrays, lambda a: head.load_weights(list(a.items()))),
    }
    with (
        Run(
            "ppo", vars(args), output_dir=args.output_dir, resume=args.resume is not None,
            overwrite=args.overwrite, log_with=args.log_with, blas=fast_blas.NAME,
        ) as run,
        GracefulStop() as stop,
    ):  # fmt: skip
        loop = RolloutLoop(
            run, trainer, rewards, loaded.tokenizer, prompts["train"].rows,
            validation_prompts(args, prompts), groups, schedule,
            stop_at(args.stop, loaded.tokenizer), loaded.fingerprint,
        )  # fmt: skip
        if args.resume is not None:
            last = checkpoint_asked_for(args.resume) or latest_checkpoint(run.checkpoints)
            loop.resume(last, force=args.force_resume)
        print(
            f"{run.folder}: {config.num_steps} steps of {config.batch_size} responses, "
            f"{config.ppo_epochs} epochs of minibatches of {config.mini_batch_size}; "
            f"{sum(a.size for a in tuning.arrays().values()):,} weights trained; rewards: "
            + ", ".join(f"{w:g} x {n}" for n, w in zip(rewards.names, rewards.weights, strict=True))
        )
        loop.run(stop)
        if not stop.requested:
            with contextlib.suppress(StepGivenUp), stop.giving_up(), saving(args.save_file):
                finish(args, loaded, policy, run, loop)
    stop.exit_if_requested("ppo_training.py", run.folder)


# ------------------------------------------------------------------------------ save


def finish(args, loaded, policy, run, loop) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    from models.adapter_files import save_adapter, save_head
    from reports.training_plots import plot_learned_and_true, plot_ppo
    from rewards.learned import GROUND_TRUTH, LEARNED
    from run_folder.next_line import command, next_lines
    from run_folder.run import read_rows

    written = save_adapter(args.save_file, policy.tuning, loaded, head=VALUE_HEAD)
    written.append(save_head(args.save_file, VALUE_HEAD, policy.value_head.arrays(), {}))
    rows = read_rows(run.folder)
    target = args.target if args.adap_kl_ctrl else None
    written.append(plot_ppo(rows, run.plots / "ppo.png", kl_target=target))
    if args.reward_model and args.true_score:
        written.append(
            plot_learned_and_true(
                rows,
                run.plots / "learned_and_true.png",
                learned=f"env/{LEARNED}_mean",
                true=f"env/{GROUND_TRUTH}_mean",
            )  # fmt: skip
        )
    kls = [row["objective/kl"] for row in rows if row.get("objective/kl") is not None][-10:]
    kl = sum(kls) / len(kls) if kls else None
    evaluations = {"first": loop.evaluations[:1], "last": loop.evaluations[-1:]}
    run.finish({"steps": loop.step, "kl": kl, "evaluation": evaluations})
    print("wrote " + "\n      ".join(map(str, [*written, run.folder / "metrics.jsonl"])))
    talk = command("talk_to_model.py", model=args.model, resume_file=args.save_file)
    fuse = command("fuse.py", model=args.model, adapter_file=args.save_file, save_path="my_model/")
    print(next_lines([talk] if policy.tuning.kind == "prompt" else [fuse, talk]))


if __name__ == "__main__":
    run_main(main)
