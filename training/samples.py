"""What a model writes while it is trained: greedy answers to fixed prompts, at each validation."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from models.decoding import Sampling, generate
from models.load import LoadedModel
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
