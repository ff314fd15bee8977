"""What is trained on top of a base model: a LoRA adapter, a soft prompt, or every weight."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from errors import UserError


class Tuning:
    """A set of trained arrays that can be switched off to get the base model back.

    `prefix` holds the ids of virtual tokens that go in front of every sequence while it is on.
    """

    kind: str
    prefix: tuple[int, ...] = ()
    active = True

    def activate(self) -> None:
        raise NotImplementedError

    def deactivate(self) -> None:
        raise NotImplementedError

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model is the base model."""
        was_active = self.active
        self.deactivate()
        try:
            yield
        finally:
            if was_active:
                self.activate()

    def arrays(self) -> dict[str, mx.array]:
        """The trained arrays by name, as they are saved."""
        raise NotImplementedError

    def load_arrays(self, arrays: dict[str, mx.array], source: str) -> None:
        """Take over `arrays`; UserError lists every mismatch with both shapes."""
        raise NotImplementedError

    def description(self, num_blocks: int) -> dict:
        """What a file of these arrays records about itself (mlx-lm's adapter_config.json)."""
        raise NotImplementedError


class FullTuning(Tuning):
    """Every weight of the model; its base does not survive, so it cannot be switched off."""

    kind = "full"

    def __init__(self, model: nn.Module):
        if any(hasattr(module, "bits") for module in model.modules()):
            raise UserError(
                "a quantised model cannot be fully fine-tuned; use LoRA, or a model "
                "that is not quantised"
            )
        self._model = model
        model.unfreeze()

    def activate(self) -> None:
        """Nothing to do: full fine-tuning is always on."""

    def deactivate(self) -> None:
        raise RuntimeError("full fine-tuning has no base to go back to; keep a reference copy")

    def arrays(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self._model.parameters()))

    def load_arrays(self, arrays: dict[str, mx.array], source: str = "weights") -> None:
        check_arrays(arrays, self.arrays(), source)
        self._model.load_weights(list(arrays.items()))

    def description(self, num_blocks: int) -> dict:
        return {"fine_tune_type": "full", "num_layers": num_blocks}


def check_arrays(given: dict, expected: dict, source: str) -> None:
    """Raise one UserError that lists every array too many, too few or of another shape.

    Arrays that fit and hold NaN or infinite values are refused as well.
    """
    from models.adapter_description import check_shapes  # a trainer reads no file

    check_shapes(given, expected, source)
    check_finite(given, source)


def check_finite(arrays: dict[str, mx.array], source: str) -> None:
    """Raise UserError that counts the NaN and infinite values of the first array with any."""
    for name, array in arrays.items():
        if not mx.issubdtype(array.dtype, mx.floating):
            continue
        if broken := int((~mx.isfinite(array)).sum()):
            raise UserError(
                f"{source}: {broken} of the {array.size} values of {name} are NaN or "
                "infinite, so nothing can be computed with it; take an earlier "
                "checkpoint"
            )
