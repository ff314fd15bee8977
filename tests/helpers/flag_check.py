"""Finds flags that are declared and never read, for the tests of every script."""

import argparse
import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

OWNERS = ("args", "config")
READ_BY_PARSER = ("help", "config")
# A flag that is only looked at to refuse it has no effect.
CHECKERS = ("check", "__post_init__")


def unread_flags(
    parser: argparse.ArgumentParser, sources: Iterable[str | Path], owners: Iterable[str] = OWNERS
) -> list[str]:
    """Names of a parser's options that no source file reads, sorted.

    Reading means ``OWNER.name`` or ``getattr(OWNER, "name")``, where the owner is a variable or an
    attribute called one of ``owners`` (``args.seed``, ``self.config.gamma``). Functions that check
    options (``check...``, ``__post_init__``) do not count.
    """
    read: set[str] = set()
    for source in sources:
        tree = ast.parse(Path(source).read_text(encoding="utf-8"))
        read.update(names_read(tree, tuple(owners)))
    names = {action.dest for action in parser._actions}
    return sorted(names - read - set(READ_BY_PARSER))


def names_read(node: ast.AST, owners: tuple[str, ...]) -> Iterator[str]:
    """Every option name that the code under ``node`` reads from one of the owners."""
    if isinstance(node, ast.FunctionDef) and node.name.startswith(CHECKERS):
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        if last_name(node.value) in owners:
            yield node.attr
    if isinstance(node, ast.Call) and last_name(node.func) == "getattr" and len(node.args) >= 2:
        owner, name = node.args[:2]
        if last_name(owner) in owners and isinstance(name, ast.Constant):
            yield name.value
    for child in ast.iter_child_nodes(node):
        yield from names_read(child, owners)


def last_name(node: ast.expr) -> str:
    """``config`` for ``config`` and for ``self.config``."""
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
