"""Flags of composite rewards (rl/adlf.py), and the reward set they ask for. Loads no MLX."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from command_line.parser import Parser
from command_line.rules import Needs, flag_of, needs
from command_line.shared_flags import at_least
from errors import UserError
from rewards.reward_set import RewardSet
from run_folder.secrets import tell

CHOSEN_BY = (
    "use_length_penalty",
    "use_coherence_reward",
    "use_fluency_reward",
    "use_faithfulness_reward",
)
WEIGHTS = ("fluency_weight", "faithfulness_weight", "quality_weight")
NEEDS = (
    Needs("length_target", "use_length_penalty"),
    Needs("fluency_weight faithfulness_weight quality_weight", "use_multi_objective"),
    Needs(
        "faithfulness_model",
        met=lambda args: args.use_faithfulness_reward or args.use_multi_objective,
        why="without --use-faithfulness-reward or --use-multi-objective",
    ),
)


def add_adlf_arguments(parser: Parser) -> None:
    """The share of internal rewards, and what they are made of."""
    add = parser.add_argument_group("composite reward").add_argument
    add(
        "--adlf-alpha",
        type=float,
        default=0.0,
        help="share of the internal reward: (1 - alpha) * external + alpha * internal",
    )
    add(
        "--score-range",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="external scores from here are mapped to 0 to 1, clipped",
    )
    add(
        "--use-length-penalty",
        type=bool,
        default=False,
        help="internal reward: tokens / --length-target, at most 1",
    )
    add("--length-target", type=int, default=100, help="tokens at which an answer is long enough")
    add(
        "--use-coherence-reward",
        type=bool,
        default=False,
        help="internal reward: likeness of neighbouring sentences under the reference model",
    )
    add(
        "--use-fluency-reward",
        type=bool,
        default=False,
        help="internal reward: perplexity under the reference model, compared with its own texts",
    )
    add(
        "--use-faithfulness-reward",
        type=bool,
        default=False,
        help="internal reward: likeness of prompt and answer under the reference model",
    )
    add(
        "--faithfulness-model",
        help="NLI classifier (an encoder; needs PyTorch): faithfulness is its probability that "
        "the prompt entails a sentence",
    )
    add(
        "--use-multi-objective",
        type=bool,
        default=False,
        help="internal reward: fluency, faithfulness and external quality, weighted",
    )
    add("--fluency-weight", type=float, default=0.3, help="with --use-multi-objective")
    add("--faithfulness-weight", type=float, default=0.3, help="with --use-multi-objective")
    add("--quality-weight", type=float, default=0.4, help="with --use-multi-objective")
    parser.checks += [needs(NEEDS), check_adlf]


def check_adlf(args: argparse.Namespace) -> None:
    """Refuse a share of nothing, components without a share, and weights that say nothing."""
    check_chosen(args)
    at_least(args, 1, "length_target")
    if args.use_multi_objective and args.score_range is None:
        raise UserError("--use-multi-objective needs --score-range, for quality from 0 to 1")
    if args.adlf_alpha and not asked_for(args):
        raise UserError(
            f"--adlf-alpha {args.adlf_alpha:g} is a share of nothing: give "
            f"{', '.join(map(flag_of, CHOSEN_BY))} or --use-multi-objective"
        )
    if args.score_range is not None:
        low, high = args.score_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(f"--score-range {low:g} {high:g}: the first must be the lower one")
        if not args.adlf_alpha:
            raise UserError("--score-range has no effect at --adlf-alpha 0")


def asked_for(args: argparse.Namespace) -> list[str]:
    """The flags that ask for internal rewards, of those that are given."""
    return [name for name in (*CHOSEN_BY, "use_multi_objective") if getattr(args, name, False)]


def check_chosen(args: argparse.Namespace) -> None:
    """Refuse a share that is none, rewards without a share, and weights that cannot be."""
    if not 0 <= args.adlf_alpha <= 1:
        raise UserError(f"--adlf-alpha {args.adlf_alpha:g}: give a number from 0 to 1")
    asked = asked_for(args)
    several = "use_multi_objective" in asked
    if several and len(asked) > 1:
        raise UserError(
            f"{flag_of(asked[0])} has no effect with --use-multi-objective, whose objectives are "
            "fluency, faithfulness and quality"
        )
    if asked and not args.adlf_alpha:
        raise UserError(f"{flag_of(asked[0])} has no effect at --adlf-alpha 0")
    if not several:
        return
    weights = [getattr(args, name) for name in WEIGHTS]
    for name, weight in zip(WEIGHTS, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise UserError(f"{flag_of(name)} {weight:g}: give a number that is not below 0")
    if not any(weights):
        raise UserError(f"{', '.join(map(flag_of, WEIGHTS))}: all 0; one must be above 0")


def component_weights(args: argparse.Namespace) -> dict[str, float]:
    """The internal components that were asked for, with their weights; {} without any."""
    if args.use_multi_objective:
        return {
            "fluency": args.fluency_weight,
            "faithfulness": args.faithfulness_weight,
            "external": args.quality_weight,
        }
    chosen = {
        "length": args.use_length_penalty,
        "coherence": args.use_coherence_reward,
        "fluency": args.use_fluency_reward,
        "faithfulness": args.use_faithfulness_reward,
    }
    return {name: 1.0 for name, wanted in chosen.items() if wanted}


def make_composite(
    args: argparse.Namespace, rewards: RewardSet, make_signals: Callable[..., Any]
) -> RewardSet:
    """`rewards` as they are, or with the internal ones that were asked for.

    `make_signals(names, length_target=, entailment=)` gives what measures them
    (rewards/internal.py); it is not called where none is asked for.
    """
    weights = component_weights(args)
    if not weights:
        return rewards
    from rewards.composite import EXTERNAL, CompositeRewards

    if args.score_range is None:
        tell(
            "warning: --adlf-alpha without --score-range: internal rewards lie between 0 and 1, "
            "and an external one of another range outweighs them, or is outweighed"
        )
    entailment = None
    if args.faithfulness_model is not None:
        from rewards.entailment import load_entailment

        entailment = load_entailment(args.faithfulness_model, args.trust_remote_code)
    signals = make_signals(
        [name for name in weights if name != EXTERNAL],
        length_target=args.length_target,
        entailment=entailment,
    )
    return CompositeRewards(
        rewards,
        signals,
        args.adlf_alpha,
        weights,
        score_range=args.score_range,
        objectives=args.use_multi_objective,
    )
