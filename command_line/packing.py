"""--packing of sft.py: several rows in one, whole or cut. Loads no MLX."""

import argparse
from collections.abc import Callable
from typing import Any

from command_line.rules import Needs
from data_utils import Tokenised, pack_rows, wrap_rows

STRATEGIES = ("whole", "wrapped")
NO_LIMIT = 1 << 40  # tokens of a row that is cut afterwards
NEEDS = (
    Needs("packing_strategy", "packing"),
    Needs(
        "too_long",
        met=lambda args: not wraps(args),
        why="with --packing-strategy wrapped, which cuts the rows of every length",
    ),
)


def add_packing_arguments(add: Callable) -> None:
    """Flags that say whether rows share a row, and how."""
    text = "several rows in one of up to --max-length tokens; attention crosses rows"
    add("--packing", type=bool, default=False, help=text)
    text = "whole: none is split; wrapped: joined by EOS and cut at exactly --max-length"
    add("--packing-strategy", choices=STRATEGIES, default="whole", help=text)


def wraps(args: argparse.Namespace) -> bool:
    return args.packing and args.packing_strategy == "wrapped"


def row_limit(args: argparse.Namespace) -> dict[str, Any]:
    """The ``max_length`` of a row before it is packed, where that is not --max-length."""
    return {"max_length": NO_LIMIT} if wraps(args) else {}


def pack(args: argparse.Namespace, rows: Tokenised, tokenizer: Any) -> None:
    """Put the rows together as the flags say, and print how full the new ones are."""
    if wraps(args):
        rows.rows = wrap_rows(rows.rows, args.max_length, tokenizer.eos_token_id)
        how = f"wrapped into {len(rows)} rows of {args.max_length} tokens"
    else:
        rows.rows = pack_rows(rows.rows, args.max_length)
        how = f"packed into {len(rows)} rows of up to {args.max_length} tokens"
    fill = sum(rows.lengths) / (len(rows) * args.max_length)
    print(f"  {how}, {fill:.0%} full")
