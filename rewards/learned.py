"""The rewards that come with the project: the digits score, and a learned reward model."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from data_utils import PromptRow, Record, use_date
from rewards.digits import count_numbers, digits_score
from rewards.reader import Reader, opening_of, reads_alike
from rewards.reward_set import Reward
from rewards.texts import Prompt, plain

GROUND_TRUTH, NUMBERS, LEARNED = "ground_truth", "numbers", "reward_model"


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
        policy: the tokenizer of the model that writes the responses. The reward model renders
            prompt and response itself: it sees the tokens of a training row with that answer.
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
            alike=reads_alike(policy, own, template, model),
            opening=opening_of(policy, *template),
        )
        check = partial(_check_prompts, model, read, off)

    def reward_model(
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        ended: Sequence[bool],
        response_start: Sequence[int | None] | None = None,
        answered_record: Sequence[Record | None] | None = None,
        **columns: Sequence,
    ) -> list[float]:
        known = {"starts": response_start, "answered": answered_record}
        texts = read(prompts, responses, token_ids, ended, columns, **known)
        with off():
            return model.score(texts, batch_size)

    return Reward(LEARNED, reward_model, weight, check=check, model=model, by_row=True)


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
            columns["prompt_text"] = [row.text]
            start = [len(row.tokens)]
            [ids] = read([row.prompt], ["a"], [row.tokens], [True], columns, starts=start)
            # "a" is a token, and where one ended, its last gave way to the recorded ending.
            room = max(0, response - 2)
            model.check(ids, where=f"{row.where} for the reward model", room=room)


def score_texts(model: Any, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Scores of whole responses, read by the reward model's own template.

    Prompts are texts, or the messages of a conversation.
    """
    ended = [True] * len(responses)
    if getattr(model, "reads_pairs", False):
        return model.score(_read_pairs(prompts, responses, (), ended, {}))
    read = Reader(model.source.tokenizer, model.reading)
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


def _read_pairs(
    prompts, responses, token_ids, ended, columns, *, starts=None, answered=None
) -> list[tuple[str, str]]:
    """(prompt, response) as texts, for encoders."""
    records = [None] * len(responses) if answered is None else answered
    return [
        (plain(record.prompt), plain(record.completion))
        if record is not None and record.kind == "prompt_completion"
        else (plain(prompt), response)
        for prompt, response, record in zip(prompts, responses, records, strict=True)
    ]
