"""What has been said: the system prompt and the exchanges; saved as a row that sft.py reads."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from data_loading.messages import BadRow, read_messages
from errors import UserError
from safe_files import write_atomically


@dataclass
class Exchange:
    """One prompt and the reply to it, as the next prompt quotes them."""

    prompt: str
    reply: str


@dataclass
class Conversation:
    """The exchanges so far, oldest first."""

    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def messages(self, prompt: str | None = None) -> list[dict]:
        """All of it as role and content, `prompt` as the last."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges:
            said.append({"role": "user", "content": exchange.prompt})
            said.append({"role": "assistant", "content": exchange.reply})
        return said + ([{"role": "user", "content": prompt}] if prompt is not None else [])

    def add(self, prompt: str, reply: str) -> None:
        self.exchanges.append(Exchange(prompt, reply))

    def undo(self) -> Exchange | None:
        """Take the last exchange back; None where there is none."""
        return self.exchanges.pop() if self.exchanges else None

    def save(self, path: Path) -> None:
        """Write one conversation record, ``{"messages": [...]}``."""
        if not self.exchanges:
            raise UserError("/save: nothing has been said yet")
        row = json.dumps({"messages": self.messages()}, ensure_ascii=False)
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
            return cls._of(read_messages(row["messages"], "messages"))
        except BadRow as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, messages: list[dict]) -> "Conversation":
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        roles = [m["role"] for m in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise BadRow("user and assistant must take turns, and the assistant have the last")
        texts = [m["content"] for m in messages]
        pairs = zip(texts[::2], texts[1::2], strict=True)
        return cls(system, [Exchange(*pair) for pair in pairs])
