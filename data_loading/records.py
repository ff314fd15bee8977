"""Records: what a row means, whatever format it came in."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_loading.messages import Message

# Fields of a row that are a conversation or begin one, where they are lists.
MAY_HOLD_MESSAGES = "messages conversation conversations prompt question instruction chosen".split()
Text = str | list[Message]  # plain text, or messages for the tokenizer's template


@dataclass
class Record:
    """One row. `kind` says which of the fields below it are set."""

    kind: str  # text, prompt, prompt_completion, conversation, preference, unpaired
    where: str  # FILE:LINE
    fields: dict[str, Any]  # the row as it was read
    text: str = ""  # text
    messages: list[Message] = field(default_factory=list)  # conversation
    prompt: Text = ""  # prompt, prompt_completion, unpaired; preference: may be ""
    completion: Text = ""  # prompt_completion, unpaired
    responses: list[Text] = field(default_factory=list)  # preference: two or more
    ranks: list[int] = field(default_factory=list)  # preference: 0 is best; equal = a tie
    margin: float | None = None  # preference
    label: bool | None = None  # unpaired
    reward: float | None = None  # from `reward` or `meta_eval_score`
    extras: dict[str, Any] = field(default_factory=dict)  # tools, documents: for the chat template
    prompt_fields: list[str] = field(default_factory=list)  # names of `fields` that are its prompt
    answer_fields: list[str] = field(default_factory=list)  # and of those that are its answers
    prefix: str = ""  # words before its prompt that say its score; not trained

    @property
    def columns(self) -> dict[str, Any]:
        """All fields of the row, for a reward function, less the names of its own arguments."""
        return {k: v for k, v in self.fields.items() if k not in ("prompts", "responses")}

    def asked(self) -> Text:
        """The prompt as a person wrote it: text, or messages up to the last that asks.

        A question alone is a text, unless the row itself has messages; plain text has no prompt.
        """
        prompt = self.messages if self.kind == "conversation" else self.prompt
        if isinstance(prompt, str):
            return prompt
        last = max((i for i, m in enumerate(prompt) if m["role"] in ("user", "tool")), default=-1)
        prompt = prompt[: last + 1]
        alone = len(prompt) == 1 and list(prompt[0]) == ["role", "content"]
        written = [self.fields.get(name) for name in MAY_HOLD_MESSAGES]
        lists = any(
            isinstance(value, list | tuple) or (isinstance(value, str) and value[:2] == "[{")
            for value in written
        )
        return prompt[0]["content"] if alone and not lists else prompt


@dataclass
class Records:
    """Rows of one or more data sets, and the rows that were refused: [(where, why), ...]."""

    rows: list[Record]
    refused: list[tuple[str, str]] = field(default_factory=list)
    name: str = ""
    notes: list[str] = field(default_factory=list)  # what was mixed or left out, a line each

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Record:
        return self.rows[index]

    @property
    def kinds(self) -> Counter[str]:
        """How many rows of each kind."""
        return Counter(row.kind for row in self.rows)
