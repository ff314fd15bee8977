"""The model that a policy is compared with: the base without its adapter, the adapter as it was
loaded, or a frozen copy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from models.tuning import Tuning


class Reference:
    """`model` is the reference within ``with reference.on():``; `prefix` is its soft prompt."""

    def __init__(
        self,
        model: nn.Module,
        switch: Callable | None = None,
        prefix: tuple[int, ...] = (),
        kept: dict[str, mx.array] | None = None,
    ):
        self.model, self.prefix, self.kept = model, prefix, kept
        self._switch = switch

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within this context `model` is the reference; the policy is back after it."""
        if self._switch is None:
            yield
            return
        with self._switch():
            yield


def adapter_off(model: nn.Module, tuning: Tuning) -> Reference:
    """The base model, of which there is one copy."""
    return Reference(model, tuning.disabled)


def adapter_as_it_is(model: nn.Module, tuning: Tuning) -> Reference:
    """`tuning` with the arrays it has now; the base stays one copy."""
    kept = dict(tuning.arrays())
    reference = Reference(model, None, tuning.prefix, kept)

    @contextmanager
    def switch() -> Iterator[None]:
        trained = tuning.arrays()
        tuning.load_arrays(reference.kept, "reference")
        try:
            yield
        finally:
            tuning.load_arrays(trained, "reference")

    reference._switch = switch
    return reference


def frozen_copy(model: nn.Module) -> Reference:
    """Another model, such as the base of full fine-tuning, which is not trained."""
    return Reference(model)
