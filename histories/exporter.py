"""The text files of imessage-exporter (`imessage-exporter --format txt`), a file for each chat.

    May 17, 2022  5:29:42 PM (Read by them after 2 minutes)
    +15555550123
    Hello world

Replies are printed twice: indented below what they answer, and in their own place with a line that
says so. The indented ones are passed over, from the time that each begins with.
"""

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from errors import UserError
from histories.conversations import ME, History, Message, clean

START = re.compile(r"([A-Z][a-z]{2} \d{2}, \d{4} +\d{1,2}:\d{2}:\d{2} [AP]M)( \(.*\))?$")
REPLY = "This message responded to an earlier message."
DELETED = "This message was deleted from the conversation!"
# Whole lines of the exporter's: a person may write of these things too.
UNSENT = re.compile(r"^.+ unsent (a message|this message( part)?)( .+ after sending)?[.!]?$")
EDITED = re.compile(r"^Edited (\d+ (second|minute|hour|day|month|year)s?(, )?)+ later: ")
EFFECT = re.compile(
    "^Sent with (Slam|Loud|Gentle|Invisible Ink|Balloons|Celebration|Confetti|Echo|Fireworks|Heart|"
    "Lasers|Shooting Star|Sparkles|Spotlight)$"
)
TAPBACKS = ("Tapbacks:", "Stickers:")
ATTACHMENT = re.compile(
    r"^(/|~/|\.{0,2}/|attachments/|[A-Za-z]:\\).*\.\w{2,5}$|^Attachment missing!"
)


def read_export(folder: Path, *, groups: bool = False, me: str = "Me") -> History:
    """Messages of every .txt file of `folder`; raises UserError where there is none."""
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder}: holds no .txt file; imessage-exporter --format txt writes them")
    history = History()
    for file in files:
        read_file(file, history, groups, me)
    if not history.messages and not history.dropped:
        raise UserError(
            f"{files[0]}: no message of imessage-exporter's English text form in it: each begins "
            'with a line such as "May 17, 2022  5:29:42 PM"'
        )
    return history


def read_file(file: Path, history: History, groups: bool, me: str) -> None:
    found = []
    text = file.read_text(encoding="utf-8", errors="replace")
    for number, (time, sender, lines) in enumerate(blocks(text)):
        body, reason = message_body(lines)
        if reason:
            history.dropped[reason] += 1
            continue
        who = ME if sender == me else sender
        found.append(Message(file.stem, who, time, body, f"{file.name}:{number}"))
    if len({m.sender for m in found} - {ME}) > 1:
        history.groups.add(file.stem)
        if not groups:
            history.dropped["in a group"] += len(found)
            return
    history.messages += found


def blocks(text: str) -> Iterator[tuple[datetime, str, list[str]]]:
    """(time, sender, lines of the body) of each message at the margin."""
    current: tuple[datetime, str, list[str]] | None = None
    lines = iter(text.splitlines())
    for line in lines:
        if match := START.match(line):
            if current:
                yield current
            time = datetime.strptime(" ".join(match[1].split()), "%b %d, %Y %I:%M:%S %p")
            current = (time, next(lines, "").strip(), [])
        elif current:
            current[2].append(line)
    if current:
        yield current


def message_body(lines: list[str]) -> tuple[str, str]:
    """(text, "") or ("", why it is left out)."""
    kept: list[str] = []
    unsent = False
    for line in lines:
        if line in TAPBACKS or (line.startswith("    ") and START.match(line.strip())):
            break
        if line == DELETED:
            return "", "deleted"
        if UNSENT.match(line):
            unsent = True
        elif match := EDITED.match(line):
            kept = [line[match.end() :]]  # the lines behind it are of this version
        elif not (line == REPLY or EFFECT.match(line) or ATTACHMENT.match(line)):
            kept.append(line)
    body = clean("\n".join(kept))
    return (body, "") if body else ("", "unsent" if unsent else "attachment alone")
