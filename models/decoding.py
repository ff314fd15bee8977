"""Batched sampling with a KV cache, keeping what PPO needs: EOS, log-probabilities, values.

Prompts are left-padded to one length. A row that is finished leaves the batch, so later steps do
not pay for it. Random numbers belong to (step, row) and are drawn beforehand, so a row's text does
not depend on when the others finish.

Legend: B rows, b rows still alive, V vocabulary.
"""

from fast_blas import exp

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from errors import UserError
from models.limits import find_limits
from models.trunk import find_trunk, hidden_states, logits_from_hidden

# Tokens of each prompt that go through the model at once: attention's scores of a long prompt, of
# every token for every other, would be the largest array of all.
PREFILL = 512
# Steps between which buffers of past shapes are given back (mlx-lm's generate does so too).
CLEAR_EVERY = 256
# Rows are dropped once this share of the batch is finished: each drop copies the cache.
DROP_SHARE = 0.125


@dataclass
class Sampling:
    """How tokens are picked. PPO's KL is an estimate of the true one only at the defaults."""

    temperature: float = 1.0  # 0 picks the most likely token
    top_k: int = 0  # 0: off
    top_p: float = 0.0  # 0 or 1: off
    min_p: float = 0.0  # 0: off
    filters_off: bool = field(init=False)

    def __post_init__(self):
        self.filters_off = not (self.top_k or self.min_p or 0 < self.top_p < 1)


