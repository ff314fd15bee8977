"""Prompts as a person wrote them, a text or messages, and what rewards are told beside them."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_utils import PromptRow, Record

Prompt = str | list[dict[str, Any]]  # text, or the messages of a conversation

# What every reward may ask for beside the data's columns: tokens of prompt and response, whether
# the response ended by itself, and the prompt as the model was given it, template and all. Those of
# BY_NAME, where the response begins in its tokens and the row of data that it stands in, go to
# functions that name them alone.
GIVEN = ("token_ids", "ended", "prompt_text", "response_start")
BY_NAME = ("response_start", "answered_record")


def plain(text: Prompt) -> str:
    """A text as it is; of messages, their contents with a blank line between."""
    if isinstance(text, str):
        return text
    return "\n\n".join(turn["content"] for turn in text if isinstance(turn.get("content"), str))


def reward_columns(
    columns: Mapping[str, Sequence],
    *,
    token_ids: Sequence[Sequence[int]],
    ended: Sequence[bool],
    prompt_text: Sequence[str],
    response_start: Sequence[int | None] | None = None,
    answered_record: Sequence[Record | None] | None = None,
) -> dict[str, Sequence]:
    """The data's columns and those of GIVEN, which hide columns of the data of the same name.

    `response_start`: how many of a row's `token_ids` are its prompt; None where no token ends it.
    `answered_record`: the row whose answer a response is; None where it was sampled.
    """
    given = {"token_ids": token_ids, "ended": ended, "prompt_text": prompt_text}
    if response_start is not None:
        given["response_start"] = response_start
    if answered_record is not None:
        given["answered_record"] = answered_record
    return {**columns, **given}


def asked(row: PromptRow) -> dict[str, Any]:
    """The prompt for samples.jsonl: as it was written and, where that differs, as it was given."""
    given = {} if row.text == row.prompt else {"prompt_text": row.text}
    return {"prompt": row.prompt, **given}


def response_text(
    tokenizer: Any, query: Sequence[int], response: Sequence[int], *, special: bool = False
) -> str:
    """The text that `response` adds to `query`, so that prompt + response is the whole text.

    Some decoders drop the blank in front of a text, so the two are decoded together. `special`:
    with special tokens, which are left out else.
    """
    start = tokenizer.decode(list(query), skip_special_tokens=not special)
    whole = tokenizer.decode([*query, *response], skip_special_tokens=not special)
    if whole.startswith(start):
        return whole[len(start) :]
    return tokenizer.decode(list(response), skip_special_tokens=not special)
