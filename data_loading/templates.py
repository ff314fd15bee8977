"""From records to text: chat template, prompt template or token format.

The result is the text that the model sees, and which characters of it are answers. Answers come
without their header and with what ends their turn. The text is never cut: its token ids are those
of the whole.
"""

import string
from dataclasses import dataclass, field
from typing import Any

from data_loading.answer_spans import KNOWN_KEYS, Rendered, render_conversation, render_prompt
from data_loading.chat_templates import ChatTemplate
from data_loading.messages import BadRow, Message, is_trained
from data_loading.records import Record, Text
from data_loading.values import shorten
from errors import UserError

TOKEN_FORMATS = {
    "standard": "the tokenizer's chat template; without one, the turns with a blank line between",
    "role_markers": '"User: ...", "Assistant: ...", "System: ..." with a blank line between',
    "turn_markers": '"<|user|>", "<|assistant|>", "<|system|>" on a line before each turn',
}


@dataclass
class Template:
    """How prompts and conversations become text for one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer or mlx-lm's wrapper of one.
        prompt_template: such as "Question: {question}\\n\\nAnswer: ", filled with the fields of
            the row (and {prompt}, where the record has one as text). It stands for the prompt;
            the answer follows it as it is. The two characters \\n are read as a line break.
        token_format: one of TOKEN_FORMATS, for conversations and single turns.
        chat_options: further arguments of the chat template, such as enable_thinking.

    Raises:
        UserError: an unknown token format, or a prompt template that is not well formed.
    """

    tokenizer: Any
    prompt_template: str | None = None
    token_format: str = "standard"
    chat_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.token_format = self.token_format.replace("-", "_")
        if self.token_format not in TOKEN_FORMATS:
            known = ", ".join(TOKEN_FORMATS)
            raise UserError(f"token format {self.token_format}: unknown; use one of {known}")
        has_one = getattr(self.tokenizer, "has_chat_template", None)
        if has_one is None:
            has_one = getattr(self.tokenizer, "chat_template", None) is not None
        self.uses_chat_template = bool(has_one) and self.token_format == "standard"
        self.notes: list[tuple[str, str, str]] = []  # (row, what happened to it, an example)
        self.chat = ChatTemplate(self.tokenizer, self.chat_options)
        if self.prompt_template is not None:
            self.prompt_template = self.prompt_template.replace("\\n", "\n").replace("\\t", "\t")
            if not placeholders(self.prompt_template):
                raise UserError(
                    f"prompt template {shorten(self.prompt_template)}: names no field; "
                    'write one in braces, as in "Question: {question}"'
                )

    def turn_end_id(self) -> int | None:
        """The special token that the chat template puts behind an answer; None without one.

        Training teaches it as the end, and a base model's configuration need not name it as an
        EOS, so whoever samples has to stop at it too.
        """
        if not self.uses_chat_template or self.prompt_template is not None:
            return None
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            rendered = self.conversation(turns)
        except BadRow:  # the template wants something else; it will say so at the first prompt
            return None
        answer = next((rendered.text[a:b] for a, b in reversed(rendered.answers)), "")
        ids = self.tokenizer.encode(answer.partition("b")[2].strip(), add_special_tokens=False)
        added = self.tokenizer.added_tokens_decoder
        return ids[0] if ids and ids[0] in added and added[ids[0]].special else None

    def writes(self, record: Record) -> bool:
        """Whether the chat template writes the text of a row that has an answer."""
        if not self.uses_chat_template or self.prompt_template is not None:
            return False
        return record.kind == "conversation" or (record.kind != "text" and bool(record.prompt))

    def note(self, record: Record, rendered: Rendered) -> None:
        """Remember what was noted of a row, for the report."""
        self.notes += [(record.where, *note) for note in dict.fromkeys(rendered.notes)]

    def fields(self, record: Record) -> set[str]:
        """The fields of a row that its text is made of."""
        if self.prompt_template is None:
            return {*record.prompt_fields, *record.answer_fields}
        names = set(placeholders(self.prompt_template))
        if "prompt" in names and "prompt" not in record.fields:
            names |= {*record.prompt_fields}
        return names | {*record.answer_fields}

    # Whole records ----------------------------------------------------------------------

    def record(self, record: Record) -> Rendered:
        """Prompt and answer of a row to train on (text, prompt_completion, conversation)."""
        if record.kind == "text":
            if self.prompt_template is not None:
                raise BadRow("a row of plain text takes no prompt template")
            return Rendered(record.text, [(0, len(record.text))])
        if record.kind == "conversation":
            if self.prompt_template is not None:
                raise BadRow("a conversation takes no prompt template; use token formats")
            return self.conversation(record.messages, record.extras)
        return self.answered(record, record.completion)

    def answered(self, record: Record, answer: Text) -> Rendered:
        """The prompt of a row, then one answer to it (a completion, a ranked response)."""
        if self.prompt_template is None and record.prompt:
            if isinstance(record.prompt, list):
                asked, turns = record.prompt, answer
            elif self.uses_chat_template:
                asked, turns = [{"role": "user", "content": record.prompt}], answer
            else:
                return self._plain(record, record.prompt, answer)
            turns = [as_turn(turns)] if isinstance(turns, str) else turns
            return self.conversation([*asked, *turns], record.extras, first=len(asked))
        prompt = self.prompt(record).text if self.prompt_template is not None else ""
        return self._plain(record, prompt, answer)

    def _plain(self, record: Record, prompt: str, answer: Text) -> Rendered:
        """A prompt and an answer that no chat template writes."""
        turns = answer if isinstance(answer, list) else []
        if len(turns) > 1:
            raise BadRow("an answer of several turns takes no prompt template; use token formats")
        text = prompt + plain_text(answer)
        extras = record.extras if self.prompt_template is None else {}  # the report names them
        made = Rendered(text, [(len(prompt), len(text))], notes=_unread(extras, turns))
        if turns and not is_trained(turns[0]):
            made.untrained = made.answers
        return made

    def prompt(self, record: Record) -> Rendered:
        """What the model is given before it answers.

        Of a conversation: everything up to its last user turn, and the header of the answer.
        """
        if self.prompt_template is not None:
            if record.kind in ("text", "conversation"):
                raise BadRow(f"a row of kind {record.kind} takes no prompt template")
            return Rendered(fill(self.prompt_template, record), [])
        prompt = record.messages if record.kind == "conversation" else record.prompt
        if isinstance(prompt, str):
            if prompt and self.uses_chat_template:
                turns = [{"role": "user", "content": prompt}]
                return render_prompt(self.chat, turns, record.extras)
            return Rendered(prompt, [], notes=_unread(record.extras, []))
        asks = [i for i, m in enumerate(prompt) if m["role"] in ("user", "tool")]
        last = max(asks, default=-1)
        if last < 0:
            raise BadRow("the conversation has no user turn to take as a prompt")
        prompt = prompt[: last + 1]
        if self.uses_chat_template:
            return render_prompt(self.chat, prompt, record.extras)
        return self._marked(prompt, record.extras, len(prompt), answer_next=True)

    # Conversations ----------------------------------------------------------------------

    def conversation(
        self, messages: list[Message], extras: dict[str, Any] | None = None, first: int = 0
    ) -> Rendered:
        """The text of a conversation; its answers are those from message `first` on."""
        if self.uses_chat_template:
            return render_conversation(self.chat, messages, extras or {}, first)
        return self._marked(messages, extras or {}, first)

    def _marked(
        self,
        messages: list[Message],
        extras: dict[str, Any],
        first: int,
        answer_next: bool = False,
    ) -> Rendered:
        """Formats without a chat template; every answer ends with the tokenizer's EOS."""
        if any("tool_calls" in m for m in messages):
            raise BadRow("tool calls need a tokenizer with a chat template")
        eos, made, gap = eos_text(self.tokenizer), Rendered("", []), ""
        made.notes = _unread(extras, messages)
        for i, message in enumerate(messages):
            header, space, after = self._marks(message["role"])
            start = len(made.text) + len(gap)
            made.text += gap + header
            gap = after
            if message["role"] == "assistant":
                start = len(made.text)
                made.text += space + message["content"] + eos
            else:
                made.text += space + message["content"]
            span = (start, len(made.text))
            if not is_trained(message):
                made.untrained.append(span)
            elif message["role"] == "assistant" and i >= first:
                made.answers.append(span)
        if answer_next:
            made.text += gap + self._marks("assistant")[0]
        elif messages[-1]["role"] != "assistant":
            made.text += gap
        return made

    def _marks(self, role: str) -> tuple[str, str, str]:
        """(header, what stands between header and content, what follows the turn)."""
        if self.token_format == "role_markers":
            # The space goes with the content: most tokenizers have " word" as one token.
            return f"{role.capitalize()}:", " ", "\n\n"
        if self.token_format == "turn_markers":
            return f"<|{role}|>\n", "", "\n"
        return "", "", "\n\n"


