"""What has been said: the system prompt and the exchanges, saved as a row that sft.py reads.

And how it becomes the tokens that the model is given, as in training.
"""

import itertools
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_loading.formats import to_record
from data_loading.messages import BadRow
from data_utils import Record, Template, put_before, tokenise_prompts
from errors import UserError
from safe_files import write_atomically


@dataclass
class Exchange:
    """One prompt and the reply to it, as the next prompt quotes them.

    `turns` are the messages themselves where they say more: keys of their own, calls of tools.
    """

    prompt: str
    reply: str
    turns: list[dict] = field(default_factory=list)

    @property
    def messages(self) -> list[dict]:
        plain = [("user", self.prompt), ("assistant", self.reply)]
        return self.turns or [{"role": role, "content": text} for role, text in plain]


@dataclass
class Conversation:
    """The exchanges so far, oldest first; `extras` are tools and documents for the template.

    `system_keys`: further keys of the system's message, for the template as well.
    """

    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    extras: dict = field(default_factory=dict)
    system_keys: dict = field(default_factory=dict)

    def messages(self, prompt: str | None = None) -> list[dict]:
        """All of it as role and content, `prompt` as the last."""
        system = {"role": "system", "content": self.system, **self.system_keys}
        said = [system] if self.system else []
        for exchange in self.exchanges:
            said += exchange.messages
        return said + ([{"role": "user", "content": prompt}] if prompt is not None else [])

    def add(self, prompt: str, reply: str) -> None:
        self.exchanges.append(Exchange(prompt, reply))

    def undo(self) -> Exchange | None:
        """Take the last exchange back; None where there is none."""
        return self.exchanges.pop() if self.exchanges else None

    def save(self, path: Path) -> None:
        """Write one conversation record, ``{"messages": [...]}``, with its tools if it has any."""
        if not self.exchanges:
            raise UserError("/save: nothing has been said yet")
        row = json.dumps({"messages": self.messages(), **self.extras}, ensure_ascii=False)
        write_atomically(path, row + "\n")

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read what `save` wrote, or any row with messages. Raises UserError."""
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:  # broken JSON, broken UTF-8
            raise UserError(f"{path}: not one conversation as JSON: {error}") from None
        if not isinstance(row, dict) or "messages" not in row:
            raise UserError(f'{path}: not a conversation: {{"messages": [...]}} is needed')
        try:
            record = to_record(row, "conversation", str(path))
            return cls._of(record.messages, record.extras)
        except BadRow as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, messages: list[dict], extras: dict) -> "Conversation":
        first = messages.pop(0) if messages[0]["role"] == "system" else {}
        system = first.get("content")
        keys = {key: value for key, value in first.items() if key not in ("role", "content")}
        asks = [i for i, message in enumerate(messages) if message["role"] == "user"]
        exchanges = []
        for start, end in itertools.pairwise([*asks, len(messages)]):
            turns = messages[start:end]
            if turns[-1]["role"] != "assistant" or len(turns) < 2:
                break
            plain = all({*turn} == {"role", "content"} for turn in turns) and len(turns) == 2
            kept = [] if plain else turns
            exchanges.append(Exchange(turns[0]["content"], turns[-1]["content"], kept))
        if sum(len(exchange.messages) for exchange in exchanges) != len(messages):
            raise BadRow("user and assistant must take turns, and the assistant have the last")
        return cls(system, exchanges, extras, keys)


# ------------------------------------------------------------------------------ to tokens


NO_LIMIT = 1 << 40  # tokens; a chat is never cut silently


@dataclass
class Prompting:
    """Prompts for one tokenizer.

    With a chat template (or a token format with turns) a prompt is the whole conversation; for
    other models it is the last text alone, which they continue.
    """

    tokenizer: Any
    token_format: str = "standard"
    prompt_template: str | None = None
    prefix: str = ""  # before the first thing that is asked: the score that is wanted

    def __post_init__(self):
        template = Template(self.tokenizer, self.prompt_template, self.token_format)
        markers = template.token_format != "standard"
        if markers and self.prompt_template is not None:
            raise UserError(
                "--prompt-template and --token-format both say how a prompt is "
                "written; leave one of them out"
            )
        self.has_turns = self.prompt_template is None and (markers or template.uses_chat_template)

    def stop_at_turn_end(self) -> None:
        """Let a reply end at the special token that the chat template puts behind an answer."""
        template = Template(self.tokenizer, self.prompt_template, self.token_format)
        if (token := template.turn_end_id()) is not None:
            self.tokenizer.add_eos_token(str(token))

    def tokens(
        self, messages: list[dict], extras: dict[str, Any] | None = None
    ) -> tuple[list[int], str]:
        """(token ids with one BOS where the tokenizer writes one, the text they stand for).

        `messages` end with the user's; `extras` are tools and documents. Raises UserError where the
        template refuses them.
        """
        last = messages[-1]["content"]
        if not last.strip():
            raise UserError("the prompt is empty")
        if self.prefix:
            messages, last = put_before(messages, self.prefix), self.prefix + last
        if self.has_turns:
            record = Record(
                "conversation", "conversation", {}, messages=messages, extras=extras or {}
            )
        else:
            record = Record("prompt", "prompt", {"prompt": last}, prompt=last)
        rows = tokenise_prompts(
            [record],
            self.tokenizer,
            max_length=NO_LIMIT,
            prompt_template=self.prompt_template,
            token_format=self.token_format,
        )
        return rows[0].tokens, rows[0].text

    def recent(
        self, messages: list[dict], extras: dict | None, most: int | None
    ) -> tuple[list[int], str]:
        """As `tokens`, with the oldest exchanges, or of a text its beginning, left out until the
        prompt has at most `most` tokens.

        Raises UserError where the last prompt alone has more.
        """
        tokens, text = self.tokens(messages, extras)
        if most is None or len(tokens) <= most:
            return tokens, text
        warnings.warn(f"--max-context {most}: what is older is left out", stacklevel=2)
        if not self.has_turns:
            bos = tokens[:1] if tokens[0] == self.tokenizer.bos_token_id else []
            tokens = [*bos, *tokens[len(tokens) - most + len(bos) :]]
            return tokens, self.tokenizer.decode(tokens, skip_special_tokens=True)
        head = messages[:1] if messages[0]["role"] == "system" else []
        asks = [i for i, message in enumerate(messages) if message["role"] == "user"]
        for start in asks[1:]:
            tokens, text = self.tokens([*head, *messages[start:]], extras)
            if len(tokens) <= most:
                return tokens, text
        raise UserError(f"--max-context {most}: the last prompt alone has {len(tokens)} tokens")

    def said(self, messages: list[dict]) -> str | list[dict]:
        """The prompt as it was said: a text, or the conversation where there is one."""
        return messages if self.has_turns and len(messages) > 1 else messages[-1]["content"]
