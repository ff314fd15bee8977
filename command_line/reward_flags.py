"""Flags that say what is rewarded, and the rewards they ask for. Loads no MLX."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, get_args
from urllib.parse import urlsplit

from command_line.adlf_flags import add_adlf_arguments
from command_line.parser import Parser
from command_line.rules import Needs, needs
from command_line.shared_flags import at_least
from errors import UserError
from rewards.answers import (
    AnswerFrom,
    AnswerMatch,
    answer_reward,
    format_reward,
    json_reward,
    length_reward,
)
from rewards.learned import digits_rewards, reward_beside
from rewards.reward_set import Reward, RewardSet
from rewards.service import HTTPReward
from rewards.user_function import load_function
from run_folder.private import private_folder

THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
LONGEST_TIMEOUT = 1e6  # seconds; what the system's timers take ends at about 1e9

RULES = (
    Needs(
        "increasing decreasing multiple_of min_length",
        met=lambda args: args.ground_truth_reward or args.true_score,
        why="without --ground-truth-reward or --true-score",
        valued=False,
    ),
)
NEEDS = (
    Needs(
        "answer_from answer_tag",
        met=lambda args: args.answer_reward or getattr(args, "weigh_answers", None),
        why="without --answer-reward",
    ),
    Needs("answer_match", "answer_reward"),
    Needs("reward_retries", "reward_url"),
    Needs(
        "reward_timeout",
        met=lambda args: (
            args.reward_model
            or args.reward_function
            or args.reward_url
            or any(getattr(args, name) is not None for name in CHECKED_ANSWERS)
        ),
        why="on the digits score: nothing there is waited for",
    ),
)


CHECKED_ANSWERS = ("answer_reward", "format_reward", "length_reward", "json_reward")


def add_reward_arguments(
    parser: Parser, needed: Callable[[argparse.Namespace], bool] = lambda args: True
) -> None:
    """The digits score, a reward model, functions, services; and their weights.

    `needed`: whether a command line must name one.
    """
    add = parser.add_argument_group("reward").add_argument
    add("--ground-truth-reward", type=bool, default=False, help="the digits task's true score")
    add(
        "--reward-model",
        "--reward-model-dir",
        help="fused reward model, *ForSequenceClassification model, or adapter "
        "with a reward head on --model; an encoder (BERT) needs PyTorch",
    )
    add("--reward-function", nargs="+", help="FILE.py:NAME, a function of your own; runs FILE")
    add("--reward-url", nargs="+", help="services that take prompts and responses as JSON")
    add("--answer-reward", metavar="COLUMN", help="1 where the response has this column's answer")
    add(
        "--answer-from",
        choices=get_args(AnswerFrom),
        default="auto",
        help="where in the response: its tag, its \\boxed{}, its last number, all of it; auto: the "
        "first of these that is there",
    )
    add("--answer-tag", default="answer", help="name of the tag around an answer")
    add(
        "--answer-match",
        choices=get_args(AnswerMatch),
        default="value",
        help="as numbers or else texts; as texts; as mathematics (needs math-verify)",
    )
    add("--format-reward", metavar="REGEX", help="1 where this is found in the response")
    add("--length-reward", type=int, metavar="WORDS", help="1 at so many words, 0 at none or twice")
    add("--json-reward", metavar="SCHEMA", help="1 for JSON that fits this file's JSON Schema")
    add("--reward-weights", type=float, nargs="+", help="of the rewards, in the order above")
    add("--reward-timeout", type=float, default=120.0, help="seconds for a batch's reward")
    add("--reward-retries", type=int, default=3, help="of a request to --reward-url")
    add("--true-score", type=bool, default=False, help="log the digits score, do not train on it")
    add("--increasing", type=bool, default=None, help="digits score: numbers rise (the default)")
    add("--decreasing", type=bool, default=None, help="digits score: numbers fall")
    add("--multiple-of", type=int, default=2, help="digits score: of this number")
    add("--min-length", type=int, default=5, help="digits score: fewer words count as this many")
    check = partial(check_rewards, needed=needed)
    parser.checks += [needs(RULES), check, needs(NEEDS)]
    add_adlf_arguments(parser)


def check_rewards(args: argparse.Namespace, needed: Callable[[argparse.Namespace], bool]) -> None:
    """Refuse no reward, weights that do not fit, and rules of a score that is not used."""
    if args.increasing and args.decreasing:
        raise UserError("--increasing and --decreasing contradict each other; give one of them")
    if args.increasing is False and not args.decreasing:
        raise UserError("--increasing False needs --decreasing")
    count = args.ground_truth_reward + bool(args.reward_model)
    count += len(args.reward_function or ()) + len(args.reward_url or ())
    count += sum(getattr(args, name) is not None for name in CHECKED_ANSWERS)
    if not count and needed(args):
        raise UserError(
            "no reward: give --ground-truth-reward, --reward-model, --reward-function, "
            "--reward-url, --answer-reward, --format-reward, --length-reward or "
            "--json-reward"
        )
    if args.reward_weights is not None and len(args.reward_weights) != count:
        raise UserError(f"--reward-weights: {len(args.reward_weights)} for {count} rewards")
    if args.true_score and args.ground_truth_reward:
        raise UserError("--true-score is logged anyway with --ground-truth-reward; leave it out")
    at_least(args, 0, "reward_retries")
    at_least(args, 1, "multiple_of", "min_length")
    if not 0 < args.reward_timeout <= LONGEST_TIMEOUT:
        raise UserError(f"--reward-timeout: give seconds above 0, up to {LONGEST_TIMEOUT:g}")


def refuse_sending(args: argparse.Namespace) -> None:
    """UserError for a service elsewhere where the rows, or the model, are private."""
    services = [("--reward-url", url) for url in args.reward_url or ()]
    if getattr(args, "judge_url", None) is not None:
        services.append(("--judge-url", args.judge_url))
    elsewhere = [service for service in services if host_of(service[1]) not in THIS_MACHINE]
    if elsewhere and (folder := private_folder(vars(args))):
        flag, url = elsewhere[0]
        raise UserError(
            f"{flag} {url}: {folder} is private, so its texts go to no other machine; a service "
            "on http://localhost may have them"
        )


def host_of(url: str) -> str | None:
    """The host of an address; None where it is none, which is told when it is used."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def make_learned_reward(args: argparse.Namespace, loaded: Any, tuning: Any) -> Reward | None:
    """--reward-model as a reward beside a policy, or None where none is asked for.

    `tuning` is the policy's, which is off while the reward model scores on the same base.
    """
    if not args.reward_model:
        return None
    return reward_beside(
        loaded,
        tuning,
        args.reward_model,
        model=args.model,
        batch_size=args.batch_size,
        any_base=args.any_base,
        quantize=args.quantize,
        prompt_template=args.prompt_template,
        token_format=args.token_format,
        template_date=args.template_date,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        tokenizer=args.tokenizer,
    )


