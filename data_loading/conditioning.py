"""Answers conditioned on a score: a prefix that says it, before the first thing that is asked.

Chen et al. 2021 (Decision Transformer), with a return that is written out: fine-tuning puts each
row's own score there, and whoever samples puts the one that is wanted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from data_loading.records import Record, Text
from errors import UserError

WIDE = re.compile("[0-9]{5}")
KEY = "score_conditioning"  # in config.json of a model, and in the description of an adapter


@dataclass(frozen=True)
class Conditioning:
    """How a score is written, and the one that is wanted where nobody says another."""

    template: str
    target: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Conditioning | None":
        """What a model's configuration says; None where it was not trained on scores."""
        said = config.get(KEY)
        if said is None:
            return None
        try:
            check_template(said["template"])
            return cls(said["template"], float(said["target"]))
        except (KeyError, TypeError, ValueError, UserError):
            raise UserError(f"{KEY} of the model is not usable: {said!r}") from None

    def described(self) -> dict[str, Any]:
        return {"template": self.template, "target": self.target}

    def prefix(self, score: float | None = None) -> str:
        """The words for a score, or for the target."""
        return self.template.format(score=self.target if score is None else score)


def check_template(template: str) -> None:
    """Raise UserError for a template that does not say the score, or asks for more than that."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        refuse_wide("--score-template", template)
        good = names and set(names) == {"score"} and template.format(score=1.0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        good = False
    if not good:
        raise UserError(
            f"--score-template {template!r}: must hold {{score}} and no other field, such as "
            "'[Target Score: {score:.1f}] '"
        )


def refuse_wide(flag: str, template: str) -> None:
    """Raise UserError for a field of 10,000 characters or more, which fills every row with blanks.

    ValueError for what is no template.
    """
    if any(WIDE.search(spec or "") for _, _, spec, _ in Formatter().parse(template)):
        raise UserError(f"{flag} {template!r}: give its fields a width below 10,000 characters")


def put_before(prompt: Text, prefix: str) -> Text:
    """A text, or messages, with `prefix` before the first thing that is asked."""
    if isinstance(prompt, str):
        return prefix + prompt
    first = next((i for i, m in enumerate(prompt) if m["role"] == "user"), None)
    if first is None or not isinstance(prompt[first].get("content"), str):
        raise UserError("a score goes before the first user turn, and there is none with a text")
    turn = {**prompt[first], "content": prefix + prompt[first]["content"]}
    return [*prompt[:first], turn, *prompt[first + 1 :]]


def conditioned(record: Record, conditioning: Conditioning) -> Record:
    """A row with its own score before its prompt. Raises UserError where it has none."""
    if record.reward is None:
        raise UserError(
            f"{record.where}: --use-decision-transformer: the row has no score; the field reward "
            "or meta_eval_score is needed"
        )
    prefix = conditioning.prefix(record.reward)
    if record.kind == "text":
        return replace(record, text=prefix + record.text, prefix=prefix)
    name = "messages" if record.kind == "conversation" else "prompt"
    try:
        return replace(record, **{name: put_before(getattr(record, name), prefix)}, prefix=prefix)
    except UserError as why:
        raise UserError(f"{record.where}: {why}") from None
