"""Question trees: messages with parents, whose answers people ranked, as OpenAssistant's.

Two forms: a row for each message (``message_id``, ``parent_id``, ``role``, ``text``, ``lang``,
``rank``), and a row for each tree (``prompt`` with ``replies`` in it).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data_loading.messages import BadRow, text_of
from data_loading.values import RawRow, shorten
from errors import UserError

ROLES = {"prompter": "user", "user": "user", "human": "user", "assistant": "assistant"}


@dataclass
class Node:
    """A message of a tree. `rank`: among the answers to one question, 0 the best."""

    where: str
    role: str  # user or assistant
    text: str
    lang: str = ""
    rank: float | None = None
    good: bool = True  # neither deleted nor turned down by a reviewer
    parent: "Node | None" = None
    replies: list["Node"] = field(default_factory=list)

    def asked(self) -> list[dict[str, str]]:
        """The conversation up to this message, as messages."""
        turns, node = [], self
        while node is not None:
            turns.append({"role": node.role, "content": node.text})
            node = node.parent
        return turns[::-1]


def is_tree_row(fields: dict[str, Any]) -> bool:
    """Whether a row is a message of a tree, or a tree."""
    if isinstance(fields.get("prompt"), dict) and "replies" in fields["prompt"]:
        return True
    return {"message_id", "parent_id", "role", "text"} <= fields.keys()


def read_trees(rows: Iterable[RawRow]) -> tuple[list[Node], Counter[str]]:
    """(all messages, in their order; how many were left out, by reason).

    Left out: messages that were deleted or turned down, and those whose question is not there.
    Raises UserError for a row that is no part of a tree, a message that is there twice, and
    messages that are one another's parents.
    """
    nodes: list[Node] = []
    by_id: dict[str, Node] = {}
    waiting: list[tuple[str, Node]] = []
    for row in rows:
        if row.fields is None:
            raise UserError(f"{row.where}: {row.problem}")
        if not is_tree_row(row.fields):
            raise UserError(f"{row.where}: is no message of a tree, as the rows before it are")
        try:
            if isinstance(row.fields.get("prompt"), dict):
                nodes += _nested(row.fields["prompt"], row.where)
                continue
            node = _node(row.fields, row.where)
            name = row.fields["message_id"]
            if not isinstance(name, str | int):
                raise BadRow(f"message_id must be a text, found {shorten(name)}")
        except BadRow as why:
            raise UserError(f"{row.where}: {why}") from None
        if str(name) in by_id:
            raise UserError(f"{row.where}: message {name} is there twice")
        by_id[str(name)] = node
        nodes.append(node)
        if row.fields["parent_id"] not in (None, ""):
            waiting.append((str(row.fields["parent_id"]), node))
    lost = [node for name, node in waiting if name not in by_id]
    for name, node in waiting:
        if name in by_id:
            node.parent = by_id[name]
            by_id[name].replies.append(node)
    _refuse_circles(nodes)
    return _kept(nodes, lost)


def best_answers(nodes: Iterable[Node], lang: str | None) -> Iterator[tuple[Node | None, str]]:
    """(the answer that ranks highest, "") of each question that has answers in a language.

    (None, why) for a question that has none.
    """
    for _, answers in _questions(nodes):
        there = [node for node in answers if lang is None or node.lang == lang]
        ranked = [node for node in there if node.rank is not None]
        if ranked:
            yield min(ranked, key=lambda node: node.rank), ""
        elif not answers:
            yield None, "questions without an answer"
        else:
            yield None, "answers without a rank" if there else f"questions not in {lang}"


def better_and_worse(nodes: Iterable[Node], lang: str | None) -> Iterator[tuple[Node, list[Node]]]:
    """(the answer that ranks highest, those that rank lower) of each question."""
    for _, answers in _questions(nodes):
        ranked = [n for n in answers if n.rank is not None and (lang is None or n.lang == lang)]
        if not ranked:
            continue
        best = min(ranked, key=lambda node: node.rank)
        yield best, sorted((n for n in ranked if n.rank > best.rank), key=lambda node: node.rank)


def questions(nodes: Iterable[Node], lang: str | None) -> Iterator[Node]:
    """Every question in a language (None: in any)."""
    return (n for n in nodes if n.role == "user" and (lang is None or n.lang == lang))


def _questions(nodes: Iterable[Node]) -> Iterator[tuple[Node, list[Node]]]:
    for node in nodes:
        if node.role == "user":
            yield node, [reply for reply in node.replies if reply.role == "assistant"]


def _node(fields: dict[str, Any], where: str) -> Node:
    role = fields.get("role")
    if role not in ROLES:
        raise BadRow(f"role must be prompter or assistant, found {shorten(role)}")
    rank = fields.get("rank")
    if isinstance(rank, bool) or not (rank is None or isinstance(rank, int | float)):
        raise BadRow(f"rank must be a number, 0 the best, found {shorten(rank)}")
    if rank is not None and rank != rank:  # what tables have for none
        rank = None
    good = not fields.get("deleted") and fields.get("review_result") is not False
    text = text_of(fields.get("text"), "text") if good else str(fields.get("text") or "")
    return Node(where, ROLES[role], text, str(fields.get("lang") or ""), rank, good)


def _nested(prompt: dict[str, Any], where: str) -> list[Node]:
    """The messages of one tree, parents first."""
    found, open_ = [], [(prompt, None)]
    while open_:
        fields, parent = open_.pop(0)
        if not isinstance(fields, dict):
            raise BadRow(f"a reply must be a message, found {shorten(fields)}")
        node = _node(fields, where)
        node.parent = parent
        if parent is not None:
            parent.replies.append(node)
        found.append(node)
        replies = fields.get("replies") or []
        if not isinstance(replies, list):
            raise BadRow(f"replies must be a list, found {shorten(replies)}")
        open_ += [(reply, node) for reply in replies]
    return found


def _refuse_circles(nodes: Iterable[Node]) -> None:
    safe: set[int] = set()
    for node in nodes:
        way, at = [], node
        while at is not None and id(at) not in safe:
            if any(at is before for before in way):
                raise UserError(f"{node.where}: messages are one another's parents")
            way.append(at)
            at = at.parent
        safe.update(map(id, way))


def _kept(nodes: list[Node], lost: list[Node]) -> tuple[list[Node], Counter[str]]:
    """Without what was deleted, turned down or lost, and what stands below that."""
    why: dict[int, str] = {id(node): "their question is not there" for node in lost}
    why |= {id(node): "deleted or turned down" for node in nodes if not node.good}
    below: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        if node.parent is not None:
            below[id(node.parent)].append(node)
    open_ = [node for node in nodes if id(node) in why]
    while open_:
        for node in below[id(open_.pop())]:
            if id(node) not in why:
                why[id(node)] = "below one that is left out"
                open_.append(node)
    kept = [node for node in nodes if id(node) not in why]
    for node in kept:
        node.replies = [reply for reply in node.replies if id(reply) not in why]
    return kept, Counter(f"messages, {reason}" for reason in why.values())