def as_turn(answer: Text) -> Message:
    """An answer as an assistant message; blanks around a text belong to texts that are joined."""
    if isinstance(answer, list):
        return answer[-1]
    return {"role": "assistant", "content": answer.strip()}


def plain_text(answer: Text) -> str:
    """An answer with no template around it."""
    if isinstance(answer, str):
        return answer
    if any("tool_calls" in message for message in answer):
        raise BadRow("tool calls need a tokenizer with a chat template")
    return "\n\n".join(message["content"] for message in answer)


def eos_text(tokenizer: Any) -> str:
    """The tokenizer's end-of-sequence token as text."""
    if not tokenizer.eos_token:
        raise UserError("the tokenizer has no EOS token, so no answer could ever end; name one")
    return tokenizer.eos_token


def _unread(extras: dict[str, Any], messages: list[Message]) -> list[tuple[str, str]]:
    """Notes on what only a chat template could show."""
    keys = [key for message in messages for key in message]
    left = [*extras, *(key for key in dict.fromkeys(keys) if key not in PLAIN_KEYS)]
    return [("without a chat template a part of the row is left out", name) for name in left]


PLAIN_KEYS = KNOWN_KEYS - {"reasoning_content", "reasoning", "thinking"}


# Prompt templates such as "Question: {question}\n\nAnswer: " ----------------------------------


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
