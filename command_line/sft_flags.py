"""The command line of supervised training, and the rows it asks for. Loads no MLX.

Shared by sft.py and its PyTorch twin.
"""

from collections.abc import Callable

from command_line.adapter_file import check_save_file, settle_adapter
from command_line.data_flags import (
    NO_VALIDATION,
    add_data_arguments,
    has_validation,
)
from command_line.packing import NEEDS as OF_PACKING
from command_line.packing import add_packing_arguments
from command_line.parser import Parser
from command_line.rules import Needs, flag_of, needs
from command_line.shared_flags import (
    add_adapter_arguments,
    add_any_base,
    add_model_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    at_least,
    check_epochs,
)
from command_line.technique_rows import add_technique_arguments
from command_line.worker_flags import add_worker_arguments, refuse_across_rows
from errors import UserError

DESCRIPTION = (
    "Supervised fine-tuning of a language model; with --reward-model, training of a reward model."
)
# May change when a run is resumed, beside what option_files.py lists: they train nothing.
HARMLESS = ("test", "sample_prompts", "preview")
AT_VALIDATIONS = ("early_stopping_patience", "save_best", "sample_prompts")
LEARNING_RATES = {"lora": 2e-4, "dora": 2e-4, "full": 2e-5, "prompt": 1e-2}

OF_TRAINING = (
    "iters epochs gradient_accumulation_steps steps_per_report steps_per_eval val_batches "
    "early_stopping_patience save_best sample_prompts save_file fused_dir train_file "
    "validation_file validation_split_percentage lora_dropout grad_checkpoint optimizer "
    "learning_rate lr_schedule num_cycles lr_power warmup_steps lr_end_factor weight_decay "
    "max_grad_norm adam_beta1 adam_beta2 adam_eps momentum output_dir overwrite save_every "
    "keep_checkpoints log_with wandb_project wandb_run_name max_bad_steps "
    "num_training_workers cpus_per_worker worker_timeout"
)

# A test alone makes no adapter: it has that of a file, or none.
HAS_ADAPTER = {
    "met": lambda args: args.train or args.preview or args.resume_adapter_file is not None,
    "why": "without --train or --resume-adapter-file",
}

# Of every supervised script.
LOOP_NEEDS = (
    Needs("prompt_tuning", **HAS_ADAPTER),  # in a --config file too: a random one would be tested
    Needs(
        "fine_tune_type lora_layers lora_rank lora_scale lora_alpha lora_keys rslora",
        typed=True,
        **HAS_ADAPTER,
    ),
    Needs(
        OF_TRAINING, met=lambda args: args.train or args.preview, why="without --train", typed=True
    ),
    Needs("test_file test_batches", "test"),
    Needs(
        "steps_per_eval",
        met=lambda args: not (args.train and args.steps_per_eval) or has_validation(args),
        why=NO_VALIDATION,
    ),
    Needs(
        "val_batches", met=lambda args: not args.train or has_validation(args), why=NO_VALIDATION
    ),
)

NEEDS = (
    *LOOP_NEEDS,
    *OF_PACKING,
    Needs("pooling centering margins soft_labels normalize_samples", "reward_model"),
    Needs("margins", met=lambda args: not args.soft_labels, why="with --soft-labels: it has none"),
)


# ------------------------------------------------------------------------------ arguments


def parse_arguments(words=None):
    """The parsed and checked command line."""
    parser = Parser(script="sft.py", description=DESCRIPTION, harmless=HARMLESS)
    add = add_loop_arguments(parser)
    add("--reward-model", type=bool, default=False, help="a reward model, not a language model")
    add("--mask-prompt", type=bool, default=False, help="train on answers alone")
    add("--chosen", type=bool, default=False, help="of preference rows, train the best answer")
    add_packing_arguments(add)
    add = parser.add_argument_group("reward model").add_argument
    add("--pooling", choices=("mean", "last"), default="mean", help="of hidden states")
    add("--centering", type=float, default=0.0, help="weight of (chosen + rejected)^2 in the loss")
    add("--margins", type=bool, default=True, help="use the margins of preference rows")
    add(
        "--soft-labels",
        type=bool,
        default=False,
        help="pairs count by the probability in judge.p, or by a margin of log-odds",
    )
    add(
        "--normalize-samples",
        type=int,
        default=0,
        help="scores get mean 0, deviation 1 on this many samples; 0: as trained",
    )
    add_technique_arguments(parser)
    add_data_arguments(parser, test_rows=True)
    add_model_arguments(parser)
    add_any_base(parser, "resume_adapter_file")
    add_adapter_arguments(parser, lora_scale=4.0)
    note = (
        "default: lora 2e-4, full 2e-5, prompt 1e-2, by flags or --resume-adapter-file; the "
        "1e-6 of old scripts teaches nothing"
    )
    add_optimizer_arguments(parser, learning_rate=None, max_grad_norm=1.0, learning_rate_note=note)
    add_run_arguments(parser)
    add_worker_arguments(parser)
    parser.checks += [check_arguments, needs(NEEDS), settle_arguments]
    return parser.parse_args(words)


