"""A minibatch that several workers share: what each one's part weighs in the whole.

A loss on some rows of a minibatch is a mean over them, of tokens or of rows. With the weights here
the parts add up to the loss of all rows; masks are the same at all, so that each knows them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from distributed.group import here

STAGE = "the sum of gradients"


@dataclass
class PassShare:
    """This worker's part of a pass.

    `loss`: weight of its loss, and of its gradient; `metrics`: of its metrics, by name, where it is
    not that of `loss`. `least`, `largest`: metrics that are extremes of rows; `there` says which
    workers have rows with tokens.
    """

    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    least: Sequence[str] = ()
    largest: Sequence[str] = ()
    there: Sequence[bool] = ()
    entropy: float = 1.0  # weight of an entropy term inside the loss, over that of the loss

    def whole(self, gradient: Any, metrics: dict[str, mx.array]) -> tuple[Any, dict]:
        """Gradient and metrics of the whole pass, in one collective."""
        workers = here()
        weighed = {
            name: self._slots(value)
            if name in (*self.least, *self.largest)
            else value * self.metrics.get(name, self.loss)
            for name, value in metrics.items()
        }
        gradient = tree_map(lambda g: g * self.loss, gradient)
        gradient, weighed = workers.sum((gradient, weighed), STAGE)
        for names, join in ((self.least, min), (self.largest, max)):
            for name in names:
                if name in weighed:
                    weighed[name] = mx.array(self._extreme(weighed[name], join))
        return gradient, weighed

    def _slots(self, value: mx.array) -> mx.array:
        """(workers,) the value at this worker's place, 0 elsewhere."""
        return mx.where(mx.arange(here().size) == here().rank, value, 0.0)

    def _extreme(self, values: mx.array, join: Any) -> float:
        found = [v for v, there in zip(values.tolist(), self.there, strict=True) if there]
        return join(found) if found else 0.0


def token_shares(masks: Sequence[np.ndarray], rows: Sequence[int], size: int) -> list[float]:
    """What each of `size` workers has of the counted tokens of `rows`; 0 of none."""
    counts = [sum(int(masks[row].sum()) for row in rows[rank::size]) for rank in range(size)]
    return [count / max(sum(counts), 1) for count in counts]
