"""Flags made from a dataclass, and the dataclass made from the flags. Loads no MLX."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from command_line.parser import Parser
from command_line.rules import flag_of
from command_line.values import number, whole_number


def add_dataclass_arguments(
    parser: Parser, cls: type, *, title: str | None = None, exclude: Iterable[str] = ()
) -> None:
    """A flag for each field of a dataclass: type, default, and help and choices from metadata.

    Read them back with ``dataclass_from_arguments``. Types: bool, int, float, str, ``Literal``,
    lists of these, and each of them ``| None``, where the word ``none`` gives None.
    """
    group = parser.add_argument_group(title or cls.__name__)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init and field.name not in exclude:
            names = [flag_of(field.name), *field.metadata.get("aliases", ())]
            group.add_argument(*names, **field_options(field, hints[field.name]))


def field_options(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """The keyword arguments of ``add_argument`` for one field."""
    kinds = typing.get_args(hint) if is_union(hint) else (hint,)
    optional = type(None) in kinds
    (kind,) = (kind for kind in kinds if kind is not type(None))
    options: dict[str, Any] = {"help": field.metadata.get("help")}
    if field.default_factory is not dataclasses.MISSING:
        options["default"] = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        options["default"] = field.default
    else:
        options["required"] = True
    if typing.get_origin(kind) in (list, tuple):
        kind, options["nargs"] = typing.get_args(kind)[0], "+"
    choices = field.metadata.get("choices")
    if typing.get_origin(kind) is typing.Literal:
        choices = choices or typing.get_args(kind)
        kind = type(choices[0])
    options["type"] = or_none(kind) if optional and kind is not bool else kind
    if choices:
        options["choices"] = [*choices, *([None] if optional else [])]
        options["metavar"] = (
            "{" + ",".join("none" if c is None else str(c) for c in options["choices"]) + "}"
        )
    return options


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def or_none(kind: type) -> Callable[[str], Any]:
    """A converter that also takes the word ``none``."""
    convert = {int: whole_number, float: number}.get(kind, kind)

    def converted(text: str) -> Any:
        return None if text.strip().lower() in ("none", "null") else convert(text)

    converted.__name__ = f"{kind.__name__} or none"
    return converted


def dataclass_from_arguments(cls: type, args: argparse.Namespace, **values: Any) -> Any:
    """An instance of the dataclass from parsed flags; ``values`` replace or complete them."""
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    found = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return cls(**(found | values))
