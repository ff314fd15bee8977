"""Messages of a Mac: ~/Library/Messages/chat.db, read with its -wal, where the newest ones are.

Columns differ between releases of macOS; a query names only those that are there.

Since macOS 13 most rows have no `text`: it lies in `attributedBody`, a typedstream (the archive
format of NeXTSTEP), which pytypedstream reads. An edited message keeps its versions in
`message_summary_info`, a property list.
"""

import plistlib
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from errors import UserError
from histories.conversations import ME, History, Message, Rating, clean

# ------------------------------------------------------------------------------ the text of a row,


EPOCH = datetime(2001, 1, 1, tzinfo=UTC)
NANOSECONDS_ABOVE = 10**11  # larger numbers are nanoseconds; as seconds they are 3,000 years


def apple_time(date: int) -> datetime:
    """Seconds or nanoseconds since 2001 (UTC), as macOS before and after 10.13 writes them."""
    seconds = date / 1e9 if abs(date) > NANOSECONDS_ABOVE else float(date)
    return EPOCH + timedelta(seconds=seconds)


def row_time(date: object) -> datetime | None:
    """The time of a row; None where its date is no number, or none of a calendar."""
    try:
        return apple_time(date or 0)
    except (TypeError, ValueError, OverflowError):
        return None


def archived_text(data: bytes) -> str | None:
    """The string of an archived NSAttributedString; None for what cannot be read."""
    typedstream = import_typedstream()
    try:
        root = typedstream.unarchive_from_data(data)
        return next((clean(text) for text in strings(root, typedstream)), None)
    except Exception:  # whatever a damaged archive makes of the library
        return None


def import_typedstream() -> Any:
    try:
        import typedstream
    except ImportError:
        raise UserError(
            "reading iMessage needs the package pytypedstream: pip install pytypedstream"
        ) from None
    return typedstream


def strings(root: Any, typedstream: Any) -> Iterator[str]:
    """Values of NSString and NSMutableString, the object's own before those of its attributes."""
    if isinstance(root, typedstream.types.foundation.NSString):
        yield root.value
    elif isinstance(root, typedstream.GenericArchivedObject):
        if root.super_object is not None:
            yield from strings(root.super_object, typedstream)
        for group in root.contents:
            for value in group.values:
                yield from strings(value, typedstream)


def summary(info: bytes | None) -> dict:
    """`message_summary_info` as a dictionary; empty where there is none or it is damaged."""
    try:
        found = plistlib.loads(info) if info else {}
    except Exception:  # plistlib raises many kinds for what is no property list
        return {}
    return found if isinstance(found, dict) else {}


def last_edit(info: dict) -> str | None:
    """The newest version of every part that was edited, joined; None where nothing was."""
    edits = info.get("ec")
    if not isinstance(edits, dict):
        return None
    parts = []
    for part in sorted(edits, key=part_number):
        versions = edits[part]
        data = versions[-1].get("t") if versions and isinstance(versions[-1], dict) else None
        text = archived_text(data) if isinstance(data, bytes) else None
        if text:
            parts.append(text)
    return "\n".join(parts) or None


def part_number(part: str) -> int:
    return int(part) if str(part).isdigit() else 0


def message_text(text: str | None, body: bytes | None, info: bytes | None) -> tuple[str, str]:
    """(text, "") or ("", why there is none): "unsent", "attachment alone", "undecodable"."""
    found = archived_text(body) if body else None
    for candidate in (found, clean(text or "")):
        if candidate:
            return candidate, ""
    known = summary(info)
    edited = last_edit(known)
    if edited:
        return edited, ""
    if known.get("rp"):  # retracted parts
        return "", "unsent"
    if found is not None or text:
        return "", "attachment alone"
    return "", "undecodable" if body else "without text"


# ------------------------------------------------------------------------------ the database


