"""The rows that sft.py's command line asks for, and how long they are trained on. Loads no MLX."""

import dataclasses
import itertools
import math
import string

from command_line.data_flags import (
    cut_test_rows,
    data_sources,
    settle_date,
    tokenising,
    warn_of_model,
)
from command_line.option_files import begun_before
from command_line.packing import pack, row_limit
from command_line.row_preview import show_row
from command_line.rules import flag_of, refuse_idle
from command_line.technique_rows import TechniqueRows
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
