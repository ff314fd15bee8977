"""How much memory training takes, found by arithmetic before the first step.

The terms are sizes in bytes of arrays that MLX holds at the same time, counted on the blocks of
Llama's family; benchmarks/memory.py and a test compare their sum with MLX's own peak. Blocks of
other families keep other arrays, mixtures of experts most of all, and are estimated as if they
were of that one.

Legend: B rows of one pass, T tokens of a row, n = B x T, D width, V vocabulary, H heads, I width of
the feed-forward part, Q and K widths of all queries and of all keys.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from models.decoding import PREFILL
from models.load import weight_bytes
from models.lora import base_layer
from models.trunk import (
    GRADIENT_CHUNK_ELEMENTS,
    MAX_CHUNK_ELEMENTS,
    MIN_GRADIENT_CHUNK,
    hidden_states,
    vocabulary_size,
)
from models.tuning import Tuning

CACHE_STEP = 256  # tokens by which mlx-lm's KV caches grow
FLOAT = 4  # bytes of what is computed in float32 whatever the weights are
# Of a block, for a token, kept for the backward pass: the input of both norms, what the first one
# gives and the output of attention (D); keys and values (K); gate, up, sigmoid and products (I).
KEPT_D, KEPT_K, KEPT_I = 4, 2, 5
HALF_KEPT_D = 4  # and in half precision those of the norms in float32 beside them
# While one block is gone through backwards, for a token: gradients of the above.
BACKWARD_D, BACKWARD_I, BACKWARD_SCORES = 8, 4, 3
# The same of a pass without gradient: MLX allocates several operations ahead of the computation.
FORWARD_D, FORWARD_I, FORWARD_SCORES = 4, 3, 3
CHECKPOINT_D = 1.5  # with --grad-checkpoint: a block's input, and what finds it again
# Arrays of (positions, V), float32: logits, shifted, exponentials, their gradients.
HEAD, HEAD_ENTROPY, HEAD_ONLY_FORWARD = 5, 6, 3
# Moments of an optimizer, arrays of the size of what is trained.
MOMENTS = {"adam": 2, "adamw": 2, "lion": 1, "muon": 1, "sgd": 1, "adafactor": 0.1}
APPLYING = 3  # gradients as they are, divided and clipped, and the new weights


# ------------------------------------------------------------------------------ what it depends on


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model, as far as memory depends on them."""

    weights: int  # bytes without an adapter, with a reference copy or reward model beside
    layers: int
    hidden: int  # D
    queries: int  # Q
    keys: int  # K
    mlp: int  # I
    heads: int  # H
    vocabulary: int  # V
    number: int = 4  # bytes of a hidden state's number


@dataclass(frozen=True)
class Trained:
    """What is trained, and so what a backward pass needs."""

    weights: int  # bytes
    layers: int  # blocks that the backward pass goes through
    inputs: int = 0  # width of what adapted layers of all blocks read, beside the first norm's
    whole: bool = False  # every weight
    moments: float = 2
    checkpointed: bool = False  # --grad-checkpoint


@dataclass(frozen=True)
class Memory:
    """Bytes at the fullest moment, by what takes them, and which moment that is."""

    moment: str
    terms: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.terms.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in self.terms.items() if size)
        return f"{self.total / 1e9:.3g} GB ({self.moment}: {parts})"


# ------------------------------------------------------------------------------ moments


def supervised_memory(
    shape: Shape, trained: Trained, rows: int, length: int, targets: int | None = None
) -> Memory:
    """The peak of updates on `rows` rows of `length` tokens each.

    `targets`: tokens of all rows that are trained on (default: all but the first); 0: a score of
    each row, and no logits.
    """
    count = rows * (length - 1) if targets is None else targets
    return _fullest(
        [_backward(shape, trained, rows, max(1, length - 1), count, HEAD)], trained, shape
    )


