"""What is labelled: a prompt and replies to it, and where each reply stands on the screen. No MLX.

Legend: a place is where a reply is shown, from 0 (left, or first); replies have numbers of their
own, in the order in which they were sampled.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_loading.values import value_problem
from data_utils import Record
from errors import UserError

ID_LENGTH = 16  # hexadecimal digits: 64 bits
Text = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Reply:
    """A sampled text; `model` is its number among the models of the file."""

    text: str
    model: int
    ended: bool  # by the model, and not by the limit of tokens


@dataclass(frozen=True)
class Item:
    """A prompt and replies that differ, or one alone; `order[place]` is the number of a reply."""

    id: str
    prompt: Text
    replies: list[Reply]
    order: list[int]
    extras: dict[str, Any] = field(default_factory=dict)  # tools, documents: for the template

    @property
    def shown(self) -> list[str]:
        """The texts as they stand on the screen."""
        return [self.replies[number].text for number in self.order]


def make_item(row: dict[str, Any], shuffle: str) -> Item | None:
    """An item of a row of samples; None where fewer than two replies have words and differ.

    Of one sample, it is enough that it has words. A reply that no reader of records takes (one with
    a NUL character) is none. Which reply stands where depends on the item and the words of
    `shuffle` alone.
    """
    replies: list[Reply] = []
    for reply in row["replies"]:
        known = {other.text.strip() for other in replies}
        text = reply["text"]
        if text.strip() and text.strip() not in known and value_problem(text, 0) is None:
            replies.append(Reply(text, reply["model"], reply["ended"]))
    if len(replies) < min(2, len(row["replies"])):
        return None
    order = list(range(len(replies)))
    random.Random(f"{shuffle} {row['pair']}").shuffle(order)
    return Item(row["pair"], row["prompt"], replies, order, row.get("extras", {}))


def item_ids(records: Sequence[Record]) -> list[str]:
    """A name for each prompt of a set, from its words and its place among the same words."""
    seen: dict[str, int] = {}
    ids = []
    for record in records:
        words = json.dumps([record.asked(), record.extras], sort_keys=True)
        again = seen[words] = seen.get(words, 0) + 1
        ids.append(hashlib.sha256(f"{again} {words}".encode()).hexdigest()[:ID_LENGTH])
    return ids


def said(prompt: Text) -> list[tuple[str, str]]:
    """(who, what) of a prompt; who is empty for a text that is no conversation."""
    if isinstance(prompt, str):
        return [("", prompt)]
    return [(turn["role"], str(turn["content"])) for turn in prompt]


def refuse_promptless(kind: str) -> str | None:
    """What `read_records` says of rows without prompts."""
    if kind != "text":
        return None
    return 'the rows are plain texts and have no prompts; give rows such as {"prompt": "8 20"}'


# ------------------------------------------------------------------------------ a person's answer


@dataclass(frozen=True)
class Choice:
    """What a person said of an item: ranks by place, 0 the best and equal ones a tie; None: skip.

    Of a reply alone: [0] for good, [1] for bad.
    `aspects`: of each aspect the place of the best reply, None where none is better.
    """

    ranks: list[int] | None
    aspects: dict[str, int | None] = field(default_factory=dict)
    note: str = ""
    seconds: float | None = None

    @property
    def tied(self) -> bool:
        return self.ranks is not None and len(self.ranks) > 1 and len(set(self.ranks)) == 1


LONGEST_NOTE = 2000
LONGEST_SECONDS = 24 * 3600.0


def check_choice(choice: Choice, item: Item, aspects: Sequence[str]) -> None:
    """Raise UserError for an answer that no person could have given to this item."""
    places = range(len(item.replies))
    if choice.ranks is not None:
        known = all(isinstance(r, int) and not isinstance(r, bool) for r in choice.ranks)
        if not known or len(choice.ranks) != len(places):
            raise UserError(f"ranks: {len(places)} whole numbers are needed, one for each reply")
        if len(places) == 1 and choice.ranks[0] not in (0, 1):
            raise UserError("ranks: of one reply, 0 is good and 1 is bad")
        if len(places) > 1 and sorted({*choice.ranks}) != list(range(len({*choice.ranks}))):
            raise UserError("ranks: 0 is the best, 1 the next, without a gap")
        if missing := [name for name in aspects if name not in choice.aspects]:
            raise UserError(f"aspects: {missing[0]} has no answer")
    for name, place in choice.aspects.items():
        if name not in aspects:
            raise UserError(f"aspects: {name} was not asked")
        if place is not None and (isinstance(place, bool) or place not in places):
            raise UserError(f"aspects: {name}: there is no reply at place {place}")
    if problem := note_problem(choice.note):
        raise UserError(f"note: {problem}")


def note_problem(note: str) -> str | None:
    """Why a note cannot be kept: no reader of records would take its row; None where it can."""
    if len(note) > LONGEST_NOTE:
        return f"has more than {LONGEST_NOTE} characters"
    if value_problem(note, 0) is not None:
        return "holds a NUL, or what is no UTF-8 text"
    return None
