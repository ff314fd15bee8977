"""Critiques as rows to train on: what is asked about an answer, and the reason for its score."""

from collections.abc import Iterable
from string import Formatter

from data_loading.conditioning import refuse_wide
from data_loading.messages import Message
from data_loading.records import Record, Text
from errors import UserError

CRITIQUE = (
    "Question: {prompt}\nAnswer: {response}\n"
    "What is good or bad about this answer, and which score does it get?"
)
REVISION = (
    "Question: {prompt}\nAnswer: {response}\nCritique: {critique}\n"
    "Write the answer anew, as the critique asks."
)


def check_critique_template(flag: str, template: str, *names: str) -> None:
    """Raise UserError unless a template has just the fields `names`, each at least once."""
    try:
        refuse_wide(flag, template)
        found = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
        good = found == set(names) and template.format(**dict.fromkeys(names, "x"))
    except (ValueError, KeyError, IndexError, AttributeError):
        good = False
    if not good:
        fields = " ".join("{" + name + "}" for name in names)
        raise UserError(f"{flag} {template!r}: must hold the fields {fields} and no other")


def critique_of(record: Record, template: str) -> Record | None:
    """The row that trains a critique of an answer; None where the row gives no reason."""
    reason = record.fields.get("score_reason")
    if not isinstance(reason, str) or not reason.strip() or record.reward is None:
        return None
    prompt, response = asked_and_answered(record)
    if not response:
        return None
    return Record(
        "prompt_completion",
        f"{record.where} critique",
        {},
        prompt=template.format(prompt=prompt, response=response),
        completion=f" {reason.strip()} Score: {record.reward:g}",
        reward=record.reward,
    )


def critiques(records: Iterable[Record], template: str) -> list[Record]:
    """Those of all rows that give a reason."""
    found = (critique_of(record, template) for record in records)
    return [record for record in found if record is not None]


def asked_and_answered(record: Record) -> tuple[str, str]:
    """Prompt and response of a row as texts; plain text is a response to nothing."""
    if record.kind == "text":
        return "", record.text
    if record.kind == "conversation":
        return as_text(record.messages[:-1]), as_text(record.messages[-1:])
    return as_text(record.prompt), as_text(record.completion)


def as_text(text: Text) -> str:
    """A text as it is; of messages the contents, a blank line between."""
    if isinstance(text, str):
        return text.strip()
    return "\n\n".join(said(turn) for turn in text if said(turn))


def said(turn: Message) -> str:
    content = turn.get("content")
    return content.strip() if isinstance(content, str) else ""
