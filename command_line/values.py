"""What the value of a flag may look like, how help shows it, and one option as a file has it.

Loads no MLX.
"""

import argparse
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # of float32
LARGEST_INT = 2**63 - 1
LONGEST_SHOWN = 80  # characters of a value in a message


def boolean(text: str) -> bool:
    """``True``, ``yes``, ``on``, ``1`` and their opposites, in any case."""
    word = text.strip().lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"{shown(text)} is neither True nor False")
    return word in TRUE_WORDS


def number(text: str) -> float:
    """A finite decimal number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a finite number")
    if abs(value) > LARGEST_FLOAT:
        raise argparse.ArgumentTypeError(f"{shown(text)} is beyond what float32 can hold")
    return value


def whole_number(text: str) -> int:
    """An integer; ``1e3`` and ``600.0`` count as integers too."""
    value = None
    with contextlib.suppress(ValueError, OverflowError):
        number = float(text)
        value = int(number) if number == int(number) else None
    with contextlib.suppress(ValueError):
        value = int(text)  # exact, where it has that form
    if value is None:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number")
    if abs(value) > LARGEST_INT:
        raise argparse.ArgumentTypeError(f"{shown(text)} is beyond what 64 bits can hold")
    return value


def shown(text: str) -> str:
    """A value for a message, not all of its thousand digits."""
    return repr(text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "...")


class HelpFormatter(argparse.HelpFormatter):
    """Shows each default once, and booleans as ``--flag, --no-flag``."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.option_strings and action.type is bool:
            first = action.option_strings[0]
            short = [name for name in action.option_strings if not name.startswith("--")]
            return ", ".join([first, *short, f"--no-{first[2:]}"])
        return super()._format_action_invocation(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        short = {int: "N", float: "X"}
        return short.get(action.type) or action.dest.rpartition("_")[2].upper()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        if not action.option_strings or default in (None, "", [], argparse.SUPPRESS):
            return text
        if isinstance(default, Path) and default.is_absolute():  # on this machine alone
            return text
        said = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        said = said.replace("%", "%%")
        return text if "(default" in text else f"{text} (default: {said})".strip()


class LongHelpFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The same with the lines of the description as they are."""


# ------------------------------------------------------------------------------ options of files


@dataclass(frozen=True)
class Setting:
    """One option of a file: its name there, its value, and where it stands (``FILE:LINE``)."""

    key: str
    value: Any
    where: str
    optional: bool = False  # True: skipped in silence by a script that has no such flag


def refuse_doubles(settings: list[Setting]) -> list[Setting]:
    """The same settings; raises ``UserError`` when a key stands there twice."""
    seen: dict[str, str] = {}
    for setting in settings:
        name = setting.key.replace("-", "_")
        if name in seen:
            first = seen[name].rpartition(":")[2]
            raise UserError(f"{setting.where}: {setting.key!r} stands in line {first} already")
        seen[name] = setting.where
    return settings
