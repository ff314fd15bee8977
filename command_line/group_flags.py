"""The command line of the group methods. Loads no MLX."""

from command_line.dataclass_flags import add_dataclass_arguments, dataclass_from_arguments
from command_line.model_size import settle_size
from command_line.parser import Parser
from command_line.ppo_flags import (
    HARMLESS,
    NEEDS_OF_ROLLOUTS,
    SMALL_RATES,
    add_shared_arguments,
    add_task_arguments,
    check_arguments,
    settle_tuning,
)
from command_line.reward_flags import add_reward_arguments
from command_line.rules import Needs, needs
from command_line.worker_flags import refuse_across_rows, refuse_uneven
from rl.group_config import GroupConfig

DESCRIPTION = "GRPO, RLOO, REINFORCE++ or online DPO on a language model: no value function."
SHARED = ("seed", "learning_rate", "max_grad_norm")  # fields of GroupConfig with a flag elsewhere

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
OF_THE_LOSS = (
    "loss_type importance_sampling_level delta top_entropy_quantile entropy_coef "
    "use_adaptive_entropy off_policy_mask_threshold sapo_temperature_pos sapo_temperature_neg "
    "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"
)


def _has_loss(*losses: str):
    """Whether the loss is one of these (rloo and online DPO have a loss of their own)."""
    return lambda args: args.loss_type in losses


def _without_loss_types(args) -> bool:
    return args.online_dpo or args.advantage_estimator == "rloo"


def _estimator(*names: str):
    return lambda args: args.advantage_estimator in names


NEEDS = (
    Needs("max_resample", "dynamic_sampling"),
    Needs("dpo_loss", "online_dpo"),
    Needs("ref_model_mixup_alpha ref_model_sync_steps", "sync_ref_model"),
    Needs(
        "entropy_target entropy_coef_delta entropy_coef_min entropy_coef_max",
        "use_adaptive_entropy",
    ),
    Needs(
        "advantage_estimator scale_rewards multi_objective_aggregation reward_clip_range "
        "normalize_advantages kl_in_reward use_bias_correction_kl epsilon epsilon_high "
        f"mask_truncated_completions {OF_THE_LOSS}",
        met=lambda args: not args.online_dpo,
        why="with --online-dpo, which compares two responses and has a loss of its own",
    ),
    Needs(
        OF_THE_LOSS,
        met=lambda args: not _without_loss_types(args),
        why="with --advantage-estimator rloo, which has a loss of its own",
    ),
    Needs(
        "scale_rewards multi_objective_aggregation kl_in_reward use_bias_correction_kl",
        met=_estimator("grpo"),
        why="without --advantage-estimator grpo",
    ),
    Needs(
        "reward_clip_range normalize_advantages",
        met=_estimator("rloo"),
        why="without --advantage-estimator rloo",
    ),
    Needs("use_bias_correction_kl kl_in_reward", "beta"),
    Needs(
        "use_bias_correction_kl",
        met=lambda args: not args.kl_in_reward,
        why="with --kl-in-reward, where the loss has no KL",
    ),
    Needs(
        "scale_rewards",
        met=lambda args: args.multi_objective_aggregation != "normalize_then_sum",
        why="with --multi-objective-aggregation normalize_then_sum, which scales by groups and "
        "by the batch",
    ),
    Needs(
        "epsilon",
        met=lambda args: args.loss_type in CLIPPED or _without_loss_types(args),
        why="with this --loss-type, which clips no ratio",
    ),
    Needs(
        "epsilon_high",
        met=lambda args: args.loss_type in (*CLIPPED, "cispo") or _without_loss_types(args),
        why="with this --loss-type, which bounds no ratio",
    ),
    Needs("delta", met=_has_loss(*CLIPPED), why="with this --loss-type, which clips no ratio"),
    Needs(
        "sapo_temperature_pos sapo_temperature_neg",
        met=_has_loss("sapo"),
        why="without --loss-type sapo",
    ),
    Needs(
        "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
        met=_has_loss("vespo"),
        why="without --loss-type vespo",
    ),
    Needs(
        "importance_sampling_level",
        met=lambda args: args.loss_type != "vespo",
        why="with --loss-type vespo, whose weight is always one of a response",
    ),
    Needs(
        "reference_quantize",
        met=lambda args: config_of(args).beta,
        why="at --beta 0, where no reference is run",
    ),
    Needs(
        "reference_quantize",
        met=lambda args: not args.sync_ref_model,
        why="with --sync-ref-model, whose blend needs whole weights",
    ),
    *NEEDS_OF_ROLLOUTS,
)


def config_of(args) -> GroupConfig:
    """The options of the algorithm."""
    return dataclass_from_arguments(GroupConfig, args)


def parse_arguments(words=None):
    """The parsed and checked command line."""
    parser = Parser(script="group_training.py", description=DESCRIPTION, harmless=HARMLESS)
    add_reward_arguments(parser)
    add_task_arguments(parser, save_file="group_weights.npz")
    add_dataclass_arguments(
        parser, GroupConfig, title="group method", exclude=(*SHARED, "ppo_epochs")
    )
    parser.add_argument_group("passes").add_argument(
        "--ppo-epochs",
        "--num-iterations",
        type=int,
        default=GroupConfig.ppo_epochs,
        help="passes over a batch's responses",
    )
    add_shared_arguments(
        parser,
        learning_rate_note="default for models below 5 million weights: lora 3e-3, full 3e-4, "
        "prompt 0.1, found on the digits task; else lora 1e-5, full 1e-6, prompt 1e-3",
    )
    parser.checks += [check_arguments, needs(NEEDS), settle_arguments]
    return parser.parse_args(words)


def settle_arguments(args) -> None:
    """Fill in what follows from other flags, and make sure of the algorithm's own options."""
    settle_tuning(args)
    config_of(args)
    refuse_uneven(args, 2 if args.online_dpo else 1)
    if args.top_entropy_quantile < 1:
        refuse_across_rows(args, "--top-entropy-quantile", "ranks the tokens of a minibatch")


# By kind of training, from 5 million weights on: TRL's for full fine-tuning, ten times that for
# adapters.
LARGE_RATES = {"lora": 1e-5, "dora": 1e-5, "full": 1e-6, "prompt": 1e-3}


def settle_for_model(args, weights: int) -> None:
    """Fill in what depends on the number of the model's weights."""
    settle_size(args, weights, SMALL_RATES, LARGE_RATES, unit=config_of(args).num_generations)
    config_of(args)
