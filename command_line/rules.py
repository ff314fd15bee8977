"""Flags that do nothing without another one: a table for each script, and one refusal. No MLX."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from errors import UserError


@dataclass(frozen=True)
class Needs:
    """The flags named in `flags` have an effect only where `other` is set or `met(args)` is true.

    `why` ends the sentence "--flag VALUE has no effect ..."; it follows from `other`. `typed`: only
    on the command line, as one --config file may serve to train and to test. `valued`: whether the
    sentence names the value. What a user gave is what differs from its default (`args.changed`): a
    default that is written out, as shared config files do, is no mistake.
    """

    flags: str
    other: str = ""
    met: Callable[[argparse.Namespace], Any] | None = None
    why: str = ""
    typed: bool = False
    valued: bool = True

    def check(self, args: argparse.Namespace) -> None:
        """Raise UserError where the user gave one of the flags another value than its default."""
        given = args.typed if self.typed else args.changed
        names = [name for name in self.flags.split() if name in given]
        if names and not (self.met(args) if self.met else getattr(args, self.other)):
            refuse_idle(args, names[0], self.why or missing(args, self.other), self.valued)


def refuse_idle(args: argparse.Namespace, name: str, why: str, valued: bool = True) -> None:
    """UserError where the flag `name` was changed by the user, who must be told that it does not
    matter here.
    """
    if name not in args.changed:
        return
    value, flag = getattr(args, name), flag_of(name)
    if value is False:
        flag = f"--no-{flag[2:]}"
    shown = [] if isinstance(value, bool) or not valued else [shown_value(value)]
    raise UserError(f"{' '.join([flag, *shown])} has no effect {why}")


def shown_value(value: Any) -> str:
    """A value as a person writes it on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def missing(args: argparse.Namespace, name: str) -> str:
    """``without --x`` for a switch or an option that is not given; ``at --x 0`` for a number."""
    value = getattr(args, name)
    if value is None or isinstance(value, bool | str | list):
        return f"without {flag_of(name)}"
    return f"at {flag_of(name)} {shown_value(value)}"


def needs(table: Iterable[Needs]) -> Callable[[argparse.Namespace], None]:
    """A check of a parser: all rows of a table."""
    rows = tuple(table)

    def check(args: argparse.Namespace) -> None:
        for row in rows:
            row.check(args)

    return check


def flag_of(name: str) -> str:
    """``lora_rank`` as the user writes it: ``--lora-rank``."""
    return "--" + name.replace("_", "-")
