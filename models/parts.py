"""What is fused into one model: a base, adapters with weights, a soft prompt, a reward head."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from errors import UserError
from models.adapter_description import REWARD_HEAD, VALUE_HEAD
from models.adapter_files import load_adapter, read_adapter, read_head
from models.comparing import all_logits
from models.fusing import blended, dequantize_model, fuse_adapters
from models.hub_files import looks_like_hub_name
from models.load import (
    DEFAULT_MODEL,
    DEFAULT_NAME,
    LoadedModel,
    cast,
    default_dtype,
    load_model,
    resolve_path,
)
from models.lora import Adapter
from models.reward_model import RewardModel, load_reward_head, load_reward_model
from models.soft_prompt import SoftPrompt
from models.soft_vocabulary import FusedPrompt, fuse_soft_prompt
from models.tuning import Tuning


@dataclass
class Parts:
    """Everything that goes into the result; all of it switched off until it is fused."""

    base: LoadedModel
    dtype: str = "stored"  # of the result; "stored": every array as the base has it
    tunings: list[Tuning] = field(default_factory=list)  # one for each adapter file
    adapters: list[Adapter] = field(default_factory=list)  # the LoRA and DoRA ones among them
    weights: list[float] = field(default_factory=list)  # one for each of them
    prompt: SoftPrompt | None = None
    reward_model: RewardModel | None = None
    descriptions: list[dict] = field(default_factory=list)  # of every adapter file
    notes: list[str] = field(default_factory=list)  # for the person at the terminal

    def __post_init__(self):
        flat = tree_flatten(self.base.model.parameters())
        self.types = {name: array.dtype for name, array in flat}  # as stored
        if self.working == "float32":
            cast(self.base.model, "float32")

    @property
    def working(self) -> str:
        """Type for sums and comparisons: float32 where it costs nothing or is asked for."""
        return "float32" if "float32" in (self.dtype, default_dtype()) else "stored"

    @property
    def bits(self) -> int | None:
        """Bits of a weight of a quantised base, else None."""
        return (self.base.config.get("quantization") or {}).get("bits")

    def outputs(self, sequences: Sequence[Sequence[int]]) -> list:
        """What the unfused parts compute: scores of a reward model, else logits (T, V)."""
        if self.reward_model is not None:
            return self.reward_model.score(sequences)
        with ExitStack() as stack:
            stack.enter_context(blended(self.base.model, self.adapters, self.weights))
            prefix: tuple[int, ...] = ()
            if self.prompt is not None:
                self.prompt.activate()
                stack.callback(self.prompt.deactivate)
                prefix = self.prompt.prefix
            return all_logits(self.base.model, sequences, prefix)

    def fuse(self, *, dequantize: bool = False) -> FusedPrompt | None:
        """Make the base model the sum of all parts; returns what became of the soft prompt."""
        model, config = self.base.model, self.base.config
        fuse_adapters(
            model,
            self.adapters,
            self.weights,
            dequantize=dequantize,
            dtype=mx.float32 if self.working == "float32" else None,
        )
        if dequantize:
            dequantize_model(model)
            config.pop("quantization", None)
            config.pop("quantization_config", None)
        fused = None
        if self.prompt is not None:
            self.prompt.activate()
            fused = fuse_soft_prompt(self.base, self.prompt)
        self._give_types()
        if self.reward_model is not None:
            self.reward_model.settle(fused.ids if fused else None)
        mx.eval(model.parameters())
        return fused

    def _give_types(self) -> None:
        """Cast the fused weights to what the result has."""
        if self.dtype != "stored":
            return cast(self.base.model, self.dtype)
        floating = [t for t in self.types.values() if mx.issubdtype(t, mx.floating)]
        usual = max(set(floating), key=floating.count)  # for arrays that are new
        changed = []
        for name, array in tree_flatten(self.base.model.parameters()):
            if mx.issubdtype(array.dtype, mx.floating):
                stored = self.types.get(name, usual)
                dtype = stored if mx.issubdtype(stored, mx.floating) else usual
                changed.append((name, array.astype(dtype)))
        self.base.model.load_weights(changed, strict=False)


def load_parts(
    model: str | None,
    files: Sequence[str],
    weights: Sequence[float],
    *,
    dtype: str = "stored",
    quantize: int | None = None,
    trust_remote_code: bool = False,
    any_base: bool = False,
    tokenizer: str | None = None,
) -> Parts:
    """Load a base and the adapter `files` with `weights`; without a `model` the recorded base.

    `dtype` is that of the result; `quantize` rounds the base to so many bits first, as in training.

    Raises UserError for what cannot be combined: several heads or soft prompts, weights on them or
    on a full fine-tune, and a full fine-tune with anything else; unless `any_base`, for an adapter
    that was trained on another base.
    """
    options = {"dtype": "stored", "quantize": quantize, "trust_remote_code": trust_remote_code}
    if not files:
        if tokenizer is not None:
            raise UserError("--tokenizer has no effect without --adapter-file")
        return _model_alone(model, dtype, options)
    options["tokenizer"] = tokenizer
    descriptions = [read_adapter(file)[1] for file in files]
    _check_together(files, weights, descriptions)
    base = load_model(model or recorded_base(files[0], descriptions[0]), **options)
    parts = Parts(base, dtype, descriptions=descriptions)
    for file, weight in zip(files, weights, strict=True):
        tuning = load_adapter(base, file, any_base=any_base)
        parts.tunings.append(tuning)
        if read_head(file, VALUE_HEAD) is not None:
            parts.notes.append(f"the value head beside {file} stays behind: only training uses it")
        if read_head(file, REWARD_HEAD) is not None:
            parts.reward_model = RewardModel(base.model, tuning=tuning)
            load_reward_head(parts.reward_model, file)
            parts.reward_model.eval()
        if tuning.kind != "full":
            tuning.deactivate()
        if tuning.kind == "prompt":
            parts.prompt = tuning
        elif tuning.kind != "full":
            parts.adapters.append(tuning)
            parts.weights.append(weight)
    return parts


def _model_alone(model: str | None, dtype: str, options: dict) -> Parts:
    from models.classifiers import is_classifier

    path = resolve_path(model) if model is not None else None
    if path is not None and (is_classifier(path) or read_head(path, REWARD_HEAD) is not None):
        if options.pop("quantize"):
            raise UserError("--quantize: rounds the base of an adapter; a fused reward model stays")
        reward_model = load_reward_model(path, **options)
        return Parts(reward_model.source, dtype, reward_model=reward_model)
    return Parts(load_model(model, **options), dtype)


def _check_together(files, weights, descriptions) -> None:
    kinds = [description.get("fine_tune_type", "lora") for description in descriptions]
    for file, weight, kind in zip(files, weights, kinds, strict=True):
        if not np.isfinite(weight):
            raise UserError(f"--adapter-weights: {weight} is no factor")
        is_reward = read_head(file, REWARD_HEAD) is not None
        if is_reward and len(files) > 1:
            raise UserError(f"{file}: a reward model is fused alone: its head fits no other sum")
        what = {"full": "a full fine-tune", "prompt": "a soft prompt"}.get(kind)
        what = "a reward model" if is_reward else what
        if what and weight != 1:
            raise UserError(f"{file}: {what} has no half measures; its weight has to be 1")
        if kind == "full" and len(files) > 1:
            raise UserError(
                f"{file}: every weight was trained, so it is no adapter of the same "
                "base; fuse it alone and give the result as --model"
            )
    if kinds.count("prompt") > 1:
        raise UserError("two soft prompts cannot both come first; give one")


def recorded_base(file: str, description: dict) -> str:
    """The base model that an adapter's description names. Raises UserError without one."""
    name = description.get("model")
    if not isinstance(name, str) or not name:
        raise UserError(f"{file}: does not say which model it belongs to; give --model")
    refuse_lost_base(file, name)
    return name


def refuse_lost_base(file: str, name: str) -> None:
    """UserError where the relative path of a base that an adapter names leads nowhere from here."""
    meant = Path(name).expanduser()
    known = name == DEFAULT_NAME or meant.name == DEFAULT_MODEL.name or looks_like_hub_name(name)
    if not (known or meant.is_absolute() or meant.exists()):
        raise UserError(
            f"{file}: was trained on {name}, a path relative to the folder that it was "
            f"trained in, and there is none in {Path.cwd()}; give --model, or start "
            "where it was trained"
        )
