"""Commands that a person may go on with, as a shell takes them."""

import shlex
from collections.abc import Sequence


def command(script: str, *flags: str, **named: object) -> str:
    """``python SCRIPT --name VALUE ...`` with every value quoted; None leaves a flag out."""
    words = ["python", script]
    for name, value in named.items():
        if value is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join([*words, *flags])


def next_lines(commands: Sequence[str]) -> str:
    """The commands below each other, behind ``next:``."""
    return "next: " + "\n      ".join(commands)
