"""What has been said so far becomes the tokens that the model is given, as in training."""

from dataclasses import dataclass
from typing import Any

from data_utils import Record, Template, put_before, tokenise_prompts
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
            messages = put_before(messages, self.prefix)
            last = self.prefix + last
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

    def said(self, messages: list[dict]) -> str | list[dict]:
        """The prompt as it was said: a text, or the conversation where there is one."""
        return messages if self.has_turns and len(messages) > 1 else messages[-1]["content"]
