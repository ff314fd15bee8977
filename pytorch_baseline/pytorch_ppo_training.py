"""ppo_training.py in PyTorch: PPO against a ground-truth reward, a learned one, or your own.

Flags, prompts and their order, loop and run folder are those of ppo_training.py. The reference is
the base with the adapter off (peft), or a frozen copy in full fine-tuning; a reward model is a
second model in memory, as in TRL.

Within minutes on a laptop, on the embedded model:
    python pytorch_baseline/pytorch_ppo_training.py --ground_truth_reward
"""

from functools import partial

import project_root  # noqa: F401
from pytorch_actor_critic import ActorCritic, ValueHead
from pytorch_backend import trained_group
from pytorch_files import is_adapter, read_head, save_head, save_trained
from pytorch_models import Tuned, load_model
from pytorch_optimizers import build_optimizer
from pytorch_ppo_trainer import PPOTrainer
from pytorch_reward_model import load_reward_model
from pytorch_runs import load_base, loading, make_tuned, parse, place, start, train

from command_line import ppo_flags
from command_line.dataclass_flags import dataclass_from_arguments
from command_line.exits import run_main
from command_line.reward_flags import make_rewards
from command_line.row_preview import show_prompts
from command_line.shared_flags import optimizer_options, schedule_options
from data_utils import Template
from models.adapter_description import VALUE_HEAD
from rewards.learned import learned_reward
from rl.ppo_config import PPOConfig
from run_folder.console import command
from training.launch import ppo_said, rollout_loop, say_peak_memory
from training.results import finish_ppo
from training.rollout_loop import RolloutLoop


def main(words=None) -> int:
    args = parse(ppo_flags, words)
    loaded, backend = start(args, load_base)
    weights = sum(array.numel() for array in loaded.model.parameters())
    ppo_flags.settle_for_model(args, weights)
    prompts = ppo_flags.load_prompts(args, loaded.tokenizer, weights)
    trainer = make_trainer(args, loaded)
    rewards = make_rewards(args, make_learned_reward(args, loaded), unscored=True)
    if args.preview:
        show_prompts(args, loaded.tokenizer, prompts["train"].rows, rewards)
        return 0
    config = trainer.config
    make_loop = rollout_loop(
        RolloutLoop,
        args,
        loaded,
        trainer,
        rewards,
        prompts,
        ppo_flags.validation_prompts(args, prompts),
        schedule_options(args),
        ppo_flags.stop_at(args.stop, loaded.tokenizer),
        backend=backend,
        **trained_group(trainer.parameters),
    )
    said = ppo_said(config, trainer.model.model, rewards)
    train(args, "ppo", make_loop, said, partial(finish, args, loaded))
    say_peak_memory(backend.peak_memory())
    return 0


def make_trainer(args, loaded) -> PPOTrainer:
    """The policy with a value head, its reference, its optimizer."""
    head = ValueHead(loaded.model.config.hidden_size, args.value_head_init_std)
    model = make_tuned(args, loaded, args.resume_file, ignore=("lora_dropout",))
    if args.resume_file and (saved := read_head(args.resume_file, VALUE_HEAD)) is not None:
        head.load_state_dict(saved[0])
    reference = None
    if model.kind == "full":
        reference = Tuned(load_model(args.model, **loading(args)).model, {"fine_tune_type": "full"})
        reference.requires_grad_(False).eval()
    policy, config = ActorCritic(model, head), dataclass_from_arguments(PPOConfig, args)
    updates, parameters = config.num_steps * config.updates_per_step, policy.trainable_parameters()
    turn_end = Template(loaded.tokenizer, args.prompt_template, args.token_format).turn_end_id()
    return PPOTrainer(
        config,
        policy,
        reference,
        build_optimizer(parameters, **optimizer_options(args), steps=updates),
        eos_ids=set() if args.ignore_eos else loaded.eos_ids | ({turn_end} - {None}),
        grad_checkpoint=args.grad_checkpoint,
    )


def make_learned_reward(args, loaded):
    """A reward model as a reward; it reads text where its tokens are not the policy's."""
    if not args.reward_model:
        return None
    reward_model, tokenizer = load_reward_model(
        args.reward_model, args.model, any_base=args.any_base, **loading(args)
    )
    return learned_reward(
        reward_model,
        loaded.tokenizer,
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        prompt_template=args.prompt_template,
        token_format=args.token_format,
    )


def finish(args, loaded, run, loop) -> None:
    """Write the trained weights, plots and a summary; say where everything lies."""
    path, policy = place(args, run), loop.trainer.model
    written = save_trained(path, policy.model, loaded, args.tokenizer, VALUE_HEAD, run=run.recorded)
    written.append(save_head(path, VALUE_HEAD, policy.value_head.state_dict(), {}))
    adapter = is_adapter(path, policy.model)
    where = {"model": loaded.name, "resume_file": path} if adapter else {"model": path}
    commands = [command("talk_to_model.py", **where)]
    finish_ppo(args, run, loop, written, commands, peak_memory=loop.backend.peak_memory())


if __name__ == "__main__":
    run_main(main)