def rollout_memory(
    shape: Shape,
    trained: Trained,
    batch: int,
    rows: int,
    prompt: int,
    response: int,
    compared: bool = True,
    kept: bool = False,
) -> Memory:
    """The peak of steps on `batch` responses with gradients of `rows`; lengths in tokens.

    `compared`: with a reference; `kept`: with what frozen blocks give (training/rollout_stages.py).
    """
    length = prompt + response - 1
    moments = [_backward(shape, trained, rows, length, rows * response, HEAD_ENTROPY)]
    if compared:
        moments.append(_reference(shape, rows, length, rows * response))
    if kept:
        held = {"frozen states": kept_bytes(shape, batch + rows, length)}  # those of a pass: copies
        moments = [(name, terms | held) for name, terms in moments]
    moments.append(_sampling(shape, batch, prompt, response))
    return _fullest(moments, trained, shape)


def kept_bytes(shape: Shape, rows: int, length: int) -> int:
    """What enters a block, for `rows` rows of `length` tokens."""
    return rows * length * shape.hidden * shape.number


def _fullest(moments: list[tuple[str, dict]], trained: Trained, shape: Shape) -> Memory:
    """The fullest of some moments, with what is held throughout."""
    what = "weights" if trained.whole else "adapter"
    moments = [*moments, (f"moving the {what}", {"gradients": APPLYING * trained.weights})]
    name, terms = max(moments, key=lambda moment: sum(moment[1].values()))
    held = {
        "weights": shape.weights,
        "adapter": 0 if trained.whole else trained.weights,
        "optimizer": trained.moments * trained.weights,
    }
    return Memory(name, held | terms)


def _backward(
    shape: Shape, trained: Trained, rows: int, length: int, targets: int, head: int
) -> tuple[str, dict]:
    """Forward and backward of B rows of T tokens, of which `targets` have a log-probability."""
    n, size = rows * length, shape.number
    scores = rows * shape.heads * length**2
    block = n * (KEPT_D * shape.hidden + KEPT_K * shape.keys + KEPT_I * shape.mlp) + scores
    if trained.whole:
        block += n * (shape.queries + shape.hidden + shape.mlp)
    block = block * size + HALF_KEPT_D * n * shape.hidden * FLOAT * (size < FLOAT)
    kept = trained.layers * block + n * trained.inputs * size
    if trained.checkpointed:
        kept = trained.layers * n * CHECKPOINT_D * shape.hidden * size + block
    kept += (n + targets) * shape.hidden * size  # after the last norm, and the targets' of them
    if trained.whole:
        logits = _logits(shape, targets, MAX_CHUNK_ELEMENTS, head)
    else:
        chunk = max(MIN_GRADIENT_CHUNK * shape.vocabulary, GRADIENT_CHUNK_ELEMENTS)
        logits = _logits(shape, targets, chunk, head, at_once=2)
    through = n * (BACKWARD_D * shape.hidden + BACKWARD_I * shape.mlp) + BACKWARD_SCORES * scores
    if logits >= through * size:
        return "logits", {"activations": kept, "logits": logits}
    terms = {"activations": kept + through * size, "gradients": trained.weights}
    return "backward pass", terms


def _logits(shape: Shape, targets: int, most: int, arrays: int, at_once: int = 1) -> float:
    """Bytes of so many arrays of logits, chunks of at most `most` elements, two of them at once
    where the next one is begun before the last one is through."""
    return arrays * min(targets * shape.vocabulary, most * at_once) * FLOAT


def _forward(shape: Shape, rows: int, length: int, before: int = 0) -> float:
    """Bytes of a pass of which nothing is kept, on rows with `before` tokens in their caches."""
    widths = FORWARD_D * shape.hidden + FORWARD_I * shape.mlp
    scores = FORWARD_SCORES * rows * shape.heads * length * (before + length)
    return (rows * length * widths + scores) * shape.number


def _reference(shape: Shape, rows: int, length: int, targets: int) -> tuple[str, dict]:
    logits = _logits(shape, targets, MAX_CHUNK_ELEMENTS, HEAD_ONLY_FORWARD)
    held = rows * length * shape.hidden * shape.number
    one = _forward(shape, rows, length)
    if logits > one:
        return "reference", {"activations": held, "logits": logits}
    return "reference", {"activations": held + one}


