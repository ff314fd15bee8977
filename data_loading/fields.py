"""Fields of a row, checked: the prompt out of all that belong to it, responses, numbers, labels."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_loading.files import decode_json
from data_loading.messages import (
    BadRow,
    Message,
    is_dialogue,
    list_of,
    read_dialogue,
    read_messages,
    text_of,
    with_system,
)
from data_loading.records import Text
from data_loading.values import agreed, given, shorten

PROMPT_FIELDS = ("prompt", "question", "instruction", "query")  # the first that is filled in
CONVERSATION_FIELDS = ("messages", "conversation", "conversations")
ADDED_FIELDS = ("context", "input")  # follow the prompt; the prompt itself where there is no other
ANSWER_FIELDS = ("completion", "response", "answer", "output")  # beside messages that ask
SYSTEM_FIELDS = ("system_prompt", "system")
TEMPLATE_FIELDS = ("tools", "documents", "chat_template_kwargs")  # for the chat template
QUOTED_WORDS = 5  # a context of so many words is not in a prompt by chance
REWARDS = ("reward", "meta_eval_score")


@dataclass
class Prompt:
    """The prompt of a row, text or messages, "" where there is none; `fields` it was made of."""

    text: Text = ""
    fields: list[str] = field(default_factory=list)


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


def read_prompt(fields: dict[str, Any]) -> Prompt:
    """The prompt of a row: every field that is part of one, in whatever format the row is."""
    made = Prompt()
    for name in (*PROMPT_FIELDS, *CONVERSATION_FIELDS, *ADDED_FIELDS):
        if not given(fields, name):
            continue
        made.fields.append(name)
        if name in CONVERSATION_FIELDS:
            made.text = read_messages(fields[name], name)
        elif name in ADDED_FIELDS:
            made.text = added_text(fields, name)
        else:
            made.text = prompt_of(fields[name], name)
        made.fields += said_again(fields, name, (*PROMPT_FIELDS, *CONVERSATION_FIELDS))
        break
    return with_surroundings(made, fields)


def said_again(fields: dict[str, Any], name: str, names: Iterable[str]) -> list[str]:
    """Which other fields of the same meaning hold what the field `name` holds.

    One that holds something else is left for the report, which names it as used by nothing.
    """
    return [n for n in names if n != name and given(fields, n) and fields[n] == fields[name]]


def with_surroundings(prompt: Prompt, fields: dict[str, Any]) -> Prompt:
    """A prompt and what else of it stands in the row: context and input, history, system.

    Context and input follow the first user turn; where a turn before the answer holds them already,
    they do not stand there twice. Earlier turns and the system prompt make messages of a text.
    """
    used = [*prompt.fields]
    text = prompt.text
    for name in ADDED_FIELDS:
        if name not in used and (added := added_text(fields, name)):
            used.append(name)
            text = _with_text(text, added, name) if text else added
    history = _history(fields)
    if history:
        used.append("history")
    if isinstance(history, str):
        text = _with_text(text, history, "history") if text else history
        history = []
    system = system_of(fields)
    if system:
        used += [name for name in SYSTEM_FIELDS if given(fields, name)]
    if text and (history or system):
        turns = text if isinstance(text, list) else [{"role": "user", "content": text}]
        if history:
            turns = _with_history(turns, history)
        text = with_system(turns, system, used[0])
    return Prompt(text, used)


def added_text(fields: dict[str, Any], name: str) -> str:
    """A context or input as text, several passages with a blank line between; "" for none."""
    value = fields.get(name)
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        value = "\n\n".join(value)
    if given(fields, name) and not isinstance(value, str):
        raise BadRow(
            f"{name} must be a string or a list of strings, found {shorten(value)}; "
            "rename the field if it is no part of the prompt"
        )
    return value if given(fields, name) else ""


def _with_text(text: Text, added: str, name: str) -> Text:
    """A prompt with a text of another field: behind what it asks, or before that for a history."""
    if isinstance(text, str):
        if _stands_in(added, text):
            return text
        return f"{added}\n\n{text}" if name == "history" else f"{text}\n\n{added}"
    turns = [*text]
    if any(_stands_in(added, turn["content"]) for turn in turns if turn["role"] != "assistant"):
        return turns
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None:
        raise BadRow(f"{name} belongs to a user turn, and the row has none")
    turns[first] = {**turns[first], "content": _with_text(turns[first]["content"], added, name)}
    return turns


def _stands_in(added: str, text: str) -> bool:
    """Whether a text holds another: as lines of its own, with or without a label before them.

    A few words that a question only mentions ("noun or verb?", verb) are not its input.
    """
    words = re.escape(added.strip())
    if len(added.split()) >= QUOTED_WORDS:
        return re.search(rf"(?<!\w){words}(?!\w)", text) is not None
    return re.search(rf"(?:\A|\n|:)[ \t]*{words}[ \t]*(?:\n|\Z)", text) is not None


def _with_history(turns: list[Message], history: list[Message]) -> list[Message]:
    """Earlier turns before the row's own, unless those begin with them; one system message."""
    said, own = ([turn for turn in part if turn["role"] == "system"] for part in (history, turns))
    if said and own and said != own:
        raise BadRow("history begins with another system message than the prompt has")
    earlier, later = ([t for t in part if t["role"] != "system"] for part in (history, turns))
    if later[: len(earlier)] == earlier:
        earlier = []
    return [*(own or said), *earlier, *later]


