"""Texts that models write beside training: prompts continued, and samples to set a scale by."""

import itertools
from collections.abc import Sequence

import mlx.core as mx

from models.decoding import Sampling, generate
from models.load import LoadedModel
from models.reading import Ending
from models.reward_network import normalise

# Fixed: samples beside training must not move its random state.
KEY = 0


def continued(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], prefix: Sequence[int] = (), *,
    max_tokens: int = 100,
) -> list[str]:  # fmt: skip
    """The most likely continuation of each prompt (token ids), as text.

    `prefix`: ids of virtual tokens in front of each.
    """
    made = generate(
        loaded.model,
        [[*prefix, *tokens] for tokens in prompts],
        max_tokens=max_tokens,
        eos_ids=loaded.eos_ids,
        sampling=Sampling(temperature=0),
        key=mx.random.key(KEY),
    )
    return [loaded.tokenizer.decode(r, skip_special_tokens=True) for r in made.responses]


def normalise_on_samples(task, loaded: LoadedModel, rows: Sequence, count: int) -> None:
    """Scores get mean 0 and deviation 1 on `count` texts that the base writes from row starts."""
    starts = [getattr(row, "tokens", None) or row.chosen for row in rows]
    starts = list(itertools.islice(itertools.cycle(starts), count))
    starts = [tokens[: max(1, len(tokens) // 4)] for tokens in starts]
    with task.tuning.disabled():
        longest = max(map(len, starts)) * 3
        made = generate(
            loaded.model,
            starts,
            max_tokens=longest,
            eos_ids=loaded.eos_ids,
            key=mx.random.key(KEY),
        )
    ending = Ending(loaded.tokenizer, task.reward_model.reading)
    made = zip(starts, made.responses, made.finished, strict=True)
    texts = [ending.put(start + response, end) for start, response, end in made]
    normalise(task.reward_model, texts)
