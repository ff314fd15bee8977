"""Telegram's export in JSON (Telegram Desktop: Export chat history, format "Machine-readable")."""

import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from errors import UserError
from histories.conversations import ME, History, Message, clean

ONE_PERSON = ("personal_chat", "saved_messages", "bot_chat")


def read_telegram(path: Path, *, me: str | None = None, groups: bool = False) -> History:
    """Messages of `result.json`, of one chat or of all.

    An export of everything says who I am; that of one chat does not, so `me` is asked for: a name
    as it stands in "from", or an id such as user123456789. Raises UserError for other files.
    """
    try:
        export = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as wrong:
        raise UserError(f"{path}: cannot read as JSON: {wrong}") from None
    chats = list(chats_of(export))
    if not chats:
        raise UserError(f"{path}: not an export of Telegram Desktop: no list of messages in it")
    own = own_names(export, me)
    if not own:
        names = sorted({str(m.get("from")) for c in chats for m in messages_of(c) if m.get("from")})
        raise UserError(f"{path}: --me NAME is needed: one of {', '.join(names[:10])}")
    history = History()
    names = Counter(str(chat.get("name")) for chat in chats)
    for chat in chats:
        name = str(chat.get("name") or chat.get("id"))
        if names[name] > 1:  # two people of one name are two chats
            name = f"{name} ({chat.get('id')})"
        if chat.get("type") not in ONE_PERSON:
            history.groups.add(name)
            if not groups:
                history.dropped["in a group"] += len(messages_of(chat))
                continue
        for message in messages_of(chat):
            take_message(history, message, name, own)
    if not any(m.mine for m in history.messages):
        raise UserError(f"{path}: no message is from {', '.join(sorted(own))}: see --me")
    return history


def chats_of(export: Any) -> Iterator[dict]:
    if not isinstance(export, dict):
        return
    if isinstance(export.get("messages"), list):
        yield export
    listed = export.get("chats")
    for chat in listed.get("list", []) if isinstance(listed, dict) else []:
        if isinstance(chat, dict) and isinstance(chat.get("messages"), list):
            yield chat


def messages_of(chat: dict) -> list[dict]:
    return [message for message in chat["messages"] if isinstance(message, dict)]


def own_names(export: dict, me: str | None) -> set[str]:
    if me:
        return {me}
    person = export.get("personal_information")
    if isinstance(person, dict) and person.get("user_id"):
        return {f"user{person['user_id']}"}
    return set()


def take_message(history: History, message: dict, chat: str, own: set[str]) -> None:
    reason = ""
    if message.get("type") != "message":
        reason = "an event of the chat"
    elif message.get("forwarded_from"):
        reason = "forwarded"
    elif message.get("via_bot"):
        reason = "written by a bot"
    text = clean(joined(message.get("text")))
    time = moment(message)
    if not reason and not text:
        reason = "attachment alone"
    if not reason and time is None:
        reason = "without a time"
    if reason:
        history.dropped[reason] += 1
        return
    names = {str(message.get("from")), str(message.get("from_id"))}
    sender = ME if names & own else str(message.get("from") or message.get("from_id"))
    history.messages.append(Message(chat, sender, time, text, f"{chat}:{message.get('id')}"))


def joined(text: Any) -> str:
    """Text is a string, or a list of strings and of pieces with a "text" (links, bold, ...)."""
    if isinstance(text, list):
        return "".join(joined(piece) for piece in text)
    if isinstance(text, dict):
        return joined(text.get("text"))
    return text if isinstance(text, str) else ""


def moment(message: dict) -> datetime | None:
    try:
        return datetime.fromtimestamp(int(message["date_unixtime"]), tz=UTC)
    except (KeyError, ValueError, TypeError, OverflowError, OSError):
        pass
    try:  # exports before 2021 have the local time alone
        return datetime.fromisoformat(str(message["date"])).replace(tzinfo=UTC)
    except (KeyError, ValueError):
        return None
