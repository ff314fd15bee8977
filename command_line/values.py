"""What the value of a flag may look like, and how help shows it. Loads no MLX."""

import argparse
import math

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")


def boolean(text: str) -> bool:
    """``True``, ``yes``, ``on``, ``1`` and their opposites, in any case."""
    word = text.strip().lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return word in TRUE_WORDS


def number(text: str) -> float:
    """A finite decimal number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def whole_number(text: str) -> int:
    """An integer; ``1e3`` and ``600.0`` count as integers too."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")


class HelpFormatter(argparse.HelpFormatter):
    """Shows each default once, and booleans as ``--flag, --no-flag``."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.option_strings and action.type is bool:
            first = action.option_strings[0]
            return f"{first}, --no-{first[2:]}"
        return super()._format_action_invocation(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        short = {int: "N", float: "X"}
        return short.get(action.type) or action.dest.rpartition("_")[2].upper()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.option_strings and action.default not in (None, "", argparse.SUPPRESS)
        return text + (" (default: %(default)s)" if shown and "%(default)" not in text else "")
