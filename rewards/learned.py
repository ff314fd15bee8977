"""The rewards that come with the project: the digits score, and a learned reward model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from string import Formatter
from typing import Any

from data_utils import BadRow, PromptRow, Record, Template, extras_of, tokenise_scalar, use_date
from models.reading import MARK, Ending, Reading, template_tail
from rewards.digits import count_numbers, digits_score
from rewards.reward_set import Reward
from rewards.texts import Prompt, plain

GROUND_TRUTH, NUMBERS, LEARNED = "ground_truth", "numbers", "reward_model"
NO_LIMIT = 1 << 40  # tokens; how long a text may be is the policy's affair


def digits_rewards(
    *, increasing: bool, multiple_of: int, min_length: int, weight: float = 1.0
) -> list[Reward]:
    """The true score of a row of numbers, and (weight 0) how many numbers it has.

    The count stands beside the score because a score can rise by texts getting shorter.
    """

    def ground_truth(
        prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        rows = zip(prompts, responses, ended, strict=True)
        return [
            digits_score(
                plain(prompt) + response,
                increasing=increasing,
                multiple_of=multiple_of,
                min_length=min_length,
                cut_off=not end,
            )
            for prompt, response, end in rows
        ]

    def numbers(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        rows = zip(prompts, responses, strict=True)
        return [count_numbers(plain(prompt) + response) for prompt, response in rows]

    return [Reward(GROUND_TRUTH, ground_truth, weight), Reward(NUMBERS, numbers, 0.0)]


def learned_reward(
    model: Any,
    policy: Any,
    *,
    tokenizer: Any = None,
    batch_size: int = 64,
    off: Callable[[], AbstractContextManager] = nullcontext,
    prompt_template: str | None = None,
    token_format: str = "standard",
    weight: float = 1.0,
) -> Reward:
    """A reward model as a reward: it sees each text in the form that it was trained on.

    Args:
        model: a RewardModel (``score(token lists)`` and ``reading``), or an EncoderReward, which
            scores pairs of prompt and response.
        policy: the tokenizer of the model that writes the responses. Where the reward model reads
            other tokens, or by another template, it renders prompt and response itself; else it
            gets the policy's tokens, ended as its own texts are.
        tokenizer: the reward model's (default: that of ``model.source``).
        off: a context in which the policy's adapter is off.
        prompt_template, token_format: how the policy's prompts are written.
    """
    check = None
    if getattr(model, "reads_pairs", False):
        read = _read_pairs
    else:
        own = model.source.tokenizer if tokenizer is None else tokenizer
        template = (prompt_template, token_format.replace("-", "_"))
        read = Reader(
            own,
            model.reading,
            as_given=_reads_alike(policy, own, template, model),
            opening=opening_of(policy, *template),
        )
        check = partial(_check_prompts, model, read, off)

    def reward_model(
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        ended: Sequence[bool],
        **columns: Sequence,
    ) -> list[float]:
        texts = read(prompts, responses, token_ids, ended, columns)
        with off():
            return model.score(texts, batch_size)

    return Reward(LEARNED, reward_model, weight, check=check, model=model)


def _check_prompts(
    model: Any,
    read: "Reader",
    off: Callable[[], AbstractContextManager],
    rows: Sequence[PromptRow],
    response: int,
) -> None:
    """Raise UserError for a prompt that the reward model has no rows or positions for."""
    with off():
        for row in rows:
            columns = {name: [value] for name, value in row.columns.items()}
            [ids] = read([row.prompt], ["a"], [row.tokens], [True], columns)
            # Where one ended, its last token gave way to the recorded ending.
            room = max(0, response - (1 if read.as_given else 2))
            model.check(ids, where=f"{row.where} for the reward model", room=room)


def score_texts(model: Any, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Scores of whole responses, read by the reward model's own template.

    Prompts are texts, or the messages of a conversation.
    """
    ended = [True] * len(responses)
    if getattr(model, "reads_pairs", False):
        return model.score(_read_pairs(prompts, responses, (), ended, {}))
    read = Reader(model.source.tokenizer, model.reading, as_given=False)
    return model.score(read(prompts, responses, (), ended, {}))


