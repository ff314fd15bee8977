"""The rows that a reward model is trained and tested on, ended as it will see texts later."""

from functools import partial
from typing import Any

from data_utils import (
    PreferenceRow,
    Records,
    ScalarRow,
    Tokenised,
    tokenise_preferences,
    tokenise_scalar,
)
from errors import UserError
from models.reading import Ending, Reading, trained_reading


def reading_of_rows(records: Records, tokenizer: Any, **options: Any) -> Reading:
    """How a reward model reads texts that is trained on these rows.

    `options`: prompt_template and token_format.
    """
    answers = [answer for row in records for answer in (row.completion, *row.responses) if answer]
    texts = [answer for answer in answers if isinstance(answer, str)]
    blanks = {text[: len(text) - len(text.lstrip())] for text in texts}
    return trained_reading(
        tokenizer,
        plain=set(records.kinds) == {"text"},
        turns=all(row.messages or isinstance(row.prompt, list) for row in records),
        joint=blanks.pop() if len(blanks) == 1 else "",
        **options,
    )


def tokenise_reward_rows(
    records: Records, tokenizer: Any, reading: Reading, **options: Any
) -> Tokenised:
    """Preference rows, or rows with a reward, as tokens that end as `reading` says.

    `options` are those that data_utils' ``tokenise_...`` functions share. A row that was cut has
    no ending. Raises UserError where no row is left.
    """
    pairs = set(records.kinds) == {"preference"}
    tokenise = tokenise_preferences if pairs else partial(tokenise_scalar, marks=True)
    done = tokenise(records, tokenizer, add_eos=reading.ending is None or None, **options)
    if reading.ending is None:
        return done
    ending, longest = Ending(tokenizer, reading), options["max_length"]
    may_cut = options.get("too_long", "refuse") == "cut"
    rows, done.rows = done.rows, []
    for row in rows:
        end_row(row, ending)
        if row_length(row) > longest and may_cut:
            cut_row(row, longest)
            done.cut += 1
        if row_length(row) > longest:
            done.refused.append((row.where, f"longer than {longest} tokens"))
        else:
            done.rows.append(row)
    if not done.rows:
        raise UserError(
            f"{rows[0].where}: no row is left; of {len(done.refused)} refused, the "
            f"first: {done.refused[0][1]}"
        )
    return done


def end_row(row: PreferenceRow | ScalarRow, ending: Ending) -> None:
    """Give every text of a row that has an ending the recorded one."""
    if isinstance(row, ScalarRow):
        row.tokens = ending.put(row.tokens, ending.ends(row.tokens))
        return
    for i, (tokens, mask) in enumerate(zip(row.responses, row.masks, strict=True)):
        if ending.ends(tokens):
            kept = len(ending.bare(tokens))
            row.responses[i] = ending.put(tokens)
            row.masks[i] = mask[:kept] + [1] * (len(row.responses[i]) - kept)


def row_length(row: PreferenceRow | ScalarRow) -> int:
    """Tokens of a row's longest text."""
    return max(map(len, row.responses if isinstance(row, PreferenceRow) else [row.tokens]))


def cut_row(row: PreferenceRow | ScalarRow, length: int) -> None:
    """Leave at most `length` tokens of every text."""
    if isinstance(row, ScalarRow):
        row.tokens = row.tokens[:length]
    else:
        row.responses = [tokens[:length] for tokens in row.responses]
        row.masks = [mask[:length] for mask in row.masks]
