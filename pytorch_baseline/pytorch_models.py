"""models/load.py, lora.py, soft_prompt.py and trunk.py on transformers and peft.

A model here is a `Tuned`: a transformers causal LM with what is trained on it. Its adapter can be
switched off, which gives the reference of PPO.

Legend: B batch, L padded length, D width, V vocabulary, N positions picked from B x L.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from errors import UserError
from models.adapter_description import check_shapes, match_keys, path_in_block
from models.base_fingerprint import DEFAULT_MODEL, base_fingerprint
from models.file_checks import read_config, refuse_code

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# peft reads a name that transformers is about to drop.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Options of configurations that act between hidden states and logits, and are not mirrored here.
UNKNOWN_HEADS = ("logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass
class LoadedModel:
    """What `load_model` returns; `name` is the folder or hub name that was asked for."""

    model: nn.Module
    tokenizer: object
    config: dict  # config.json as it was stored
    name: str
    device: torch.device
    fingerprint: str | None = None  # of the folder's weights, as models/load.py has it

    @property
    def eos_ids(self) -> set[int]:
        """Tokens that end a text: of the configuration and the tokenizer, as in mlx-lm."""
        stored = self.config.get("eos_token_id")
        ids = set(stored if isinstance(stored, list) else [stored])
        return {i for i in ids | {self.tokenizer.eos_token_id} if i is not None}


def pick_device(name: str) -> torch.device:
    """cpu, mps or cuda. Raises UserError where torch cannot use it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch finds no CUDA device; use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this PyTorch finds no Metal device; use --device cpu")
    return torch.device(name)


