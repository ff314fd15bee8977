"""Conversations in the shapes that tools write them, as one shape: [{"role", "content"}, ...]."""

import re
from typing import Any

from data_loading.json_files import decode_json
from data_loading.values import shorten

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class BadRow(Exception):
    """What is wrong with one row; the reader adds the file and the line."""


def text_of(value: Any, name: str) -> str:
    """`value` if it is a string with something in it, else BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{name} must be a string, found {shorten(value)}")
    if not value.strip():
        raise BadRow(f"{name} is empty; remove the row or fill it in")
    return value


def list_of(value: Any, name: str) -> list[Any]:
    """`value` as a list; a string that holds a JSON list (as in CSV cells) is decoded."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = decode_json(value)
        except ValueError as error:
            raise BadRow(f"{name} is not a valid JSON list: {error}") from error
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"{name} must be a list, found {shorten(value)}")
    if not value:
        raise BadRow(f"{name} is an empty list")
    return list(value)


def read_messages(value: Any, name: str, system: str = "") -> list[Message]:
    """Messages of OpenAI's shape (role, content) or ShareGPT's (from, value).

    An empty system message is left out; keys that chat templates know (tool_calls, name) stay.
    """
    messages = [read_message(item, f"{name}[{i}]") for i, item in enumerate(list_of(value, name))]
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    if not any(m["role"] != "system" for m in messages):
        raise BadRow(f"{name} holds no user or assistant message")
    if any(m["role"] == "system" for m in messages[1:]):
        raise BadRow(f"{name} has a system message that is not the first")
    return messages


def read_message(item: Any, name: str) -> Message:
    """One message with a known role and a text as content."""
    if not isinstance(item, dict):
        raise BadRow(f"{name} must be an object with role and content, found {shorten(item)}")
    named = item.get("role", item.get("from"))
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        known = "system, user (human), assistant (gpt), tool"
        raise BadRow(f"{name}: role {shorten(named)} is none of {known}")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        content = _joined_parts(content, name)
    extra = {k: v for k, v in item.items() if k in ("tool_calls", "tool_call_id", "name") and v}
    if content is None and "tool_calls" in extra:
        content = ""
    elif role == "system":
        if not isinstance(content, str):
            raise BadRow(f"{name}: content must be a string, found {shorten(content)}")
    else:
        content = text_of(content, f"{name}: content")
    return {"role": role, "content": content, **extra}


def _joined_parts(parts: list[Any], name: str) -> str:
    for part in parts:
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            raise BadRow(f"{name}: only text parts can be used, found {shorten(part)}")
    return "".join(part["text"] for part in parts)


# hh-rlhf dialogues --------------------------------------------------------------------------

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def is_dialogue(text: Any) -> bool:
    """Whether a string is a dialogue as in hh-rlhf: `Human: ...` and later `Assistant:`."""
    if not isinstance(text, str):
        return False
    return bool(re.match(r"\s*Human:", text)) and "\n\nAssistant:" in text


def read_dialogue(text: str, name: str) -> list[Message]:
    """Messages of a dialogue; an empty last assistant turn (the place to answer) is left out."""
    parts = _TURN.split(text)[1:]  # [name, words, name, words, ...]
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    if turns and turns[-1][0] == "Assistant" and not turns[-1][1].strip():
        turns.pop()
    role = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": role[who], "content": text_of(words, f"{name}: turn {i} of the dialogue").strip()}
        for i, (who, words) in enumerate(turns, 1)
    ]
