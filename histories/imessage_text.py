"""The text of one row of Apple's message table, and its time.

Since macOS 13 most rows have no `text`: it lies in `attributedBody`, a typedstream (the archive
format of NeXTSTEP), which pytypedstream reads. An edited message keeps its versions in
`message_summary_info`, a property list.
"""

import plistlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from errors import UserError
from histories.messages import clean

EPOCH = datetime(2001, 1, 1, tzinfo=UTC)
NANOSECONDS_ABOVE = 10**11  # larger numbers are nanoseconds; as seconds they are 3,000 years


def apple_time(date: int) -> datetime:
    """Seconds or nanoseconds since 2001 (UTC), as macOS before and after 10.13 writes them."""
    seconds = date / 1e9 if abs(date) > NANOSECONDS_ABOVE else float(date)
    return EPOCH + timedelta(seconds=seconds)


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
