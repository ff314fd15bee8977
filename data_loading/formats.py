"""Formats: recognising them by the names of a row's fields, and converting rows to records.

A format is recognised from the first good row of a file; every other row of that file must then
have the same, so that a forgotten field is an error and not a row of another kind.
"""

from collections.abc import Callable
from typing import Any

from data_loading.fields import (
    ANSWER_FIELDS,
    CONVERSATION_FIELDS,
    PROMPT_FIELDS,
    Prompt,
    extras_of,
    first_of,
    given,
    label_of,
    may_answer,
    may_be_label,
    need,
    read_prompt,
    response_of,
    reward_of,
    said_again,
    with_surroundings,
)
from data_loading.messages import BadRow, Message, read_messages, text_of
from data_loading.preferences import preference, ranked
from data_loading.records import Record, Text
from data_loading.values import shorten


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
    asks = [name for name in ("question", "query", "input") if name in has]
    answers = "response" in has or ("answer" in has and asks != ["input"]) or "output" in has
    if asks and answers and "prompt" not in has:
        return "question_answer"
    if "question" in has and "response" in has:
        return "question_answer"
    prompts = [name for name in (*PROMPT_FIELDS, "input") if name in has]
    if "text" in has and prompts and prompts[0] not in ("query", "input"):
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
    if record.kind in ("conversation", "prompt_completion") and may_be_label(fields.get("label")):
        record.label = label_of(fields["label"])
    if record.kind != "text":
        record.extras = extras_of(fields)
        record.prompt_fields += record.extras
    return record


def _text(fields: dict[str, Any], where: str) -> Record:
    text = text_of(need(fields, "text"), "text")
    return Record("text", where, fields, text=text, answer_fields=["text"])


def _prompt(fields: dict[str, Any], where: str) -> Record:
    prompt = _needed(fields, (*PROMPT_FIELDS, "input"))
    return Record("prompt", where, fields, prompt=prompt.text, prompt_fields=prompt.fields)


def _needed(fields: dict[str, Any], names: tuple[str, ...]) -> Prompt:
    """The prompt of a row that must have one of these fields, not empty."""
    name, value = first_of(fields, names)
    if not given(fields, name):
        text_of(value, name)  # says what is wrong with it
    return read_prompt(fields)


def _prompt_completion(fields: dict[str, Any], where: str) -> Record:
    need(fields, "prompt")
    prompt = _needed(fields, ("prompt",))
    name, value = first_of(fields, ANSWER_FIELDS)
    completion: Text = text_of(value, name) if isinstance(value, str) else response_of(value, name)
    return _answered(fields, where, prompt, completion, name)


def _answered(
    fields: dict[str, Any], where: str, prompt: Prompt, completion: Text, name: str
) -> Record:
    """A record of a prompt and one answer to it, both as text or both as messages."""
    asked = prompt.text
    if isinstance(completion, list) and completion[0]["role"] != "assistant":
        raise BadRow(f"{name} must begin with an assistant message")
    if isinstance(asked, str) and isinstance(completion, list):
        asked = [{"role": "user", "content": asked}]
    elif isinstance(asked, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion.strip()}]
    return Record(
        "prompt_completion",
        where,
        fields,
        prompt=asked,
        completion=completion,
        prompt_fields=prompt.fields,
        answer_fields=[name, *said_again(fields, name, ANSWER_FIELDS)],
    )


def _unpaired(fields: dict[str, Any], where: str) -> Record:
    record = _prompt_completion(fields, where)
    record.kind, record.label = "unpaired", label_of(need(fields, "label"))
    record.answer_fields.append("label")
    return record


def _instruction(fields: dict[str, Any], where: str) -> Record:
    text_of(need(fields, "instruction"), "instruction")
    return _single_turn(fields, where, "instruction", ("response", "output"))


def _question_answer(fields: dict[str, Any], where: str) -> Record:
    name, value = first_of(fields, ("question", "query", "input"))
    text_of(value, name)
    return _single_turn(fields, where, name, ("response", "answer", "output"))


def _single_turn(fields: dict[str, Any], where: str, asks: str, answers: tuple[str, ...]) -> Record:
    """One user turn and its answer; the field `asks` is the prompt, whatever others there are."""
    others = {name: fields[name] for name in fields if name not in PROMPT_FIELDS}
    prompt = read_prompt({asks: fields[asks], **others})
    name, value = first_of(fields, answers)
    completion = [{"role": "assistant", "content": text_of(value, name)}]
    return _answered(fields, where, prompt, completion, name)


def _conversation(fields: dict[str, Any], where: str) -> Record:
    name, value = first_of(fields, CONVERSATION_FIELDS)
    messages = read_messages(value, name)
    prompt = with_surroundings(Prompt(messages, [name]), fields)
    answers = [name for name in ANSWER_FIELDS if may_answer(fields.get(name))]
    if messages[-1]["role"] != "assistant" and answers:
        completion = response_of(fields[answers[0]], answers[0])
        return _answered(fields, where, prompt, completion, answers[0])
    used = [*prompt.fields, *said_again(fields, name, CONVERSATION_FIELDS)]
    told = (*PROMPT_FIELDS, *ANSWER_FIELDS)
    used += [n for n in told if _said(fields.get(n), prompt.text)]
    return Record("conversation", where, fields, messages=prompt.text, prompt_fields=used)


def _said(value: Any, messages: list[Message]) -> bool:
    """Whether a field holds what a turn says anyway."""
    return isinstance(value, str) and any(value.strip() == m["content"].strip() for m in messages)


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
# What becomes of the rows of a format, where it is not its own name.
KINDS = {
    "instruction": "prompt_completion",
    "question_answer": "prompt_completion",
    "ranked": "preference",
}
ALIASES = {
    "alpaca": "instruction",
    "dolly": "instruction",
    "messages": "conversation",
    "sharegpt": "conversation",
    "hh_rlhf": "preference",
}
KNOWN_FORMATS = sorted([*FORMATS, *ALIASES])