def _sampling(shape: Shape, batch: int, prompt: int, response: int) -> tuple[str, dict]:
    """Reading B prompts, and writing responses: the cache is there from the first block on."""
    slots = -(-prompt // CACHE_STEP) * CACHE_STEP
    while slots < prompt + response - 1:
        slots += CACHE_STEP
    one_slot = 2 * shape.layers * batch * shape.keys * shape.number
    reading = {
        "KV cache": one_slot * -(-prompt // CACHE_STEP) * CACHE_STEP,
        "activations": _forward(shape, batch, min(prompt, PREFILL), max(0, prompt - PREFILL)),
    }
    writing = {
        "KV cache": one_slot * slots,
        "logits": 4 * batch * shape.vocabulary * FLOAT,
    }
    return "sampling", max(reading, writing, key=lambda terms: sum(terms.values()))


# ------------------------------------------------------------------------------ reading a model


OUTPUT = re.compile(r"(^|[.])(o_proj|out_proj|dense|c_proj|wo)$")  # of attention
BLOCK = re.compile(r"[.](\d+)[.](.*)")  # of the path of a layer: its block, and the path in there
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KEY_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads")
EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")  # that a token goes through


def shape_of(
    model: nn.Module, config: Mapping[str, Any], tuning: Tuning, *others: nn.Module
) -> Shape:
    """The sizes of `model`; `config` is its config.json. `others` are in memory beside it."""
    config = {**config, **(config.get("text_config") or {})}
    hidden = hidden_states(model, mx.zeros((1, 1), dtype=mx.int32))  # never evaluated
    width = hidden.shape[-1]
    heads = _first(config, HEADS) or max(1, width // 64)
    each = config.get("head_dim") or width // heads
    held = weight_bytes(*(some.parameters() for some in (model, *others)))
    reads = [_reads(module) for module in model.layers[-1].modules()]
    experts = any(getattr(m.get("weight"), "ndim", 0) == 3 for m in model.layers[-1].modules())
    return Shape(
        weights=held - (0 if tuning.kind == "full" else weight_bytes(tuning.arrays())),
        layers=len(model.layers),
        hidden=width,
        queries=heads * each,
        keys=(_first(config, KEY_HEADS) or heads) * each,
        # What leads back to D reads the widest arrays.
        mlp=max(reads) * ((_first(config, EXPERTS) or 1) if experts else 1),
        heads=heads,
        vocabulary=vocabulary_size(model),
        number=hidden.dtype.size,
    )


def trained_of(
    model: nn.Module, tuning: Tuning, optimizer: str, *, checkpointed: bool = False
) -> Trained:
    """What `tuning` trains of `model`, with an optimizer of that name."""
    first, read = 0, {}
    adapted = getattr(tuning, "layers", {})
    if adapted:
        places = {path: BLOCK.search(path) for path in adapted}
        first = min(int(place[1]) for place in places.values())
        for path, place in places.items():
            inside = place[2].rpartition(".")[0]
            # Queries, keys and values read what the first norm gives, which is kept anyway.
            key = (place[1], inside, bool(OUTPUT.search(path)), _reads(adapted[path]))
            if "att" not in inside or key[2]:
                read[key] = key[3]
    return Trained(
        weights=weight_bytes(tuning.arrays()),
        layers=len(model.layers) - first,
        inputs=sum(read.values()),
        whole=tuning.kind == "full",
        moments=MOMENTS[optimizer],
        checkpointed=checkpointed,
    )


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if config.get(name)), None)


def _reads(layer: nn.Module) -> int:
    """The width of what a linear layer reads, adapted or not; 0 for any other module."""
    if "lora_a" in layer:
        layer = base_layer(layer)
    weight = layer.get("weight")
    if getattr(weight, "ndim", 0) < 2:
        return 0
    packed = 32 // layer.bits if hasattr(layer, "bits") else 1
    return weight.shape[-1] * packed
