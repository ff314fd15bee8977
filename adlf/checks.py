"""What the two scripts refuse before their first stage; a later one would say it hours later.

The rules are those of the stages' own flags; here they go by the names of these scripts.
"""

from argparse import Namespace

from command_line.adlf_flags import CHOSEN_BY, asked_for, check_chosen
from command_line.contrastive_flags import check_contrast
from command_line.critique_flags import check_critique_weight
from command_line.rules import Needs, refuse_idle
from command_line.shared_flags import at_least, check_epochs
from data_utils import check_template
from errors import UserError

RESTARTS = "cosine_with_restarts"


def of_rlhf(flags: str) -> Needs:
    """Flags that do nothing where a model is only fine-tuned."""
    return Needs(flags, met=lambda args: args.run_rlhf, why="without --run_rlhf")


NEEDS = (
    of_rlhf("ppo_epochs ppo_batch_size ppo_learning_rate adlf_alpha length_target"),
    of_rlhf(" ".join(CHOSEN_BY)),
    Needs("wandb_project wandb_run_name", "use_wandb"),
)
ADVANCED_NEEDS = (
    of_rlhf("use_multi_objective use_dynamic_kl"),
    Needs("fluency_weight faithfulness_weight quality_weight", "use_multi_objective"),
    Needs("length_target", "use_length_penalty"),
    Needs("kl_target", "use_dynamic_kl"),
    Needs("contrastive_temp contrastive_weight", "use_contrastive"),
    Needs("score_template target_score", "use_decision_transformer"),
    Needs("critique_weight", "use_self_critique"),
    Needs(
        "use_contrastive use_decision_transformer",
        met=lambda args: args.run_sft,
        why="without --run_sft",
    ),
    Needs(
        "cosine_cycles",
        met=lambda args: args.scheduler == RESTARTS,
        why=f"without --scheduler {RESTARTS}",
    ),
)


def check_arguments(args: Namespace) -> None:
    """Of both scripts: what has no effect, and numbers that cannot be."""
    if not args.run_sft and not args.run_rlhf:
        args.run_sft = args.run_rlhf = True
    if not args.output_dir.strip():
        raise UserError("--output_dir: the name is empty; give a folder")
    if args.sft_checkpoint and args.run_sft:
        raise UserError("--sft_checkpoint is made by --run_sft; give one of them")
    check_epochs(args, "sft_epochs", "ppo_epochs")
    at_least(args, 1, "sft_batch_size", "ppo_batch_size", "gradient_accumulation_steps")
    at_least(args, 1, "length_target", "logging_steps")
    at_least(args, 2, "max_seq_length")
    at_least(args, 0, "eval_steps", "save_steps", "warmup_steps", "seed")
    at_least(args, 0, "sft_learning_rate", "ppo_learning_rate")
    check_chosen(args)
    if not args.adlf_alpha:
        refuse_idle(args, "length_target", "at --adlf_alpha 0")


def check_length_target(args: Namespace) -> None:
    """Of training.py, whose own choice, where none is named, is a reward for length too."""
    if asked_for(args) and not args.use_length_penalty:
        refuse_idle(args, "length_target", "without --use_length_penalty")


def check_techniques(args: Namespace) -> None:
    """Of Advanced_training.py: numbers and templates of its techniques."""
    at_least(args, 1, "cosine_cycles")
    if not args.kl_target > 0:
        raise UserError(f"--kl_target {args.kl_target:g}: give a number above 0")
    check_contrast(args, "sft_batch_size")
    check_critique_weight(args)
    if args.use_decision_transformer:
        check_template(args.score_template)
    if args.run_sft and args.use_self_critique and args.use_contrastive:
        raise UserError("--use_self_critique does not go with --use_contrastive; drop one of them")
