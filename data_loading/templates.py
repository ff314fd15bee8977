"""From records to text: chat template, prompt template or token format.

The result is a list of pieces, (text, is the model's answer), in order; joined they are the text
that the model sees. Answers come without their header and with their end-of-turn marker.
"""

from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

from data_loading.messages import BadRow, Message
from data_loading.prompt_templates import fill, placeholders
from data_loading.records import Record, Text
from data_loading.values import shorten
from errors import UserError

Piece = tuple[str, bool]

MARK = "@@the answer stands here@@"  # stands in for an answer, to see what a template adds

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

    def turn_end_id(self) -> int | None:
        """The special token that the chat template puts behind an answer; None without one.

        Training teaches it as the end, and a base model's configuration need not name it as an
        EOS, so whoever samples has to stop at it too.
        """
        if not self.uses_chat_template or self.prompt_template is not None:
            return None
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            pieces = self.conversation(turns)
        except BadRow:  # the template wants something else; it will say so at the first prompt
            return None
        answer = next((text for text, is_answer in reversed(pieces) if is_answer), "")
        ids = self.tokenizer.encode(answer.partition("b")[2].strip(), add_special_tokens=False)
        added = self.tokenizer.added_tokens_decoder
        return ids[0] if ids and ids[0] in added and added[ids[0]].special else None

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
                return self._before_answer([{"role": "user", "content": prompt}])
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
        elif messages[-1]["role"] == "assistant":
            pieces.pop()  # the gap after it
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
        if answer_next:
            return [(self._before_answer(messages), False)]
        whole = self._chat(messages)
        pieces: list[Piece] = []
        at = 0
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = self._answer_span(messages, i, whole, at)
                pieces += [(whole[at:start], False), (whole[start:end], True)]
                at = end
        return [piece for piece in [*pieces, (whole[at:], False)] if piece[0]]

    def _before_answer(self, messages: list[Message]) -> str:
        """The text that an answer to `messages` follows: with its header, whoever writes that."""
        asked = self._chat(messages, add_generation_prompt=True)
        if asked != self._chat(messages):
            return asked
        # The template knows no generation prompt; where it writes an answer shows the header.
        answered = self._chat([*messages, {"role": "assistant", "content": MARK}])
        before = answered.partition(MARK)[0]
        header = before.removeprefix(asked)
        return before if before.startswith(asked) and header.strip() else asked

    def _answer_span(self, messages: list[Message], i: int, whole: str, at: int) -> tuple[int, int]:
        """Where in the whole text the answer `messages[i]` stands, its header left out."""
        if i:
            before = self._before_answer(messages[:i])
            upto = self._chat(messages[: i + 1])
            if upto.startswith(before) and whole.startswith(upto) and len(before) >= at:
                return len(before), len(upto)
        # Some templates render a turn differently once others follow it (they drop thoughts).
        marked = [*messages]
        marked[i] = {**messages[i], "content": MARK}
        head, _, rest = self._chat(marked).partition(MARK)
        end = len(whole) - len(rest)
        fits = whole.startswith(head) and whole.endswith(rest) and at <= len(head) < end
        if not fits or MARK in whole:
            raise BadRow("the chat template changes an assistant turn; its tokens cannot be told")
        tail = self._chat(marked[: i + 1]).partition(MARK)[2]
        return len(head), end + len(commonprefix([rest, tail]))

    def _chat(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.chat_options,
            )
        except Exception as error:  # whatever the template's own code raises
            reason = shorten(str(error).partition("\n")[0], 120)
            raise BadRow(f"the chat template refuses the conversation: {reason}") from error


def as_turn(answer: Text) -> Message:
    """An answer as an assistant message."""
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer[-1]


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
