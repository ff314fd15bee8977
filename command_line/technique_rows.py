"""What techniques of fine-tuning ask for, and make of rows. Loads no MLX."""

import argparse
from collections.abc import Callable

from command_line.conditioning_flags import (
    add_conditioning_arguments,
    make_conditioning,
    put_scores,
)
from command_line.contrastive_flags import Labels, add_contrastive_arguments
from command_line.critique_flags import add_critique_arguments, add_critiques
from command_line.curriculum_flags import add_curriculum_arguments
from command_line.parser import Parser
from data_utils import Conditioning, Records, Tokenised


def add_technique_arguments(parser: Parser) -> None:
    """The flags of sft.py's techniques; docs/techniques.md."""
    add_curriculum_arguments(parser)
    add_contrastive_arguments(parser)
    add_conditioning_arguments(parser)
    add_critique_arguments(parser)


class TechniqueRows:
    """Rows of one split after the other, the training rows first: they settle what is shared."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.labels = args, Labels()
        self.conditioning: Conditioning | None = None
        self.first = True

    def make(self, records: Records, tokenise: Callable[..., Tokenised]) -> Tokenised:
        """Tokenised rows: with scores before prompts, labels, and critiques, if asked for."""
        args = self.args
        self.conditioning = self.conditioning or make_conditioning(args, records)
        if self.conditioning is not None:
            records = put_scores(records, self.conditioning)
        done = tokenise(records, chosen=args.chosen)
        if args.use_contrastive:
            self.labels.put(records, done, tokenise)
        if args.use_self_critique:
            add_critiques(args, records, done, tokenise, needed=self.first)
        self.first = False
        return done