def add_loop_arguments(parser: Parser) -> Callable:
    """What every supervised loop is told; returns the group's own ``add_argument``."""
    add = parser.add_argument_group("task").add_argument
    add("--train", type=bool, default=False, help="train")
    add("--test", type=bool, default=False, help="evaluate on the test rows, after any training")
    add("--preview", type=bool, default=False, help="show the data as it is trained on, and stop")
    add("--save-file", default="peft_weights.npz", help=".npz, .safetensors, or a folder to write")
    add("--resume-adapter-file", "--resume-file", help="adapter to start from, or to test")
    add("--batch-size", type=int, default=4, help="rows per gradient")
    add("--iters", "--steps", type=int, default=1000, help="updates of the weights")
    add("--epochs", type=float, help="passes over the data, in place of --iters")
    add("--gradient-accumulation-steps", type=int, default=1, help="gradients per update")
    add("--steps-per-report", type=int, default=10, help="updates between lines of metrics")
    add("--steps-per-eval", type=int, default=200, help="updates between validations; 0: none")
    add("--val-batches", type=int, default=25, help="batches of a validation; -1: all rows")
    add("--early-stopping-patience", type=int, help="stop after this many validations in vain")
    add(
        "--save-best",
        type=bool,
        default=False,
        help="save the best validated weights, not the last",
    )
    add("--sample-prompts", nargs="+", help="prompts to continue greedily at each validation")
    parser.alternatives.append({"iters", "epochs"})
    parser.checks.append(check_loop)
    return add


def check_loop(args) -> None:
    """Refuse what contradicts itself in the options of `add_loop_arguments`."""
    if not (args.train or args.test or args.preview):
        raise UserError("nothing to do: give --train, --test or both")
    if {"iters", "epochs"} <= args.changed:
        raise UserError("--iters and --epochs both say how long to train; give one of them")
    at_least(
        args,
        1,
        "batch_size",
        "iters",
        "gradient_accumulation_steps",
        "steps_per_report",
        "early_stopping_patience",
    )
    at_least(args, 0, "steps_per_eval")
    if args.val_batches == 0 or args.val_batches < -1:
        raise UserError(
            "--val-batches: give a number of batches, or -1 for all rows; "
            "--steps-per-eval 0 means no validation"
        )
    check_epochs(args, "epochs")
    check_validations(args)
    check_save_file(args.save_file)


def check_arguments(args) -> None:
    """Refuse what contradicts itself."""
    for name in ("mask_prompt", "packing", "sample_prompts", "chosen", "use_decision_transformer"):
        if getattr(args, name) and args.reward_model:
            raise UserError(f"{flag_of(name)} has no effect with --reward-model")
    if args.test and not args.train and args.resume_adapter_file is None and args.reward_model:
        raise UserError("--test of a reward model needs --resume-adapter-file, or --train")
    at_least(args, 0, "centering")
    check_normalisation(args)
    if args.use_contrastive:
        refuse_across_rows(args, "--use-contrastive", "compares the rows of a batch")


def settle_arguments(args) -> None:
    """Fill in what follows from the adapter that is made or loaded, if its file fits the flags."""
    file = args.resume_adapter_file
    if settle_adapter(args, file, LEARNING_RATES) == "full" and file and args.normalize_samples:
        raise UserError(f"--normalize-samples: {file} holds every weight, and no base to sample")


def check_normalisation(args) -> None:
    """Refuse --normalize-samples where there is no base model, no training, or one sample."""
    if not args.normalize_samples:
        return
    if args.fine_tune_type == "full":
        raise UserError(
            "--normalize-samples: samples come from the base model, of which "
            "--fine-tune-type full leaves nothing; leave one of them out"
        )
    if not args.train:
        raise UserError("--normalize-samples has no effect without --train")
    at_least(args, 2, "normalize_samples")


def check_validations(args) -> None:
    """Refuse what happens at validations where there are none."""
    wanted = [name for name in AT_VALIDATIONS if getattr(args, name)]
    if wanted and not args.steps_per_eval:
        raise UserError(f"{flag_of(wanted[0])} needs validations; --steps-per-eval 0 means none")
    if args.save_best and not args.save_every:
        raise UserError("--save-best takes weights from a checkpoint; --save-every 0 keeps none")
    if wanted and args.train and not has_validation(args):
        raise UserError(
            f"{flag_of(wanted[0])} needs rows to validate on: give --validation-file "
            "or --validation-split-percentage"
        )
