"""Pairs of prompt and response out of any records, scored by a reward set, and what is written."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data_utils import (
    Record,
    Records,
    ScalarRow,
    Template,
    Tokenised,
    columns_of,
    ranked_pairs,
    tokenise_prompts,
    tokenise_scalar,
)
from errors import UserError
from models.reading import Ending, Reading, end_id
from reports.reward_report import pearson, preference_report, ranks, spearman
from rewards.texts import Prompt, plain, response_text, reward_columns
from rl.scores import constant

# Fields of rows with several responses that belong to all of them together.
SHARED = ("chosen", "rejected", "responses", "scores", "margin")
SCORE, PARTS, ENDED = "score", "rewards", "ended"  # fields that are written


@dataclass
class Pair:
    """A response to a prompt, as a reward gets it; `record` has it alone, `whole` is the row."""

    record: Record
    whole: Record
    tokens: list[int]  # prompt and response, up to the token that ends it where it ended
    prompt: Prompt  # as it was written
    prompt_text: str  # as a model is given it
    response: str
    ended: bool
    start: int | None = None  # of `tokens` the prompt; None where no token ends it
    own: bool = True  # the response is the record's, whole
    rank: int | None = None  # among the responses of a preference row, 0 the best
    score: float = float("nan")
    parts: dict[str, float] = field(default_factory=dict)


# ------------------------------------------------------------------------------ pairs


def make_pairs(
    records: Records, tokenizer: Any, options: dict[str, Any]
) -> tuple[list[Pair], Tokenised[ScalarRow]]:
    """Every response of every row, in their order, and the tokens for a report.

    `options` are those that data_utils' ``tokenise_...`` functions share. Raises UserError for rows
    without a response, unless bad rows are skipped.
    """
    bad: list[tuple[str, str]] = []
    found: list[tuple[Record, Record, int | None]] = []
    for record in records:
        if (problem := unanswered(record)) is None:
            found += singles(record)
        elif options["skip_bad_rows"]:
            bad.append((record.where, problem))
        else:
            raise UserError(f"{record.where}: {problem}")
    if not found:
        raise UserError(f"{records.name}: no row has a response; the first: {bad[0][1]}")
    done = tokenise_scalar([single for single, _, _ in found], tokenizer, **options)
    ending, left = Ending(tokenizer, Reading()), iter(done.rows)
    row = next(left, None)
    form = {key: options[key] for key in ("prompt_template", "token_format") if key in options}
    template = Template(tokenizer, **form)
    eos = end_id(tokenizer)
    turn_end = template.turn_end_id() or eos  # at which a policy stops
    pairs = []
    for single, whole, rank in found:
        if row is None or row.where != single.where:
            continue  # refused, in done.refused
        ended = ending.ends(row.tokens)
        stop = turn_end if template.writes(single) else eos
        tokens = [*ending.bare(row.tokens), stop] if ended else row.tokens
        pair = Pair(single, whole, tokens, prompt_of(single), "", "", ended, rank=rank)
        pair.own = ended or len(row.tokens) < options["max_length"]  # else it may have been cut
        pairs.append(pair)
        row = next(left, None)
    done.refused = bad + done.refused
    _add_texts(pairs, tokenizer, options, ending)
    return pairs, done


def unanswered(record: Record) -> str | None:
    """Why a row has no response; None where it has one."""
    if record.kind == "prompt":
        return "a prompt without a response; there is nothing to score"
    if record.kind == "conversation" and record.messages[-1]["role"] != "assistant":
        return "the conversation does not end with an answer; there is nothing to score"
    return None


def singles(record: Record) -> list[tuple[Record, Record, int | None]]:
    """(record with one response, the row it is from, its rank) for each response of a row."""
    if record.kind != "preference":
        kind = "prompt_completion" if record.kind == "unpaired" else record.kind
        return [(replace(record, kind=kind, reward=0.0), record, None)]
    ranked = enumerate(zip(record.responses, record.ranks, strict=True), 1)
    return [
        (
            replace(
                record,
                kind="prompt_completion",
                where=f"{record.where} response {place}",
                completion=response,
                reward=0.0,  # tokenise_scalar asks for one; nothing reads it
            ),
            record,
            rank,
        )
        for place, (response, rank) in ranked
    ]


def _add_texts(pairs: list[Pair], tokenizer: Any, options: dict[str, Any], ending: Ending) -> None:
    """Prompt and response of each pair as PPO hands them to a reward."""
    asked = [pair for pair in pairs if pair.record.kind == "conversation" or pair.record.prompt]
    longest = max((len(pair.tokens) for pair in pairs), default=2)
    options = {**options, "max_length": max(longest, options["max_length"])}
    records = [with_last_answer(pair.record) for pair in asked]
    prompts = tokenise_prompts(records, tokenizer, **options).rows if asked else []
    for pair, prompt in zip(asked, prompts, strict=True):
        start = len(prompt.tokens)
        pair.prompt, pair.prompt_text = prompt.prompt, prompt.text
        if pair.tokens[:start] == prompt.tokens:
            pair.start = start
            answer = ending.bare(pair.tokens[start:])
            pair.response = response_text(tokenizer, prompt.tokens, answer)
        else:  # a tokenizer that joins them differently
            pair.response = plain(answer_of(with_last_answer(pair.record)))
    for pair in pairs:
        if pair.record.kind == "text":
            pair.response = pair.record.text
        elif not pair.prompt_text:
            pair.response = plain(answer_of(pair.record))


def with_last_answer(record: Record) -> Record:
    """Of an answer of several turns those up to the last that asks belong to its prompt."""
    turns = record.completion
    if record.kind == "conversation" or not isinstance(turns, list) or len(turns) == 1:
        return record
    asks = max((i for i, turn in enumerate(turns) if turn["role"] in ("user", "tool")), default=-1)
    prompt = [*record.prompt, *turns[: asks + 1]]
    return replace(record, prompt=prompt, completion=turns[asks + 1 :] or turns[-1:])


def answer_of(record: Record) -> Any:
    """The response of a record that has one: text, or messages."""
    return record.messages[-1:] if record.kind == "conversation" else record.completion


def prompt_of(record: Record) -> Any:
    """Its prompt: text, or messages."""
    return record.messages[:-1] if record.kind == "conversation" else record.prompt


# ------------------------------------------------------------------------------ scores


def score_pairs(
    rewards: Callable, pairs: Sequence[Pair], batch_size: int, advance: Callable[[int], None]
) -> None:
    """Fill in the scores, the longest pairs first; `advance` is told how many are done."""
    order = sorted(pairs, key=lambda pair: -len(pair.tokens))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        columns = columns_of([pair.whole for pair in batch]) | given_columns(batch)
        prompts, responses = [p.prompt for p in batch], [p.response for p in batch]
        scores, parts = rewards(prompts, responses, **columns)
        for i, pair in enumerate(batch):
            pair.score = scores[i]
            pair.parts = {name: column[i] for name, column in parts.items()}
        advance(len(batch))


def given_columns(pairs: Sequence[Pair]) -> dict[str, Sequence]:
    """What rewards may ask for beside the data's columns."""
    return reward_columns(
        {},
        token_ids=[pair.tokens for pair in pairs],
        ended=[pair.ended for pair in pairs],
        prompt_text=[pair.prompt_text for pair in pairs],
        response_start=[pair.start for pair in pairs],
        answered_record=[pair.record if pair.own else None for pair in pairs],
    )


