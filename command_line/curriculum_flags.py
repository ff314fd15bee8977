"""Flags of the curriculum, and the order of rows they ask for. Loads no MLX."""

import argparse
from collections.abc import Sequence
from typing import Any

from command_line.parser import Parser
from command_line.rules import Needs, needs
from command_line.shared_flags import at_least
from data_utils import Curriculum, counted_tokens, hard_by_length, hard_by_score
from errors import UserError

NEEDS = (Needs("curriculum_start curriculum_steps curriculum_by", "use_curriculum"),)


def add_curriculum_arguments(parser: Parser) -> None:
    """Whether easy rows come first, and what is easy."""
    add = parser.add_argument_group("curriculum").add_argument
    add("--use-curriculum", type=bool, default=False, help="easy rows first")
    add("--curriculum-start", type=float, default=0.2, help="share of the rows open at the start")
    add("--curriculum-steps", type=int, help="until all rows are open (default: half of all)")
    add(
        "--curriculum-by",
        choices=("length", "loss", "score"),
        default="length",
        help="difficulty: tokens; loss under the untrained model; the row's score, high is easy",
    )
    parser.checks += [needs(NEEDS), check_curriculum]


def check_curriculum(args: argparse.Namespace) -> None:
    """Refuse what has no order of rows to change."""
    if not 0 < args.curriculum_start <= 1:
        raise UserError(f"--curriculum-start {args.curriculum_start:g}: give a share above 0, to 1")
    at_least(args, 1, "curriculum_steps")
    if not args.use_curriculum:
        return
    if not getattr(args, "train", True) and not getattr(args, "preview", False):
        raise UserError("--use-curriculum has no effect without --train")
    if getattr(args, "packing", False):
        raise UserError("--use-curriculum orders rows, and --packing joins them; drop one of them")
    if args.streaming:
        raise UserError("--use-curriculum orders all rows, and --streaming reads on; drop one")


def difficulty(args: argparse.Namespace, loaded: Any, rows: Sequence[Any]) -> list[float] | None:
    """How hard each row is; None without a curriculum.

    To be called before anything is trained: by loss, the model reads every row once.
    """
    if not args.use_curriculum:
        return None
    if args.curriculum_by == "length":
        return hard_by_length(rows)
    if args.curriculum_by == "score":
        return hard_by_score(rows)
    from models.text_signals import Text, measure

    texts = []
    for row in rows:
        tokens, start = counted_tokens(row)
        texts.append(Text(tuple(tokens), max(1, start), scored=True))
    found = measure(loaded.model, texts, watched_as="difficulty")
    return [-float(found.get(text, 0.0)) for text in texts]  # one that is cut has nothing to say


def make_curriculum(
    args: argparse.Namespace, how_hard: Sequence[float] | None, steps: int
) -> Curriculum | None:
    """The curriculum of a run of `steps` updates; None without one."""
    if how_hard is None:
        return None
    return Curriculum(how_hard, args.curriculum_start, args.curriculum_steps or max(1, steps // 2))
