"""What a model writes beside training: answers to fixed prompts, samples to set a scale by."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from models.decoding import Sampling, generate
from models.load import LoadedModel
from run_folder.run import Run
from training.sample_texts import log_answers, normalise_on, starts_of
from waiting import watched


def write_samples(
    run: Run,
    step: int,
    loaded: LoadedModel,
    task: Any,
    prompts: Sequence[str] | None,
    tokens: Sequence[Sequence[int]] | None,
) -> None:
    """Continue `prompts`, which are `tokens`, greedily; into samples.jsonl. None: nothing."""
    if not prompts or tokens is None:
        return
    prefix = task.tuning.prefix
    task.trained.eval()
    rows = [[*prefix, *prompt] for prompt in tokens]
    made = generate(
        loaded.model,
        rows,
        max_tokens=[loaded.limits.room(len(row), 100) for row in rows],
        eos_ids=loaded.eos_ids,
        sampling=Sampling(temperature=0),
        watch=partial(watched, name="samples"),
        key=mx.random.key(0),  # leaves the random state of training alone
    )
    log_answers(run, step, loaded.tokenizer, prompts, made.responses)


def normalise_on_samples(task: Any, loaded: LoadedModel, rows: Sequence, count: int) -> None:
    """Scores get mean 0 and deviation 1 on `count` texts that the base writes from row starts."""
    starts = starts_of(rows, count)
    with task.tuning.disabled():
        longest = max(map(len, starts))
        longest = loaded.limits.room(longest, longest * 3)
        made = generate(
            loaded.model,
            starts,
            max_tokens=longest,
            eos_ids=loaded.eos_ids,
            key=mx.random.key(0),
            watch=partial(watched, name="sampling"),
        )
    normalise_on(task.reward_model, loaded.tokenizer, starts, made.responses, made.finished)
