"""Soft prompts fused: learned rows become tokens of the vocabulary, written by the tokenizer.

The virtual tokens keep the ids that `SoftPrompt` gives them, V .. V+n-1, so the model computes what
it did before. Their rows go behind those of the embedding. The output layer needs rows for them as
well, and these must never win: see `repelling_row`. Where input and output share their weights they
are separated, because a learned row would be a likely output.

The virtual tokens go in front of everything, before BOS, where `SoftPrompt` has them: in texts by
the post-processor in tokenizer.json, in conversations, which are encoded without it, by the
template.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from errors import UserError
from models.adapter_description import read_json
from models.array_files import write_json, write_text
from models.decoding import Sampling, generate
from models.fusing import plain_weight
from models.load import LoadedModel
from models.soft_prompt import SoftPrompt, find_embedding
from models.tokenizer_files import GENERATION_CONFIG
from models.trunk import find_trunk, hidden_states, logits_from_hidden

# ------------------------------------------------------------------------------ weights


ROWS, LENGTH = 128, 32  # contexts of each kind that the output row is fitted to, and their tokens
STEPS = 2000  # of the search for the nearest point of the hull
DEPTH = 1000.0  # how far below 0 the virtual logit is put where it is nearest to 0
LEAST_MARGIN = 0.01  # of a direction, as a cosine; less would need rows of excessive length
CHUNK = 64  # hidden states whose logits are held at once
BIAS = -1e4  # of a virtual token, for output layers that have one; fits in float16


@dataclass
class FusedPrompt:
    """What became of a soft prompt."""

    ids: list[int]
    highest: float  # log-probability of all virtual tokens together, at most, on fresh contexts


def token_names(count: int) -> list[str]:
    return [f"<|soft_prompt_{i}|>" for i in range(count)]


def fuse_soft_prompt(loaded: LoadedModel, prompt: SoftPrompt) -> FusedPrompt:
    """Put the rows of `prompt` into the vocabulary of `loaded`, in place (model and config).

    The soft prompt has to be switched on; afterwards it is off, for good. Raises UserError where
    the architecture does not allow it.
    """
    model = loaded.model
    fitted, fresh = (_contexts(model, prompt, loaded, seed) for seed in (0, 1))
    ids = list(prompt.prefix)
    rows = prompt.arrays()["soft_prompt"]
    prompt.deactivate()
    _grow_embedding(loaded, rows)
    highest = _grow_output(loaded, fitted, fresh, len(ids))
    loaded.config["vocab_size"] = ids[-1] + 1
    if "text_config" in loaded.config:
        loaded.config["text_config"]["vocab_size"] = ids[-1] + 1
    mx.eval(model.parameters())
    return FusedPrompt(ids, highest)


def _contexts(model, prompt: SoftPrompt, loaded: LoadedModel, seed: int) -> np.ndarray:
    """Hidden states (N, D) behind the soft prompt: of random tokens and of the model's own text."""
    vocabulary = prompt.prefix[0]
    drawn = np.random.default_rng(seed).integers(0, vocabulary, (ROWS, LENGTH)).tolist()
    start = loaded.tokenizer.encode("") or [int(min(loaded.eos_ids))]
    key = mx.random.key(seed)
    written = []
    for temperature in (1.0, 2.0):
        made = generate(
            model,
            [[*prompt.prefix, *start]] * ROWS,
            max_tokens=LENGTH,
            eos_ids=set(),
            sampling=Sampling(temperature),
            key=key,
        )
        written += [[*start, *response] for response in made.responses]
    states = []
    for rows in (drawn, written):
        hidden = hidden_states(model, mx.array([[*prompt.prefix, *row] for row in rows]))
        hidden = hidden[:, len(prompt.prefix) - 1 :].astype(mx.float32)  # the last virtual one on
        states.append(np.array(hidden).reshape(-1, hidden.shape[-1]))
    return np.concatenate(states)


def _grow_embedding(loaded: LoadedModel, rows: mx.array) -> None:
    trunk, name, embedding = find_embedding(loaded.model)
    weight = plain_weight(embedding)
    grown = nn.Embedding(1, 1)
    grown.weight = mx.concatenate([weight, rows.astype(weight.dtype)])
    if _output_layer(loaded.model)[1] is None:  # tied: what is left is the output layer
        _add_output_layer(loaded, weight)
    trunk[name] = grown