def load_model(
    name: str | None = None,
    *,
    tokenizer: str | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """A local folder, a hub name, or (None) the embedded digits model, frozen.

    `dtype` "auto" is float32 on the CPU, bfloat16 elsewhere. Dropout of the base is set to 0, as
    the MLX side has none. Raises UserError when there is no model to be had.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    name, device = name or str(DEFAULT_MODEL), torch.device(device)
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    config = checked_config(name, trust_remote_code)
    options = {"trust_remote_code": trust_remote_code}
    model = loaded_from(name, AutoModelForCausalLM, dtype=DTYPES[dtype], **options)
    reader = loaded_from(tokenizer or name, AutoTokenizer, **options)
    if (ends := model.generation_config.eos_token_id) is not None:  # what mlx-lm reads, too
        config["eos_token_id"] = ends
    # Its own sampling settings (a repetition penalty, say) must not reach the rollouts.
    model.generation_config = GenerationConfig()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.requires_grad_(False)
    model.to(device).eval()
    return LoadedModel(model, reader, config, name, device, base_fingerprint(model_folder(name)))


def loaded_from(name: str, kind: type, **options):
    """What transformers' `kind` finds at `name`, or a UserError of one line."""
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{name}: cannot be loaded: {reason}") from None


def model_folder(name: str) -> Path:
    """The local folder of a model: itself, or the downloaded snapshot."""
    from transformers.utils import cached_file

    path = Path(name).expanduser()
    try:
        return path if path.is_dir() else Path(cached_file(name, "config.json")).parent
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{name}: no model there: {reason}") from None


def checked_config(name: str, trust_remote_code: bool = False) -> dict:
    """config.json of a folder or hub name; UserError for what the baseline does not run."""
    folder = model_folder(name)
    config = read_config(folder)
    if not trust_remote_code:
        refuse_code(folder / "config.json")
    if "quantization" in config:
        raise UserError(f"{name}: is quantised by MLX, which PyTorch cannot read; give its source")
    for key in UNKNOWN_HEADS:
        if config.get(key) not in (None, 1, 1.0):
            raise UserError(f"{name}: scales its logits ({key}), which the baseline does not do")
    return config


# ---- what is trained ---------------------------------------------------------------------------


class Tuned(nn.Module):
    """A causal LM with an adapter, a soft prompt or all of its weights to train.

    `description` is what the MLX side writes into adapter_config.json: fine_tune_type lora, dora,
    prompt or full, with lora_parameters or num_prompt_tokens.
    """

    def __init__(self, base: nn.Module, description: dict):
        super().__init__()
        self.kind = description["fine_tune_type"]
        self.description, self.active = description, True
        self.base = base  # peft puts LoRA layers into it, in place
        self.peft = None if self.kind == "full" else add_peft(base, description)
        if self.kind == "full":
            base.requires_grad_(True)

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def trunk(self) -> nn.Module:
        """The part that maps tokens to hidden states."""
        return self.base.base_model

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model is the base model."""
        if self.kind == "full":
            raise RuntimeError("full fine-tuning has no base to go back to; keep a reference copy")
        was_active, self.active = self.active, False
        adapted = was_active and self.kind != "prompt"
        try:
            with self.peft.disable_adapter() if adapted else nullcontext():
                yield
        finally:
            self.active = was_active

    @property
    def prompt_length(self) -> int:
        """Virtual tokens that stand in front of a sequence at present."""
        return self.description["num_prompt_tokens"] if self.kind == "prompt" and self.active else 0

    def embed(self, tokens: Tensor, padding: list[int] | None = None) -> Tensor:
        """tokens (B, L) -> embeddings (B, n + L, D) with the n virtual tokens in front.

        `padding` counts the pad tokens on the left of each row; virtual tokens follow them.
        """
        rows = self.base.get_input_embeddings()(tokens)
        virtual = self.peft.get_prompt(len(tokens)).to(rows.dtype)  # (B, n, D)
        if padding is None:
            return torch.cat([virtual, rows], dim=1)
        return torch.stack(
            [torch.cat([r[:p], v, r[p:]]) for r, v, p in zip(rows, virtual, padding, strict=True)]
        )

    def hidden_states(self, tokens: Tensor, with_prompt: bool = False) -> Tensor:
        """Right-padded tokens (B, L) -> hidden states after the final norm (B, L, D).

        Causal attention never looks at padding on the right, so no mask is needed. `with_prompt`
        keeps those of the n virtual tokens in front, (B, n + L, D).
        """
        count = self.prompt_length
        fed = {"inputs_embeds": self.embed(tokens)} if count else {"input_ids": tokens}
        hidden = self.trunk(**fed, use_cache=False).last_hidden_state
        return hidden if with_prompt else hidden[:, count:]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V) float32, through the model's own head."""
        logits = self.base.get_output_embeddings()(hidden).float()
        cap = getattr(self.base.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def checkpoint_blocks(self) -> None:
        """Make activations again in the backward pass, when in training mode."""
        self.base.activation_checkpointing_enable({"use_reentrant": False})

    def drop_nothing(self) -> None:
        """Switch the adapter's dropout off for good."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def arrays(self) -> dict[str, Tensor]:
        """The trained tensors under the names of the MLX side's adapter files."""
        if self.kind == "full":
            tied = {"lm_head.weight"} if self.base.config.tie_word_embeddings else set()
            weights = self.base.state_dict(keep_vars=True)
            return {name: weight for name, weight in weights.items() if name not in tied}
        if self.kind == "prompt":
            return {"soft_prompt": self.peft.prompt_encoder["default"].embedding.weight}
        found = {}
        for name, weight in self.base.named_parameters():
            if mlx_name := lora_name(name):
                found[mlx_name] = weight
        return found

    def load_arrays(self, arrays: dict[str, Tensor], source: str) -> None:
        """Take over `arrays` (in the layout of `mlx_layout`); UserError lists every mismatch."""
        expected = self.arrays()
        check_shapes(arrays, {n: mlx_layout(n, a) for n, a in expected.items()}, source)
        with torch.no_grad():
            for name, target in expected.items():
                target.copy_(mlx_layout(name, arrays[name]))


def add_peft(base: nn.Module, description: dict):
    """A peft model around `base`, its adapter ready to train."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    if description["fine_tune_type"] == "prompt":
        return get_peft_model(
            base,
            PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=description["num_prompt_tokens"],
                prompt_tuning_init="SAMPLE_VOCAB",
            ),
        )
    settings = description["lora_parameters"]
    targets = lora_targets(base, settings.get("keys"), description["num_layers"])
    return get_peft_model(
        base,
        LoraConfig(
            r=settings["rank"],
            lora_alpha=settings["scale"] * settings["rank"],  # mlx-lm's scale is alpha / rank
            lora_dropout=settings.get("dropout", 0.0),
            use_dora=description["fine_tune_type"] == "dora",
            target_modules=targets,
        ),
    )


def lora_targets(base: nn.Module, keys: list[str] | None, num_layers: int) -> list[str]:
    """Full names of the linear layers that `keys` (None: all) pick in the last blocks.

    Raises UserError for a key that picks none, and for a model without any (GPT-2 has Conv1D).
    """
    modules = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    numbers = {name: int(found[1]) for name in modules if (found := re.search(r"\.(\d+)\.", name))}
    if not numbers:
        kind = base.config.model_type
        raise UserError(f"{kind}: has no linear layers for an adapter here; the MLX scripts may")
    wanted = {*match_keys(sorted({*map(path_in_block, numbers)}), keys)}
    blocks = base.config.num_hidden_layers
    first = 0 if num_layers <= 0 else max(blocks - num_layers, 0)
    return [n for n, block in numbers.items() if block >= first and path_in_block(n) in wanted]


LEAVES = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}


def lora_name(name: str) -> str | None:
    """peft's parameter name -> mlx-lm's (``model.layers.0.….lora_a``), None for other weights."""
    for theirs, ours in LEAVES.items():
        if f".{theirs}.default" in name:
            return name.split(f".{theirs}.default")[0] + f".{ours}"
    return None


def mlx_layout(name: str, array: Tensor) -> Tensor:
    """An array of `Tuned.arrays` as mlx-lm stores it, or back: LoRA's matrices are transposed."""
    return array.T if name.endswith((".lora_a", ".lora_b")) else array