def make_rewards(
    args: argparse.Namespace, learned: Reward | None = None, *, unscored: bool = False
) -> RewardSet:
    """The weighted set of all rewards that were asked for; `learned` is the reward model's.

    `unscored`: rows may be left without a score.
    """
    refuse_sending(args)
    rewards = []
    rule = {
        "increasing": args.increasing or not args.decreasing,
        "multiple_of": args.multiple_of,
        "min_length": args.min_length,
    }
    if args.ground_truth_reward:
        rewards.append(digits_rewards(**rule)[0])
    if learned is not None:
        learned.timeout = args.reward_timeout
        rewards.append(learned)
    for spec in args.reward_function or ():
        name = spec.rpartition(":")[2]
        rewards.append(Reward(name, load_function(spec), timeout=args.reward_timeout))
    for url in args.reward_url or ():  # has a time limit of its own, for each request
        service = HTTPReward(url, timeout=args.reward_timeout, retries=args.reward_retries)
        rewards.append(Reward("service", service))
    rewards += answer_rewards(args)
    for reward, weight in zip(rewards, args.reward_weights or (), strict=False):
        reward.weight = weight
    if args.ground_truth_reward or args.true_score:
        logged = digits_rewards(**rule, weight=0.0)
        rewards += logged if args.true_score else logged[1:]
    return RewardSet(rewards, unscored=unscored)


def answer_rewards(args: argparse.Namespace) -> list[Reward]:
    """The rewards for answers that can be checked, in the order of their flags."""
    found = []
    if args.answer_reward is not None:
        found.append(
            answer_reward(
                args.answer_reward,
                answer_from=args.answer_from,
                answer_tag=args.answer_tag,
                answer_match=args.answer_match,
            )
        )
    for value, make in (
        (args.format_reward, format_reward),
        (args.length_reward, length_reward),
        (args.json_reward, json_reward),
    ):
        if value is not None:
            found.append(make(value))
    for reward in found:
        reward.timeout = args.reward_timeout
    return found
