"""What fuse.py reports of an export, and the comparison that a result has to stand."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from errors import UserError
from models.comparing import Difference, check_sequences
from models.parts import Parts
from models.soft_prompt import find_embedding

# In float32 a fused model is its unfused one up to the order of sums; more is a fault.
TOLERANCE = 1e-3


@dataclass
class Exported:
    """What was written and what can be done with it."""

    messages: list[str] = field(default_factory=list)
    next_commands: list[str] = field(default_factory=list)


@dataclass
class Check:
    """The sequences that the unfused model was run on, and what it gave."""

    sequences: list[list[int]]
    expected: list

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """What `parts` compute before they are fused."""
        vocabulary = find_embedding(parts.base.model)[2].weight.shape[0]
        sequences = check_sequences(parts.base.tokenizer, vocabulary)
        return cls(sequences, parts.outputs(sequences))


def refuse_broken(difference: Difference, what: str, expected: Sequence, exact: bool) -> None:
    """Raise UserError where a result is not finite or, if `exact`, not what was expected."""
    size = max(1.0, max(float(np.abs(part).max()) for part in expected))
    if not np.isfinite(difference.largest) or (exact and difference.largest > TOLERANCE * size):
        raise UserError(
            f"the result does not compute what the unfused model does: {what} differ "
            f"by {difference.largest:.1e}; nothing was written"
        )
