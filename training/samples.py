"""What a model writes beside training: answers to fixed prompts, samples to set a scale by."""

import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from models.decoding import Sampling, generate
from models.load import LoadedModel
from models.reading import Ending
from models.reward_network import normalise
from run_folder.run import Run


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
    tokenizer, prefix = loaded.tokenizer, task.tuning.prefix
    task.trained.eval()
    rows = [[*prefix, *prompt] for prompt in tokens]
    made = generate(
        loaded.model,
        rows,
        max_tokens=[loaded.limits.room(len(row), 100) for row in rows],
        eos_ids=loaded.eos_ids,
        sampling=Sampling(temperature=0),
        key=mx.random.key(0),  # leaves the random state of training alone
    )
    texts = [tokenizer.decode(r, skip_special_tokens=True) for r in made.responses]
    pairs = zip(prompts, texts, strict=True)
    run.log_samples(step, [{"prompt": p, "response": r} for p, r in pairs])


def normalise_on_samples(task: Any, loaded: LoadedModel, rows: Sequence, count: int) -> None:
    """Scores get mean 0 and deviation 1 on `count` texts that the base writes from row starts."""
    starts = [getattr(row, "tokens", None) or row.chosen for row in rows]
    starts = list(itertools.islice(itertools.cycle(starts), count))
    starts = [tokens[: max(1, len(tokens) // 4)] for tokens in starts]
    with task.tuning.disabled():
        longest = max(map(len, starts))
        longest = loaded.limits.room(longest, longest * 3)
        made = generate(
            loaded.model, starts, max_tokens=longest, eos_ids=loaded.eos_ids, key=mx.random.key(0)
        )
    ending = Ending(loaded.tokenizer, task.reward_model.reading)
    rows = zip(starts, made.responses, made.finished, strict=True)
    normalise(task.reward_model, [ending.put(start + answer, end) for start, answer, end in rows])