def _output_layer(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    owner, _ = find_trunk(model)
    return owner, owner.get("lm_head")


def _add_output_layer(loaded: LoadedModel, weight: mx.array) -> None:
    """An output layer of its own for a model that has used its embedding."""
    owner, _ = find_trunk(loaded.model)
    arguments = getattr(owner, "args", None)
    if not getattr(arguments, "tie_word_embeddings", False):
        kind = loaded.config["model_type"]
        raise UserError(
            f"model type {kind}: has no output layer apart from its embedding, and "
            "can be given none, so soft prompts cannot be fused"
        )
    arguments.tie_word_embeddings = False
    loaded.config["tie_word_embeddings"] = False
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = weight
    owner.lm_head = layer


def _grow_output(loaded: LoadedModel, fitted, fresh, count: int) -> float:
    """Append `count` equal rows to the output layer; returns how likely they are at most (log)."""
    owner, layer = _output_layer(loaded.model)
    weight = plain_weight(layer)
    if "bias" in layer:
        row = mx.zeros((weight.shape[-1],))
    else:
        row = repelling_row(fitted)
        if row is None:
            row = weight[int(highest_logprobs(loaded.model, fitted).argmin())]
    grown = nn.Linear(1, 1, bias="bias" in layer)
    added = mx.broadcast_to(mx.array(row).astype(weight.dtype), (count, weight.shape[-1]))
    grown.weight = mx.concatenate([weight, added])
    if "bias" in layer:
        grown.bias = mx.concatenate([layer.bias, mx.full((count,), BIAS, layer.bias.dtype)])
    owner.lm_head = grown
    return float(highest_logprobs(loaded.model, fresh)[-1] + np.log(count))


def highest_logprobs(model: nn.Module, hidden: np.ndarray) -> np.ndarray:
    """For each token the highest log-probability (V,) it has after any of `hidden` (N, D)."""
    highest = None
    for start in range(0, len(hidden), CHUNK):
        states = mx.array(hidden[start : start + CHUNK])
        logits = logits_from_hidden(model, states).astype(mx.float32)
        found = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).max(axis=0)  # (V,)
        highest = found if highest is None else mx.maximum(highest, found)
        mx.eval(highest)
    return np.array(highest)


def repelling_row(hidden: np.ndarray) -> np.ndarray | None:
    """A row (D,) whose product with hidden states like `hidden` (N, D) is far below all logits.

    Final hidden states of a trained model share a direction. The best one is that of the point of
    their convex hull nearest to the origin (Gilbert's algorithm, 1966): every state is at least
    that far along it, and its negative, long enough, repels them all. None where the hull holds
    the origin (weights that were never trained); then no row does that.
    """
    point = hidden.mean(axis=0)
    for _ in range(STEPS):
        step = point - hidden[(hidden @ point).argmin()]
        length = step @ step
        if point @ step <= 1e-3 * (point @ point):  # no corner is much nearer than the point
            break
        point = point - min(1.0, (point @ step) / length) * step
    margin = (hidden @ point).min()
    if margin <= LEAST_MARGIN * np.linalg.norm(point) * np.linalg.norm(hidden, axis=1).mean():
        return None
    return (-DEPTH / margin * point).astype(np.float32)


# ------------------------------------------------------------------------------ tokenizer


WHOLE = "<|soft_prompt|>"  # stands for all virtual tokens in the post-processor
FILLER = "<|unused_{}|>"  # names for rows of the embedding that no token of the tokenizer uses


