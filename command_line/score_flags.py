"""The command line of score.py, and the rows it asks for. Loads no MLX."""

import os
from typing import get_args

from command_line.data_flags import add_data_arguments
from command_line.parser import Parser
from command_line.reward_flags import add_reward_arguments
from command_line.rules import Needs, needs
from command_line.sampling import OF_SAMPLING, add_sampling_arguments, check_sampling
from command_line.shared_flags import add_any_base, add_model_arguments, at_least
from data_utils import Records, mix_records, read_dataset, read_records
from errors import UserError
from rewards.best_of import Weighing
from safe_files import check_place

NEEDS = (
    Needs("force", "output"),
    Needs("weigh_answers", "best_of"),
    Needs(f"samples {OF_SAMPLING} seed", "prompts"),
)
DESCRIPTION = "Score responses, from a file or sampled, with any reward; pick the best of several."
# Of the flags that say where training rows come from, those that are for rows to score as well.
ROW_FLAGS = frozenset(
    "--dataset --dataset-config --split --streaming --max-rows --format --skip-bad-rows "
    "--prompt-template --token-format --template-date --max-length --too-long".split()
)


def parse_arguments(words=None):
    """The parsed and checked command line."""
    parser = Parser(description=DESCRIPTION)
    add = parser.add_argument_group("task").add_argument
    add("--input", nargs="+", help="files with prompts and responses, in any record format")
    add("--prompts", nargs="+", help="in place of --input: files of prompts, which --model answers")
    add("--samples", type=int, default=4, help="responses sampled to each prompt")
    add_sampling_arguments(add)
    add("--seed", type=int, default=0, help="of what is sampled")
    add("--output", help="JSON lines to write: a row for each response, with its score")
    add(
        "--best-of",
        type=bool,
        default=False,
        help="write the best response to each prompt alone, as a row for sft.py",
    )
    text = "with --best-of: the best of those whose answer (--answer-from) has the largest sum of "
    text += "rewards, or of their exponentials"
    add("--weigh-answers", choices=get_args(Weighing), help=text)
    add("--force", type=bool, default=False, help="overwrite --output")
    add("--batch-size", type=int, default=64, help="responses that are scored together")
    parser.checks += [check_arguments, needs(NEEDS)]
    add_reward_arguments(parser)
    add_row_arguments(parser)
    add_model_arguments(parser)
    add_any_base(parser, "reward_model")
    return parser.parse_args(words)


def add_row_arguments(parser: Parser, names: frozenset[str] = ROW_FLAGS) -> None:
    """The flags of these names, as the training scripts have them."""
    others = Parser(add_help=False)
    add_data_arguments(others)
    group = parser.add_argument_group("data")
    for action in others._actions:
        if names & set(action.option_strings):
            group._add_action(action)
    parser.checks += others.checks


def check_arguments(args) -> None:
    """Refuse what contradicts itself."""
    if args.prompts and (args.input or args.dataset):
        other = "--input" if args.input else "--dataset"
        raise UserError(
            f"--prompts and {other}: --prompts samples responses, {other} has them; give one"
        )
    if not (args.input or args.dataset or args.prompts):
        raise UserError("nothing to score: give --input FILE, --dataset NAME, or --prompts FILE")
    at_least(args, 1, "samples")
    check_sampling(args)
    if args.prompts and not args.temperature and args.samples > 1:
        raise UserError(
            f"--samples {args.samples} with --temperature 0: all would be the same; give "
            "--samples 1, or a temperature"
        )
    if args.best_of and args.output is None:
        raise UserError("--best-of needs --output FILE to write to")
    refuse_overwriting(args)
    at_least(args, 1, "batch_size")


def refuse_overwriting(args) -> None:
    """Before the work, and again after it, when the file may have come up."""
    if args.output is not None and os.path.lexists(args.output) and not args.force:
        raise UserError(f"{args.output}: is there already; --force overwrites it")
    if args.output is not None:
        check_place(args.output)


def read_input(args) -> Records:
    """The rows of all files and data sets, in their order."""
    reading = {name: getattr(args, name) for name in ("format", "skip_bad_rows", "max_rows")}
    sets = [read_records(path, **reading) for path in args.prompts or args.input or ()]
    opening = {"split": args.split, "config": args.dataset_config, "streaming": args.streaming}
    sets += [read_dataset(name, **opening, **reading) for name in args.dataset or ()]
    return mix_records(sets)
