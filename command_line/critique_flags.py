"""Flags of self-critique in fine-tuning, and the rows it adds. Loads no MLX."""

import argparse
from collections.abc import Callable
from typing import Any

from command_line.parser import Parser
from command_line.rules import Needs, needs
from data_utils import (
    CRITIQUE,
    REVISION,
    Records,
    Tokenised,
    check_critique_template,
    critiques,
    encode_prompt,
)
from errors import UserError

NEEDS = (Needs("critique_weight critique_template", "use_self_critique"),)


def add_critique_arguments(parser: Parser) -> None:
    """Whether reasons for scores are trained as critiques."""
    add = parser.add_argument_group("self-critique").add_argument
    add(
        "--use-self-critique",
        type=bool,
        default=False,
        help="rows with score_reason also train a critique of their answer",
    )
    add(
        "--critique-weight",
        type=float,
        default=0.5,
        help="share of critiques in the loss; answers have the rest",
    )
    add("--critique-template", default=CRITIQUE, help="asks for one: {prompt} and {response}")
    parser.checks += [needs(NEEDS), check_critique]


def check_critique(args: argparse.Namespace) -> None:
    """Refuse templates without their fields, and what trains no answers."""
    check_critique_weight(args)
    if not args.use_self_critique:
        return
    check_critique_template("--critique-template", args.critique_template, "prompt", "response")
    for name in ("reward_model", "packing", "chosen", "use_contrastive"):
        if getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--use-self-critique does not go with {flag}; drop one of them")


def check_critique_weight(args: argparse.Namespace) -> None:
    if not 0 <= args.critique_weight <= 1:
        raise UserError(f"--critique-weight {args.critique_weight:g}: give a number from 0 to 1")


ROLLOUT_NEEDS = (Needs("critique_weight critique_template revision_template", "use_self_critique"),)


def add_revision_arguments(parser: Parser) -> None:
    """Whether PPO trains critiques of its answers, and answers revised by them."""
    add = parser.add_argument_group("self-critique").add_argument
    add(
        "--use-self-critique",
        type=bool,
        default=False,
        help="three rows a prompt: an answer, a critique of it, the answer revised by it",
    )
    add(
        "--critique-weight",
        type=float,
        default=0.5,
        help="share of critiques and revisions in the loss; answers have the rest",
    )
    add("--critique-template", default=CRITIQUE, help="asks for one: {prompt} and {response}")
    add("--revision-template", default=REVISION, help="also {critique}")
    parser.checks += [needs(ROLLOUT_NEEDS), check_revision]


def check_revision(args: argparse.Namespace) -> None:
    """Refuse templates without their fields."""
    check_critique_weight(args)
    fields = ["prompt", "response"]
    check_critique_template("--critique-template", args.critique_template, *fields)
    check_critique_template("--revision-template", args.revision_template, *fields, "critique")


def critique_options(args: argparse.Namespace, loaded: Any) -> dict[str, Any] | None:
    """What a CritiqueLoop is told; None where no critiques are sampled."""
    if not (args.use_self_critique and args.critique_weight):
        return None
    positions = loaded.limits.positions
    return {
        "encode": lambda text: encode_prompt(
            text, loaded.tokenizer, token_format=args.token_format
        ),
        "critique_template": args.critique_template,
        "revision_template": args.revision_template,
        "longest": None if positions is None else positions - args.max_new_tokens,
    }


def add_critiques(
    args: argparse.Namespace,
    records: Records,
    done: Tokenised,
    tokenise: Callable[..., Tokenised],
    *,
    needed: bool = True,
) -> None:
    """Add critique rows to `done`, and weigh all rows.

    Over all rows the loss is (1 - w) * the mean over answers' tokens + w * that over critiques'.
    Raises UserError where no row gives a reason, if they are `needed`.
    """
    weight = args.critique_weight
    found = critiques(records, args.critique_template)
    if not found and needed:
        raise UserError(
            f"{records.name}: --use-self-critique: no row has a score_reason and a score"
        )
    if not weight or not found:
        return
    more = tokenise(found, mask_prompt=True)
    own, theirs = (sum(sum(row.mask) for row in part.rows) for part in (done, more))
    for row in done.rows:
        row.weight = (1 - weight) * (own + theirs) / own
    for row in more.rows:
        row.weight = weight * (own + theirs) / theirs
    done.rows += more.rows