def reward_beside(
    loaded: Any,
    tuning: Any,
    path: str,
    *,
    model: str | None,
    batch_size: int,
    any_base: bool,
    quantize: int | None,
    prompt_template: str | None,
    token_format: str,
    template_date: str,
    tokenizer: str | None = None,
    **options: Any,
) -> Reward:
    """The reward model at `path` as a reward for a policy: `loaded` with `tuning` on it.

    One that is an adapter shares the policy's base; unless every weight of that is trained, which
    needs a base of its own, `model` with `quantize` bits and `tokenizer`. `options` are those of
    ``load_model``.
    """
    from models.load import load_model
    from models.reward_model import load_reward_model

    if tuning.kind == "full":  # training moves the base
        base = load_model(model, quantize=quantize, tokenizer=tokenizer, **options)
        off = nullcontext
    else:
        base, off = loaded, tuning.disabled
    with off():
        reward_model = load_reward_model(path, base, any_base=any_base, **options)
    if not getattr(reward_model, "reads_pairs", False):
        use_date(reward_model.source.tokenizer, template_date)
    return learned_reward(
        reward_model,
        loaded.tokenizer,
        batch_size=batch_size,
        off=off,
        prompt_template=prompt_template,
        token_format=token_format,
    )


def _reads_alike(policy: Any, own: Any, template: tuple[str | None, str], model: Any) -> bool:
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


def _read_pairs(prompts, responses, token_ids, ended, columns) -> list[tuple[str, str]]:
    """(prompt, response) as texts, for encoders."""
    return [(plain(p), r) for p, r in zip(prompts, responses, strict=True)]


class Reader:
    """Makes the token lists that a reward model scores.

    `as_given`: of the policy's tokens; else it renders prompt and response by its own template, and
    they are the tokens of a training row with the same prompt and answer. `opening`: what the
    policy's template writes before an answer; None where a blank joins it to its prompt instead.
    """

    def __init__(
        self, tokenizer: Any, reading: Reading, *, as_given: bool, opening: str | None = ""
    ):
        self.tokenizer, self.reading, self.as_given = tokenizer, reading, as_given
        self.opening = opening
        self.ending = Ending(tokenizer, reading)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        ended: Sequence[bool],
        columns: Mapping[str, Sequence],
    ) -> list[list[int]]:
        rows = token_ids if self.as_given else self._rendered(prompts, responses, columns)
        return [self.ending.put(ids, end) for ids, end in zip(rows, ended, strict=True)]

    def _rendered(self, prompts, responses, columns) -> list[list[int]]:
        """Texts without an ending. UserError where the template refuses one."""
        records = [
            self._record(row, prompt, response, {name: c[row] for name, c in columns.items()})
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
        found: list[list[int]] = []
        for record in records:
            done = tokenise_scalar(
                [record],
                self.tokenizer,
                max_length=NO_LIMIT,
                prompt_template=self._template(record),
                token_format=self.reading.token_format,
            )
            found.append(self.ending.bare(done.rows[0].tokens))
        return found

    def _record(self, row: int, prompt: Prompt, response: str, fields: dict[str, Any]) -> Record:
        where = f"row {row}"
        if self.reading.plain:
            return Record("text", where, fields, text=plain(prompt) + response, reward=0.0)
        if self.reading.turns and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        standard = self.reading.token_format == "standard"
        chat = standard and template_tail(self.tokenizer) is not None
        turn = self.reading.prompt_template is None and (chat or isinstance(prompt, list))
        answer = response
        if self.opening is None:
            answer = response.strip() if turn else response
        else:
            answer = response.removeprefix(self.opening)
            if not turn and not answer[:1].isspace():
                answer = self.reading.joint + answer
        if isinstance(prompt, list):
            answer = [{"role": "assistant", "content": answer}]
        kind = "prompt_completion"
        made = Record(kind, where, fields, prompt=prompt, completion=answer, reward=0.0)
        made.extras = extras_of(fields)
        return made

    def _template(self, record: Record) -> str | None:
        """The prompt template; its one field is the prompt where the row has no such field."""
        template = self.reading.prompt_template
        names = {name for _, name, _, _ in Formatter().parse(template or "") if name}
        if len(names) == 1 and not names & record.fields.keys() and isinstance(record.prompt, str):
            template = template.replace("{" + names.pop() + "}", "{prompt}")
        return template
