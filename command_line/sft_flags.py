"""The command line of supervised training, and the rows it asks for. Loads no MLX.

Shared by sft.py and its PyTorch twin.
"""

import dataclasses
import itertools
import math
import string
from collections.abc import Callable

from command_line.adapter_file import check_save_file, settle_adapter
from command_line.data_flags import (
    NO_VALIDATION,
    add_data_arguments,
    cut_test_rows,
    data_sources,
    has_validation,
    settle_date,
    tokenising,
    warn_of_model,
)
from command_line.option_files import begun_before
from command_line.packing import NEEDS as OF_PACKING
from command_line.packing import add_packing_arguments, pack, row_limit
from command_line.parser import Parser
from command_line.row_preview import show_row
from command_line.rules import Needs, flag_of, needs, refuse_idle
from command_line.shared_flags import (
    add_adapter_arguments,
    add_any_base,
    add_model_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    at_least,
    check_epochs,
)
from command_line.technique_rows import TechniqueRows, add_technique_arguments
from command_line.worker_flags import add_worker_arguments, refuse_across_rows
from data_utils import (
    BatchPlan,
    Records,
    data_report,
    encode_prompt,
    epoch_batches,
    load_data,
    not_for_sft,
    put_soft_labels,
    tokenise_sft,
)
from errors import UserError
from models.adapter_description import REWARD_HEAD, head_path, read_head_description
from models.reading import Reading
from rewards.reward_rows import reading_of_rows, tokenise_reward_rows
from run_folder.run_config import run_folder_of
from waiting import watched

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


# ------------------------------------------------------------------------------ data


def load_rows(args, tokenizer) -> dict:
    """Tokenised rows by split: train and valid when training, test when testing.

    With --sample-prompts also "samples": their tokens, in the form of the training rows. With
    --reward-model also "reading": how the model reads its texts, to be recorded beside its head.
    """
    settle_date(args, tokenizer)
    splits = (["train", "valid"] if args.train or args.preview else []) + ["test"] * args.test
    refuse = None if args.reward_model else lambda kind: not_for_sft(kind, args.chosen)
    rows, techniques = {}, TechniqueRows(args)
    found = load_data(splits=splits, refuse=refuse, **data_sources(args))
    for records in found.values():
        warn_of_model(args, records, tokenizer)
    check_kinds(args, {kind for records in found.values() for kind in records.kinds})
    for split, records in found.items():
        if not args.reward_model:
            options = tokenising(args) | row_limit(args) | {"mask_prompt": args.mask_prompt}

            def tokenise(some, options=options, **more):
                return tokenise_sft(some, tokenizer, **options | more)

            rows[split] = techniques.make(records, tokenise)
        else:
            if "reading" not in rows:
                rows["reading"] = reading_of(args, tokenizer, records)
            rows[split] = tokenise_reward_rows(
                records, tokenizer, rows["reading"], **tokenising(args)
            )
            if args.soft_labels:
                put_soft_labels(records, rows[split].rows)
        print(data_report(split, records, rows[split]))
        if args.packing:
            pack(args, rows[split], tokenizer)
        if args.sample_prompts and split == "train":
            scores = techniques.conditioning
            said = "" if scores is None else scores.prefix()
            plain = set(records.kinds) == {"text"}
            rows["samples"] = encode_samples(args, tokenizer, plain, said)
    rows["scores"] = techniques.conditioning
    if args.test:
        cut_test_rows(args, rows["test"])
    if args.preview:
        show_row(rows["train"][0], tokenizer)
    return rows


FORM = {"prompt_template", "token_format"}


def reading_of(args, tokenizer, records: Records) -> Reading:
    """How a reward model reads these rows.

    What was trained before that was recorded goes on as it was.
    """
    old = args.resume_adapter_file
    described = {} if old is None else read_head_description(old, REWARD_HEAD)
    if old is not None and "ending" not in described:
        return Reading()
    if old is not None and not args.resume and not FORM & args.explicit:
        take_form(args, Reading.described(described))
    checkpoints = args.resume and sorted(run_folder_of(args.resume).glob("checkpoints/step-*"))
    if checkpoints:  # without one the run begins anew
        if head_path(checkpoints[-1], REWARD_HEAD).exists():
            before = "ending" not in read_head_description(checkpoints[-1], REWARD_HEAD)
        else:
            before = begun_before(args.resume, "template_date")
        if before:
            return Reading()
    return reading_of_rows(
        records,
        tokenizer,
        prompt_template=args.prompt_template,
        token_format=args.token_format,
    )


def take_form(args, reading: Reading) -> None:
    """Read rows in the form in which a reward model was trained, which goes on; and say so."""
    for name in sorted(FORM):
        if (value := getattr(reading, name)) != getattr(args, name):
            setattr(args, name, value)
            print(f"note: {flag_of(name)} is {value!r}, as in {args.resume_adapter_file}")


def check_kinds(args, kinds: set[str]) -> None:
    """Refuse what has no effect on rows of these kinds."""
    if "preference" not in kinds and args.reward_model:
        for name in ("centering", "margins", "soft_labels"):
            refuse_idle(args, name, "on rows with a reward: it is for pairs of chosen and rejected")
    if "preference" not in kinds:
        refuse_idle(args, "chosen", "without preference rows")
    if kinds == {"text"}:
        refuse_idle(args, "token_format", "on rows of plain text")


def encode_samples(args, tokenizer, plain: bool, prefix: str = "") -> list[list[int]]:
    """Tokens of --sample-prompts as the prompts of training rows have them; `plain`: as text."""
    texts = [prefix + text for text in args.sample_prompts]
    if plain:
        return [list(tokenizer.encode(text)) for text in texts]
    template = args.prompt_template
    names = {name for _, name, _, _ in string.Formatter().parse(template or "") if name}
    if len(names) == 1:  # "Question: {question}": the prompt is the question
        template = template.replace("{" + names.pop() + "}", "{prompt}")
    options = {"prompt_template": template, "token_format": args.token_format}
    return [encode_prompt(text, tokenizer, **options) for text in texts]


def validation(args, rows, least: int = 1):
    """A function that gives the batches of a validation, or None without rows for one.

    `least`: rows of the smallest batch.
    """
    if rows is None:
        return None
    plan = BatchPlan(rows.lengths, args.batch_size, shuffle=False, least=least)
    count = None if args.val_batches < 0 else args.val_batches
    total = len(plan) if count is None else min(count, len(plan))

    def batches():
        return watched(itertools.islice(epoch_batches(rows.rows, plan), count), "validation", total)

    return batches


def validated(args, rows):
    """The rows that a validation takes, of those that there are (None: none)."""
    if rows is None:
        return None
    plan = BatchPlan(rows.lengths, args.batch_size, shuffle=False)
    count = None if args.val_batches < 0 else args.val_batches
    taken = [rows.rows[i] for batch in itertools.islice(plan.epoch(0), count) for i in batch]
    return dataclasses.replace(rows, rows=taken)


def training_length(args, batches_per_epoch: int) -> tuple[int, int | None]:
    """(updates, batches in all or None): with --epochs the last update may get fewer batches."""
    each = args.gradient_accumulation_steps
    batches = math.ceil(args.epochs * batches_per_epoch) if args.epochs else None
    updates = math.ceil(batches / each) if batches else args.iters
    if updates <= args.steps_per_eval and args.early_stopping_patience:
        raise UserError(
            f"--steps-per-eval {args.steps_per_eval}: {updates} updates have no validation between "
            "the first and the last, so --early-stopping-patience could stop nothing"
        )
    return updates, batches
