"""Conversations in the shapes that tools write them, as one shape: [{"role", "content"}, ...]."""

import re
from collections.abc import Sequence
from typing import Any

from data_loading.files import decode_json
from data_loading.values import BadRow, agreed, shorten

Message = dict[str, Any]

ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
OWN_KEYS = (*ROLE_KEYS, *CONTENT_KEYS)

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

    def read_role(named: Any, key: str) -> str:
        role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
        if role is None:
            known = "system, user (human), assistant (gpt), tool"
            raise BadRow(f"{name}: {key} {shorten(named)} is none of {known}")
        return role

    _, role = agreed(item, ROLE_KEYS, read_role, name) or ("role", None)
    if role is None:
        read_role(item.get("role", item.get("from")), "role")  # says what is wrong
    contents = [item[key] for key in CONTENT_KEYS if item.get(key) is not None]
    _, content = agreed(item, CONTENT_KEYS, lambda value, _: value, name) or ("", None)
    content = contents[0] if content is None and contents else content
    extra = {k: v for k, v in item.items() if k not in OWN_KEYS and v is not None}
    if isinstance(content, (list, tuple)):
        content, thoughts = read_parts(content, name)
        for key, thought in thoughts.items():
            if extra.setdefault(key, thought) != thought:
                raise BadRow(f"{name}: {key} and its parts say different things; remove one")
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
    if single:
        alone = _read_calls([{"type": "function", "function": single}], None, name)
        if calls and [call.get("function", call) for call in _read_calls(calls, None, name)] != [
            call["function"] for call in alone
        ]:
            raise BadRow(f"{name}: tool_calls and function_call say different things; remove one")
        return alone if not calls else _read_calls(calls, None, name)
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

    def read(value: Any, key: str) -> bool:
        if value not in (0, 1):  # False and True are equal to these
            raise BadRow(f"{name}: {key} must be 0 or 1, found {shorten(value)}")
        return bool(value)

    found = agreed(message, TRAIN_KEYS, read, name)
    return found is None or found[1]


# Contents that are lists of parts --------------------------------------------------------------

TEXT_PARTS = (None, "text", "input_text", "output_text")
# Thoughts by the type of a part: the key of a message that holds them.
THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "reasoning_content"}
MEDIA = ("image", "image_url", "audio", "input_audio", "video", "video_url", "file", "document")


def read_parts(parts: Sequence[Any], name: str) -> tuple[str, dict[str, str]]:
    """The text of a content in parts, and its thoughts by the message's key for them.

    BadRow for a part of another type, such as an image.
    """
    text, thoughts = "", {}
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict):
            raise BadRow(f"{name}: a part must be an object with a text, found {shorten(part)}")
        if kind in THOUGHT_PARTS:
            known = [part[key] for key in (kind, "text") if isinstance(part.get(key), str)]
            if not known:
                raise BadRow(f"{name}: a part of type {kind} without text, {shorten(part)}")
            key = THOUGHT_PARTS[kind]
            thoughts[key] = thoughts.get(key, "") + known[0]
            continue
        media = next((key for key in MEDIA if part.get(key) is not None), None)
        if kind not in TEXT_PARTS or media is not None:
            what = shorten(kind if kind not in TEXT_PARTS else media)
            raise BadRow(f"{name}: a part of type {what}; only text and thinking can be used")
        if not isinstance(part.get("text"), str):
            raise BadRow(f"{name}: only parts with a text can be used, found {shorten(part)}")
        text += part["text"]
    return text, thoughts


# hh-rlhf dialogues --------------------------------------------------------------------------

SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# Who may speak in a dialogue, but not between Human and Assistant.
OTHER_SPEAKERS = (
    r"System|Developer|User|Bot|AI|GPT|ChatGPT|Prompter|Tool|Observation|(?:Human|Assistant) ?\d+"
)
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_DIALOGUE = re.compile(r"\s*(?:System:(.*?)\n\n)?(?=Human:)", re.DOTALL)
_OTHER_TURN = re.compile(rf"\n\n({OTHER_SPEAKERS}):")


def is_dialogue(text: Any) -> bool:
    """Whether a string is a dialogue as in hh-rlhf: `Human: ...` and later `Assistant:`.

    `System: ...` may stand before it.
    """
    if not isinstance(text, str):
        return False
    return bool(_DIALOGUE.match(text)) and "\n\nAssistant:" in text


def read_dialogue(text: str, name: str) -> list[Message]:
    """Messages of a dialogue; an empty last assistant turn (the place to answer) is left out.

    BadRow for a third speaker, whose words would be part of somebody else's turn.
    """
    begin = _DIALOGUE.match(text)
    system = (begin[1] or "").strip()
    if other := _OTHER_TURN.search(text[begin.end() :] if begin[1] is not None else text):
        raise BadRow(
            f"{name}: {other[1]} speaks in a dialogue of Human and Assistant; "
            "give messages, or begin with System"
        )
    parts = _TURN.split(text[begin.end() :])[1:]  # [name, words, name, words, ...]
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    if turns and turns[-1][0] == "Assistant" and not turns[-1][1].strip():
        turns.pop()
    messages = [
        {
            "role": SPEAKERS[who],
            "content": text_of(words, f"{name}: turn {i} of the dialogue").strip(),
        }
        for i, (who, words) in enumerate(turns, 1)
    ]
    return with_system(messages, system, name)