GROUP_STYLE = 43
TAPBACKS = range(2000, 3000)
REMOVED_TAPBACKS = range(3000, 4000)
GOOD = {0: True, 1: True, 2: False, 3: True}  # love, like, dislike, laugh; others say neither
Reactions = dict[tuple[str, str], int]  # {(message, who): kind, without the thousands}
LINK = "com.apple.messages.URLBalloonProvider"
WANTED = (
    "guid text attributedBody date is_from_me handle_id item_type group_action_type "
    "associated_message_type associated_message_guid balloon_bundle_id message_summary_info "
    "date_retracted"
).split()


def read_database(path: Path, *, groups: bool = False, tapbacks: bool = False) -> History:
    """Every message of `chat.db` that a person wrote, and my chats' tapbacks where asked for.

    Raises UserError where the file cannot be read or is no message database.
    """
    history = History()
    reactions: Reactions = {}
    with opened(path) as database:
        people = read_people(database)
        chats = read_chats(database, people)
        for row in read_rows(database):
            if tapbacks and is_reaction(row):
                take_tapback(history, reactions, row, people)
            else:
                take_row(history, row, chats, people, groups=groups)
    history.ratings = ratings(reactions)
    history.groups = {name for name, is_group in chats.values() if is_group}
    return history


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, read-only. Never "immutable": that would leave out the -wal."""
    database = None
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file; a Mac has it as ~/Library/Messages/chat.db")
        with open(path, "rb"):
            pass  # sqlite's own message does not say that it is a permission
        database = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)
        database.row_factory = sqlite3.Row
        database.text_factory = lambda raw: raw.decode("utf-8", "replace")  # `clean` drops U+FFFD
        yield database
    except PermissionError:
        raise UserError(
            f"{path}: no permission to read it: allow your terminal Full Disk Access (System "
            "Settings, Privacy & Security), or copy chat.db, chat.db-wal and chat.db-shm elsewhere"
        ) from None
    except sqlite3.OperationalError as wrong:
        if "locked" in str(wrong) or "busy" in str(wrong):
            raise UserError(f"{path}: another program is writing it; close Messages") from None
        raise UserError(
            f"{path}: cannot read: {wrong}; copy chat.db, chat.db-wal and chat.db-shm into a "
            "folder that you can write, and read that copy"
        ) from None
    except (sqlite3.DatabaseError, OSError) as wrong:
        raise UserError(f"{path}: not a whole message database: {wrong}") from None
    finally:
        if database is not None:
            database.close()


def columns(database: sqlite3.Connection, table: str) -> set[str]:
    found = {row["name"] for row in database.execute(f"PRAGMA table_info({table})")}
    if not found:
        raise sqlite3.DatabaseError(f"it has no table {table!r}")
    return found


def read_people(database: sqlite3.Connection) -> dict[int, str]:
    """{handle: person}: all addresses of a person, where the database knows, have one name."""
    known = "person_centric_id" in columns(database, "handle")
    rows = database.execute(
        f"SELECT ROWID, id, {'person_centric_id' if known else 'NULL'} AS person FROM handle "
        "ORDER BY ROWID"
    ).fetchall()
    # Of one address the service that Messages knows no person of may stand before or behind others.
    person_of = {plain_address(str(row["id"])): row["person"] for row in rows if row["person"]}
    first: dict[str, str] = {}
    people = {}
    for row in rows:
        address = plain_address(str(row["id"]))
        person = row["person"] or person_of.get(address)
        people[row["ROWID"]] = first.setdefault(f"person {person}" if person else address, address)
    return people


def plain_address(address: str) -> str:
    """A number without blanks and signs, an e-mail address in small letters."""
    if "@" in address:
        return address.lower()
    return re.sub(r"[\s().-]", "", address)


def read_chats(database: sqlite3.Connection, people: dict[int, str]) -> dict[int, tuple[str, bool]]:
    """{chat: (its name, whether it is a group)}; chats with one person have that person's name."""
    members: dict[int, set[str]] = {}
    for row in database.execute("SELECT chat_id, handle_id FROM chat_handle_join"):
        members.setdefault(row[0], set()).add(people.get(row[1], "unknown"))
    there = columns(database, "chat")
    wanted = [c for c in ("style", "chat_identifier", "guid", "display_name") if c in there]
    chats = {}
    for row in database.execute(f"SELECT ROWID, {', '.join(wanted)} FROM chat"):
        of_chat = members.get(row["ROWID"], set())
        is_group = len(of_chat) > 1 or ("style" in wanted and row["style"] == GROUP_STYLE)
        name = str(row["chat_identifier"] or row["guid"]) if is_group or not of_chat else ""
        chats[row["ROWID"]] = (name or next(iter(of_chat)), is_group)
    return chats


