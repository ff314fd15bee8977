"""A name or a folder becomes a model, its tokenizer and its configuration (mlx-lm underneath)."""

import fast_blas

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from errors import UserError
from models.base_fingerprint import DEFAULT_MODEL, DEFAULT_NAME, base_fingerprint
from models.file_checks import check_folder, check_memory, read_config, refuse_code
from models.hub_files import download, looks_like_hub_name
from models.limits import Limits, context_of, find_limits
from models.repairs import model_classes, repair
from models.transformers_config import unnested
from safe_files import scratch_folder
from waiting import busy, watched

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
QUANTIZE_GROUP_SIZES = (64, 32)  # mlx's default, then what narrow layers divide by


@dataclass
class LoadedModel:
    """What `load_model` returns; `path` is the local folder the weights came from."""

    model: nn.Module
    tokenizer: object  # mlx_lm's TokenizerWrapper
    config: dict
    path: Path
    name: str
    fingerprint: str | None = None  # of the folder's weights, for adapters (base_fingerprint.py)
    quantized: dict[str, int] | None = None  # {"bits", "group_size"} where `quantize` did it
    tokenizer_path: Path | None = None  # its folder, where that is not the model's
    weights: int = 0  # how many the model has, as they are before they are packed into bits

    @cached_property
    def limits(self) -> Limits:
        """Tokens and positions that the model has rows for, without virtual tokens; its context."""
        return replace(find_limits(self.model), context=context_of(self.config))

    @property
    def eos_ids(self) -> set[int]:
        return set(self.tokenizer.eos_token_ids)


def default_dtype() -> str:
    """float32 on the CPU backend, bfloat16 where there is a GPU (Metal or CUDA)."""
    return "float32" if mx.default_device().type == mx.DeviceType.cpu else "bfloat16"


def load_model(
    name_or_path: str | Path | None = None,
    *,
    dtype: str = "auto",
    quantize: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Load a local folder, a hub name ``USER/NAME``, or (None) the embedded digits model.

    `dtype` is "auto", "stored" (as in the file), "float32", "bfloat16" or "float16"; `quantize`
    is 4 or 8 bits for the linear layers and embeddings of a model that is not quantised yet.
    `tokenizer` names another model's folder, or hub name, to read with. The weights are read in
    parts, for a bar.
    Raises UserError when the model cannot be found, read, or is not supported.
    """
    name = str(name_or_path) if name_or_path is not None else DEFAULT_NAME
    path = resolve_path(name, revision, with_code=trust_remote_code)
    check_folder(path, name, trust_remote_code)
    if "SequenceClassification" in str(read_config(path).get("architectures")):
        raise UserError(
            f"{name}: is a classifier that gives scores, not a language model; "
            "give it as --reward-model"
        )
    dtype = default_dtype() if dtype == "auto" else dtype
    check_memory(path, name, dtype, quantize)
    reader = None
    if tokenizer is not None:
        reader = resolve_path(str(tokenizer))
        if not trust_remote_code:
            refuse_code(reader / "tokenizer_config.json")
    with busy("loading"):
        model, tokenizer, config = _load(path, name, trust_remote_code, reader)
    quantized = None if quantize is None else _quantize(model, config, quantize, name)
    repair(model, config)  # after quantisation, which makes some modules anew
    if dtype != "stored":
        cast(model, dtype)
    model.freeze()
    fast_blas.use_in(model)
    for part in watched(in_parts(model), "loading"):
        mx.eval(part)
    found = LoadedModel(
        model, tokenizer, config, path, name, base_fingerprint(path), quantized, reader
    )
    found.weights = count_weights(model)
    return found


def in_parts(model: nn.Module, count: int = 40) -> list[list[mx.array]]:
    """All arrays of a model, in their order, in about `count` lists of as many bytes."""
    arrays = [array for _, array in tree_flatten(model.parameters())]
    each, parts = sum(array.nbytes for array in arrays) / count, [[]]
    for array in arrays:
        if sum(other.nbytes for other in parts[-1]) >= each:
            parts.append([])
        parts[-1].append(array)
    return parts


def resolve_path(name: str, revision: str | None = None, *, with_code: bool = False) -> Path:
    """The local folder of `name`: itself, or the snapshot downloaded from the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name == DEFAULT_NAME:
        return DEFAULT_MODEL
    if path.exists() or not looks_like_hub_name(name):
        raise UserError(
            f"{name}: no model folder there; give a folder with config.json and "
            "model.safetensors, or a hub name USER/NAME"
        )
    return download(name, revision, with_code=with_code)


def _load(path: Path, name: str, trust_remote_code: bool, reader: Path | None = None):
    from mlx_lm.utils import load_model as mlx_lm_load_model
    from mlx_lm.utils import load_tokenizer

    try:
        with no_pattern(path) as literal:
            model, config = mlx_lm_load_model(
                literal,
                lazy=True,
                model_config=unnested(read_config(path)),
                get_model_classes=model_classes,
                trust_remote_code=trust_remote_code,
            )
        extra = {"trust_remote_code": True} if trust_remote_code else None
        tokenizer = load_tokenizer(
            reader or path,
            tokenizer_config_extra=extra,
            eos_token_ids=None if reader else config.get("eos_token_id"),
        )
    except Exception as error:  # mlx-lm and transformers have dozens of kinds for a broken folder
        raise UserError(f"{name}: cannot be loaded: {_one_line(error)}") from error
    if not tokenizer.eos_token_ids:
        raise UserError(
            f"{name}: the tokenizer names no end-of-sequence token; "
            'set "eos_token" in tokenizer_config.json'
        )
    check_tokens(model, tokenizer, name)
    return model, tokenizer, config


@contextmanager
def no_pattern(path: Path) -> Iterator[Path]:
    """`path` by a name without [, * and ?: mlx-lm looks for weights by a pattern."""
    if glob.escape(str(path)) == str(path):
        yield path
        return
    with scratch_folder("load") as scratch:
        link = scratch / "model"
        link.symlink_to(path.absolute())
        yield link


def check_tokens(model: nn.Module, tokenizer, name: str) -> None:
    """Raise UserError for tokens that the model has no row for: MLX would read beyond its memory.

    Special tokens that were added later and never trained may lie there; most of them are padding.
    """
    from models.trunk import vocabulary_size

    try:
        rows = vocabulary_size(model)
    except UserError:  # an architecture that cannot be trained here, but may be looked at
        return
    known = tokenizer.get_vocab()
    regular = known.keys() - tokenizer.get_added_vocab().keys()
    last = max((known[token] for token in regular), default=0)
    if last >= rows:
        raise UserError(
            f"{name}: the tokenizer counts to {last}, and the model has {rows} tokens; "
            "they do not belong together"
        )
    if beyond := [i for i in tokenizer.eos_token_ids if not (isinstance(i, int) and 0 <= i < rows)]:
        raise UserError(
            f"{name}: {beyond[0]!r} ends a text and is none of the model's {rows} "
            "tokens; put eos_token_id right in config.json"
        )


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:500] or type(error).__name__


