"""Prompt templates such as "Question: {question}\\n\\nAnswer: "."""

import string

from data_loading.messages import BadRow
from data_loading.records import Record
from data_loading.values import shorten
from errors import UserError


def placeholders(template: str) -> list[str]:
    """Names in braces; UserError where a brace is open or names more than a plain field."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"prompt template {shorten(template)}: {error}; {{{{ is a brace") from error
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        # Attributes and indices would reach into Python objects.
        if spec or conversion or not name or set(name) & set(".[]"):
            raise UserError(
                f"prompt template {shorten(template)}: a field name such as {{question}} "
                f"was expected in the braces, found {shorten(name)}"
            )
        names.append(name)
    return names


def fill(template: str, record: Record) -> str:
    """The template with the fields of the row in it; BadRow for an unknown or empty field."""
    known = dict(record.fields)
    if isinstance(record.prompt, str) and record.prompt:
        known.setdefault("prompt", record.prompt)
    for name in placeholders(template):
        if name not in known:
            names = ", ".join(sorted(map(str, known)))
            raise BadRow(f"the prompt template asks for {name}; the row has {names}")
        if not isinstance(known[name], (str, int, float)):
            raise BadRow(f"the prompt template needs text in {name}, found {shorten(known[name])}")
    return template.format_map(known)
