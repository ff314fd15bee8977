"""Rows that say which of several responses is better: chosen and rejected, or a ranked list."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from data_loading.fields import (
    CONVERSATION_FIELDS,
    PROMPT_FIELDS,
    Prompt,
    given,
    need,
    number_of,
    read_prompt,
    response_of,
    with_surroundings,
)
from data_loading.messages import BadRow, Message, list_of, read_messages
from data_loading.records import Record, Text
from data_loading.rows import PreferenceRow
from errors import UserError

# A row of label.py that prefers nothing: its responses, and one of these fields.
ASIDE = {"tie": "a tie, in which nothing is preferred", "skipped": "skipped by the labeller"}


def set_aside(fields: dict[str, Any]) -> str | None:
    """Why a labelled row is no preference, or None. Such rows are kept in a file and left out."""
    if given(fields, "chosen") or not given(fields, "responses"):
        return None
    return next((why for name, why in ASIDE.items() if is_true(fields.get(name))), None)


def is_true(value: Any) -> bool:
    """Also as a string, which is all that a CSV file has."""
    return value is True or str(value).lower() == "true"


def preference(fields: dict[str, Any], where: str) -> Record:
    """A row with chosen and rejected; rejected may be a list of answers."""
    chosen, rejected = need(fields, "chosen"), need(fields, "rejected")
    losers = rejected if _is_list_of_responses(rejected) else [rejected]
    names = ["chosen", *(f"rejected[{i}]" for i in range(len(losers)))]
    if len(losers) == 1:
        names[1] = "rejected"
    made = _record(fields, where, [chosen, *losers], names, [0] + [1] * len(losers))
    made.answer_fields += ["chosen", "rejected"]
    return made


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
    made = _record(fields, where, responses, names, ranks)
    made.answer_fields += ["responses", "scores"]
    return made


def put_soft_labels(records: Iterable[Record], rows: Sequence[PreferenceRow]) -> None:
    """Fill in the `probability` of tokenised rows from their records, which may be more."""
    of_row = {record.where: record for record in records}
    for row in rows:
        row.probability = soft_label(of_row[row.where])


def soft_label(record: Record) -> float:
    """The probability that the chosen answer of a pair is the better one.

    ``{"judge": {"p": 0.8}}``, as judge.py writes it, or a `margin` of log-odds. Raises UserError
    for a row without either, and for a list of more than two answers.
    """
    if len(record.responses) != 2:
        raise UserError(
            f"{record.where}: --soft-labels is for pairs, and the row has "
            f"{len(record.responses)} answers"
        )
    judge = record.fields.get("judge")
    p = judge.get("p") if isinstance(judge, dict) else None
    if p is None and record.margin is not None:
        return 1 / (1 + math.exp(-record.margin)) if record.margin > -700 else 0.0
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise UserError(
            f"{record.where}: --soft-labels needs the probability that the chosen answer is the "
            "better one: a number from 0 to 1 in judge.p, or a margin of log-odds"
        )
    return float(p)


def _record(
    fields: dict[str, Any], where: str, values: list[Any], names: list[str], ranks: list[int]
) -> Record:
    """A preference record, its responses best first, from strings, messages or dialogues."""
    responses = [response_of(v, n) for v, n in zip(values, names, strict=True)]
    whole = [isinstance(r, list) and r[0]["role"] != "assistant" for r in responses]
    if all(whole):
        read, responses = _of_dialogues(fields, responses, names)
    elif any(whole):
        raise BadRow("some responses are whole dialogues and others are not")
    else:
        read = read_prompt(fields)
    prompt = read.text
    if isinstance(prompt, list) or any(isinstance(r, list) for r in responses):
        if not prompt:
            raise BadRow("responses are messages but there is no prompt")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if prompt[-1]["role"] == "assistant":
            raise BadRow(f"the prompt ({', '.join(read.fields)}) must end with a user turn")
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
        prompt_fields=read.fields,
        answer_fields=["margin", "judge"],
    )


def _of_dialogues(
    fields: dict[str, Any], dialogues: list[list[Message]], names: list[str]
) -> tuple[Prompt, list[Text]]:
    """The prompt that whole dialogues share, with what else the row says of it, and their ends.

    A prompt in a field of its own counts as read where the dialogues have it already.
    """
    shared, rests = _split_dialogues(dialogues, names)
    read = with_surroundings(Prompt(shared, []), fields)
    for name in PROMPT_FIELDS:
        if given(fields, name) and _holds(shared, fields[name]):
            read.fields.append(name)
    for name in CONVERSATION_FIELDS:
        if given(fields, name):
            turns = read_messages(fields[name], name)
            if any(dialogue[: len(turns)] == turns for dialogue in dialogues):
                read.fields.append(name)
    return read, rests


def _holds(turns: list[Message], prompt: Any) -> bool:
    """Whether a prompt stands in turns that are there anyway."""
    if not isinstance(prompt, str):
        return False
    said = "".join("".join(turn["content"].split()) for turn in turns)
    asked = prompt
    for name in ("Human:", "Assistant:"):  # as in hh-rlhf
        asked = asked.replace(f"\n\n{name}", "")
    return "".join(asked.split()) in said


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
