"""Preference training as tasks of mlx_sft_trainer: DPO, CPO and ORPO on pairs, KTO on single rows.

Both sides of all pairs of a batch go through the model together: in one forward pass, on a CPU in
passes of rows of like lengths, so that little is padding; where a prompt is long, it is read once
for the responses to it. The reference has passes of its own, without a gradient, unless its
log-probabilities were computed before.

Legend: N rows (responses after their prompts), P pairs, R longest response, L padded length.
"""

import fast_blas  # noqa: F401

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from data_utils import PreferenceBatch, UnpairedBatch
from distributed.group import here
from mlx_sft_trainer import Sums, Task, has_share, own_share
from models.packing import Layout, lay_out, least_padding, left_justified
from models.reference import Reference
from models.shared_prompts import can_share_prompts, hidden_after
from models.trunk import picked_hidden, token_logprobs
from models.tuning import Tuning
from rl.preference_losses import (
    Pairs,
    dpo_loss,
    kto_baseline,
    kto_loss,
    pair_sums,
    sequence_weights,
)
from rl.reference_free_losses import cpo_loss, orpo_loss
from training.groups import Group, adapter_group

# On a CPU: the most tokens of a pass, beyond which its arrays outgrow the caches, and the tokens
# that one more pass is worth.
PASS_TOKENS, A_PASS = 1024, 64
EXTRAS = ("entropy", "top1", "mean_logit")


