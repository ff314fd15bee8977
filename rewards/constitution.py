"""A constitution: principles in a YAML file, by which a judge compares and revises answers.

Bai et al. 2022 (Constitutional AI): one principle is drawn for each row.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UserError
from safe_files import read_small

FORM = "name and principle, and for --revise critique and revision, each a text"


@dataclass(frozen=True)
class Principle:
    """What to judge by, how to ask for what an answer lacks, and for a better one."""

    name: str
    principle: str
    critique: str | None = None
    revision: str | None = None


def read_constitution(path: str | Path) -> list[Principle]:
    """The principles of a file: a list of them, alone or under the key `principles`.

    Raises UserError for a file that cannot be read, has no principles, unknown keys, or anything
    but texts in them.
    """
    entries = _parsed(Path(path))
    if isinstance(entries, dict):
        if unknown := [key for key in entries if key != "principles"]:
            raise UserError(f"{path}: unknown key {unknown[0]!r}; principles: and a list is needed")
        entries = entries.get("principles")
    if not entries:
        raise UserError(f"{path}: has no principles; a list of them is needed, each with {FORM}")
    if not isinstance(entries, list):
        raise UserError(f"{path}: principles must be a list, each with {FORM}")
    made = [_principle(entry, f"{path}: principle {i}") for i, entry in enumerate(entries, 1)]
    counts = Counter(principle.name for principle in made)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{path}: two principles have the name {twice[0]!r}")
    return made


def _parsed(path: Path):
    import yaml

    try:
        return yaml.load(read_small(path, "utf-8-sig"), strict_loader())
    except OSError as wrong:
        raise UserError(f"{path}: cannot read the constitution: {wrong.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the constitution is not UTF-8 text") from None
    except (yaml.YAMLError, ValueError, RecursionError) as wrong:
        mark = getattr(wrong, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        said = getattr(wrong, "problem", None) or str(wrong).partition("\n")[0] or "too deep"
        raise UserError(f"{where}: not YAML: {said}") from None


def strict_loader() -> type:
    """yaml's safe loader, which refuses a key that stands twice, as YAML 1.2 does (section 3.2.1.3)

    PyYAML keeps the last one: where a dash is forgotten, two principles would become one.
    """
    import yaml

    class Strict(yaml.SafeLoader):
        def compose_mapping_node(self, anchor):
            node, seen = super().compose_mapping_node(anchor), set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        said = f"{key.value!r} stands there twice; is a dash missing before it?"
                        raise yaml.composer.ComposerError(None, None, said, key.start_mark)
                    seen.add(key.value)
            return node

    return Strict


def _principle(entry, where: str) -> Principle:
    from data_utils import value_problem  # with MLX, which --help does without

    if not isinstance(entry, dict):
        raise UserError(f"{where}: must have {FORM}")
    known = Principle.__dataclass_fields__
    if unknown := [key for key in entry if key not in known]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; it may have {', '.join(known)}")
    for key in ("name", "principle"):
        if key not in entry:
            raise UserError(f"{where}: {key} is missing; it must have {FORM}")
    for key, value in entry.items():
        if value is not None and not isinstance(value, str | list | dict):
            raise UserError(f"{where}: {key} must be a text; {value} is one in quotes")
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {key} must be a text that is not empty")
        if problem := value_problem(value, 0):
            raise UserError(f"{where}: {key}: {problem}")
    return Principle(**{key: value.strip() for key, value in entry.items()})


def drawn(principles: list[Principle], seed: int, row: int) -> Principle:
    """The principle of a row: of the seed and its number alone."""
    return principles[int(np.random.default_rng([seed, row]).integers(len(principles)))]
