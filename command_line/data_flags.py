"""Flags that say which data a script reads and how a row becomes tokens. Loads no MLX."""

import argparse
import itertools
import re
from collections.abc import Iterable
from typing import Any

from command_line.parser import Parser
from command_line.rules import Needs, needs
from command_line.shared_flags import at_least
from data_utils import (
    KNOWN_FORMATS,
    TOKEN_FORMATS,
    Record,
    Template,
    asks_for_date,
    folder_file,
    now,
    read_date,
    use_date,
)
from distributed.membership import given
from errors import UserError
from run_folder.secrets import tell

NEEDS = (Needs("dataset_config split streaming", "dataset", valued=False),)


# Flags that say which rows are read, for the next script's prompts.
ROWS = (
    "data",
    "data_base",
    "train_file",
    "validation_file",
    "dataset",
    "dataset_config",
    "split",
    "streaming",
    "max_rows",
    "data_weights",
    "format",
    "skip_bad_rows",
    "validation_split_percentage",
    "prompt_template",
    "token_format",
)


def add_data_arguments(parser: Parser, *, max_length: int = 2048, test_rows: bool = False) -> None:
    """Where rows come from, and their form; `test_rows`: of a script that reads such."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="data", help="folder with the data files")
    add("--data-base", default="increasing_mult_2_", help="file names up to train.jsonl")
    add("--train-file", nargs="+", help="training files, in place of the folder's")
    add("--validation-file", help="validation file, in place of the folder's")
    if test_rows:
        add("--test-file", help="test file, in place of the folder's")
        add("--test-batches", type=int, default=-1, help="batches of test rows; -1: all of them")
    add("--validation-split-percentage", type=float, help="validate on this share of the rows")
    add("--dataset", nargs="+", help="names or paths that the datasets library opens")
    add("--dataset-config", help="configuration of --dataset")
    add("--split", default="train", help="split of --dataset, or a part: train[:50%%]")
    add("--streaming", type=bool, default=False, help="read --dataset without storing it")
    add("--max-rows", type=int, help="read at most this many rows of each source")
    add("--data-weights", type=float, nargs="+", help="share of each of several sources")
    add("--format", choices=tuple(KNOWN_FORMATS), help="of the rows (default: from their fields)")
    add("--skip-bad-rows", type=bool, default=False, help="count unusable rows, do not stop at one")
    add("--prompt-template", help='such as "Question: {question}\\n\\nAnswer: "')
    formats = "; ".join(f"{name}: {what}" for name, what in TOKEN_FORMATS.items())
    add("--token-format", choices=tuple(TOKEN_FORMATS), default="standard", help=formats)
    add("--template-date", help="date that a chat template sees (default: that of the run's start)")
    add("--max-length", type=int, default=max_length, help="longest row, in tokens")
    add("--too-long", choices=("cut", "refuse"), help="what happens to a longer one")

    def check(args: argparse.Namespace) -> None:
        at_least(args, 1, "max_rows", "max_length")
        if getattr(args, "test_batches", -1) == 0 or getattr(args, "test_batches", -1) < -1:
            raise UserError("--test-batches: give a number of batches, or -1 for all rows")
        share = getattr(args, "validation_split_percentage", None)  # score.py has no such flag
        if share is not None and not 0 < share < 100:
            raise UserError(
                f"--validation-split-percentage {share:g}: give a number between 0 and "
                "100, or leave it out"
            )
        if args.template_date is not None:
            read_date(args.template_date)
        if args.prompt_template is not None:  # the two characters \n, as shells hand them over
            args.prompt_template = args.prompt_template.replace("\\n", "\n")

    parser.checks += [check, needs(NEEDS)]


def warn_of_digits_model(args: argparse.Namespace, records: Iterable[Record]) -> None:
    """Say so where no --model was given and the rows are not numbers: digits are all it knows."""
    if args.model is None and (record := first_text(records)) is not None:
        tell(
            "warning: no --model: it is the embedded digits model that reads these rows, and "
            f"all it knows is numbers ({record.where} is none); give --model"
        )


def first_text(records: Iterable[Record]) -> Record | None:
    """The first of some rows that is more than numbers."""
    for record in itertools.islice(records, 100):
        said = [record.text, record.prompt, record.completion, record.messages, *record.responses]
        turns = [turn for one in said if isinstance(one, list) for turn in one]
        texts = [one for one in said if isinstance(one, str)]
        texts += [str(turn.get("content")) for turn in turns]
        if any(LETTERS.search(text) for text in texts):
            return record
    return None


def warn_of_model(args: argparse.Namespace, records: Iterable[Record], tokenizer: Any) -> None:
    """Say so where rows are not what the model reads: texts for the digits model, conversations
    for a base model."""
    warn_of_digits_model(args, records)
    asked_for = args.prompt_template is not None or "token_format" in args.explicit
    if args.model is None or asked_for:  # digits have no roles
        return
    if (problem := without_roles(args.model, tokenizer, records)) is not None:
        tell(f"warning: {problem}")


def without_roles(name: str, tokenizer: Any, records: Iterable[Record]) -> str | None:
    """What becomes of conversations, the first named, for a model without a chat template."""
    if Template(tokenizer).uses_chat_template:
        return None
    for record in itertools.islice(records, 100):
        if record.kind == "conversation" or isinstance(record.prompt, list):
            return (
                f"{record.where}: is a conversation, and the tokenizer of {name} has no chat "
                "template: turns are written without their roles, a blank line between; give "
                "--token-format role_markers to mark them, or an instruct model"
            )
    return None


def settle_date(args: argparse.Namespace, tokenizer: Any) -> None:
    """Make sure of the date that chat templates see; a run's config.json keeps it for a resume."""
    if "template_date" in args.typed and not asks_for_date(tokenizer):
        raise UserError("--template-date has no effect: the tokenizer's chat template reads none")
    args.template_date = args.template_date or given("date") or now()
    use_date(tokenizer, args.template_date)


