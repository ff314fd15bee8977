"""What is about to be trained on, as text for the terminal."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np

from data_loading.records import Records
from data_loading.rows import (
    PreferenceRow,
    PromptRow,
    ScalarRow,
    TextRow,
    Tokenised,
    UnpairedRow,
)

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
SHOWN_PLACES = 3  # places named for each reason why rows were refused


def use_colour(stream: TextIO) -> bool:
    """Colour for a person at a terminal, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def data_report(name: str, records: Records, tokenised: Tokenised, *, columns: bool = False) -> str:
    """Rows by kind, token lengths, rows cut or refused and why, and what was left out of them.

    `columns`: fields that no text is made of still go to reward functions.
    """
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in records.kinds.most_common())
    refused = [*records.refused, *tokenised.refused]
    lengths = [length for sequences in tokenised.sequences for length in sequences]
    what = "a row" if len(lengths) == len(tokenised) else "a prompt with a response"
    lines = [
        f"{name}: {len(tokenised):,} rows ({kinds} read; {len(refused):,} refused, "
        f"{tokenised.cut:,} cut)",
        *(f"  {note}" for note in records.notes),
        *(f"  {line}" for line in histogram(lengths, what).splitlines()),
        *(f"  {line}" for line in refusals(refused)),
        *(f"  {line}" for line in notices(tokenised.notes)),
    ]
    if tokenised.unused:
        prompts = columns or isinstance(tokenised.rows[0], PromptRow)
        what = "fields for reward functions alone" if prompts else "fields that nothing used"
        lines.append(f"  {what}: {', '.join(map(shorten_name, tokenised.unused))}")
    return "\n".join(lines)


def refusals(refused: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each reason: how many rows, why, and where the first of them stand."""
    lines = []
    for why, count in Counter(why for _, why in refused).most_common():
        places = [where for where, reason in refused if reason == why][:SHOWN_PLACES]
        more = ", ..." if count > len(places) else ""
        lines.append(f"refused {count:,}: {why} ({', '.join(places)}{more})")
    return lines


def notices(notes: Sequence[tuple[str, str, str]]) -> list[str]:
    """A line for each thing that a template did to rows: how many, where, and one example."""
    lines = []
    for what in dict.fromkeys(what for _, what, _ in notes):
        found = [(where, example) for where, said, example in notes if said == what]
        rows = list(dict.fromkeys(where for where, _ in found))
        more = ", ..." if len(rows) > SHOWN_PLACES else ""
        places = ", ".join(rows[:SHOWN_PLACES])
        count = f"{len(rows):,} row{'s' * (len(rows) > 1)}"
        lines.append(f"note: {what}: {found[0][1]} ({count}: {places}{more})")
    return lines


def shorten_name(name: object) -> str:
    """A field's name as it is, short."""
    return str(name) if len(str(name)) <= 40 else f"{str(name)[:37]}..."


def histogram(lengths: Sequence[int], what: str = "a row", bins: int = 8, width: int = 40) -> str:
    """Token lengths as bars of text, a line a bin, with the count at its end."""
    values = np.asarray(lengths)
    low, high = int(values.min()), int(values.max())
    step = max(1, -(-(high - low + 1) // bins))
    starts = range(low, high + 1, step)
    counts = [int(((values >= start) & (values < start + step)).sum()) for start in starts]
    digits = len(str(high))
    lines = [
        f"tokens {what}: {low} to {high}, mean {values.mean():.1f}, median "
        f"{np.median(values):g}, {int(values.sum()):,} in all"
    ]
    for start, count in zip(starts, counts, strict=True):
        bar = "#" * -(-count * width // max(counts))
        end = min(start + step - 1, high)
        lines.append(f"{start:>{digits}} to {end:>{digits}} {bar} {count:,}".replace("  ", " "))
    return "\n".join(lines)


def preview(
    row: TextRow | ScalarRow | PreferenceRow | UnpairedRow | PromptRow,
    tokenizer: Any,
    colour: bool,
) -> str:
    """One row decoded: trained tokens in green, the others dim; without colour, in [[ ]]."""
    if isinstance(row, PreferenceRow):
        head = f"{row.where}: preference, best first, answers {key_of(colour)}"
        sides = zip(row.ranks, row.responses, row.masks, strict=True)
        shown = [f"rank {r}: {marked(t, mask, tokenizer, colour)}" for r, t, mask in sides]
        return "\n".join([head, *shown])
    if isinstance(row, UnpairedRow):
        head = f"{row.where}: {'' if row.label else 'not '}wanted, answer {key_of(colour)}"
        return f"{head}\n{marked(row.tokens, row.mask, tokenizer, colour)}"
    if isinstance(row, ScalarRow):
        return f"{row.where}: reward {row.reward:g}\n{tokenizer.decode(row.tokens)}"
    if isinstance(row, PromptRow):
        return f"{row.where}: prompt of {len(row.tokens)} tokens\n{tokenizer.decode(row.tokens)}"
    head = f"{row.where}: {len(row.tokens)} tokens, {sum(row.mask)} trained ({key_of(colour)})"
    return head + "\n" + marked(row.tokens, row.mask, tokenizer, colour)


def key_of(colour: bool) -> str:
    """What marks the tokens of a mask in `marked`."""
    return "green" if colour else "in [[ ]]"


def marked(tokens: Sequence[int], mask: Sequence[int], tokenizer: Any, colour: bool) -> str:
    """Decoded tokens, those of the mask in green, the others dim; without colour, in [[ ]]."""
    parts = []
    for start, end in _runs(mask):
        text = tokenizer.decode(tokens[start:end])
        if colour:
            parts.append(f"{GREEN if mask[start] else DIM}{text}{RESET}")
        else:
            parts.append(f"[[{text}]]" if mask[start] else text)
    return "".join(parts)


def _runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of each stretch of equal values."""
    cuts = [0, *(i for i in range(1, len(mask)) if mask[i] != mask[i - 1]), len(mask)]
    return list(zip(cuts[:-1], cuts[1:], strict=True))