def _history(fields: dict[str, Any]) -> list[Message] | str:
    """Earlier turns: messages, pairs of a prompt and its answer, or a text; [] without any."""
    if not given(fields, "history"):
        return []
    value = fields["history"]
    if is_dialogue(value):
        return read_dialogue(value, "history")
    if isinstance(value, str) and value.lstrip()[:1] != "[":
        return value
    turns = list_of(value, "history")
    if all(isinstance(turn, dict) for turn in turns):
        return read_messages(turns, "history")
    messages = []
    for i, pair in enumerate(turns):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRow(f"history[{i}] must be a prompt and its answer, found {shorten(pair)}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": text_of(text, f"history[{i}]")})
    return messages


def extras_of(fields: dict[str, Any]) -> dict[str, Any]:
    """What the chat template is given beside messages; lists and objects may be written as JSON."""
    found: dict[str, Any] = {}
    for name in TEMPLATE_FIELDS:
        if not given(fields, name):
            continue
        kind, expected = (dict, "an object") if name == "chat_template_kwargs" else (list, "a list")
        value = fields[name]
        if isinstance(value, str):
            try:
                value = decode_json(value)
            except ValueError as error:
                raise BadRow(f"{name} is not valid JSON: {error}") from error
        if isinstance(value, tuple):
            value = list(value)
        if not isinstance(value, kind):
            raise BadRow(f"{name} must be {expected}, found {shorten(fields[name])}")
        if kind is list and not all(isinstance(item, dict) for item in value):
            raise BadRow(f"{name} must be a list of objects, found {shorten(value)}")
        found[name] = value
    for name, value in found.get("chat_template_kwargs", {}).items():
        if found.get(name, value) != value:
            raise BadRow(f"{name} and chat_template_kwargs say different things; remove one")
    return found


def prompt_of(value: Any, name: str) -> Text:
    """A prompt: text, messages, or a dialogue as messages."""
    if is_dialogue(value):
        return read_dialogue(value, name)
    if isinstance(value, (list, tuple)) or (isinstance(value, str) and value[:2] == "[{"):
        try:
            return read_messages(value, name)
        except BadRow:
            if not isinstance(value, str):
                raise
    return text_of(value, name)


def system_of(fields: dict[str, Any]) -> str:
    """The system prompt that a row has in a field of its own; "" where there is none."""
    found = agreed(fields, SYSTEM_FIELDS, text_of)
    return found[1] if found else ""


def reward_of(fields: dict[str, Any]) -> float | None:
    """The number in `reward` or `meta_eval_score` (0 to 5); None where there is none."""

    def read(value: Any, name: str) -> float:
        number = number_of(value, name)
        if name == "meta_eval_score" and not 0 <= number <= 5:
            raise BadRow(f"meta_eval_score must lie between 0 and 5, found {number:g}")
        return number

    found = agreed(fields, REWARDS, read)
    return found[1] if found else None


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


def may_answer(value: Any) -> bool:
    """Whether a value is a text or messages, and not a number or references to compare with."""
    if isinstance(value, str):
        return bool(value.strip())
    turns = value if isinstance(value, (list, tuple)) else [value]
    named = [isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns]
    return bool(named) and all(named)


def may_be_label(value: Any) -> bool:
    """Whether a value says true or false, also as 1 or 0 and as a string."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "false", "1", "0")
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def label_of(value: Any) -> bool:
    """True or false, also as 1 or 0 and as a string."""
    if may_be_label(value):
        return value.strip().lower() in ("true", "1") if isinstance(value, str) else bool(value)
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