LETTERS = re.compile(r"[^\W\d_]")
NO_VALIDATION = (
    "without rows to validate on: give --validation-file or --validation-split-percentage"
)


def has_validation(args: argparse.Namespace) -> bool:
    """Whether there is anything to validate on, as ``load_data`` will find it."""
    if args.validation_file or args.validation_split_percentage:
        return True
    if args.train_file or args.dataset:
        return False
    return folder_file(args.data, args.data_base, "valid", required=False) is not None


def cut_test_rows(args: argparse.Namespace, rows: Any) -> None:
    """Leave the rows of the first --test-batches batches."""
    if args.test_batches > 0:
        del rows.rows[args.test_batches * args.batch_size :]


def data_sources(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of ``data_utils.load_data``, all but ``splits``."""
    return {
        "data": args.data,
        "data_base": args.data_base,
        "train_files": args.train_file or (),
        "validation_file": args.validation_file,
        "test_file": getattr(args, "test_file", None),
        "validation_split_percentage": args.validation_split_percentage,
        "datasets": args.dataset or (),
        "dataset_config": args.dataset_config,
        "split": args.split,
        "streaming": args.streaming,
        "weights": args.data_weights,
        "format": args.format,
        "skip_bad_rows": args.skip_bad_rows,
        "max_rows": args.max_rows,
        "seed": args.seed,
    }


def tokenising(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments that the ``tokenise_…`` functions of data_utils share."""
    chosen = {} if args.too_long is None else {"too_long": args.too_long}
    return chosen | {
        "max_length": args.max_length,
        "prompt_template": args.prompt_template,
        "token_format": args.token_format,
        "skip_bad_rows": args.skip_bad_rows,
    }


def flags_of_rows(args) -> list[str]:
    """The flags that say which rows of the user's own were read, for the next script's prompts."""
    if not args.changed & {"data", "train_file", "dataset"}:
        return []
    words = []
    for name in ROWS:
        if name in args.changed:
            value = getattr(args, name)
            many = value if isinstance(value, list) else [value]
            words += ["--" + name.replace("_", "-"), *map(str, many)]
    return words
