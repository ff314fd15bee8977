"""One option as a file has it. Loads no MLX."""

from dataclasses import dataclass
from typing import Any

from errors import UserError


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
