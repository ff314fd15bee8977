"""Names, numbers, mail addresses and links out of texts, before anything is written.

What patterns cannot know stays: names of people who wrote nothing in the history (unless they are
given with --mask-words), nicknames, places, employers, numbers written out as words.
"""

import re
from collections.abc import Iterable

MAIL = re.compile(r"[\w.+%-]+(?:@|\s?\(at\)\s?|\s?\[at\]\s?)[\w-]+(?:\.[\w-]+)+", re.IGNORECASE)
LINK = re.compile(
    r"(?:[a-z][a-z0-9+.-]*://|www\.)[^\s<>\"]+"
    r"|\b(?:[a-z0-9-]+\.)+(?:com|org|net|edu|gov|io|me|co|app|dev|de|uk|fr|it|es|nl|ch|at|eu)"
    r"(?:\.[a-z]{2})?\b(?:/[^\s<>\"]*)?",
    re.IGNORECASE,
)
# Seven digits or more, with blanks and signs between them; shorter runs are years and prices.
NUMBER = re.compile(r"(?<![\w])\+?\(?\d(?:[\s().\-/\u00a0]{0,2}\d){6,}(?!\w)")
HANDLE = re.compile(r"(?<![\w@])@\w{2,}")


def name_parts(names: Iterable[str]) -> list[str]:
    """Whole names and their parts of two letters and more, longest first; no numbers."""
    parts: set[str] = set()
    for name in names:
        if "@" in name or re.fullmatch(r"[+\d\s().-]*", name):
            continue
        whole = name.strip(" ~")
        pieces = [piece for piece in re.split(r"[\s,()]+", whole) if len(piece) > 1]
        parts |= {whole, *pieces} - {""}
    return sorted(parts, key=lambda part: (-len(part), part))


class Masker:
    """`mask(text)`: the text with [MAIL], [LINK], [NUMBER] and [NAME] in the place of such."""

    def __init__(self, names: Iterable[str], words: Iterable[str] = ()):
        parts = [re.escape(part) for part in [*name_parts(names), *name_parts(words)]]
        # A genitive stays readable: Ann's -> [NAME]'s.
        self.names = re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)", re.IGNORECASE)
        self.none = not parts

    def mask(self, text: str) -> str:
        text = MAIL.sub("[MAIL]", text)
        text = LINK.sub("[LINK]", text)
        text = NUMBER.sub("[NUMBER]", text)
        text = HANDLE.sub("[NAME]", text)
        return text if self.none else self.names.sub("[NAME]", text)
