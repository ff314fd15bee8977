"""The best of n responses to each prompt, alone or weighed by how many give its answer."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from data_utils import value_problem
from errors import UserError
from rewards.answers import AnswerFrom, as_number, find_answer, plain_answer
from rewards.scored_rows import PARTS, SCORE, Pair, answer_of, prompt_of
from rewards.texts import plain

Weighing = Literal["reward", "softmax"]


def best_of(pairs: Sequence[Pair]) -> list[Pair]:
    """The pair with the highest score of each prompt, the first of equals; in order of prompts."""
    return [max(own, key=lambda pair: pair.score) for own in by_prompt(pairs)]


def weighted_best_of(
    pairs: Sequence[Pair], weighing: Weighing, answer_from: AnswerFrom, answer_tag: str
) -> list[Pair]:
    """Of each prompt the best pair among those that give the answer of the largest weight.

    Weighted best-of-n (Li et al. 2023, DiVeRSe; weighted self-consistency): equal answers add up
    their rewards or, where those may be negative, exp(reward), as "softmax" does. Responses without
    an answer count where no response has one. Raises UserError for rewards below 0 that are to be
    added up.
    """
    if weighing == "reward" and (below := [pair for pair in pairs if pair.score < 0]):
        raise UserError(
            f"{below[0].whole.where}: a score of {below[0].score:g}: answers that are given often "
            "would lose by it; --weigh-answers softmax weighs scores of any sign"
        )
    found = []
    for own in by_prompt(pairs):
        highest = max(pair.score for pair in own)
        answers: dict[Any, list[Pair]] = {}
        for pair in own:
            answers.setdefault(answer_key(pair.response, answer_from, answer_tag), []).append(pair)
        if len(answers) > 1:
            answers.pop(None, None)

        def weight(same: list[Pair], highest: float = highest) -> float:
            if weighing == "reward":
                return math.fsum(pair.score for pair in same)
            return math.fsum(math.exp(pair.score - highest) for pair in same)

        found.append(max(max(answers.values(), key=weight), key=lambda pair: pair.score))
    return found


def answer_key(response: str, answer_from: AnswerFrom, answer_tag: str) -> Any:
    """What equal answers have in common: a number, or a text; None without an answer."""
    found = find_answer(response, answer_from, answer_tag, number=True)
    if found is None:
        return plain_answer(response) if answer_from == "auto" else None
    number = as_number(found)
    return plain_answer(found) if number is None else number


def by_prompt(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs with the same prompt together, in order of prompts."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(json.dumps(prompt_of(pair.record), sort_keys=True), []).append(pair)
    return [*groups.values()]


def trainable(pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose response a record can hold: some text, without a NUL. Sampled ones may be neither

    To pick among them is to give the others the lowest score, so the bound of `kl_of_best` holds.
    UserError where none is left.
    """
    texts = [plain(answer_of(pair.record)) for pair in pairs]
    kept = [
        pair
        for pair, text in zip(pairs, texts, strict=True)
        if text.strip() and value_problem(text, 0) is None
    ]
    if not kept:
        raise UserError("--best-of: no response has any text that a training script would read")
    return kept


def kl_of_best(pairs: Sequence[Pair]) -> float:
    """How far the best of n samples lies from the model, in nats: the mean over prompts of
    log n - (n - 1)/n.

    Stiennon et al. 2020, appendix G.3; an upper bound (Beirami et al. 2024), reached where no two
    samples score alike.
    """
    counts = [len(own) for own in by_prompt(pairs)]
    return sum(math.log(n) - (n - 1) / n for n in counts) / len(counts)


def refuse_promptless(pairs: Sequence[Pair]) -> None:
    """UserError for a row whose response answers nothing."""
    for pair in pairs:
        if not prompt_of(pair.record):
            raise UserError(
                f"{pair.whole.where}: --best-of picks among the responses to a prompt, "
                "and this row has none"
            )


def best_rows(best: Iterable[Pair]) -> list[dict[str, Any]]:
    """Rows of prompt and completion for supervised fine-tuning."""
    return [
        {
            "prompt": prompt_of(pair.record),
            "completion": answer_of(pair.record),
            **pair.record.extras,
            SCORE: pair.score,
            PARTS: pair.parts,
        }
        for pair in best
    ]
