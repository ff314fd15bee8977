"""Options from a file: --config, and those of the old run for --resume. Loads no MLX.

YAML and JSON have our own names, sectioned ``.conf`` files those of others. Nothing in a file is
executed: YAML goes through the safe loader, ``.conf`` values through ``ast.literal_eval``.
"""

import json
import re
from argparse import Action
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from command_line.foreign_config import read_conf
from command_line.rules import flag_of
from command_line.values import Setting, refuse_doubles
from errors import UserError
from run_folder.manifest import any_numbered
from run_folder.run_config import (
    MADE_BY,
    OF_ONE_START,
    REDACTED,
    SUM,
    read_run_config,
    run_folder_of,
    was_changed,
)
from run_folder.secrets import tell
from run_folder.stopping import resume_command
from safe_files import read_small

# ------------------------------------------------------------------------------ --config


def read_config(
    path: Path, flags: Mapping[str, Action], typed: Container[str] = ()
) -> list[Setting]:
    """The settings of a YAML, JSON or ``.conf`` file; ``flags``: the script's, by ``--name``.

    `typed`: the names that the command line gives.
    """
    try:
        text = read_small(path, "utf-8-sig")
    except OSError as wrong:
        raise UserError(f"{path}: cannot read the config file: {wrong.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the config file is not UTF-8 text") from None
    except ValueError as wrong:  # a NUL character in the name
        raise UserError(f"{str(path)!r}: cannot read the config file: {wrong}") from None
    if path.suffix == ".conf":
        return read_conf(path, text, flags, typed)
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


# ------------------------------------------------------------------------------ --resume


FILES = ("train_file", "validation_file", "test_file", "reward_function", "json_reward")
# Options that may be relative paths; models and data sets may be hub names as well.
PATHS = ("model", "reward_model", "resume_file", "resume_adapter_file", "data", "dataset", *FILES)
WRITTEN = ("save_file", "fused_dir")


def check_script(path: str | Path, script: str) -> None:
    """Raise ``UserError`` unless ``script`` made the run: another one would begin it anew."""
    made = read_run_config(path)["script"]
    maker = MADE_BY.get(made, made)
    if maker != script:
        go_on = f"; go on with it by: {resume_command(maker, path)}" if made in MADE_BY else ""
        raise UserError(f"{run_folder_of(path)}: is a run of {maker}, and this is {script}{go_on}")


def read_run_options(path: str | Path) -> list[Setting]:
    """The options of a run as settings for the parser; those with a secret in them are left out."""
    folder, config = run_folder_of(path), read_run_config(path)
    file, options = str(folder / "config.json"), config["options"]
    if was_changed(config) and (SUM in config or any_numbered(folder / "checkpoints")):
        tell(f"warning: {file}: was changed since the run wrote it")
    # Optional: an option that this version no longer has is no reason to refuse the run.
    return [
        Setting(key, value, file, optional=True)
        for key, value in options.items()
        if key not in OF_ONE_START and REDACTED not in str(value)
    ]


def refuse_lost_paths(path: str | Path, options: Mapping[str, Any]) -> None:
    """UserError for a relative path among a run's `options` that leads nowhere from here.

    It says which folder it is relative to; a version that did not record that names this one. What
    is going to be written in another folder than the run began in is said.
    """
    here, machine = Path.cwd(), read_run_config(path).get("machine")
    began = machine.get("folder") if isinstance(machine, dict) else None
    began = began if isinstance(began, str) else None
    for name in PATHS:
        if name == "data" and any(options.get(n, True) for n in ("train_file", "dataset")):
            continue  # rows come from those, or from what this start was given
        value = options.get(name)
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, str) or not is_lost(name, item, began):
                continue
            where = f"the folder {began}, where the run was" if began else "where the run was"
            raise UserError(
                f"{flag_of(name)} {item}: is not in {here}; it is relative to {where} started: "
                "resume it from there"
            )
    for name in WRITTEN:
        value = options.get(name)
        if isinstance(value, str) and began and not Path(value).expanduser().is_absolute():
            if Path(began).resolve() != here.resolve():
                tell(
                    f"note: {flag_of(name)} {value} is written in {here}; the run began in {began}"
                )


def is_lost(name: str, value: str, began: str | None) -> bool:
    """Whether `value` is a path that is not here and was there, or that can be nothing but one."""
    from data_utils import DATA_SUFFIXES  # not with the parser: these need numpy
    from models.adapter_description import FILE_SUFFIXES

    value = value.partition(":")[0] if name == "reward_function" else value
    path = Path(value).expanduser()
    if not value or path.is_absolute() or path.exists():
        return False
    if began and Path(began, path).exists():
        return True
    data = name == "data" or (name == "dataset" and path.suffix in DATA_SUFFIXES)
    return not began and (name in FILES or data or path.suffix in FILE_SUFFIXES)


def begun_before(path: str | Path, option: str) -> bool:
    """Whether a run was begun by a version that had no such option yet."""
    return option not in read_run_config(path)["options"]


def redacted_options(path: str | Path) -> set[str]:
    """Names of the options that had a secret in them, which is not in the file."""
    options = read_run_config(path)["options"]
    return {key for key, value in options.items() if REDACTED in str(value)}
