"""Texts that a model writes beside training, on either backend; MLX's: training/samples.py."""

import itertools
from collections.abc import Sequence
from typing import Any

from models.reading import Ending
from models.text_scores import normalise
from run_folder.run import Run


def log_answers(
    run: Run, step: int, tokenizer: Any, prompts: Sequence[str], responses: Sequence[Sequence[int]]
) -> None:
    """Prompts and what was written to them (token ids), into samples.jsonl."""
    texts = [tokenizer.decode(r, skip_special_tokens=True) for r in responses]
    pairs = zip(prompts, texts, strict=True)
    run.log_samples(step, [{"prompt": p, "response": r} for p, r in pairs])


def starts_of(rows: Sequence, count: int) -> list[list[int]]:
    """The beginnings of `count` texts, the first quarter of each; rows come again if need be."""
    starts = [getattr(row, "tokens", None) or row.chosen for row in rows]
    starts = list(itertools.islice(itertools.cycle(starts), count))
    return [tokens[: max(1, len(tokens) // 4)] for tokens in starts]


def normalise_on(
    reward_model: Any,
    tokenizer: Any,
    starts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    ended: Sequence[bool],
) -> None:
    """Scores get mean 0 and deviation 1 on texts that were written after `starts`."""
    ending = Ending(tokenizer, reward_model.reading)
    rows = zip(starts, responses, ended, strict=True)
    normalise(reward_model, [ending.put([*start, *answer], end) for start, answer, end in rows])
