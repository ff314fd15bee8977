"""Formats: recognising them by the names of a row's fields, and converting rows to records.

A format is recognised from the first good row of a file; every other row of that file must then
have the same, so that a forgotten field is an error and not a row of another kind.
"""

from collections.abc import Callable
from typing import Any

from data_loading.fields import (
    PROMPT_FIELDS,
    first_of,
    given,
    label_of,
    need,
    prompt_of,
    response_of,
    reward_of,
    system_of,
)
from data_loading.messages import BadRow, read_messages, text_of
from data_loading.preferences import preference, ranked
from data_loading.records import Record, Text
from data_loading.values import shorten

CONVERSATION_FIELDS = ("messages", "conversation", "conversations")


def recognise(fields: dict[str, Any]) -> str:
    """The format of a row from the names of its fields; BadRow where none or two would do."""
    has = fields.keys()
    if "chosen" in has or "rejected" in has:
        return "preference"
    if "responses" in has:
        return "ranked"
    if any(name in has for name in CONVERSATION_FIELDS):
        return "conversation"
    if "prompt" in has and ("completion" in has or "response" in has):
        return "unpaired" if "label" in has else "prompt_completion"
    if "instruction" in has and ("response" in has or "output" in has):
        return "instruction"
    if "question" in has and ("response" in has or ("answer" in has and "prompt" not in has)):
        return "question_answer"
    prompts = [name for name in PROMPT_FIELDS if name in has]
    if "text" in has and prompts:
        raise BadRow(
            f"has both text and {prompts[0]}; say which is meant with --format text or prompt"
        )
    if "text" in has:
        return "text"
    if prompts:
        return "prompt"
    names = shorten(", ".join(map(str, fields)), 120) if fields else "none"
    known = "text; prompt; prompt, completion; instruction, response; question, response; "
    raise BadRow(
        f"no known format in the fields {names}; use {known}messages; chosen, rejected; "
        "or name one with --format"
    )


def to_record(fields: dict[str, Any], format: str, where: str) -> Record:
    """Converts one row; BadRow where a field is missing, empty or of the wrong type."""
    record = FORMATS[format](fields, where)
    record.reward = reward_of(fields)
    return record


def _text(fields: dict[str, Any], where: str) -> Record:
    return Record("text", where, fields, text=text_of(need(fields, "text"), "text"))


def _prompt(fields: dict[str, Any], where: str) -> Record:
    name, value = first_of(fields, PROMPT_FIELDS)
    return Record("prompt", where, fields, prompt=prompt_of(value, name, system_of(fields)))


def _prompt_completion(fields: dict[str, Any], where: str) -> Record:
    prompt = prompt_of(need(fields, "prompt"), "prompt", system_of(fields))
    name, value = first_of(fields, ("completion", "response"))
    completion: Text = text_of(value, name) if isinstance(value, str) else response_of(value, name)
    if isinstance(completion, list) and completion[0]["role"] != "assistant":
        raise BadRow(f"{name} must begin with an assistant message")
    if isinstance(prompt, str) and isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion.strip()}]
    return Record("prompt_completion", where, fields, prompt=prompt, completion=completion)


def _unpaired(fields: dict[str, Any], where: str) -> Record:
    record = _prompt_completion(fields, where)
    record.kind, record.label = "unpaired", label_of(need(fields, "label"))
    return record


def _instruction(fields: dict[str, Any], where: str) -> Record:
    asked = text_of(need(fields, "instruction"), "instruction")
    for name in ("context", "input"):
        if given(fields, name):
            asked = f"{asked}\n\n{text_of(fields[name], name)}"
    return _single_turn(fields, where, asked, ("response", "output"))


def _question_answer(fields: dict[str, Any], where: str) -> Record:
    asked = text_of(need(fields, "question"), "question")
    return _single_turn(fields, where, asked, ("response", "answer"))


def _single_turn(
    fields: dict[str, Any], where: str, asked: str, answers: tuple[str, str]
) -> Record:
    name, value = first_of(fields, answers)
    completion = [{"role": "assistant", "content": text_of(value, name)}]
    prompt = [{"role": "user", "content": asked}]
    if system := system_of(fields):
        prompt.insert(0, {"role": "system", "content": system})
    return Record("prompt_completion", where, fields, prompt=prompt, completion=completion)


def _conversation(fields: dict[str, Any], where: str) -> Record:
    name, value = first_of(fields, CONVERSATION_FIELDS)
    messages = read_messages(value, name, system_of(fields))
    return Record("conversation", where, fields, messages=messages)


FORMATS: dict[str, Callable[[dict[str, Any], str], Record]] = {
    "text": _text,
    "prompt": _prompt,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "question_answer": _question_answer,
    "conversation": _conversation,
    "preference": preference,
    "ranked": ranked,
    "unpaired": _unpaired,
}
ALIASES = {
    "alpaca": "instruction",
    "dolly": "instruction",
    "messages": "conversation",
    "sharegpt": "conversation",
    "hh_rlhf": "preference",
}
KNOWN_FORMATS = sorted([*FORMATS, *ALIASES])
