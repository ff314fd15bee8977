"""A chat.db for tests: Apple's own CREATE TABLEs (macOS 14, columns that nothing reads left out)
and typedstreams written byte by byte."""

import plistlib
import sqlite3
import struct
from datetime import UTC, datetime
from pathlib import Path

TABLES = """
CREATE TABLE handle (ROWID INTEGER PRIMARY KEY AUTOINCREMENT UNIQUE, id TEXT NOT NULL, country TEXT,
    service TEXT NOT NULL, uncanonicalized_id TEXT, person_centric_id TEXT, UNIQUE (id, service));
CREATE TABLE chat (ROWID INTEGER PRIMARY KEY AUTOINCREMENT, guid TEXT UNIQUE NOT NULL,
    style INTEGER, state INTEGER, account_id TEXT, properties BLOB, chat_identifier TEXT,
    service_name TEXT, room_name TEXT, display_name TEXT, group_id TEXT);
CREATE TABLE message (ROWID INTEGER PRIMARY KEY AUTOINCREMENT, guid TEXT UNIQUE NOT NULL, text TEXT,
    replace INTEGER DEFAULT 0, handle_id INTEGER DEFAULT 0, subject TEXT, country TEXT,
    attributedBody BLOB, version INTEGER DEFAULT 0, type INTEGER DEFAULT 0, service TEXT,
    error INTEGER DEFAULT 0, date INTEGER, date_read INTEGER, is_from_me INTEGER DEFAULT 0,
    cache_has_attachments INTEGER DEFAULT 0, item_type INTEGER DEFAULT 0,
    other_handle INTEGER DEFAULT 0, group_title TEXT, group_action_type INTEGER DEFAULT 0,
    associated_message_guid TEXT, balloon_bundle_id TEXT, payload_data BLOB,
    associated_message_type INTEGER DEFAULT 0, expressive_send_style_id TEXT,
    message_summary_info BLOB, thread_originator_guid TEXT, date_retracted INTEGER DEFAULT 0,
    date_edited INTEGER DEFAULT 0);
CREATE TABLE chat_handle_join (chat_id INTEGER, handle_id INTEGER, UNIQUE(chat_id, handle_id));
CREATE TABLE chat_message_join (chat_id INTEGER, message_id INTEGER, message_date INTEGER DEFAULT 0,
    PRIMARY KEY (chat_id, message_id));
"""
FIRST = datetime(2024, 5, 1, 12, tzinfo=UTC)


def typed_number(number: int) -> bytes:
    if number < 0x80:
        return bytes([number])
    if number < 0x10000:
        return b"\x81" + struct.pack("<H", number)
    return b"\x82" + struct.pack("<I", number)


def archive(text: str) -> bytes:
    """An NSAttributedString without attributes, as NSArchiver writes it."""
    raw = text.encode()
    return (
        b"\x04\x0bstreamtyped\x81\xe8\x03\x84\x01\x40\x84\x84\x84\x12NSAttributedString\x00"
        b"\x84\x84\x08NSObject\x00\x85\x92\x84\x84\x84\x08NSString\x01\x94\x84\x01\x2b"
        + typed_number(len(raw))
        + raw
        + b"\x86\x84\x02iI\x00"
        + typed_number(len(text))
        + b"\x92\x84\x84\x84\x0cNSDictionary\x00\x94\x84\x01i\x00\x86\x86"
    )


def edits(*versions: str) -> bytes:
    parts = {"0": [{"d": 0.0, "t": archive(version)} for version in versions]}
    return plistlib.dumps({"ec": parts}, fmt=plistlib.FMT_BINARY)


def retracted() -> bytes:
    return plistlib.dumps({"rp": [0]}, fmt=plistlib.FMT_BINARY)


class MessageDatabase:
    """Open in WAL mode until `close`, as Messages has it; times count in minutes from FIRST."""

    def __init__(self, path: Path):
        self.path, self.minute = path, 0
        self.connection = sqlite3.connect(path)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA wal_autocheckpoint=0")
        self.connection.executescript(TABLES)

    def insert(self, table: str, **values) -> int:
        marks = ", ".join("?" * len(values))
        query = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})"
        row = self.connection.execute(query, list(values.values())).lastrowid
        self.connection.commit()
        return row

    def person(self, address: str, person: str | None = None, service: str = "iMessage") -> int:
        return self.insert("handle", id=address, service=service, person_centric_id=person)

    def chat(self, *handles: int, name: str = "chat") -> int:
        style = 45 if len(handles) == 1 else 43
        chat = self.insert("chat", guid=f"{name}-{handles}", style=style, chat_identifier=name)
        for handle in handles:
            self.insert("chat_handle_join", chat_id=chat, handle_id=handle)
        return chat

    def message(self, chat: int, text: str | None, *, handle: int = 0, wait: float = 1, **more):
        """A message of `handle`, or mine (0), `wait` minutes after the last; its guid."""
        self.minute += wait
        seconds = (FIRST - datetime(2001, 1, 1, tzinfo=UTC)).total_seconds() + self.minute * 60
        values = {
            "guid": f"G{self.connection.total_changes}",
            "text": text,
            "handle_id": handle,
            "date": int(seconds * 1e9),
            "is_from_me": int(handle == 0),
            **more,
        }
        number = self.insert("message", **values)
        self.insert("chat_message_join", chat_id=chat, message_id=number)
        return values["guid"]

    def close(self) -> None:
        self.connection.close()
