"""Rows that say which of several responses is better: chosen and rejected, or a ranked list."""

from typing import Any

from data_loading.fields import (
    PROMPT_FIELDS,
    given,
    need,
    number_of,
    prompt_of,
    response_of,
    system_of,
)
from data_loading.messages import BadRow, Message, list_of
from data_loading.records import Record, Text


def preference(fields: dict[str, Any], where: str) -> Record:
    """A row with chosen and rejected; rejected may be a list of answers."""
    chosen, rejected = need(fields, "chosen"), need(fields, "rejected")
    losers = rejected if _is_list_of_responses(rejected) else [rejected]
    names = ["chosen", *(f"rejected[{i}]" for i in range(len(losers)))]
    if len(losers) == 1:
        names[1] = "rejected"
    return _record(fields, where, [chosen, *losers], names, [0] + [1] * len(losers))


def ranked(fields: dict[str, Any], where: str) -> Record:
    """A row with responses, best first, or in any order with scores; equal scores are ties."""
    responses = list_of(need(fields, "responses"), "responses")
    if len(responses) < 2:
        raise BadRow("responses needs two or more, best first")
    ranks = list(range(len(responses)))
    if given(fields, "scores"):
        scores = [number_of(s, "scores") for s in list_of(fields["scores"], "scores")]
        if len(scores) != len(responses):
            raise BadRow(f"{len(responses)} responses but {len(scores)} scores")
        ranks = [sorted(set(scores), reverse=True).index(score) for score in scores]
        if len(set(ranks)) == 1:
            raise BadRow("all scores are equal; nothing is preferred")
    names = [f"responses[{i}]" for i in range(len(responses))]
    return _record(fields, where, responses, names, ranks)


def _record(
    fields: dict[str, Any], where: str, values: list[Any], names: list[str], ranks: list[int]
) -> Record:
    """A preference record, its responses best first, from strings, messages or dialogues."""
    prompt: Text = ""
    for name in PROMPT_FIELDS:
        if given(fields, name):
            prompt = prompt_of(fields[name], name, system_of(fields))
            break
    responses = [response_of(v, n) for v, n in zip(values, names, strict=True)]
    whole = [isinstance(r, list) and r[0]["role"] != "assistant" for r in responses]
    if all(whole):
        prompt, responses = _split_dialogues(responses, names)
    elif any(whole):
        raise BadRow("some responses are whole dialogues and others are not")
    elif isinstance(prompt, list) or any(isinstance(r, list) for r in responses):
        if not prompt:
            raise BadRow("responses are messages but there is no prompt")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        responses = [_as_messages(r) for r in responses]
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    margin = number_of(fields["margin"], "margin") if given(fields, "margin") else None
    return Record(
        "preference",
        where,
        fields,
        prompt=prompt,
        responses=[responses[i] for i in order],
        ranks=[ranks[i] for i in order],
        margin=margin,
    )


def _split_dialogues(dialogues: list[list[Message]], names: list[str]) -> tuple[Text, list[Text]]:
    """The messages that all dialogues begin with, and how each goes on (at least its last)."""
    for dialogue, name in zip(dialogues, names, strict=True):
        if dialogue[-1]["role"] != "assistant":
            raise BadRow(f"{name} must end with an assistant turn")
    shared = 0
    while all(shared < len(d) - 1 and d[shared] == dialogues[0][shared] for d in dialogues):
        shared += 1
    if shared == 0:
        raise BadRow("the dialogues have no first turn in common, so there is no shared prompt")
    return dialogues[0][:shared], [d[shared:] for d in dialogues]


def _as_messages(text: Text) -> list[Message]:
    return text if isinstance(text, list) else [{"role": "assistant", "content": text.strip()}]


def _is_list_of_responses(value: Any) -> bool:
    """A list of answers, and not the messages of one answer."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return not any(isinstance(v, dict) and ("role" in v or "from" in v) for v in value)
