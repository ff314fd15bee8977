"""What a reward model is given: the tokens of a training row with the same prompt and answer."""

from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any

from data_utils import BadRow, Record, Template, answer_encoder, extras_of
from models.reading import MARK, Ending, Reading, template_tail
from rewards.texts import Prompt, plain, response_text

NO_TEXT = "\ufffd"  # what a decoder writes for bytes that are no text


class Reader:
    """Makes the token lists that a reward model scores.

    It renders prompt and response by the reward model's own template, so they are the tokens of a
    training row with the same prompt and answer.

    Args:
        tokenizer, reading: the reward model's.
        alike: whether the policy's tokens are those of the reward model, and its template too.
        opening: what the policy's template writes before an answer; None where no chat template
            writes its texts.
    """

    def __init__(
        self, tokenizer: Any, reading: Reading, *, alike: bool = False, opening: str | None = ""
    ):
        self.tokenizer, self.reading, self.alike = tokenizer, reading, alike
        self.opening = opening
        self.ending = Ending(tokenizer, reading)
        self._encoders: dict[str | None, Callable[[Record], list[int]]] = {}

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        ended: Sequence[bool],
        columns: Mapping[str, Sequence],
        *,
        starts: Sequence[int | None] | None = None,
        answered: Sequence[Record | None] | None = None,
    ) -> list[list[int]]:
        """Token lists, each ended as recorded where it `ended`.

        `starts`: how many of a row's `token_ids` are its prompt. Where the two models read alike,
        the policy's tokens are taken as they are if this is not known, or a response is no text.
        `answered`: rows of data, for responses that stand in the data. UserError where the
        template refuses a text.
        """
        found = []
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            fields = {name: column[row] for name, column in columns.items()}
            record = answered[row] if answered is not None else None
            start = starts[row] if starts is not None else None
            unknown = record is None or self._own_form(record)
            # What was trained before its form was recorded may have had the policy's flags; and no
            # row has bytes that are no text.
            given = start is None or NO_TEXT in response
            if self.alike and (self.reading.ending is None or (unknown and given)):
                found.append(self.ending.put(token_ids[row], ended[row]))
                continue
            if unknown:
                if self.alike:
                    response = self._all_of(response, token_ids[row], start)
                record = self._record(f"row {row}", prompt, response, fields)
                ids = self._encode(record)
                found.append(self.ending.put(ids) if ended[row] else self.ending.bare(ids))
            else:
                ids = self._encode(record)
                found.append(self.ending.put(ids, self.ending.ends(ids)))  # as in training
        return found

    def _encode(self, record: Record) -> list[int]:
        """The tokens of a row with the ending that its template writes."""
        template = self._template(record)
        if template not in self._encoders:
            self._encoders[template] = answer_encoder(
                self.tokenizer,
                prompt_template=template,
                token_format=self.reading.token_format,
                add_eos=self.reading.ending is None or None,
            )
        return self._encoders[template](record)

    def _all_of(self, response: str, ids: Sequence[int], start: int) -> str:
        """The response with the special tokens in it, which its text has not."""
        answer = self.ending.bare(ids)[start:]
        if not self.ending.special.intersection(answer):
            return response
        return response_text(self.tokenizer, ids[:start], answer, special=True)

    def _own_form(self, record: Record) -> bool:
        """Whether the reward model reads a row in another form than that of the data."""
        if record.kind == "conversation":
            return self.reading.plain or self.reading.prompt_template is not None
        return self.reading.plain or (self.reading.turns and isinstance(record.prompt, str))

    def _record(self, where: str, prompt: Prompt, response: str, fields: dict[str, Any]) -> Record:
        """A row of data with this prompt and this answer."""
        reading = self.reading
        if reading.plain:
            return Record("text", where, fields, text=plain(prompt) + response)
        standard = reading.prompt_template is None and reading.token_format == "standard"
        chat = standard and template_tail(self.tokenizer) is not None
        if self.alike and chat and fields.get("prompt_text") == prompt:  # words of a plain text
            return Record("text", where, fields, text=prompt + response)
        if reading.turns and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        turn = chat or (reading.prompt_template is None and isinstance(prompt, list))
        answer = self._answer(response, turn)
        if isinstance(prompt, list):
            answer = [{"role": "assistant", "content": answer}]
        made = Record("prompt_completion", where, fields, prompt=prompt, completion=answer)
        made.extras = extras_of(fields)
        return made

    def _answer(self, response: str, turn: bool) -> str:
        """A response without what its policy's template puts before it, with what ours does."""
        if self.opening is not None:
            answer = response.removeprefix(self.opening)
            blank = turn or answer[:1].isspace()
            return answer if blank else self.reading.joint + answer
        if not turn:
            return response
        if not self.alike:
            return response.strip()
        return (
            response.removeprefix(" ") if self.reading.token_format == "role_markers" else response
        )

    def _template(self, record: Record) -> str | None:
        """The prompt template; its one field is the prompt where the row has no such field."""
        template = self.reading.prompt_template
        names = {name for _, name, _, _ in Formatter().parse(template or "") if name}
        if len(names) == 1 and not names & record.fields.keys() and isinstance(record.prompt, str):
            template = template.replace("{" + names.pop() + "}", "{prompt}")
        return template


def reads_alike(policy: Any, own: Any, template: tuple[str | None, str], model: Any) -> bool:
    """Whether the policy's tokens are those that a reward model would make of the same text."""
    if policy is not own:
        same = getattr(policy, "chat_template", None) == getattr(own, "chat_template", None)
        if not same or policy.get_vocab() != own.get_vocab():
            return False
    reading = model.reading
    if reading.ending is None:  # from before it was recorded; nothing says that it differs
        return True
    return not reading.plain and template == (reading.prompt_template, reading.token_format)


def opening_of(policy: Any, prompt_template: str | None, token_format: str) -> str | None:
    """What a policy's chat template writes between a prompt and its answer, such as a blank.

    None where no chat template writes its texts.
    """
    template = Template(policy, prompt_template, token_format)
    if prompt_template is not None or not template.uses_chat_template:
        return None
    record = Record("prompt_completion", "a row", {}, prompt="a", completion=MARK)
    try:
        asked, text = template.prompt(record).text, template.record(record).text
    except BadRow:  # it wants something else; rows will say it
        return ""
    return text[len(asked) :].partition(MARK)[0] if text.startswith(asked) else ""
