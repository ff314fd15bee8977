"""Flags of conditioning on a score. Loads no MLX."""

import argparse
from typing import Any

from command_line.parser import Parser
from command_line.rules import Needs, needs
from data_utils import (
    Conditioning,
    Records,
    check_template,
    conditioned,
    encode_prompt,
    extras_of,
    put_before,
)
from errors import UserError

TEMPLATE = "[Target Score: {score:.1f}] "
TARGET_HELP = "score to ask for (default: the highest in training)"
NEEDS = (Needs("score_template target_score", "use_decision_transformer"),)


def add_conditioning_arguments(parser: Parser) -> None:
    """Of fine-tuning: whether each row says its score."""
    add = parser.add_argument_group("conditioning on a score").add_argument
    add(
        "--use-decision-transformer",
        type=bool,
        default=False,
        help="put each row's score before its prompt; whoever samples asks for a high one",
    )
    add("--score-template", default=TEMPLATE, help="how a score is written")
    add("--target-score", type=float, help=f"what PPO and chat ask for: {TARGET_HELP}")
    parser.checks += [needs(NEEDS), check_conditioning]


def add_target_score(add: Any) -> None:
    """Of what samples from a model that was trained on scores."""
    add("--target-score", type=float, help=f"of a model trained on scores: {TARGET_HELP}")


def check_conditioning(args: argparse.Namespace) -> None:
    """Refuse templates that say nothing, and what has no prompt to say it before."""
    if not args.use_decision_transformer:
        return
    check_template(args.score_template)
    if args.prompt_template is not None:
        raise UserError(
            "--use-decision-transformer and --prompt-template both write what stands before a "
            "prompt; drop one of them"
        )


def make_conditioning(args: argparse.Namespace, records: Records) -> Conditioning | None:
    """What training rows are conditioned by; None without the flag."""
    if not args.use_decision_transformer:
        return None
    scores = [record.reward for record in records if record.reward is not None]
    target = args.target_score if args.target_score is not None else max(scores, default=0.0)
    return Conditioning(args.score_template, target)


def put_scores(records: Records, conditioning: Conditioning) -> Records:
    """Rows with their own scores before their prompts."""
    rows = [conditioned(record, conditioning) for record in records]
    return Records(rows, records.refused, records.name, records.notes)


def ask_for_target(args: argparse.Namespace, loaded: Any, prompts: dict) -> None:
    """Let the model read each prompt behind the score that is wanted, if it was trained on scores.

    Texts, samples and rewards stay without it.
    """
    conditioning = wanted(loaded.config, args.target_score)
    if conditioning is None:
        return
    print(f"asked for the score {conditioning.target:g}: {conditioning.prefix()!r}")
    for split in prompts.values():
        for row in split.rows:
            row.given = encode_prompt(
                put_before(row.prompt, conditioning.prefix()),
                loaded.tokenizer,
                token_format=args.token_format,
                extras=extras_of(row.columns),
            )


def wanted(config: dict, target: float | None) -> Conditioning | None:
    """What a model is asked for; None where it was not trained on scores."""
    conditioning = Conditioning.of(config)
    if target is None:
        return conditioning
    if conditioning is None:
        raise UserError(
            f"--target-score {target:g} has no effect: the model was not trained on scores "
            "(sft.py --use-decision-transformer)"
        )
    return Conditioning(conditioning.template, target)
