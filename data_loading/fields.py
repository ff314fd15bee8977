"""Single fields of a row, checked: texts, prompts, responses, numbers, labels."""

import math
from typing import Any

from data_loading.messages import BadRow, is_dialogue, read_dialogue, read_messages, text_of
from data_loading.records import Text
from data_loading.values import shorten

PROMPT_FIELDS = ("prompt", "question", "instruction")


def given(fields: dict[str, Any], name: str) -> bool:
    """Whether an optional field is there and filled in (a CSV has an empty cell instead)."""
    value = fields.get(name)
    return value is not None and not (isinstance(value, str) and not value.strip())


def need(fields: dict[str, Any], name: str) -> Any:
    """The field, or BadRow with the names of those that are there."""
    if name not in fields:
        names = shorten(", ".join(map(str, fields)), 120) if fields else "none"
        raise BadRow(f"the field {name} is missing; the row has {names}")
    return fields[name]


def first_of(fields: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of several fields that is there; one that is filled in goes first."""
    for name in names:
        if given(fields, name):
            return name, fields[name]
    name = next((name for name in names if name in fields), names[0])
    return name, need(fields, name)


def prompt_of(value: Any, name: str, system: str = "") -> Text:
    """A prompt: text, messages, or a dialogue as messages."""
    if is_dialogue(value):
        return read_dialogue(value, name)
    if isinstance(value, (list, tuple)) or (isinstance(value, str) and value[:2] == "[{"):
        try:
            return read_messages(value, name, system)
        except BadRow:
            if not isinstance(value, str):
                raise
    text = text_of(value, name)
    if system:
        return [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return text


def system_of(fields: dict[str, Any]) -> str:
    """The system prompt that some formats keep in a field of its own; "" where there is none."""
    for name in ("system_prompt", "system"):
        if given(fields, name):
            return text_of(fields[name], name)
    return ""


def reward_of(fields: dict[str, Any]) -> float | None:
    """The number in `reward` or `meta_eval_score` (0 to 5); None where there is none."""
    if given(fields, "reward"):
        return number_of(fields["reward"], "reward")
    if given(fields, "meta_eval_score"):
        score = number_of(fields["meta_eval_score"], "meta_eval_score")
        if not 0 <= score <= 5:
            raise BadRow(f"meta_eval_score must lie between 0 and 5, found {score:g}")
        return score
    return None


def number_of(value: Any, name: str) -> float:
    """A finite number, also written as a string."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        if isinstance(value, str) and "_" in value:  # Python would read 1_0 as 10
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise BadRow(f"{name} must be a number, found {shorten(value)}") from error
    if not math.isfinite(number):
        raise BadRow(f"{name} must be a finite number, found {shorten(value)}")
    return number


def label_of(value: Any) -> bool:
    """True or false, also as 1 or 0 and as a string."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        return value.strip().lower() in ("true", "1")
    if isinstance(value, bool) or (isinstance(value, (int, float)) and value in (0, 1)):
        return bool(value)
    raise BadRow(
        f"label must be true or false, found {shorten(value)}; or give --format prompt_completion"
    )


def response_of(value: Any, name: str) -> Text:
    """A response: text, messages, or a whole dialogue as messages."""
    if is_dialogue(value):
        return read_dialogue(value, name)
    if isinstance(value, (list, tuple)) or (isinstance(value, str) and value[:2] == "[{"):
        try:
            return read_messages(value, name)
        except BadRow:
            if not isinstance(value, str):  # a string may just look like a list
                raise
    if isinstance(value, dict):
        return read_messages([value], name)
    return text_of(value, name)
