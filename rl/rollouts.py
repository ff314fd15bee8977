"""One batch of experience: what was asked, what was written, and what training makes of it.

No array library: the PyTorch twin shares it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from errors import UserError

Array = Any  # of MLX or PyTorch


@dataclass
class Rollout:
    """Shapes: B responses, R the most counted tokens in one. Rows are right-padded with 0.

    The lists are what sampling gives, one entry a response; the arrays are filled in stage by stage
    (training/rollout_stages.py), and stay None where an algorithm has no use for them.
    """

    queries: list[list[int]]  # B
    responses: list[list[int]]  # B, EOS included
    ended: list[bool]  # B, whether the response ended by itself: by EOS or a stop text
    sampled_logprobs: list[np.ndarray] | None = None  # B x (length,), None: not kept
    sampled_values: list[np.ndarray] | None = None  # B x (length,), None: no value head, not kept
    masks: list[np.ndarray] = None  # B x (length,), True where a response token counts (all)

    scores: Array = field(default=None)  # (B,) after penalties, scaling and clipping
    mask: Array = field(default=None)  # (B, R) 1 where there is a token
    logprobs: Array = field(default=None)  # (B, R) under the policy that wrote them
    ref_logprobs: Array = field(default=None)  # (B, R)
    values: Array = field(default=None)  # (B, R)
    kls: Array = field(default=None)  # (B, R) nats
    non_score_rewards: Array = field(default=None)  # (B, R) -beta * KL
    rewards: Array = field(default=None)  # (B, R) the same, plus the score on the last token
    advantages: Array = field(default=None)  # (B, R)
    returns: Array = field(default=None)  # (B, R)
    kept: Any = field(default=None)  # states of frozen blocks (training/rollout_stages.py)

    def __post_init__(self):
        if self.masks is None:
            self.masks = [np.ones(len(response), dtype=bool) for response in self.responses]

    def __len__(self) -> int:
        return len(self.responses)

    def take(self, rows: Sequence[int]) -> "Rollout":
        """What was sampled of these rows, in this order; no array comes along."""

        def taken(column):
            return None if column is None else [column[row] for row in rows]

        return Rollout(**{name: taken(getattr(self, name)) for name in SAMPLED})


SAMPLED = ("queries", "responses", "ended", "sampled_logprobs", "sampled_values", "masks")


def join_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """One rollout of what was sampled in several calls, row after row; no array comes along."""

    def joined(name: str):
        columns = [getattr(part, name) for part in parts]
        return None if None in columns else [entry for column in columns for entry in column]

    return Rollout(**{name: joined(name) for name in SAMPLED})


def pad_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different length -> (B, R) float32, right-padded with 0."""
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.float32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def set_mask(rollout: Rollout, as_array: Callable[[np.ndarray], Array]) -> None:
    """Fill in `mask`: which places of the (B, R) arrays hold a counted token."""
    rollout.mask = as_array(pad_rows([np.ones(mask.sum()) for mask in rollout.masks]))


def use_sampled(rollout: Rollout, as_array: Callable[[np.ndarray], Array]) -> bool:
    """Fill in logprobs (and values) that sampling kept; False where it kept none."""
    if rollout.sampled_logprobs is None:
        return False

    def padded(rows):
        kept = [row[mask] for row, mask in zip(rows, rollout.masks, strict=True)]
        return as_array(pad_rows(kept))

    rollout.logprobs = padded(rollout.sampled_logprobs)
    if rollout.sampled_values is not None:
        rollout.values = padded(rollout.sampled_values)
    return True


def token_lists(rows: Sequence) -> list[list[int]]:
    """Rows of token ids, be they lists or arrays, as lists of int."""
    return [row.tolist() if hasattr(row, "tolist") else list(row) for row in rows]


def passes_over(config: Any, compared: bool) -> int:
    """How often a step sends a row through the policy's model once it is written.

    `compared`: the same model, its adapter off, is the reference.
    """
    return config.ppo_epochs + (not config.rollout_logprobs) + compared


# ---- random numbers ----------------------------------------------------------------------------

