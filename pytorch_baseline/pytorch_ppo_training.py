"""ppo_training.py in PyTorch: PPO against a ground-truth reward, a learned one, or your own.

The flags, the prompts and their order are those of ppo_training.py. The reference is the base with
the adapter off (peft), or a frozen copy in full fine-tuning; a reward model is a second model in
memory, as in TRL.

Within minutes on a laptop, on the embedded model:
    python pytorch_baseline/pytorch_ppo_training.py --ground_truth_reward
"""

import project_root  # noqa: F401
from pytorch_actor_critic import ActorCritic, ValueHead
from pytorch_files import (
    WRITTEN,
    check_free,
    is_adapter,
    load_adapter,
    place_of_model,
    read_head,
    save_head,
    save_trained,
)
from pytorch_flags import parse
from pytorch_loops import PPOLoop, Schedule
from pytorch_models import Tuned, load_model, pick_device
from pytorch_ppo_trainer import PPOTrainer
from pytorch_reward_model import load_reward_model
from pytorch_training import (
    note_versions,
    optimizer_and_schedule,
    peak_memory,
    seed_everything,
)

from command_line import ppo_flags
from command_line.adapter_file import refuse_other_adapter
from command_line.dataclass_flags import dataclass_from_arguments
from command_line.parser import run_main
from command_line.prompt_preview import show_prompts
from command_line.reward_flags import make_rewards
from command_line.shared_flags import adapter_description, optimizer_options
from data_utils import Template
from models.adapter_description import VALUE_HEAD
from reports.training_plots import plot_learned_and_true, plot_ppo
from rewards.learned import GROUND_TRUTH, LEARNED, learned_reward
from rewards.reward_set import Reward
from rl.ppo_config import PPOConfig
from run_folder.checkpoint_folder import latest_checkpoint, saving
from run_folder.run import Run, read_rows
from run_folder.run_config import checkpoint_asked_for
from run_folder.stopping import GracefulStop

SCRIPT = "pytorch_baseline/pytorch_ppo_training.py"
FULL = {"fine_tune_type": "full"}


# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse(ppo_flags, words)
    check_free(args)
    seed_everything(args.seed)
    loaded = load_model(args.model, **loading(args))
    weights = sum(array.numel() for array in loaded.model.parameters())
    ppo_flags.settle_for_model(args, weights)
    prompts = ppo_flags.load_prompts(args, loaded.tokenizer, weights)
    policy, reference = make_policy(args, loaded)
    learned = make_learned_reward(args, loaded) if args.reward_model else None
    rewards = make_rewards(args, learned)
    if args.preview:
        show_prompts(args, loaded.tokenizer, prompts["train"].rows, rewards)
    else:
        train(args, loaded, policy, reference, rewards, prompts)
    print(f"peak memory {peak_memory(loaded.device):.2f} GB")
    return 0


# ------------------------------------------------------------------------------ model


def loading(args) -> dict:
    """Keyword arguments of `load_model` for every model of the run."""
    return {
        "tokenizer": args.tokenizer,
        "device": pick_device(args.device),
        "dtype": args.dtype,
        "trust_remote_code": args.trust_remote_code,
    }


def make_policy(args, loaded):
    """(policy with a value head, reference model or None for "the policy without its adapter")."""
    head = ValueHead(loaded.model.config.hidden_size, args.value_head_init_std)
    if args.resume_file is not None:
        model = load_adapter(loaded, args.resume_file, any_base=args.any_base)
        blocks = loaded.model.config.num_hidden_layers
        refuse_other_adapter(
            args, args.resume_file, model.description, blocks=blocks, ignore=("lora_dropout",)
        )
        if (saved := read_head(args.resume_file, VALUE_HEAD)) is not None:
            head.load_state_dict(saved[0])
    else:
        model = Tuned(loaded.model, adapter_description(args)).to(loaded.device)
    reference = None
    if model.kind == "full":
        reference = Tuned(load_model(args.model, **loading(args)).model, FULL)
        reference.requires_grad_(False).eval()
    return ActorCritic(model, head), reference


def make_learned_reward(args, loaded) -> Reward:
    """A reward model as a reward; it reads text where its tokens are not the policy's."""
    options = {name: value for name, value in loading(args).items() if name != "tokenizer"}
    reward_model, tokenizer = load_reward_model(
        args.reward_model, args.model, any_base=args.any_base, **options
    )
    return learned_reward(
        reward_model,
        loaded.tokenizer,
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        prompt_template=args.prompt_template,
        token_format=args.token_format,
    )


