"""Whether PPO can learn from what a step is given. Shared with the PyTorch baseline: no MLX."""

from collections.abc import Sequence

import numpy as np

from errors import UserError


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