# What a step's random streams are for. One belongs to (seed, step, purpose), so a resumed run draws
# what one never stopped would have.
SAMPLING, ORDER, LENGTHS, EVALUATION, REFERENCE = range(5)


def stream(seed: int, step: int, *purpose: int) -> np.random.Generator:
    """Random numbers that depend on seed, step and purpose alone."""
    return np.random.default_rng([seed, step, *purpose])


def minibatch_order(count: int, seed: int, step: int, epoch: int) -> np.ndarray:
    """A permutation of `count` responses, fresh for each epoch of each step."""
    return stream(seed, step, ORDER, epoch).permutation(count)


def minibatch_update(
    rows: Sequence[int],
    size: int,
    gradient: Callable[[Sequence[int]], tuple[Any, dict[str, float]]],
    added: Callable[[Any, Any], Any],
    apply: Callable[[Any], float],
) -> list[dict[str, float]]:
    """One update from the minibatches of `size` that `rows` fall into; the metrics of each.

    `gradient(rows)` gives arrays, None where the minibatch must not move the weights, and metrics;
    `added(total, part)` is their sum, a total of None being 0. `apply(sum of the gradients)`
    returns their norm, which the last metrics get as "grad_norm".
    """
    total, metrics = None, []
    for start in range(0, len(rows), size):
        part, found = gradient(rows[start : start + size])
        metrics.append(found)
        if part is not None:
            total = added(total, part)
    if total is not None:
        norm = metrics[-1]["grad_norm"] = apply(total)
        if not math.isfinite(norm):  # of numbers that were finite themselves
            metrics[-1] |= {"not_finite": 1.0, "skipped": 1.0}
    return metrics


def response_limits(
    shortest: int | None, longest: int, count: int, seed: int, step: int, *part: int
) -> int | list[int]:
    """The longest response allowed: one number, or one drawn for each of `count` responses."""
    if shortest is None:
        return longest
    random = stream(seed, step, LENGTHS, *part)
    return random.integers(shortest, longest + 1, size=count).tolist()


# ---- whether a step can learn from it ----------------------------------------------------------


def check_rollout(
    queries: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    scores: Sequence[float],
    masks: Sequence[Sequence[int]] | None,
    batch_size: int,
    vocabulary: int,
) -> None:
    """Refuse what PPO cannot learn from; the UserError says which row.

    `queries` and `responses` are lists of token ids, of which there are `vocabulary`.
    """
    for name, rows in (("queries", queries), ("responses", responses), ("scores", scores)):
        if len(rows) != batch_size:
            raise UserError(f"{name}: {len(rows)} given, the batch size is {batch_size}")
    if masks is not None and len(masks) != batch_size:
        raise UserError(f"response_masks: {len(masks)} given, the batch size is {batch_size}")
    check_token_ids("query", queries, vocabulary)
    check_token_ids("response", responses, vocabulary)
    for row, (query, response, score) in enumerate(zip(queries, responses, scores, strict=True)):
        if not len(query):
            raise UserError(f"row {row}: the query is empty")
        if not len(response):
            raise UserError(f"row {row}: the response is empty")
        if not np.isfinite(score):
            raise UserError(f"row {row}: the score is {score}")
        if masks is not None:
            if len(masks[row]) != len(response):
                raise UserError(
                    f"row {row}: the response mask has {len(masks[row])} places, "
                    f"the response {len(response)} tokens"
                )
            if not any(masks[row]):
                raise UserError(f"row {row}: the response mask leaves no token")


def check_token_ids(name: str, rows: Sequence[Sequence[int]], vocabulary: int) -> None:
    """UserError, naming the row, for an id that no token has; MLX would read beyond memory."""
    for row, ids in enumerate(rows):
        if wrong := [i for i in ids if not 0 <= i < vocabulary]:
            raise UserError(
                f"row {row}: the {name} has the token id {wrong[0]}; the model's go "
                f"from 0 to {vocabulary - 1}"
            )


def as_numbers(scores: Sequence[float]) -> list[float]:
    """Scores as floats; UserError, naming the row, for what is no number."""
    numbers = []
    for row, score in enumerate(scores):
        try:
            numbers.append(float(score))
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"row {row}: the score is {score!r}, and no number") from None
    return numbers
