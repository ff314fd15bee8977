"""Options from a file: YAML and JSON with our own names, sectioned ``.conf`` files with others'.

Nothing in a file is executed: YAML goes through the safe loader, ``.conf`` values through
``ast.literal_eval``. Importing this loads no MLX.
"""

import json
import re
from argparse import Action
from collections.abc import Mapping
from pathlib import Path

from command_line.foreign_config import read_conf
from command_line.setting import Setting, refuse_doubles
from errors import UserError
from safe_files import read_small


def read_config(path: Path, flags: Mapping[str, Action]) -> list[Setting]:
    """The settings of a YAML, JSON or ``.conf`` file; ``flags``: the script's, by ``--name``."""
    try:
        text = read_small(path, "utf-8-sig")
    except OSError as wrong:
        raise UserError(f"{path}: cannot read the config file: {wrong.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the config file is not UTF-8 text") from None
    except ValueError as wrong:  # a NUL character in the name
        raise UserError(f"{str(path)!r}: cannot read the config file: {wrong}") from None
    if path.suffix == ".conf":
        return read_conf(path, text, flags)
    return read_json(path, text) if path.suffix == ".json" else read_yaml(path, text)


def read_json(path: Path, text: str) -> list[Setting]:
    """The members of one JSON object."""
    try:
        pairs = json.loads(text, object_pairs_hook=Pairs)
    except json.JSONDecodeError as wrong:
        raise UserError(f"{path}:{wrong.lineno}: not JSON: {wrong.msg}") from None
    except ValueError:  # Python reads no number of more than 4,300 digits
        raise UserError(f"{path}: a number that cannot be read: it has too many digits") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a config file") from None
    if not isinstance(pairs, Pairs):
        raise UserError(f"{path}: the config file must hold one JSON object, {{...}}")
    lines = {}
    for match in re.finditer(r'"((?:[^"\\]|\\.)*)"\s*:', text):
        lines.setdefault(match[1], text.count("\n", 0, match.start()) + 1)
    found = [Setting(key, value, f"{path}:{lines.get(key, 1)}") for key, value in pairs]
    return refuse_doubles(found)


class Pairs(list):
    """The members of a JSON object in order, doubles included."""


def read_yaml(path: Path, text: str) -> list[Setting]:
    """The entries of one YAML mapping."""
    import yaml

    loader, where = None, f"{path}"
    try:
        loader = yaml.SafeLoader(text)  # refuses control characters
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: the config file must hold one mapping, lines of `key: value`")
        found = []
        for key, value in node.value:
            where = f"{path}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{where}: a key must be the name of a flag")
            found.append(Setting(str(key.value), loader.construct_object(value, True), where))
        return refuse_doubles(found)
    except yaml.YAMLError as wrong:
        mark = getattr(wrong, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        said = getattr(wrong, "problem", None) or str(wrong).partition("\n")[0]
        raise UserError(f"{path}{line}: not YAML: {said}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a config file") from None
    except (ValueError, TypeError, KeyError, AttributeError) as wrong:
        # A 13th month, too many digits, a tag on what it does not fit.
        raise UserError(f"{where}: a value that YAML cannot read: {wrong}") from None
    finally:
        if loader is not None:
            loader.dispose()