def ends(args, loaded) -> set[int]:
    """Token ids that end a response: the model's EOS, and its chat template's end of turn."""
    if args.ignore_eos:
        return set()
    turn_end = Template(loaded.tokenizer, args.prompt_template, args.token_format).turn_end_id()
    return loaded.eos_ids | ({turn_end} if turn_end is not None else set())


# ------------------------------------------------------------------------------ loop


def train(args, loaded, policy, reference, rewards, prompts) -> None:
    """The loop, and what is left behind at its end."""
    config = dataclass_from_arguments(PPOConfig, args)
    updates = config.num_steps * config.updates_per_step
    optimizer, scheduler = optimizer_and_schedule(
        policy.trainable(), optimizer_options(args), updates
    )
    trainer = PPOTrainer(
        config,
        policy,
        reference,
        loaded.tokenizer,
        optimizer,
        eos_ids=ends(args, loaded),
        scheduler=scheduler,
        grad_checkpoint=args.grad_checkpoint,
    )
    schedule = Schedule(
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
    with (
        Run(
            "pytorch_ppo",
            vars(args),
            output_dir=args.output_dir,
            resume=args.resume is not None,
            overwrite=args.overwrite,
            log_with=args.log_with,
            outputs=("model", WRITTEN),
        ) as run,
        GracefulStop() as stop,
    ):
        loop = PPOLoop(
            run,
            trainer,
            schedule,
            loaded.device,
            rewards=rewards,
            tokenizer=loaded.tokenizer,
            prompts=prompts["train"].rows,
            validation=ppo_flags.validation_prompts(args, prompts),
            should_stop=ppo_flags.stop_at(args.stop, loaded.tokenizer),
            base=loaded.fingerprint,
        )
        if args.resume is not None:
            saved = checkpoint_asked_for(args.resume) or latest_checkpoint(run.checkpoints)
            loop.resume(saved, force=args.force_resume)
        note_versions(run)
        print(
            f"{run.folder}: {config.num_steps} steps of {config.batch_size} responses, "
            f"{config.ppo_epochs} epochs of minibatches of {config.mini_batch_size}; "
            f"{sum(a.numel() for a in policy.model.arrays().values()):,} weights trained; rewards: "
            + ", ".join(f"{w:g} x {n}" for n, w in zip(rewards.names, rewards.weights, strict=True))
        )
        loop.run(stop)
        if not stop.requested:
            with saving(args.save_file or run.folder / "model"):
                finish(args, loaded, policy, run, loop)
    stop.exit_if_requested(SCRIPT, run.folder)


# ------------------------------------------------------------------------------ save


def finish(args, loaded, policy, run, loop) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    path = place_of_model(args, run.folder)
    written = save_trained(path, policy.model, loaded, args.tokenizer, VALUE_HEAD)
    written.append(save_head(path, VALUE_HEAD, policy.value_head.state_dict(), {}))
    rows = read_rows(run.folder)
    kl = {"kl_target": args.target if args.adap_kl_ctrl else None}
    if args.use_dynamic_kl:
        kl = {"kl_target": args.kl_target, "kl": "objective/kl_per_token", "unit": "token"}
    written.append(plot_ppo(rows, run.plots / "ppo.png", **kl))
    if args.reward_model and args.true_score:
        written.append(
            plot_learned_and_true(
                rows,
                run.plots / "learned_and_true.png",
                learned=f"env/{LEARNED}_mean",
                true=f"env/{GROUND_TRUTH}_mean",
            )
        )
    kls = [row["objective/kl"] for row in rows if row.get("objective/kl") is not None][-10:]
    kl = sum(kls) / len(kls) if kls else None
    found = loop.state["evaluations"]
    memory = peak_memory(loaded.device)
    evaluations = {"first": found[:1], "last": found[-1:]}
    run.finish({"steps": loop.step, "kl": kl, "evaluation": evaluations, "peak_memory": memory})
    print("wrote " + "\n      ".join(map(str, [*written, run.folder / "metrics.jsonl"])))
    how = f"--model {loaded.name} --resume-file" if is_adapter(path, policy.model) else "--model"
    print(f"next: python talk_to_model.py {how} {path}")


if __name__ == "__main__":
    run_main(main)
