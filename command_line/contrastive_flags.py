"""Flags of the contrastive loss, and the labels it needs. Loads no MLX."""

import argparse
import math
from collections.abc import Callable

from command_line.parser import Parser
from command_line.rules import Needs, flag_of, needs
from data_utils import (
    Records,
    Tokenised,
    label_edges,
    label_of,
    refuse_unlabelled,
    rejected_answers,
)
from errors import UserError

LEAST = 4  # rows of a batch: with fewer, hardly one has a positive and a negative
NEEDS = (Needs("contrastive_temp contrastive_weight", "use_contrastive"),)


def add_contrastive_arguments(parser: Parser) -> None:
    """A loss that draws answers of the same score together."""
    add = parser.add_argument_group("contrastive loss").add_argument
    add(
        "--use-contrastive",
        type=bool,
        default=False,
        help="add a supervised contrastive loss on the rows' scores; it compares the rows of one "
        "batch, so 8 x 1 is not 1 x 8 here",
    )
    add("--contrastive-temp", type=float, default=0.07, help="temperature of likenesses")
    add("--contrastive-weight", type=float, default=0.1, help="weight beside the cross-entropy")
    parser.checks += [needs(NEEDS), check_contrastive]


def check_contrastive(args: argparse.Namespace) -> None:
    """Refuse what has no rows to compare."""
    check_contrast(args, "batch_size")
    if not args.use_contrastive:
        return
    for name in ("reward_model", "packing"):
        if getattr(args, name):
            raise UserError(f"--use-contrastive has no effect with {flag_of(name)}")
    if not (args.train or args.preview):
        raise UserError("--use-contrastive has no effect without --train")


def check_contrast(args: argparse.Namespace, batch_size: str) -> None:
    """Refuse numbers that cannot be, and too few rows to compare; `batch_size`: whose number."""
    if not 0 < args.contrastive_temp < math.inf:
        raise UserError("--contrastive-temp: give a number above 0")
    if not 0 <= args.contrastive_weight < math.inf:
        raise UserError("--contrastive-weight: give a number that is not below 0")
    rows = getattr(args, batch_size)
    if args.use_contrastive and rows < LEAST:
        raise UserError(
            f"--use-contrastive compares the rows of a batch: {flag_of(batch_size)} {rows} is "
            f"below {LEAST}"
        )


class Labels:
    """Puts labels on rows; the quintiles are those of the first rows, which are trained on."""

    def __init__(self) -> None:
        self.edges: list[float] | None = None

    def put(self, records: Records, done: Tokenised, tokenise: Callable[[list], Tokenised]) -> None:
        """Label the rows of `done`; rejected answers, tokenised too, are added, not to be trained.

        Raises UserError where training rows have no labels that differ.
        """
        first = self.edges is None
        if first:
            self.edges = label_edges(records)
        labels = {record.where: label_of(record, self.edges) for record in records}
        for row in done.rows:
            row.label = labels[row.where]
        rejected = rejected_answers(records)
        if rejected:
            kept = {row.where for row in done.rows}
            more = tokenise([r for r in rejected if r.where.removesuffix(" rejected") in kept])
            for row in more.rows:
                row.label, row.weight = 0, 0.0
            done.rows += more.rows
        if first:
            if len(done.rows) < LEAST:
                raise UserError(
                    f"{records.name}: --use-contrastive compares the rows of a batch: "
                    f"{len(done.rows)} rows are below {LEAST}"
                )
            refuse_unlabelled([row.label for row in done.rows], records.name)
