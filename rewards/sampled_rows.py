"""Responses that a model samples to prompts, as pairs to score: what PPO would make of the prompts.

Pairs are made of the sampled tokens themselves, so `ended` is whether the model ended a response,
not what a text looks like.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from data_utils import PromptRow, Record
from models.decoding import Sampling, generate
from rewards.scored_rows import ENDED, Pair
from rewards.texts import response_text


def sample_pairs(
    loaded: Any,
    records: Sequence[Record],
    prompts: Sequence[PromptRow],
    *,
    samples: int,
    max_new_tokens: int,
    eos_ids: set[int],
    sampling: Sampling,
    batch_size: int,
    seed: int = 0,
    prefix: Sequence[int] = (),
    advance: Callable[[int], None] = lambda count: None,
) -> list[Pair]:
    """`samples` responses to each prompt, those of one prompt adjoining, in the prompts' order.

    `loaded`: a LoadedModel. `records`: the rows that the prompts are from. About `batch_size`
    responses are sampled together, to prompts of like lengths; `advance` is told how many are done.
    What is sampled depends on the prompts, these options and the seed. `prefix`: virtual tokens
    that stand before every prompt.
    """
    rows = {record.where: record for record in records}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens))
    together = max(1, batch_size // samples)
    made: dict[int, list[Pair]] = {}
    loaded.model.eval()
    for start in range(0, len(order), together):
        places = order[start : start + together]
        rollout = generate(
            loaded.model,
            [[*prefix, *prompts[i].query] for i in places],
            max_tokens=max_new_tokens,
            eos_ids=eos_ids,
            sampling=sampling,
            key=mx.random.key(seed + start),
            samples=samples,
        )
        for row, response in enumerate(rollout.responses):
            place = places[row // samples]
            prompt, ended = prompts[place], rollout.finished[row]
            pair = make_pair(rows[prompt.where], prompt, response, ended, loaded.tokenizer)
            made.setdefault(place, []).append(pair)
        advance(len(rollout.responses))
    return [pair for place in sorted(made) for pair in made[place]]


def make_pair(
    record: Record, prompt: PromptRow, response: list[int], ended: bool, tokenizer: Any
) -> Pair:
    """A sampled response as a pair; what is written has it in place of the row's own answers."""
    text = response_text(tokenizer, prompt.tokens, response)
    own = {*record.answer_fields, *record.prompt_fields}
    kept = {name: value for name, value in record.fields.items() if name not in own}
    written = {"prompt": prompt.prompt, "completion": text, **kept, ENDED: ended}
    whole = Record(
        "prompt_completion",
        record.where,
        written,
        prompt=prompt.prompt,
        completion=text,
        extras=record.extras,
    )
    tokens = [*prompt.tokens, *response]
    start = len(prompt.tokens)
    return Pair(
        replace(whole), whole, tokens, prompt.prompt, prompt.text, text, ended, start, own=False
    )