def add_soft_prompt(folder: Path, tokenizer, ids: list[int]) -> None:
    """Rewrite the tokenizer files in a model `folder` so that `ids` come first.

    `tokenizer` is the base model's. Raises UserError where it cannot be done.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            "the tokenizer has no tokenizer.json form, so a soft prompt cannot be made part of it"
        )
    backend = with_tokens(tokenizer.backend_tokenizer, ids)
    described = json.loads(backend.to_str())
    described["post_processor"] = with_prefix(described.get("post_processor"), ids)
    described["truncation"] = described["padding"] = None
    write_text(folder / "tokenizer.json", json.dumps(described, ensure_ascii=False))
    names = token_names(len(ids))
    _change_settings(folder / "tokenizer_config.json", backend, names)
    _change_templates(folder, "".join(names))
    _never_generate(folder / GENERATION_CONFIG, ids)


def with_tokens(backend, ids: list[int]):
    """A copy of a `tokenizers.Tokenizer` in which the virtual tokens have `ids`."""
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(backend.to_str())
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    if size > ids[0]:
        raise UserError(
            f"the tokenizer has {size} tokens and the embedding only {ids[0]} rows; "
            "a soft prompt cannot be fused into it"
        )
    names = [FILLER.format(i) for i in range(size, ids[0])] + token_names(len(ids))
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    if [backend.token_to_id(n) for n in names[-len(ids) :]] != ids:
        raise UserError("the tokenizer has holes in its vocabulary; a soft prompt cannot be fused")
    return backend


def with_prefix(processor: dict | None, ids: list[int]) -> dict:
    """The post-processor of a tokenizer.json with the virtual tokens in front."""
    if processor is None:
        return _in_front(_plain_template(), ids)
    kind = processor["type"]
    if kind == "TemplateProcessing":
        return _in_front(processor, ids)
    if kind == "ByteLevel":  # trims offsets, adds nothing
        return {"type": "Sequence", "processors": [processor, _in_front(_plain_template(), ids)]}
    if kind == "Sequence":
        parts = list(processor["processors"])
        for place, part in enumerate(parts):
            if part["type"] == "TemplateProcessing":
                parts[place] = _in_front(part, ids)
                return {**processor, "processors": parts}
        if all(part["type"] == "ByteLevel" for part in parts):
            return {**processor, "processors": [*parts, _in_front(_plain_template(), ids)]}
    raise UserError(f"the tokenizer's post-processor ({kind}) cannot take a soft prompt")


def _plain_template() -> dict:
    def piece(name: str) -> dict:
        return {"Sequence": {"id": name, "type_id": 0}}

    single, pair = [piece("A")], [piece("A"), piece("B")]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}}


def _in_front(template: dict, ids: list[int]) -> dict:
    piece = {"SpecialToken": {"id": WHOLE, "type_id": 0}}
    entry = {"id": WHOLE, "ids": list(ids), "tokens": token_names(len(ids))}
    return {
        **template,
        "single": [piece, *template["single"]],
        "pair": [piece, *template["pair"]],
        "special_tokens": {**template["special_tokens"], WHOLE: entry},
    }


def _change_settings(file: Path, backend, names: list[str]) -> None:
    """tokenizer_config.json: the class that keeps the post-processor, the new tokens named."""
    settings = read_json(file) if file.exists() else {}
    # In transformers 4 the class of a family (LlamaTokenizerFast) builds its own post-processor.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "added_tokens_decoder" in settings:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for name in names:
            entry = {"content": name, **flags, "special": True}
            settings["added_tokens_decoder"][str(backend.token_to_id(name))] = entry
    template = settings.get("chat_template")
    if isinstance(template, str):
        settings["chat_template"] = "".join(names) + template
    elif isinstance(template, list):
        for entry in template:
            entry["template"] = "".join(names) + entry["template"]
    write_json(file, settings)


def _change_templates(folder: Path, text: str) -> None:
    """Templates of conversations in files of their own, with the virtual tokens in front."""
    for file in (*folder.glob("chat_template.jinja"), *folder.glob("additional_chat_templates/*")):
        write_text(file, text + file.read_text(encoding="utf-8"))
    file = folder / "chat_template.json"
    if file.exists():
        settings = read_json(file)
        write_json(file, {**settings, "chat_template": text + settings["chat_template"]})


def _never_generate(file: Path, ids: list[int]) -> None:
    """transformers forbids these tokens outright; other programs rely on their output rows."""
    settings = read_json(file) if file.exists() else {}
    suppressed = sorted({*(settings.get("suppress_tokens") or []), *ids})
    write_json(file, {**settings, "suppress_tokens": suppressed})
