"""A chat that WhatsApp exported as text (Chat, Export chat, Without media).

    Android   31/12/2023, 23:59 - Ann: Happy new year
    iPhone    [31/12/2023, 23:59:58] Ann: Happy new year

The order of day and month, the clock (12 or 24 hours, "PM", "p. m.") and the words for "media
omitted" follow the phone's language, and the file says none of it.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from errors import UserError
from histories.conversations import ME, History, Message, clean

ORDERS = ("dmy", "mdy", "ymd")
MARKS = "\u200e\u200f\u202a\u202b\u202c"  # directions of writing, which iPhones put before lines
DATE = r"(\d{1,4})[./-](\d{1,2})[./-](\d{1,4})\.?"
CLOCK = r"(\d{1,2})[:.](\d{2})(?:[:.](\d{2}))?"
HALF = r"([ap]\.? ?m\.?)?"
BEFORE = "(?:(上午|下午|午前|午後|오전|오후) ?)?"  # "AM" and "PM" where they come first
AFTERNOON = ("p", "P", "下午", "午後", "오후")
TIME = rf"{DATE},? {BEFORE}{CLOCK} ?{HALF}"
START = re.compile(rf"^[{MARKS}]*(?:\[{TIME}\]|{TIME} -) (.*)$", re.IGNORECASE)
TIME_GROUPS = 8
# Whole texts in place of what an export leaves out: Android's stand in <>, iPhones' behind U+200E.
LEFT_OUT = re.compile(r"^<[^<>]*>$")
QUOTED = re.compile('[“”„«»"]')
DELETED = {
    "This message was deleted",
    "You deleted this message",
    "Diese Nachricht wurde gelöscht",
    "Du hast diese Nachricht gelöscht",
    "Eliminaste este mensaje",
    "Se eliminó este mensaje",
    "Ce message a été supprimé",
    "Vous avez supprimé ce message",
    "Mensagem apagada",
    "Você apagou esta mensagem",
    "Questo messaggio è stato eliminato",
    "Hai eliminato questo messaggio",
    "Dit bericht is verwijderd",
    "U hebt dit bericht verwijderd",
}
EDITED = re.compile(rf" ?[{MARKS}]?<[^<>]*(edit|bearbeitet|modifi|bewerkt)[^<>]*>$", re.IGNORECASE)
ATTACHED = re.compile(rf"^[{MARKS}]*\S+\.\w{{2,5}} \([^()]*\)(\n|$)|^[{MARKS}]*<[^<>]*: [^<>]*>$")


@dataclass
class Line:
    """A line that begins a message, with those that follow it."""

    date: tuple[int, int, int]  # as written
    clock: tuple[int, int, int]
    half: str  # "a", "p" or empty
    rest: str


def read_whatsapp(path: Path, *, me: str | None = None, order: str | None = None) -> History:
    """Messages of one exported chat; a group is one where more than two people write.

    `me` is my name as the file writes it, `order` of the date (dmy, mdy, ymd) where the file
    leaves it open. Raises UserError for other files, and where either has to be said.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as wrong:
        raise UserError(f"{path}: cannot read: {wrong.strerror or wrong}") from None
    lines = list(joined_lines(text))
    if not lines:
        raise UserError(
            f'{path}: no line of a WhatsApp export, such as "31/12/2023, 23:59 - Ann: Hello"'
        )
    order = order or order_of(lines, path)
    history = History()
    for number, line in enumerate(lines):
        take_line(history, line, order, f"{path}:{number}", path)
    names = Counter(m.sender for m in history.messages)
    if me is None or me not in names:
        there = ", ".join(name for name, _ in names.most_common(10))
        wrong = "--me NAME is needed" if me is None else f"no message is from {me}"
        raise UserError(f"{path}: {wrong}; it is one of: {there}")
    if len(names) > 2:
        history.groups.add(path.stem)
    history.messages = [
        Message(path.stem, ME if m.sender == me else m.sender, m.time, m.text, m.key)
        for m in history.messages
    ]
    return history


def joined_lines(text: str) -> Iterator[Line]:
    current = None
    # Not splitlines: a message may hold U+2028 and other breaks that begin no line of the file.
    for raw in text.replace("\u202f", " ").replace("\u00a0", " ").replace("\r\n", "\n").split("\n"):
        match = START.match(raw)
        if not match:
            if current:
                current.rest += "\n" + raw
            continue
        if current:
            yield current
        groups = match.groups()
        found = groups[:TIME_GROUPS] if groups[0] else groups[TIME_GROUPS:-1]
        date, (before, *clock, after) = found[:3], found[3:]
        half = before or after or ""
        half = half and ("p" if half.startswith(AFTERNOON) else "a")
        current = Line(tuple(map(int, date)), tuple(int(c or 0) for c in clock), half, groups[-1])
    if current:
        yield current


def order_of(lines: list[Line], path: Path) -> str:
    """The order in which every date is one and times do not go back; if two do, it is asked for."""
    found = []
    for order in ORDERS:
        times = [moment(line, order) for line in lines]
        if None in times or (order == "ymd" and lines[0].date[0] < 100):
            continue  # a year of two digits stands last
        back = sum(later < earlier for earlier, later in zip(times, times[1:], strict=False))
        found.append((back, order))
    if not found:
        raise UserError(f"{path}: dates that are neither day/month/year nor month/day/year")
    best = min(found)[0]
    orders = [order for back, order in found if back == best]
    if len(orders) > 1:
        raise UserError(
            f"{path}: dates such as {'/'.join(map(str, lines[0].date))} can be read in two ways: "
            f"--date-order {' or '.join(orders)}"
        )
    return orders[0]


def moment(line: Line, order: str) -> datetime | None:
    parts = dict(zip(order, line.date, strict=True))
    if parts["y"] < 100:
        parts["y"] += 2000
    hour, minute, second = line.clock
    if line.half:
        hour = hour % 12 + (12 if line.half == "p" else 0)
    try:
        return datetime(parts["y"], parts["m"], parts["d"], hour, minute, second)
    except ValueError:
        return None


def take_line(history: History, line: Line, order: str, key: str, path: Path) -> None:
    time = moment(line, order)
    if time is None:
        raise UserError(f"{path}: {'/'.join(map(str, line.date))} is no date in the order {order}")
    sender, colon, text = line.rest.partition(": ")
    if not colon and line.rest.endswith(":"):
        sender, colon, text = line.rest[:-1], ":", ""
    # “Ann changed the subject from “a: b” to “c””: no name has quotation marks in it.
    reason = "an event of the chat" if not colon or QUOTED.search(sender) else ""
    marked = text[:1] in MARKS and text[:1] != ""
    text = clean(EDITED.sub("", text))
    plain = text.strip(MARKS).rstrip(".")
    if reason:
        pass
    elif plain in DELETED:
        reason = "deleted"
    elif LEFT_OUT.match(text.strip(MARKS)) or ATTACHED.match(text) or not plain:
        reason = "attachment alone"
    elif marked:
        reason = "a note of WhatsApp"
    if reason:
        history.dropped[reason] += 1
        return
    name = sender.strip(MARKS + " ~")
    history.messages.append(Message(path.stem, name, time, text.strip(MARKS), key))
