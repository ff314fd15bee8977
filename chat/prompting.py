"""What has been said so far becomes the tokens that the model is given, as in training."""

import warnings
from dataclasses import dataclass
from typing import Any

from data_utils import Record, Template, tokenise_prompts
from errors import UserError

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
