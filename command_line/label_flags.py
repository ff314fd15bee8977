"""The command line of label.py. Loads no MLX."""

import getpass
import os
import re
from pathlib import Path

from command_line.parser import Parser
from command_line.rules import Needs, needs
from command_line.sampling import OF_SAMPLING, add_sampling_arguments, check_sampling
from command_line.score_flags import add_row_arguments
from command_line.shared_flags import add_any_base, add_model_arguments, at_least
from errors import UserError

DESCRIPTION = "Label replies of a model blind, in the terminal or a browser; report on labels."
ROW_FLAGS = frozenset(
    "--max-rows --format --skip-bad-rows --prompt-template --token-format --template-date "
    "--max-length --too-long".split()
)
# What has an effect on labelling alone, and not on --report.
LABELLING = (
    f"output against resume_file samples web port aspects labeller {OF_SAMPLING} batch_size "
    "max_rows format skip_bad_rows prompt_template token_format template_date max_length too_long "
    "model dtype fp16 quantize tokenizer trust_remote_code any_base"
)
NEEDS = (
    Needs(LABELLING, met=lambda args: not args.report, why="with --report", valued=False),
    Needs("port", "web"),
    Needs("against aspects", met=lambda args: args.samples > 1, why="with --samples 1"),
    Needs("plot", "report"),
)
ASPECT = re.compile(r"[\w][\w .-]{0,39}")


def parse_arguments(words=None):
    """The parsed and checked command line; `args.aspects` is a list."""
    parser = Parser(description=DESCRIPTION)
    add = parser.add_argument_group("task").add_argument
    add("--prompts", nargs="+", help="files of prompts that --model replies to")
    add("--report", nargs="+", help="in place of --prompts: files of labels to report on")
    add("--output", default="labels.jsonl", help="where labels are added, as training rows")
    add("--against", metavar="OTHER", help="second model, or an adapter on the same one")
    add("--resume-file", help="adapter or soft prompt to put on --model (a file or a folder)")
    text = "replies to each prompt: 2 for pairs, 3 or 4 to rank, 1 to mark as good or bad"
    add("--samples", type=int, default=2, help=text)
    add("--aspects", help="also asked of each pair, such as helpful,harmless")
    add("--labeller", help="who labels, for the records (default: the name you are logged in as)")
    add("--web", type=bool, default=False, help="label in a browser on this machine")
    add("--port", type=int, default=0, help="of --web; 0: any free one")
    add("--plot", help="PNG that --report draws (default: beside its first file)")
    add("--seed", type=int, default=0, help="of what is sampled, of sides, of intervals")
    add = parser.add_argument_group("sampling").add_argument
    add_sampling_arguments(add)
    add("--batch-size", type=int, default=16, help="replies that are sampled together")
    add_row_arguments(parser, ROW_FLAGS)
    add_model_arguments(parser)
    add_any_base(parser, "resume_file", "against")
    parser.checks += [check_arguments, needs(NEEDS)]
    return parser.parse_args(words)


def check_arguments(args) -> None:
    """Refuse what contradicts itself."""
    if args.prompts and args.report:
        raise UserError("--prompts and --report: --report reads labels that are there; give one")
    if not (args.prompts or args.report):
        raise UserError("nothing to label: give --prompts FILE, or --report FILE of labels")
    if not 1 <= args.samples <= 4:
        raise UserError(f"--samples {args.samples}: give 2 to 4 replies to compare, or 1 to mark")
    alone = args.samples == 1 or (args.against and args.samples == 2)  # one reply of each model
    if args.temperature == 0 and args.prompts and not alone:
        raise UserError(
            "--temperature 0: all replies of a model would be the same; give a temperature, or "
            "--against OTHER with --samples 2"
        )
    check_sampling(args)
    at_least(args, 0, "port")
    at_least(args, 1, "batch_size")
    if args.port > 65535:
        raise UserError(f"--port {args.port}: ports end at 65535")
    if not args.output.strip():
        raise UserError("--output: the name is empty; give a file for the labels")
    args.aspects = aspects_of(args.aspects)
    if args.labeller is None:
        args.labeller = login_name()
    if not args.labeller.strip() or not args.labeller.isprintable():
        raise UserError("--labeller: give a name that can be printed")
    reports = args.report or []
    places = [Path(path).resolve() for path in reports]
    if twice := [path for i, path in enumerate(reports) if places.index(places[i]) < i]:
        raise UserError(f"--report {twice[0]}: is given twice, and would agree with itself")
    if args.report and args.plot is None:
        args.plot = default_plot(args.report[0])


def aspects_of(text: str | None) -> list[str]:
    """Names between commas; UserError for none, for doubles and for what is no name."""
    if text is None:
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not ASPECT.fullmatch(name):
            raise UserError(
                f"--aspects {text}: {name!r} is no name of an aspect; names of letters and digits "
                "go between commas, such as helpful,harmless"
            )
    if len(set(names)) < len(names):
        raise UserError(f"--aspects {text}: a name stands there twice")
    return names


def login_name() -> str:
    """The name a person is logged in as."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no entry for this number of a user, as in some containers
        return f"user {os.getuid()}"


def default_plot(report: str) -> str:
    path = Path(report)
    return str(path.parent / f"{path.stem or 'labels'}.report.png")
