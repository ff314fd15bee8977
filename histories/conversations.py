"""From messages, which every reader of a history gives, to rows that training scripts read.

Sessions, turns, rows of a limited length; and how many were left out and why.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

# ------------------------------------------------------------------------------ messages


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


# ------------------------------------------------------------------------------ conversations


USER, ASSISTANT = "user", "assistant"


@dataclass
class Turn:
    """Neighbouring messages of one sender as one turn; of a group's others each on its own."""

    role: str
    text: str
    keys: list[str]

    def as_message(self, trained: bool = True) -> dict:
        row = {"role": self.role, "content": self.text}
        return row if trained or self.role == USER else {**row, "train": False}


@dataclass
class Limits:
    """How sessions are cut into rows; lengths are characters of all turns of a row."""

    gap: timedelta = timedelta(hours=3)
    max_length: int = 4000
    context_turns: int = 4
    min_messages: int = 20


@dataclass
class Rows:
    """Rows for training and validation, and what was left out, by reason."""

    train: list[dict] = field(default_factory=list)
    valid: list[dict] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def make_rows(history: History, limits: Limits, valid_share: float = 0.1) -> Rows:
    """Conversations in which I answer; the newest `valid_share` of all sessions validate."""
    chats = history.chats()
    rows = Rows(dropped=Counter(history.dropped))
    sessions = []
    for name, messages in chats.items():
        if len(messages) < limits.min_messages:
            rows.dropped["in a short chat"] += len(messages)
        elif len({m.mine for m in messages}) < 2:
            rows.dropped["in a one-sided chat"] += len(messages)
        else:
            found = split_sessions(messages, limits.gap)
            sessions += [(session, name in history.groups) for session in found]
    sessions.sort(key=lambda pair: pair[0][-1].time)
    held_out = 0
    if len(sessions) > 1 and valid_share > 0:
        held_out = max(1, round(len(sessions) * valid_share))
    for number, (session, is_group) in enumerate(sessions):
        made = rows_of(make_turns(session, is_group, rows.dropped), limits, rows.dropped)
        (rows.valid if number >= len(sessions) - held_out else rows.train).extend(made)
    return rows


def split_sessions(messages: Sequence[Message], gap: timedelta) -> list[list[Message]]:
    """A new session begins where nobody wrote for longer than `gap`."""
    sessions: list[list[Message]] = []
    for message in messages:
        if not sessions or message.time - sessions[-1][-1].time > gap:
            sessions.append([])
        sessions[-1].append(message)
    return sessions


def make_turns(session: Iterable[Message], is_group: bool, dropped: Counter[str]) -> list[Turn]:
    """Turns from the first of the other side to my last; in a group "Name: " says who it is."""
    turns: list[Turn] = []
    for message in session:
        role = ASSISTANT if message.mine else USER
        text = f"{message.sender}: {message.text}" if is_group and role == USER else message.text
        if turns and turns[-1].role == role:
            turns[-1].text += "\n" + text
            turns[-1].keys.append(message.key)
        else:
            turns.append(Turn(role, text, [message.key]))
    if turns and turns[0].role == ASSISTANT:
        dropped["mine, without anything before it in its session"] += len(turns.pop(0).keys)
    if turns and turns[-1].role == USER:
        dropped["unanswered in its session"] += len(turns.pop().keys)
    return turns


def rows_of(turns: Sequence[Turn], limits: Limits, dropped: Counter[str]) -> Iterator[dict]:
    """Rows of whole exchanges; a row that goes on begins with the last turns, not trained again."""
    exchanges = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    row: list[list[Turn]] = []
    context: list[list[Turn]] = []
    for exchange in exchanges:
        if length(exchange) > limits.max_length:
            dropped["in an exchange longer than --max-length"] += sum(len(t.keys) for t in exchange)
            if row:
                yield finished(context, row)
            row, context = [], []
            continue
        if row and length([t for e in [*context, *row, exchange] for t in e]) > limits.max_length:
            yield finished(context, row)
            context, row = fitting([*context, *row], exchange, limits), []
        row.append(exchange)
    if row:
        yield finished(context, row)


def length(turns: Iterable[Turn]) -> int:
    return sum(len(turn.text) for turn in turns)


def fitting(before: list[list[Turn]], exchange: Sequence[Turn], limits: Limits) -> list[list[Turn]]:
    """The last exchanges of at most `context_turns` turns that leave room for `exchange`."""
    kept = before[len(before) - limits.context_turns // 2 :] if limits.context_turns > 1 else []
    while kept and length([t for e in [*kept, exchange] for t in e]) > limits.max_length:
        kept = kept[1:]
    return kept


def finished(context: list[list[Turn]], row: list[list[Turn]]) -> dict:
    """A row; "keys" has those of the messages in each of its trained turns."""
    old = [turn.as_message(trained=False) for exchange in context for turn in exchange]
    new = [turn for exchange in row for turn in exchange]
    keys = [turn.keys for turn in new if turn.role == ASSISTANT]
    return {"messages": [*old, *(turn.as_message() for turn in new)], "keys": keys}


def trained_turns(row: dict) -> Iterator[tuple[list[dict], str, list[str]]]:
    """(what was said before it, its text, its messages' keys) of each trained turn of mine."""
    keys = iter(row["keys"])
    for place, message in enumerate(row["messages"]):
        if message["role"] == ASSISTANT and message.get("train", True):
            before = [{k: m[k] for k in ("role", "content")} for m in row["messages"][:place]]
            yield before, message["content"], next(keys)


def prompts_of(rows: Iterable[dict]) -> Iterator[dict]:
    """What is said before each of my trained turns: prompts for PPO, with my own answer beside."""
    for row in rows:
        for before, text, _ in trained_turns(row):
            yield {"prompt": before, "mine": text}


def ratings_of(history: History, rows: Iterable[dict]) -> Iterator[dict]:
    """Turns of mine that others reacted to; a turn is good where every reaction to it is."""
    good: dict[str, bool] = {}
    for rating in history.ratings:
        good[rating.key] = rating.good and good.get(rating.key, True)
    for row in rows:
        for before, text, keys in trained_turns(row):
            if rated := [good[key] for key in keys if key in good]:
                answer = [{"role": ASSISTANT, "content": text}]
                yield {"prompt": before, "completion": answer, "label": all(rated)}