class PreferenceTask(Task):
    """What both kinds share: forward passes, the reference, metrics of tokens. Dropout is off."""

    def __init__(
        self,
        model: nn.Module,
        tuning: Tuning,
        *,
        reference: Reference | None = None,
        pass_tokens: int | None = None,
        pad_to_multiple: int = 1,
    ):
        self.model, self.trained, self.tuning = model, model, tuning
        self.reference, self.pad_to_multiple = reference, pad_to_multiple
        on_gpu = mx.default_device().type == mx.DeviceType.gpu  # every new shape is traced anew
        self.pass_tokens = (0 if on_gpu else PASS_TOKENS) if pass_tokens is None else pass_tokens
        self.share_prompts = bool(self.pass_tokens) and can_share_prompts(model)
        # As in TRL: with it, policy and reference would differ from the start.
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module._p_1 = 1.0

    def groups(self, adapter: dict) -> dict[str, Group]:
        """What a checkpoint holds of this task; `adapter`: what it says of the adapter."""
        groups = {"adapters": adapter_group(self.tuning, adapter)}
        if self.reference is not None and self.reference.kept is not None:

            def put(arrays: dict[str, mx.array]) -> None:
                self.reference.kept = arrays

            groups["reference"] = Group(lambda: self.reference.kept, put)
        return groups

    def passes(
        self, lengths: np.ndarray, width: int, shared: Sequence[tuple[np.ndarray, int]] = ()
    ) -> list[tuple[np.ndarray, int, int]]:
        """(rows, padded length, shared tokens) of each forward pass over rows of these lengths.

        `shared`: rows with tokens in front that they share. They have a pass of their own where
        that saves more than it costs.
        """
        if not self.pass_tokens:
            return [(np.arange(len(lengths)), width, 0)]
        rest, passes = np.ones(len(lengths), dtype=bool), []
        for rows, count in shared:
            if (len(rows) - 1) * (count + len(self.tuning.prefix)) > 2 * A_PASS:
                passes.append((rows, int(lengths[rows].max()), count))
                rest[rows] = False
        (rest,) = np.nonzero(rest)
        whole = lengths[rest] + len(self.tuning.prefix)
        groups = least_padding(whole, self.pass_tokens, A_PASS) if len(rest) else []
        return passes + [(rest[rows], int(lengths[rest[rows]].max()), 0) for rows in groups]

    def shared(self, batch, picked: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """Rows of a batch that share their first tokens, and how many; none by default."""
        return []

    def _layout(self, batch, rows: slice, picked: np.ndarray, prefix: Sequence[int]) -> Layout:
        tokens, lengths = batch.tokens[rows], batch.lengths[rows]
        shared = self.shared(batch, picked) if self.share_prompts else []
        return lay_out(
            tokens,
            picked,
            self.passes(lengths, tokens.shape[1], shared),
            prefix=prefix,
            pad_to_multiple=self.pad_to_multiple,
        )

    def _score(
        self, arrays: Sequence, extras: tuple[str, ...] = (), gradient: bool = False
    ) -> list[mx.array]:
        """Log-probabilities and `extras` of the picked tokens, each (N, R), 0 where none is."""
        passes, targets, slot, mask = arrays
        hidden = [
            hidden_after(self.model, *prompt, inputs, index)
            if prompt
            else picked_hidden(self.model, inputs, index)
            for inputs, index, *prompt in passes
        ]
        hidden = mx.concatenate(hidden)
        columns = token_logprobs(self.model, hidden, targets, extras=extras, gradient=gradient)
        return [mx.where(mask > 0, column[slot], 0.0) for column in columns]

    def _reference_logprobs(self, batch, rows: slice, picked: np.ndarray) -> mx.array:
        """(N, R) under the reference, evaluated."""
        layout = self._layout(batch, rows, picked, self.reference.prefix)
        policy = self.model
        with self.reference.on():
            self.model = self.reference.model
            try:
                (logprobs,) = self._score(layout.arrays())
                mx.eval(logprobs)
            finally:
                self.model = policy
        return logprobs

    def reference_logprobs(self, batch: PreferenceBatch | UnpairedBatch) -> np.ndarray:
        """Of every token of the responses of a batch, (N, L), 0 at other places."""
        rows = slice(0, self.rows(batch))
        found = np.array(self._reference_logprobs(batch, rows, batch.mask[rows]))
        out, counted = np.zeros(batch.tokens[rows].shape, np.float32), batch.mask[rows, 1:] > 0
        out[:, 1:][counted] = found[np.arange(found.shape[1]) < counted.sum(axis=1)[:, None]]
        return out

    @staticmethod
    def rows(batch) -> int:
        """How many rows of a batch the gradient is of."""
        return len(batch.tokens)

    @staticmethod
    def summary(metrics: dict[str, float]) -> dict[str, float]:
        return metrics


def token_metrics(
    extras: Sequence[mx.array], response: mx.array, chosen: mx.array, rejected: mx.array
) -> Sums:
    """Means over response tokens (N, R); `chosen`, `rejected` (N,) are 1 on rows of that side."""
    entropy, top1, mean_logit = extras

    def mean(column: mx.array, rows: mx.array | None = None):
        weights = response if rows is None else response * rows[:, None]
        return (mx.stop_gradient(column) * weights).sum(), weights.sum()

    return {
        "entropy": mean(entropy),
        "mean_token_accuracy": mean(top1, chosen),
        "logits/chosen": mean(mean_logit, chosen),
        "logits/rejected": mean(mean_logit, rejected),
    }


class PairTask(PreferenceTask):
    """Pairs of a chosen and a rejected response; the weight is their number (ranked lists: lists).

    `loss` is dpo_loss, cpo_loss or orpo_loss with its options, ``f(pairs) -> (mean, sums)``.
    """

    def __init__(
        self,
        model: nn.Module,
        tuning: Tuning,
        loss: Callable[..., tuple[mx.array, Sums]],
        *,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        nll_of_prompt: bool = False,
        **options: Any,
    ):
        super().__init__(model, tuning, **options)
        self.pair_loss, self.ld_alpha, self.use_weighting = loss, ld_alpha, use_weighting
        self.nll_of_prompt = nll_of_prompt

    def inputs(self, batches: Iterable[PreferenceBatch]) -> Iterator[list]:
        """`arrays` of each batch of an update, with what its loss has to know of the others."""
        batches = list(batches)
        tokens = pairs = 0.0
        for batch in batches:
            counts = self._picked(batch)[:, 1:].sum(axis=1)
            tokens += float((counts[batch.better] * batch.weights).sum())
            pairs += float(batch.weights.sum())
        for batch in batches:
            yield self.arrays(own_share(batch), tokens / pairs)

    def _picked(self, batch: PreferenceBatch) -> np.ndarray:
        """(N, L) tokens whose log-probability is needed: with ORPO also the chosen's prompts."""
        picked = batch.mask > 0
        if self.nll_of_prompt:
            rows = np.unique(batch.better)
            picked = picked.copy()
            picked[rows] = np.arange(picked.shape[1]) < batch.lengths[rows, None]
        return picked

    def shared(self, batch: PreferenceBatch, picked: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """The responses to each prompt, and how many tokens come before any that is predicted."""
        group = np.arange(len(batch.tokens))
        for one, other in zip(batch.better, batch.worse, strict=True):
            group[group == group[other]] = group[one]
        found = []
        for number in np.unique(group):
            (rows,) = np.nonzero(group == number)
            alike = (batch.tokens[rows] == batch.tokens[rows[0]]).all(axis=0)
            first = picked[rows, 1:].any(axis=0).argmax()  # is predicted from this place
            found.append((rows, int(min(first, alike.argmin() if not alike.all() else first))))
        return found

    def arrays(self, batch: PreferenceBatch, tokens_per_pair: float | None = None) -> list:
        """What of a batch goes into `loss`."""
        picked, every = self._picked(batch), slice(None)
        layout = self._layout(batch, every, picked, self.tuning.prefix)
        response = mx.array(left_justified(batch.mask, picked, layout.mask.shape[1]))
        better, worse = mx.array(batch.better), mx.array(batch.worse)
        reference = []
        if self.reference is not None:
            if batch.reference is not None:
                found = left_justified(batch.reference, picked, layout.mask.shape[1])
                logprobs = mx.array(found)
            else:
                logprobs = self._reference_logprobs(batch, every, picked)
            reference = list(pair_sums(logprobs, response, better, worse, self.ld_alpha))
        sides = np.zeros((2, len(batch.tokens)), dtype=np.float32)
        sides[0, batch.better] = sides[1, batch.worse] = 1
        if tokens_per_pair is None:
            (counts,) = (picked[:, 1:].sum(axis=1)[batch.better],)
            tokens_per_pair = float((counts * batch.weights).sum() / batch.weights.sum())
        numbers = np.array([tokens_per_pair, batch.lengths.sum()], dtype=np.float32)
        columns = [response, better, worse, mx.array(batch.weights), mx.array(sides)]
        soft = [] if batch.probabilities is None else [mx.array(batch.probabilities)]
        return [layout.arrays(), columns, reference, mx.array(numbers), soft]

    def loss(self, arrays: Sequence) -> tuple[mx.array, Sums]:
        layout, (response, better, worse, weights, sides), reference, numbers, soft = arrays
        extras = EXTRAS + (("log_sum_sq",) if self.use_weighting else ())
        logprobs, *scored = self._score(layout, extras, gradient=self.trained.training)
        counted = layout[3]
        chosen, rejected = pair_sums(logprobs, response, better, worse, self.ld_alpha)
        lengths = response.sum(axis=1)
        pairs = Pairs(
            chosen,
            rejected,
            lengths[better],
            lengths[worse],
            weights,
            *(reference or (None, None)),
            nll=-(logprobs * counted).sum(axis=1)[better],
            nll_tokens=counted.sum(axis=1)[better],
            probability=soft[0] if soft else None,
            tokens_per_pair=numbers[0],
        )
        weighing = {}
        if self.use_weighting:
            each = sequence_weights(logprobs, scored.pop(), response)
            weighing["weighting"] = each[better] * each[worse]
        loss, metrics = self.pair_loss(pairs, **weighing)
        weight = weights.sum()
        found = metrics | token_metrics(scored, response, *sides)
        total = loss * weight
        return total, {**found, "loss": total, "weight": weight, "num_tokens": numbers[1]}


class UnpairedTask(PreferenceTask):
    """KTO: single responses, wanted or not; the weight is their number.

    The baseline of a batch is made before its loss, from each prompt with the response of another
    row, by the policy as it then is.
    """

    def __init__(
        self,
        model: nn.Module,
        tuning: Tuning,
        *,
        loss_type: str = "kto",
        loss_options: dict[str, float] | None = None,
        **options: Any,
    ):
        super().__init__(model, tuning, **options)
        self.loss_type, self.loss_options = loss_type, loss_options or {}

    @staticmethod
    def rows(batch: UnpairedBatch) -> int:
        return len(batch.label)

    def inputs(self, batches: Iterable[UnpairedBatch]) -> Iterator[list]:
        for batch in batches:
            yield self.arrays(own_share(batch), has_share(batch))

    def arrays(self, batch: UnpairedBatch, counts: bool = True) -> list:
        """What of a batch goes into `loss`; `counts`: into the baseline of all workers too."""
        count = len(batch.label)
        own, other = slice(0, count), slice(count, None)
        picked = batch.mask[own]
        layout = self._layout(batch, own, picked, self.tuning.prefix)
        if batch.reference is not None:
            found = left_justified(batch.reference[own], picked, layout.mask.shape[1])
            ref_logps = mx.array(found.sum(axis=1))
        else:
            ref_logps = self._reference_logprobs(batch, own, picked).sum(axis=1)
        baseline = mx.zeros(())
        if self.loss_type == "kto":
            picked = batch.mask[other]
            mismatched = self._layout(batch, other, picked, self.tuning.prefix)
            (logprobs,) = self._score(mismatched.arrays())
            mx.eval(logprobs)
            reference = self._reference_logprobs(batch, other, picked)
            # Token by token: a difference of two sums would lose digits.
            ratios = (logprobs - reference).sum(axis=1)
            baseline = kto_baseline(ratios if here().alone else mean_of_all(ratios, counts))
        tokens = mx.array(float(batch.lengths[own].sum()))
        return [layout.arrays(), mx.array(batch.label), ref_logps, baseline, tokens]

    def loss(self, arrays: Sequence) -> tuple[mx.array, Sums]:
        layout, label, ref_logps, baseline, tokens = arrays
        logprobs, *scored = self._score(layout, EXTRAS, gradient=self.trained.training)
        loss, metrics = kto_loss(
            logprobs.sum(axis=1),
            ref_logps,
            label,
            baseline,
            loss_type=self.loss_type,
            **self.loss_options,
        )
        found = metrics | token_metrics(scored, layout[3], label, 1 - label)
        weight = mx.array(float(label.size))
        total = loss * weight
        return total, {**found, "loss": total, "weight": weight, "num_tokens": tokens}

    @staticmethod
    def summary(metrics: dict[str, float]) -> dict[str, float]:
        """With the margin between wanted and unwanted rows, where there are both."""
        sides = [metrics.get(f"rewards/{side}") for side in ("chosen", "rejected")]
        if None not in sides:
            metrics = {**metrics, "rewards/margins": sides[0] - sides[1]}
        return metrics


def mean_of_all(values: mx.array, counts: bool) -> mx.array:
    """(1,) the mean over the values of all workers, of which this one's may not count."""
    own = [values.sum() * counts, mx.array(float(values.size * counts))]
    total, number = here().sum(own, "the baseline of KTO")
    return (total / number)[None]


def make_task(
    algorithm: str,
    model: nn.Module,
    tuning: Tuning,
    *,
    loss_type: Sequence[str],
    options: dict[str, dict[str, Any]],
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    reference: Reference | None = None,
    pad_to_multiple: int = 1,
) -> PreferenceTask:
    """The task of an algorithm (dpo, kto, orpo, cpo, simpo, alphapo); `options` by loss."""
    common = {"reference": reference, "pad_to_multiple": pad_to_multiple}
    first = loss_type[0]
    if algorithm == "kto":
        return UnpairedTask(model, tuning, loss_type=first, loss_options=options[first], **common)
    if algorithm == "orpo":
        loss = functools.partial(orpo_loss, **options[first])
        return PairTask(model, tuning, loss, nll_of_prompt=True, **common)
    if algorithm == "dpo":
        loss = functools.partial(
            dpo_loss, loss_type=loss_type, loss_weights=loss_weights, options=options, beta=beta
        )
        own = {"ld_alpha": ld_alpha, "use_weighting": use_weighting}
        return PairTask(model, tuning, loss, **own, **common)
    loss = functools.partial(cpo_loss, loss_type=first, cpo_alpha=cpo_alpha, **options[first])
    return PairTask(model, tuning, loss, **common)
