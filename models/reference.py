"""The model that a policy is compared with.

It is the base without its adapter, the adapter as it was loaded, or a frozen copy; or it follows
the policy, where their weights are blended from time to time (TRL's sync_ref_model, Gorbatovski et
al. 2024, which it refuses with adapters): the reference of a LoRA policy is then a second set of
adapter weights on the same base, that of full fine-tuning the frozen copy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from errors import UserError
from models.tuning import Tuning, check_arrays

# ------------------------------------------------------------------------------ fixed


class Reference:
    """`model` is the reference within ``with reference.on():``; `prefix` is its soft prompt.

    `kept` are its arrays beside the base's, for a checkpoint to hold. `fingerprint` is that of a
    model from a file of its own, which none holds.
    """

    def __init__(
        self,
        model: nn.Module,
        switch: Callable | None = None,
        prefix: tuple[int, ...] = (),
        kept: dict[str, mx.array] | None = None,
        fingerprint: str | None = None,
    ):
        self.model, self.prefix, self.kept = model, prefix, kept
        self.fingerprint = fingerprint
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


def frozen_copy(model: nn.Module, fingerprint: str | None = None) -> Reference:
    """Another model, such as the base of full fine-tuning, which is not trained."""
    return Reference(model, fingerprint=fingerprint)


# ------------------------------------------------------------------------------ blended


Arrays = dict[str, mx.array]


class ReferenceBlend:
    """The reference of `model`, which `blend` moves towards the policy by `alpha`."""

    def __init__(self, model: nn.Module, tuning: Tuning, reference: nn.Module | None, alpha: float):
        """Raises UserError for a kind of adapter whose weights do not add up."""
        if tuning.kind not in ("lora", "full"):
            raise UserError(
                f"--sync-ref-model blends weights, which a {tuning.kind} adapter does "
                "not allow; use LoRA or full fine-tuning"
            )
        self._model, self._tuning, self._copy, self._alpha = model, tuning, reference, alpha
        self._adapter = without_effect(tuning.arrays()) if tuning.kind == "lora" else None

    @contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """The reference, for as long as the context lasts."""
        if self._adapter is None:
            yield self._copy
            return
        own = self._tuning.arrays()
        self._tuning.load_arrays(self._adapter, "reference")
        try:
            yield self._model
        finally:
            self._tuning.load_arrays(own, "policy")

    def blend(self) -> None:
        """reference <- alpha x policy + (1 - alpha) x reference."""

        def mixed(policy: mx.array, reference: mx.array) -> mx.array:
            return self._alpha * policy + (1 - self._alpha) * reference

        if self._adapter is None:
            self._copy.update(tree_map(mixed, self._model.parameters(), self._copy.parameters()))
            mx.eval(self._copy.parameters())
        else:
            own = self._tuning.arrays()
            self._adapter = {name: mixed(own[name], a) for name, a in self._adapter.items()}
            mx.eval(self._adapter)

    def arrays(self) -> Arrays:
        """What the reference is, by name, for checkpoints."""
        if self._adapter is not None:
            return dict(self._adapter)
        return dict(tree_flatten(self._copy.parameters()))

    def load_arrays(self, arrays: Arrays) -> None:
        """Take `arrays` back."""
        if self._adapter is None:
            self._copy.load_weights(list(arrays.items()))
        else:
            check_arrays(arrays, self._adapter, "checkpoint")
            self._adapter = dict(arrays)


def without_effect(arrays: Arrays) -> Arrays:
    """A LoRA adapter's arrays with B at 0, which is the model without the adapter."""
    return {k: mx.zeros_like(v) if k.endswith("lora_b") else v for k, v in arrays.items()}
