"""The date that a chat template sees: one for a whole run, and for every resume of it."""

import functools
import sys
from datetime import datetime
from typing import Any

from errors import UserError

CLOCK = "transformers.utils.chat_template_utils"
DATES = "strftime_now"  # by which transformers' templates ask what day it is


def now() -> str:
    """This moment as it is recorded, to the second."""
    return datetime.now().isoformat(timespec="seconds")


def read_date(text: str) -> datetime:
    """A recorded date, with or without a time. UserError for anything else."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"--template-date {text}: give a date such as 2026-11-26") from None


def asks_for_date(tokenizer: Any) -> bool:
    """Whether the chat template of a tokenizer reads the date."""
    template = getattr(tokenizer, "chat_template", None)
    texts = template.values() if isinstance(template, dict) else [template]
    return any(isinstance(text, str) and DATES in text for text in texts)


def use_date(tokenizer: Any, text: str) -> None:
    """Let the chat template of a tokenizer see this date, whatever day it is."""
    if not asks_for_date(tokenizer):
        return
    inner = getattr(tokenizer, "_tokenizer", tokenizer)  # mlx-lm's wrapper hands calls on
    if not hasattr(inner, "apply_chat_template"):  # a fast tokenizer has a `_tokenizer` as well
        inner = tokenizer
    date = read_date(text)
    apply = getattr(inner.apply_chat_template, "dated", inner.apply_chat_template)

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return date

    @functools.wraps(apply)
    def on_that_day(*args: Any, **options: Any) -> Any:
        # What templates call reads this name; as an option of the call it would become a text.
        module = sys.modules[CLOCK]
        before, module.datetime = module.datetime, Then
        try:
            return apply(*args, **options)
        finally:
            module.datetime = before

    on_that_day.dated = apply
    inner.apply_chat_template = on_that_day
