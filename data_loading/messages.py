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

    A system message with neither text nor other keys (tools) is left out; `system`, from a field
    of its own, is put in front.
    """
    messages = [read_message(item, f"{name}[{i}]") for i, item in enumerate(list_of(value, name))]
    messages = [
        m
        for m in messages
        if m["role"] != "system"
        or m["content"].strip()
        or m.keys() - {"role", "content", *TRAIN_KEYS}
    ]
    if not any(m["role"] != "system" for m in messages):
        raise BadRow(f"{name} holds no user or assistant message")
    if any(m["role"] == "system" for m in messages[1:]):
        raise BadRow(f"{name} has a system message that is not the first")
    return with_system(messages, system, name)


def with_system(messages: list[Message], system: str, name: str) -> list[Message]:
    """Messages that begin with a system prompt; BadRow where they have another one."""
    if not system:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise BadRow(f"{name} begins with another system message than the row's field has")
    return messages


def read_message(item: Any, name: str) -> Message:
    """One message: a known role, a text as content, and every other key as it is.

    Keys without a value are left out; `content` may be empty, null or missing beside tool calls.
    """
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
    own = ("role", "from", "content", "value")
    extra = {k: v for k, v in item.items() if k not in own and v is not None}
    if calls := _read_calls(extra.pop("tool_calls", None), extra.pop("function_call", None), name):
        extra["tool_calls"] = calls
    if calls and (content is None or content == ""):
        content = ""
    elif role == "system":
        if not isinstance(content, str):
            raise BadRow(f"{name}: content must be a string, found {shorten(content)}")
    else:
        content = text_of(content, f"{name}: content")
    message = {"role": role, "content": content, **extra}
    is_trained(message, name)
    return message


def _read_calls(calls: Any, single: Any, name: str) -> list[Any]:
    """Tool calls as objects; arguments that are the text of a JSON object become that object.

    `single` is the one call of OpenAI's older function_call.
    """
    if single and not calls:
        calls = [{"type": "function", "function": single}]
    if isinstance(calls, str):
        calls = list_of(calls, f"{name}: tool_calls")
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise BadRow(f"{name}: tool_calls must be a list, found {shorten(calls)}")
    read = []
    for call in calls or ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{name}: a tool call needs a function with a name, found {shorten(call)}")
        if isinstance(function.get("arguments"), str):
            try:
                arguments = decode_json(function["arguments"])
            except ValueError:
                arguments = None
            if isinstance(arguments, dict):
                function = {**function, "arguments": arguments}
        read.append({**call, "function": function} if "function" in call else function)
    return read


TRAIN_KEYS = ("weight", "train", "training", "loss")


def is_trained(message: Message, name: str = "a message") -> bool:
    """Whether a message is to be trained: not with weight 0, or train or loss false."""
    for key in TRAIN_KEYS:
        if key in message:
            if message[key] not in (0, 1):  # False and True are equal to these
                raise BadRow(f"{name}: {key} must be 0 or 1, found {shorten(message[key])}")
            if not message[key]:
                return False
    return True


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