@dataclass
class Generation:
    """One batch of responses; row i of every list belongs to prompt i."""

    responses: list[list[int]]  # EOS included where it was written
    logprobs: list[np.ndarray]  # (len,) float32, of the tempered, unfiltered distribution
    values: list[np.ndarray] | None  # (len,) float32, where a value head was given
    finished: list[bool]  # ended by EOS or a stop string, not by the length limit


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    eos_ids: set[int],
    sampling: Sampling | None = None,
    key: mx.array | None = None,
    value_head: Callable[[mx.array], mx.array] | None = None,
    min_tokens: int = 0,
    should_stop: Callable[[list[int]], bool] | None = None,
    samples: int = 1,
    uniforms: mx.array | None = None,
    ahead: bool | None = None,
    watch: Callable[[range], Iterable[int]] = iter,
) -> Generation:
    """Sample `samples` responses to each prompt (lists of token ids, none empty).

    Those of one prompt adjoin, and the prompt is read once for all of them. `max_tokens` is a limit
    for all rows or one for each. `key` seeds the sampling (default: the global state); `uniforms`
    (step, B), numbers in [0, 1), take its place. `should_stop(tokens)` ends a row early (stop
    strings). `min_tokens` forbids EOS before that many tokens. `ahead`: a step is handed to the
    device before the tokens of the last one are looked at, so that it never waits for Python; a
    row is then seen to end one step later. None: on a GPU. `watch` goes around the steps,
    for a bar.
    """
    sampling = sampling or Sampling()
    count = len(prompts) * samples
    limits = [max_tokens] * count if isinstance(max_tokens, int) else list(max_tokens)
    if not prompts or any(not p for p in prompts) or min(limits) < 1:
        raise ValueError("every prompt needs a token, and every row a limit of at least 1")
    known = find_limits(model)
    for row, limit in enumerate(limits):
        known.check_one(prompts[row // samples], "a prompt", limit)
    if ahead is None:
        ahead = mx.default_device().type == mx.DeviceType.gpu
    state = _Rows(limits, eos_ids, should_stop, value_head is not None)
    if uniforms is None:
        uniforms = mx.random.uniform(shape=(max(limits), count), key=key)  # (step, B)
    tokens, cache = _left_pad(model, prompts)
    tokens = prefilled(model, tokens, cache)
    eos = mx.array(sorted(eos_ids)) if min_tokens else None
    made, evaluate = None, mx.async_eval if ahead else mx.eval
    for step in watch(range(max(limits))):
        hidden = hidden_states(model, tokens, cache=cache)[:, -1]  # (b, D)
        if step == 0 and samples > 1:
            rows = mx.repeat(mx.arange(len(prompts)), samples)  # (B,)
            hidden = hidden[rows]
            for layer in cache:
                keep_rows(layer, rows)
        logits = logits_from_hidden(model, hidden).astype(mx.float32)  # (b, V)
        if step < min_tokens:
            logits[:, eos] = -mx.inf
        picked, logprobs = pick(logits, sampling, uniforms[step][mx.array(state.alive)])
        last, made = made, [picked, logprobs]
        if value_head is not None:
            made.append(value_head(hidden))
        evaluate(*made)
        keep = state.record(*(last if ahead else made)) if last or not ahead else None
        if not state.alive:
            break
        if keep is not None:
            index = mx.array(keep)
            for layer in cache:
                keep_rows(layer, index)
            made = [column[index] for column in made]
        tokens = made[0][:, None]  # (b, 1)
        if step % CLEAR_EVERY == CLEAR_EVERY - 1:
            mx.clear_cache()
    if ahead and state.alive:
        state.record(*made)
    mx.clear_cache()  # buffers of a rollout's shapes fit no update
    return state.result()


def prefilled(model: nn.Module, tokens: mx.array, cache: list) -> mx.array:
    """Read tokens (B, P) into `cache`, PREFILL of each row at a time; the last ones (B, p) stay."""
    while tokens.shape[1] > PREFILL:
        hidden_states(model, tokens[:, :PREFILL], cache=cache)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        tokens = tokens[:, PREFILL:]
    return tokens


class _Rows:
    """Book-keeping of a batch: what each row has written, and which rows are still in the batch."""

    def __init__(self, limits, eos_ids, should_stop, with_values):
        count = len(limits)
        self.limits, self.eos_ids, self.should_stop = limits, eos_ids, should_stop
        self.alive = list(range(count))  # rows in the batch, in batch order
        self.done = [False] * count
        self.finished = [False] * count
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.values: list[list[float]] | None = [[] for _ in range(count)] if with_values else None

    def record(
        self, picked: mx.array, logprobs: mx.array, values: mx.array | None = None
    ) -> list[int] | None:
        """Add one token a row; returns batch positions to keep when rows are to be dropped."""
        picked, logprobs = np.array(picked), np.array(logprobs)
        values = np.array(values) if values is not None else None
        for place, row in enumerate(self.alive):
            if self.done[row]:
                continue
            token = int(picked[place])
            self.tokens[row].append(token)
            self.logprobs[row].append(logprobs[place])
            if self.values is not None:
                self.values[row].append(values[place])
            stopped = token in self.eos_ids or (
                self.should_stop is not None and self.should_stop(self.tokens[row])
            )
            self.finished[row] = stopped
            self.done[row] = stopped or len(self.tokens[row]) >= self.limits[row]
        keep = [place for place, row in enumerate(self.alive) if not self.done[row]]
        dead = len(self.alive) - len(keep)
        if keep and dead < max(1, DROP_SHARE * len(self.alive)):
            return None
        self.alive = [self.alive[place] for place in keep]
        return keep

    def result(self) -> Generation:
        def arrays(rows):
            return [np.array(row, dtype=np.float32) for row in rows]

        values = arrays(self.values) if self.values is not None else None
        return Generation(self.tokens, arrays(self.logprobs), values, self.finished)


def pick(logits: mx.array, sampling: Sampling, uniform: mx.array) -> tuple[mx.array, mx.array]:
    """logits (b, V) float32, uniform (b,) in [0, 1) -> token ids (b,), log-probabilities (b,).

    Samples by inverting the cumulative distribution: one exponential per logit serves both the
    sample and its log-probability, and one random number per row is enough.
    """
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    shifted = logits - logits.max(axis=-1, keepdims=True)
    weights = exp(shifted)  # (b, V), unnormalised probabilities
    log_total = mx.log(weights.sum(axis=-1))  # (b,)
    if sampling.temperature == 0:
        picked = mx.argmax(logits, axis=-1)
    else:
        if not sampling.filters_off:
            weights = filtered(shifted - log_total[:, None], sampling)
        cumulative = mx.cumsum(weights, axis=-1)
        total = cumulative[:, -1]
        # Strictly below the total, or rounding could pick past the last possible token.
        threshold = mx.minimum(uniform * total, total * (1 - 2**-22))
        picked = mx.argmax(cumulative > threshold[:, None], axis=-1)  # the first one above
    logprobs = mx.take_along_axis(shifted, picked[:, None], axis=-1).squeeze(-1) - log_total
    return picked, logprobs


def filtered(logprobs: mx.array, sampling: Sampling) -> mx.array:
    """Log-probabilities (b, V) -> probabilities (b, V) with those filtered out at 0."""
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    if 0 < sampling.top_p < 1:
        logprobs = apply_top_p(logprobs, sampling.top_p)
    if sampling.min_p:
        logprobs = apply_min_p(logprobs, sampling.min_p)
    if 0 < sampling.top_k < logprobs.shape[-1]:
        logprobs = apply_top_k(logprobs, sampling.top_k)
    return exp(logprobs)


def _left_pad(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[mx.array, list]:
    """Prompts -> tokens (B, P) padded on the left, and a cache that knows the padding."""
    longest = max(len(p) for p in prompts)
    padding = [longest - len(p) for p in prompts]
    tokens = np.zeros((len(prompts), longest), dtype=np.int32)
    for row, (pad, prompt) in enumerate(zip(padding, prompts, strict=True)):
        tokens[row, pad:] = prompt
    cache = padded_cache(model, padding) if any(padding) else make_cache(model)
    return mx.array(tokens), cache


def keep_rows(layer, index: mx.array) -> None:
    """Keep the rows `index` of one layer's cache; one that is named twice is there twice."""
    if hasattr(layer, "filter"):
        layer.filter(index)
    elif getattr(layer, "keys", None) is not None:
        layer.keys, layer.values = layer.keys[index], layer.values[index]


# Relative error of a hidden state beyond which padding has been read as text. Models that heed
# padding were seen below 1e-6 in float32, Mamba, which does not, above 1.2.
READS_PADDING = 0.25


def make_cache(model: nn.Module) -> list:
    """An empty cache, one part for each layer, for prompts of one length."""
    from mlx_lm.models.cache import make_prompt_cache

    owner, _ = find_trunk(model)
    return make_prompt_cache(owner if hasattr(owner, "layers") else model)


def padded_cache(model: nn.Module, padding: Sequence[int]) -> list:
    """An empty cache for rows with `padding` tokens in front.

    Raises UserError where the model cannot tell padding from text.
    """
    if not getattr(model, "_heeds_padding", False):
        _check_padding(model)
        model._heeds_padding = True
    return _padded_cache(model, padding)


def _padded_cache(model: nn.Module, padding: Sequence[int]) -> list:
    return [_padded(model, layer, list(padding)) for layer in make_cache(model)]


def _padded(model: nn.Module, layer, padding: list[int]):
    """The batched form of one layer's cache."""
    from mlx_lm.models import cache as kinds

    if type(layer) is kinds.KVCache:
        kind = _grouped_cache() if _has_grouped_scores(model) else kinds.BatchKVCache
        return kind(padding)
    if type(layer) is kinds.RotatingKVCache and layer.keep == 0:
        return kinds.BatchRotatingKVCache(layer.max_size, padding)
    if type(layer) is kinds.ArraysCache:
        layer.left_padding = mx.array(padding)
        return layer
    if type(layer) is kinds.CacheList:
        return kinds.CacheList(*(_padded(model, part, padding) for part in layer.caches))
    raise UserError(
        f"this model keeps a {type(layer).__name__}, which cannot be batched with "
        "prompts of different lengths"
    )


def _has_grouped_scores(model: nn.Module) -> bool:
    """Whether attention scores are (B, groups, heads, L, L): Gemma 2, where heads share keys."""
    owner, _ = find_trunk(model)
    if getattr(owner, "model_type", None) != "gemma2":
        return False
    return owner.args.num_attention_heads > owner.args.num_key_value_heads


@cache
def _grouped_cache() -> type:
    """A BatchKVCache whose mask fits grouped scores; mlx-lm's (B, 1, L, L) does not."""
    from mlx_lm.models.cache import BatchKVCache

    class GroupedBatchKVCache(BatchKVCache):
        def make_mask(self, *args, **kwargs) -> mx.array:
            return super().make_mask(*args, **kwargs)[:, None]  # (B, 1, 1, L, L)

    return GroupedBatchKVCache


def _check_padding(model: nn.Module) -> None:
    """Compare a text behind padding, in a batch, with the same text alone."""
    text, other = [3, 1], [2, 4, 1, 3]  # any tokens will do
    kind = getattr(model, "model_type", type(model).__name__)
    try:
        alone = hidden_states(model, mx.array([text]))[0, -1].astype(mx.float32)  # (D,)
        batch = mx.array([[2, 4, *text], other])
        padded = hidden_states(model, batch, cache=_padded_cache(model, [2, 0]))
        padded = padded[0, -1].astype(mx.float32)
        error = (mx.linalg.norm(padded - alone) / mx.linalg.norm(alone)).item()
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as problem:
        raise UserError(
            f"model type {kind}: cannot be batched with prompts of different lengths ({problem})"
        ) from problem
    if not error < READS_PADDING:
        raise UserError(
            f"model type {kind}: reads the padding in front of a prompt as text, so "
            "prompts of different lengths cannot be batched; give prompts of one "
            "length"
        )