def read_rows(database: sqlite3.Connection) -> Iterator[dict[str, Any]]:
    """Rows of the message table with their chat; a column that is missing is None."""
    there = columns(database, "message")
    wanted = [f"message.{c} AS {c}" for c in WANTED if c in there]
    missing = dict.fromkeys(c for c in WANTED if c not in there)
    query = (
        f"SELECT message.ROWID AS number, chat_message_join.chat_id AS chat, {', '.join(wanted)} "
        "FROM message LEFT JOIN chat_message_join ON chat_message_join.message_id = message.ROWID "
        "ORDER BY message.date, message.ROWID"
    )
    for row in database.execute(query):
        yield {**missing, **dict(row)}


def is_reaction(row: dict) -> bool:
    """Whether a row is a tapback of somebody else, or the removal of one."""
    kind = row["associated_message_type"] or 0
    return (kind in TAPBACKS or kind in REMOVED_TAPBACKS) and not row["is_from_me"]


def take_row(history: History, row: dict, chats, people, *, groups: bool) -> None:
    """Add what a row says to `history`, or count why it says nothing."""
    kind = row["associated_message_type"] or 0
    if kind in TAPBACKS or kind in REMOVED_TAPBACKS:
        history.dropped["a tapback"] += 1
        return
    reason = unwanted(row, kind)
    if not reason and row["chat"] not in chats:
        reason = "in no chat"
    name, is_group = chats.get(row["chat"], ("", False))
    if not reason and is_group and not groups:
        reason = "in a group"
    time, text = row_time(row["date"]), ""
    if not reason and time is None:
        reason = "without a time"
    if not reason:
        text, reason = message_text(row["text"], row["attributedBody"], row["message_summary_info"])
    if reason or time is None:
        history.dropped[reason] += 1
        return
    sender = ME if row["is_from_me"] else people.get(row["handle_id"], name)
    key = str(row["guid"] or row["number"])
    history.messages.append(Message(name, sender, time, text, key))


def unwanted(row: dict, kind: int) -> str:
    """Why a row is no message that a person typed; empty where it is one."""
    if kind:
        return "a sticker or another attachment to a message"
    if row["item_type"] or row["group_action_type"]:
        return "an event of the chat"
    balloon = row["balloon_bundle_id"]
    if balloon and balloon != LINK:
        return "of an app"
    if row["date_retracted"]:
        return "unsent"
    return ""


def take_tapback(history: History, reactions: Reactions, row: dict, people: dict[int, str]) -> None:
    """Put the kind of a tapback into `reactions`; of one person the last one counts."""
    kind = row["associated_message_type"]
    if GOOD.get(kind % 1000) is None:
        history.dropped["a tapback that is neither good nor bad"] += 1
    # "p:0/GUID" names a part of the message, "bp:GUID" its balloon.
    message = re.sub(r"^(p:\d+/|bp:)", "", str(row["associated_message_guid"] or ""))
    reaction = message, people.get(row["handle_id"], "unknown")
    if kind in TAPBACKS:
        reactions[reaction] = kind % 1000
    elif reactions.get(reaction) == kind % 1000:  # else another has come in its place
        del reactions[reaction]


def ratings(reactions: Reactions) -> list[Rating]:
    found = ((message, GOOD.get(kind)) for (message, _), kind in reactions.items())
    return [Rating(message, good) for message, good in found if good is not None]