def _quantize(model: nn.Module, config: dict, bits: int, name: str) -> dict[str, int]:
    if "quantization" in config:
        raise UserError(f"{name}: is quantised already; leave --quantize away")
    for group_size in QUANTIZE_GROUP_SIZES:
        fits = [m for m in model.modules() if _can_quantize(m, group_size)]
        if fits:
            break
    else:
        raise UserError(f"{name}: no layer is a multiple of 32 wide, so none can be quantised")
    nn.quantize(model, group_size, bits, class_predicate=lambda _, m: _can_quantize(m, group_size))
    config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    return {"bits": bits, "group_size": group_size}


def _can_quantize(module: nn.Module, group_size: int) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0


def cast(model: nn.Module, dtype: str) -> None:
    """Cast the floating weights of `model` to `dtype`, leaving quantised layers' scales alone."""
    target = DTYPES[dtype]
    quantised = {name for name, module in model.named_modules() if hasattr(module, "bits") and name}

    def wanted(name: str, array: mx.array) -> bool:
        owner = name.rsplit(".", 1)[0]
        return mx.issubdtype(array.dtype, mx.floating) and owner not in quantised

    flat = tree_flatten(model.parameters())
    model.load_weights(
        [(name, a.astype(target)) for name, a in flat if wanted(name, a)], strict=False
    )


def count_weights(model: nn.Module) -> int:
    """Weights of a model; of packed ones as many as they stand for, without scales and biases."""
    total = 0
    for _, module in model.named_modules():
        own = [a for a in dict.values(module) if isinstance(a, mx.array)]
        if hasattr(module, "bits"):
            own = [module.weight]
            total += module.weight.size * 32 // module.bits - module.weight.size
        total += sum(a.size for a in own)
    return total


def weight_bytes(*trees) -> int:
    """Bytes of all arrays in `trees`, each array counted once however often it appears."""
    arrays = {id(a): a for tree in trees for _, a in tree_flatten(tree) if isinstance(a, mx.array)}
    return sum(a.nbytes for a in arrays.values())
