"""Internal rewards beside a policy: the reference measures, and is calibrated on its own texts."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from data_utils import PromptRow
from models.decoding import Sampling
from models.trunk import vocabulary_size
from models.tuning import Tuning
from rewards.composite import CompositeRewards
from rewards.internal import ROWS, Signals
from rewards.reward_set import RewardSet
from rewards.texts import response_text
from rl.rollouts import stream
from training.groups import Group
from training.rollout_stages import reference_of, sample
from waiting import watched

CALIBRATION = 5  # what a random stream is for, beside those of training/rollout_stages.py


def reference_signals(
    names: Sequence[str],
    *,
    loaded: Any,
    tuning: Tuning,
    reference: nn.Module | None,
    prompts: Sequence[PromptRow],
    eos_ids: set[int],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    should_stop: Callable[[list[int]], bool] | None = None,
    **options: Any,
) -> Signals:
    """`Signals` of `reference`, or of the model with its adapter off.

    It is calibrated on responses at temperature 1 to the first ROWS `prompts` (again from the
    first, where there are fewer). `options` are those of `Signals`.
    """

    def on():
        return reference_of(loaded.model, tuning, reference)

    def written() -> dict[str, list]:
        rows = [prompts[i % len(prompts)] for i in range(ROWS)]
        responses: list[list[int]] = []
        with on() as model:
            for start in watched(range(0, ROWS, batch_size), "calibration"):
                made = sample(
                    model,
                    (),
                    [row.query for row in rows[start : start + batch_size]],
                    max_tokens=max_new_tokens,
                    sampling=Sampling(1.0),
                    eos_ids=eos_ids,
                    vocabulary=vocabulary_size(model),
                    random=stream(seed, 0, CALIBRATION, start),
                    should_stop=should_stop,
                )
                responses += made.responses
        pairs = list(zip(rows, responses, strict=True))
        return {
            "prompts": [row.prompt for row in rows],
            "responses": [response_text(loaded.tokenizer, r.tokens, a) for r, a in pairs],
            "token_ids": [[*row.tokens, *answer] for row, answer in pairs],
            "response_start": [len(row.tokens) for row in rows],
            "prompt_text": [row.text for row in rows],
        }

    return Signals(on, loaded.tokenizer, names, eos_ids=eos_ids, sample=written, **options)


def calibration_groups(rewards: RewardSet) -> dict[str, Group]:
    """The calibration of internal rewards as a part of checkpoints; {} where there are none."""
    if not isinstance(rewards, CompositeRewards):
        return {}
    signals = rewards.signals

    def arrays() -> dict[str, mx.array]:
        return {name: mx.array(value) for name, value in signals.numbers().items()}

    return {"internal_rewards": Group(arrays, signals.take_numbers)}
