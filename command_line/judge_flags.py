"""The command line of judge.py. Loads no MLX."""

import os
from pathlib import Path

from command_line.parser import Parser
from command_line.reward_flags import CHECKED_ANSWERS, add_reward_arguments
from command_line.rules import Needs, needs
from command_line.sampling import OF_SAMPLING, add_sampling_arguments, check_sampling
from command_line.score_flags import add_row_arguments
from command_line.shared_flags import add_any_base, add_model_arguments, at_least
from errors import UserError
from rewards.constitution import read_constitution
from safe_files import check_place

DESCRIPTION = "Label pairs of answers by a judge: a model with a constitution, or any reward."
CONSTITUTION = "data/constitution.yaml"
KEY = "JUDGE_API_KEY"
ROOT = Path(__file__).resolve().parent.parent


def by_model(args) -> bool:
    """Whether a language model judges, and no reward."""
    return args.judge is not None or args.judge_url is not None


OF_A_MODEL = {"met": by_model, "why": "on rewards: they read no question; give --judge"}
NEEDS = (
    Needs(f"{OF_SAMPLING} seed", met=lambda args: args.prompts or by_model(args), why="on rewards"),
    Needs(OF_SAMPLING, "prompts"),
    Needs(
        "adlf_alpha true_score",
        met=lambda args: not by_model(args),
        why="with a model as judge: no reward is asked",
    ),
    Needs("constitution debate revise judge_max_tokens", **OF_A_MODEL),
    Needs(
        "judge_max_tokens",
        met=lambda args: args.debate or args.revise,
        why="without --debate or --revise: a verdict is one token",
    ),
    Needs("judge_timeout judge_retries judge_connections judge_key", "judge_url"),
    Needs(
        "debate soft_labels min_confidence",
        met=lambda args: not args.revise,
        why="with --revise, which compares nothing",
    ),
    Needs(
        "model tokenizer prompt_template token_format max_length too_long",
        met=lambda args: args.prompts or not by_model(args),
        why="without --prompts: the judge reads the rows as they are",
    ),
    Needs(
        "quantize dtype fp16 trust_remote_code",
        met=lambda args: args.prompts or args.judge_url is None,
        why="with --judge-url: no model is loaded here",
    ),
)


def parse_arguments(words=None):
    """The parsed and checked command line."""
    parser = Parser(description=DESCRIPTION)
    add = parser.add_argument_group("task").add_argument
    add("--input", nargs="+", help="files with pairs: preferences, or rows with the same prompt")
    add("--prompts", nargs="+", help="in place of --input: files of prompts, which --model answers")
    add("--output", help="JSON lines to add labels to (default: judged.jsonl, or revised.jsonl)")
    add("--force", type=bool, default=False, help="begin --output anew; else it is gone on with")
    add("--seed", type=int, default=0, help="of principles, and of what is sampled")
    add("--batch-size", type=int, default=16, help="pairs that are judged together")
    add_sampling_arguments(add)
    add_judge_arguments(parser)
    parser.checks += [check_arguments, settle_constitution, needs(NEEDS)]
    add_reward_arguments(parser, needed=lambda args: not by_model(args))
    add_row_arguments(parser)
    add_model_arguments(parser)
    add_any_base(parser, "reward_model")
    return parser.parse_args(words)


def add_judge_arguments(parser: Parser) -> None:
    """Who judges, by what, and how."""
    add = parser.add_argument_group("judge").add_argument
    add("--judge", help="model that judges: folder or hub name; with --judge-url its name there")
    add("--judge-url", help="chat completions service, such as http://localhost:8080/v1")
    add("--judge-key", default=KEY, help="environment variable that holds the service's API key")
    add("--judge-timeout", type=float, default=120.0, help="seconds for a request, by the clock")
    add("--judge-retries", type=int, default=3, help="of a request; then the pair has no label")
    add("--judge-connections", type=int, default=1, help="requests that are under way at once")
    add("--judge-max-tokens", type=int, default=128, help="longest argument, critique or revision")
    add("--constitution", default=CONSTITUTION, help="YAML file of principles")
    add("--debate", type=int, default=0, help="rounds in which both answers are argued for first")
    add(
        "--soft-labels",
        type=bool,
        default=False,
        help="train on P (what is printed to go on with); of a reward: the sigmoid of the "
        "difference, and not 1 or 0",
    )
    add("--min-confidence", type=float, default=0.5, help="leave pairs without label below this P")
    add(
        "--revise",
        type=bool,
        default=False,
        help="in place of labels: critique each answer and write a better one, for sft.py",
    )


def check_arguments(args) -> None:
    """Refuse what contradicts itself, and settle --output."""
    given = [name for name in ("input", "prompts", "dataset") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]}: both say what is judged; give one")
    if not given:
        raise UserError("nothing to judge: give --input FILE, --dataset NAME, or --prompts FILE")
    rewards = [
        name
        for name in ("ground_truth_reward", "reward_model", "reward_function", "reward_url")
        if getattr(args, name)
    ]
    rewards += [name for name in CHECKED_ANSWERS if getattr(args, name) is not None]
    if by_model(args) and rewards:
        flag = "--judge" if args.judge is not None else "--judge-url"
        raise UserError(f"{flag} and --{rewards[0].replace('_', '-')}: give one judge")
    if not by_model(args) and not rewards:
        raise UserError(
            "no judge: give --judge MODEL, --judge-url URL, or a reward, such as --reward-model"
        )
    at_least(args, 1, "batch_size", "judge_connections", "judge_max_tokens")
    at_least(args, 0, "debate", "judge_retries")
    if not 0.5 <= args.min_confidence < 1:
        raise UserError("--min-confidence: give a probability from 0.5 up to, not including, 1")
    if not 0 < args.judge_timeout <= 1e6:
        raise UserError("--judge-timeout: give seconds above 0, up to 1e6")
    check_sampling(args)
    if args.prompts and not args.temperature and not args.revise:
        raise UserError("--temperature 0: both answers would be the same; give a temperature")
    if "judge_key" in args.changed and not os.environ.get(args.judge_key):
        raise UserError(f"--judge-key {args.judge_key}: there is no such environment variable")
    args.output = args.output or ("revised.jsonl" if args.revise else "judged.jsonl")
    check_place(args.output)


def settle_constitution(args) -> None:
    """Read the principles into ``args.principles``."""
    args.principles = []
    if not by_model(args):
        return
    path = Path(args.constitution)
    if args.constitution == CONSTITUTION and not path.exists():
        path = ROOT / CONSTITUTION  # the one that comes with the project, from any folder
    args.principles = read_constitution(path)
    for principle in args.principles if args.revise else ():
        if principle.critique is None or principle.revision is None:
            raise UserError(
                f"{path}: principle {principle.name!r} has no critique or no revision, which "
                "--revise asks for"
            )
