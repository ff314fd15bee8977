"""A chat that WhatsApp exported as text (Chat, Export chat, Without media).

    Android   31/12/2023, 23:59 - Ann: Happy new year
    iPhone    [31/12/2023, 23:59:58] Ann: Happy new year
    older     31/12/2023, 23:59:58: Ann: Happy new year

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
from histories.whatsapp_words import (
    DELETED,
    EDITED,
    LEFT_OUT,
    MARKS,
    NOTHING,
    without_attachment,
)

ORDERS = ("dmy", "mdy", "ymd")
# 31/12/2023, "2023. 12. 31.", "31.12.23 г."
DATE = rf"(\d{{1,4}})[{MARKS}]?[./-] ?(\d{{1,2}})[{MARKS}]?[./-] ?(\d{{1,4}})\.?(?: г\.)?"
CLOCK = r"(\d{1,2})(?:[:.]| h )(\d{2})(?:[:.](\d{2}))?"
# What stands for "AM" and "PM" behind the time, and what before it.
HALVES = (
    r"[ap]\.? ?m\.?", "π\\.?μ\\.?", "μ\\.?μ\\.?", "ص", "م", "ÖÖ", "ÖS", "SA", "CH", "PG", "PTG",
    "πμ", "μμ", "de", "du", "e paradites", "e pasdites",
)  # fmt: skip
HALF = rf"({'|'.join(HALVES)})?"
BEFORE = "(?:(上午|下午|午前|午後|오전|오후|凌晨|早上|中午|晚上|ÖÖ|ÖS) ?)?"
AFTERNOON = (
    "p.",
    "pm",
    "p m",
    "下午",
    "午後",
    "오후",
    "晚上",
    "中午",
    "μ",
    "م",
    "ös",
    "ch",
    "ptg",
    "du",
)
LINK = "(?:,|،| klo| à| kl\\.?| в| um)? ?"  # between date and time
TIME = rf"{DATE}{LINK}{BEFORE}{CLOCK}(?: ч\.)? ?{HALF}"
# iPhones, Android, iPhones of before 2017. A file has one of them; in the others a message goes on.
FORMS = [
    re.compile(rf"^[{MARKS}]*{form} (.*)$", re.IGNORECASE)
    for form in (rf"\[{TIME}\]", rf"{TIME} ?[-–]", f"{TIME}:")
]
QUOTED = re.compile('[“”„«»"]')


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
    text = text.replace("\u202f", " ").replace("\u00a0", " ").replace("\r\n", "\n")
    form = next((form for raw in text.split("\n") for form in FORMS if form.match(raw)), FORMS[0])
    for raw in text.split("\n"):
        match = form.match(raw)
        if not match:
            if current:
                current.rest += "\n" + raw
            continue
        if current:
            yield current
        *date, before, hour, minute, second, after, rest = match.groups()
        clock = (hour, minute, second)
        half = (before or after or "").lower()
        half = half and ("p" if half.startswith(AFTERNOON) else "a")
        current = Line(tuple(map(int, date)), tuple(int(c or 0) for c in clock), half, rest)
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
    text = without_attachment(EDITED.sub("", text))
    marked = text[:1] in MARKS and text[:1] != ""
    text = clean(text)
    plain = text.strip(MARKS).rstrip(".。")
    if reason:
        pass
    elif plain in DELETED:
        reason = "deleted"
    elif LEFT_OUT.match(text.strip(MARKS)) or plain in NOTHING or not plain:
        reason = "attachment alone"
    elif marked:
        reason = "a note of WhatsApp"
    if reason:
        history.dropped[reason] += 1
        return
    name = sender.strip(MARKS + " ~")
    history.messages.append(Message(path.stem, name, time, text.strip(MARKS), key))
