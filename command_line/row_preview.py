"""--preview: a row as it is trained on; what rollouts are given, and what rewards get. No MLX."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from data_utils import PromptRow, columns_of, preview, use_colour
from rewards.texts import GIVEN
from run_folder.output import own_text, printable

SHOWN = 3  # prompts
LONGEST = 400  # characters of a value


class Decoder:
    """A tokenizer whose texts hold no escape sequence, so that those of the colours can pass."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def decode(self, tokens: Sequence[int]) -> str:
        return printable(self.tokenizer.decode(tokens))


def show_row(row: Any, tokenizer: Any) -> None:
    """Print one row of any kind with what of it is trained on."""
    row = dataclasses.replace(row, where=printable(row.where))
    text = preview(row, Decoder(tokenizer), use_colour(sys.stdout))
    print(text, file=own_text(sys.stdout))


def show_prompts(args: Any, tokenizer: Any, rows: Sequence[PromptRow], rewards: Any) -> None:
    """Print three prompts as tokens and text, with the columns for rewards, and the lengths.

    `rewards`: the reward set, which is not called.
    """
    for row in rows[:SHOWN]:
        pieces = [f"{token} {tokenizer.decode([token])!r}" for token in row.tokens]
        print(printable(f"{row.where}: prompt of {len(row.tokens)} tokens"))
        print("  tokens: " + printable("  ".join(pieces)))
        print("  text: " + cut(repr(row.text)))
        print(f"  rewards get: prompt {cut(said(row.prompt))}")
        for name, values in columns_of([row]).items():
            print(f"    {printable(str(name))}: {cut(said(values[0]))}")
    print(f"rewards: {rewards}; beside prompt and response, they may ask for {', '.join(GIVEN)}")
    longest = max(len(row.tokens) for row in rows)
    print(
        f"lengths: prompts of up to {longest} tokens, responses of up to {args.max_new_tokens}: "
        f"{longest + args.max_new_tokens} tokens a row, "
        f"{(args.mini_batch_size or args.batch_size) * (longest + args.max_new_tokens):,} in a "
        f"gradient of {args.mini_batch_size or args.batch_size} rows"
    )


def said(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def cut(text: str) -> str:
    text = printable(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"