def summary(pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Count, mean, deviation and range of the score and of each reward, by name.

    Where the rows say so, also how well it agrees with them: "accuracy" over pairs of responses
    that are ranked, or over all pairs of a good and a bad response; "pearson" and "spearman" with
    rewards in the rows.
    """
    columns = {SCORE: [pair.score for pair in pairs]}
    for name in pairs[0].parts:
        columns[name] = [pair.parts[name] for pair in pairs]
    return {name: _describe(np.array(column), pairs) for name, column in columns.items()}


def same_score(pairs: Sequence[Pair]) -> float | None:
    """The score of all responses, where there is but one."""
    return constant([pair.score for pair in pairs])


def _describe(scores: np.ndarray, pairs: Sequence[Pair]) -> dict[str, float]:
    found = {
        "count": len(scores),
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "min": float(scores.min()),
        "max": float(scores.max()),
    }
    better, worse, weights = _ordered(pairs)
    if better:
        report = preference_report(scores[better], scores[worse], weights)
        found |= {"accuracy": report["accuracy"], "pairs": len(better)}
    labels = [pair.whole.label for pair in pairs]
    if None not in labels and len(set(labels)) == 2:
        good = sum(labels)
        found["accuracy"] = _separation(scores, np.array(labels))
        found["pairs"] = good * (len(labels) - good)
    rewards = [pair.whole.reward for pair in pairs]
    if None not in rewards and len(set(rewards)) > 1:
        rewards = np.array(rewards, dtype=np.float64)
        found |= {"pearson": pearson(scores, rewards), "spearman": spearman(scores, rewards)}
    return found


def _ordered(pairs: Sequence[Pair]) -> tuple[list[int], list[int], list[float]]:
    """(better, worse, weight) of all pairs of responses of a row whose ranks differ."""
    groups: dict[int, list[int]] = {}
    for place, pair in enumerate(pairs):
        if pair.rank is not None:
            groups.setdefault(id(pair.whole), []).append(place)
    places = [place for own in groups.values() for place in own]
    found = ranked_pairs([[pairs[i].rank for i in own] for own in groups.values()])
    return (
        [places[i] for i, *_ in found],
        [places[j] for _, j, *_ in found],
        [weight for _, _, weight, _ in found],
    )


def _separation(scores: np.ndarray, good: np.ndarray) -> float:
    """The share of pairs of a good and a bad response in which the good one scores higher.

    Ties count half (the area under the ROC curve, by the rank sum of Mann and Whitney).
    """
    count = int(good.sum())
    above = ranks(scores)[good].sum() - count * (count - 1) / 2
    return float(above / (count * (len(good) - count)))


# ------------------------------------------------------------------------------ rows


def scored_rows(pairs: Iterable[Pair]) -> list[dict[str, Any]]:
    """Each response as a row with its score: the row it was read from, or a part of it."""
    rows = []
    for pair in pairs:
        row = dict(pair.whole.fields)
        if pair.rank is not None:
            # The prompt has what it is made of; the template's fields are for the next reader.
            made = {*SHARED, *pair.whole.prompt_fields} - {*pair.record.extras}
            row = {name: value for name, value in row.items() if name not in made}
            row |= {"prompt": pair.record.prompt, "response": pair.record.completion}
            row["rank"] = pair.rank
        rows.append(row | {SCORE: pair.score, PARTS: pair.parts})
    return rows
