"""What every reader of a message history gives: messages, and how many were left out and why."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

ME = ""  # the sender of the messages of the person whose history it is


@dataclass(frozen=True)
class Message:
    """One message that a person wrote."""

    chat: str  # who it is with: a person, or a group
    sender: str  # ME, or the other's name, number or address
    time: datetime
    text: str
    key: str  # tells it from every other message of its history

    @property
    def mine(self) -> bool:
        return self.sender == ME


@dataclass(frozen=True)
class Rating:
    """What somebody else thought of one of my messages."""

    key: str  # of the message
    good: bool


@dataclass
class History:
    """All messages of one source; `dropped` counts what was left out, by reason."""

    messages: list[Message] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    groups: set[str] = field(default_factory=set)  # chats of more than two people
    ratings: list[Rating] = field(default_factory=list)

    def chats(self) -> dict[str, list[Message]]:
        """Each chat's messages in the order of their times; none twice."""
        seen: set[str] = set()
        found: dict[str, list[Message]] = {}
        for message in sorted(self.messages, key=lambda m: m.time):
            if message.key in seen:
                self.dropped["the same message again"] += 1
                continue
            seen.add(message.key)
            found.setdefault(message.chat, []).append(message)
        return found


def clean(text: str) -> str:
    """Without the marks that stand for attachments (U+FFFC) and for lost characters (U+FFFD)."""
    return text.replace("\ufffc", "").replace("\ufffd", "").strip()
