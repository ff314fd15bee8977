"""Defaults that depend on how large the model is, filled in once it is loaded. Loads no MLX.

Models under SMALL weights get the recipe of the digits task, whatever the data and the reward; all
others one for real models on a laptop; what is known of it stands in docs/real_models.md.
"""

import argparse
import math
from collections.abc import Mapping

from command_line.adapter_file import settle_adapter
from command_line.rules import flag_of, shown_value

SMALL = 5_000_000
# Of methods on rollouts. Those of the digits recipe are the flags' own defaults.
LARGE = {"batch_size": 16, "max_new_tokens": 64, "eval_samples": 1}
# Work on a response, in units of sampling one: of the reference, and of an epoch of updates. At
# SmolLM2's shape, LoRA on q and v, 4 epochs: sampling 28% of a step, reference 8%, updates 64%.
REFERENCE, EPOCH = 0.3, 0.57
EVALUATION = 0.1  # share of the work that evaluations may take
FEWEST = 8  # prompts of an evaluation, where there are so many


def settle_size(
    args: argparse.Namespace,
    weights: int,
    rates: Mapping[str, float],
    large_rates: Mapping[str, float],
    unit: int = 1,
) -> None:
    """Fill in what was not asked for, for a model of so many weights, and say so in a line.

    `rates` and `large_rates` give the learning rate by kind of training; a batch becomes a multiple
    of `unit`. The options of a resumed run stay what they were.
    """
    small = weights < SMALL
    known = args.learning_rate is not None
    kind = settle_adapter(
        args, args.resume_file, rates if small else large_rates, ignore="lora_dropout"
    )
    if args.resume is not None:
        return
    if not small:
        for name, value in LARGE.items():
            if name not in args.explicit:
                setattr(args, name, value)
        if "batch_size" not in args.explicit:
            args.batch_size = batch_near(args.batch_size, args, unit)
    names = [name for name in ("learning_rate", *LARGE) if name not in args.explicit]
    if known and "learning_rate" in names:
        names.remove("learning_rate")
    if not names:
        return
    chosen = " ".join(f"{flag_of(name)} {shown_value(getattr(args, name))}" for name in names)
    what = "under 5 million weights, the digits recipe" if small else "the recipe of real models"
    print(f"defaults for {millions(weights)}, {kind}: {what}: {chosen}")


def batch_near(wanted: int, args: argparse.Namespace, unit: int) -> int:
    """The multiple of `unit` and of what one update sees that is nearest below `wanted`, or one."""
    each = math.lcm(unit, (args.mini_batch_size or 1) * args.gradient_accumulation_steps)
    return max(1, wanted // each) * each


def millions(weights: int) -> str:
    """``a model of 134.5 million weights``."""
    return f"a model of {weights / 1e6:.4g} million weights"


def settle_evaluation(args: argparse.Namespace, weights: int) -> None:
    """Fill in --eval-prompts for a real model, so that evaluations take a tenth of the work."""
    if weights < SMALL or args.resume is not None or "eval_prompts" in args.explicit:
        return
    if not args.eval_every:
        return
    evaluations = 1 + math.ceil(args.num_steps / args.eval_every)  # the first before training
    work = args.num_steps * args.batch_size * (1 + REFERENCE + EPOCH * args.ppo_epochs)
    budget = EVALUATION * work / evaluations / (1 + args.eval_samples)
    args.eval_prompts = max(FEWEST, min(args.eval_prompts, int(budget)))
