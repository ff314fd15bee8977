"""From records to text: chat template, prompt template or token format.

The result is a list of pieces, (text, is the model's answer), in order; joined they are the text
that the model sees. Answers come without their header and with their end-of-turn marker.
"""

import string
from dataclasses import dataclass, field
from typing import Any

from data_loading.files import shorten
from data_loading.messages import BadRow, Message
from data_loading.records import Record, Text
from errors import UserError

Piece = tuple[str, bool]

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
        if self.prompt_template is not None:
            self.prompt_template = self.prompt_template.replace("\\n", "\n").replace("\\t", "\t")
            if not placeholders(self.prompt_template):
                raise UserError(
                    f"prompt template {shorten(self.prompt_template)}: names no field; "
                    'write one in braces, as in "Question: {question}"'
                )

    # Whole records ----------------------------------------------------------------------

    def record(self, record: Record) -> list[Piece]:
        """Prompt and answer of a row to train on (text, prompt_completion, conversation)."""
        if record.kind == "text":
            if self.prompt_template is not None:
                raise BadRow("a row of plain text takes no prompt template")
            return [(record.text, True)]
        if record.kind == "conversation":
            if self.prompt_template is not None:
                raise BadRow("a conversation takes no prompt template; use token formats")
            return self.conversation(record.messages)
        return self.answered(record, record.completion)

    def answered(self, record: Record, answer: Text) -> list[Piece]:
        """The prompt of a row, then one answer to it (a completion, a ranked response)."""
        if self.prompt_template is not None or not record.prompt:
            return [(self.prompt(record), False), (plain_text(answer), True)]
        if isinstance(record.prompt, list):
            return self.conversation([*record.prompt, *answer])
        if self.uses_chat_template:
            turns = {"role": "user", "content": record.prompt}, as_turn(answer)
            return self.conversation(list(turns))
        return [(record.prompt, False), (plain_text(answer), True)]

    def prompt(self, record: Record) -> str:
        """What the model is given before it answers.

        Of a conversation: everything up to its last user turn, and the header of the answer.
        """
        if self.prompt_template is not None:
            if record.kind in ("text", "conversation"):
                raise BadRow(f"a row of kind {record.kind} takes no prompt template")
            return fill(self.prompt_template, record)
        prompt = record.messages if record.kind == "conversation" else record.prompt
        if isinstance(prompt, str):
            if prompt and self.uses_chat_template:
                return self._chat([{"role": "user", "content": prompt}], True)
            return prompt
        asks = [i for i, m in enumerate(prompt) if m["role"] in ("user", "tool")]
        last = max(asks, default=-1)
        if last < 0:
            raise BadRow("the conversation has no user turn to take as a prompt")
        pieces = self.conversation(prompt[: last + 1], answer_next=True)
        return "".join(text for text, _ in pieces)

    # Conversations ----------------------------------------------------------------------

    def conversation(self, messages: list[Message], answer_next: bool = False) -> list[Piece]:
        """Pieces of a conversation; with `answer_next` the header of an answer at the end."""
        if self.uses_chat_template:
            return self._chat_pieces(messages, answer_next)
        if any("tool_calls" in m for m in messages):
            raise BadRow("tool calls need a tokenizer with a chat template")
        return self._marked_pieces(messages, answer_next)

    def _marked_pieces(self, messages: list[Message], answer_next: bool) -> list[Piece]:
        """Formats without a chat template; every answer ends with the tokenizer's EOS."""
        eos = eos_text(self.tokenizer)
        pieces: list[Piece] = []
        for message in messages:
            header, space, gap = self._marks(message["role"])
            if message["role"] == "assistant":
                pieces += [(header, False), (space + message["content"] + eos, True), (gap, False)]
            else:
                pieces.append((header + space + message["content"] + gap, False))
        if answer_next:
            pieces.append((self._marks("assistant")[0], False))
        elif pieces[-1][1] is False and messages[-1]["role"] == "assistant":
            pieces.pop()  # the gap after the last answer
        return [piece for piece in _joined(pieces) if piece[0]]

    def _marks(self, role: str) -> tuple[str, str, str]:
        """(header, what stands between header and content, what follows the turn)."""
        if self.token_format == "role_markers":
            # The space goes with the content: most tokenizers have " word" as one token.
            return f"{role.capitalize()}:", " ", "\n\n"
        if self.token_format == "turn_markers":
            return f"<|{role}|>\n", "", "\n"
        return "", "", "\n\n"

    def _chat_pieces(self, messages: list[Message], answer_next: bool) -> list[Piece]:
        whole = self._chat(messages, answer_next)
        pieces: list[Piece] = []
        at = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self._answer_span(messages, i, whole, at)
            pieces += [(whole[at:start], False), (whole[start:end], True)]
            at = end
        return [piece for piece in [*pieces, (whole[at:], False)] if piece[0]]

    def _answer_span(self, messages: list[Message], i: int, whole: str, at: int) -> tuple[int, int]:
        """Where in the whole text the answer `messages[i]` stands, its header left out."""
        upto = self._chat(messages[: i + 1], False)
        before = self._chat(messages[:i], True) if i else ""
        if i and upto.startswith(before) and whole.startswith(upto) and len(before) >= at:
            return len(before), len(upto)
        # Some templates render a turn differently once others follow it (they drop thoughts).
        content = message_text(messages[i])
        start = whole.find(content, at)
        if not content or start < 0:
            raise BadRow("the chat template changes an assistant turn; its tokens cannot be told")
        tail = upto[upto.rfind(content) + len(content) :]
        end = start + len(content)
        return start, end + (len(tail) if whole.startswith(tail, end) else 0)

    def _chat(self, messages: list[Message], answer_next: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next, **self.chat_options
            )
        except Exception as error:  # whatever the template's own code raises
            reason = shorten(str(error).partition("\n")[0], 120)
            raise BadRow(f"the chat template refuses the conversation: {reason}") from error


def as_turn(answer: Text) -> Message:
    """An answer as an assistant message."""
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer[-1]


def message_text(message: Message) -> str:
    """The content as templates write it: most strip it."""
    return message["content"].strip()


def plain_text(answer: Text) -> str:
    """An answer with no template around it."""
    return answer if isinstance(answer, str) else "\n\n".join(m["content"] for m in answer)


def eos_text(tokenizer: Any) -> str:
    """The tokenizer's end-of-sequence token as text."""
    if not tokenizer.eos_token:
        raise UserError("the tokenizer has no EOS token, so no answer could ever end; name one")
    return tokenizer.eos_token


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring pieces that are both not answers become one."""
    joined: list[Piece] = []
    for text, answer in pieces:
        if joined and not answer and not joined[-1][1]:
            text = joined.pop()[0] + text
        joined.append((text, answer))
    return joined


# Prompt templates ---------------------------------------------------------------------------


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
