"""What both scripts do around their loop: flags, seed, model, what is trained; where it goes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from pytorch_backend import PyTorchBackend
from pytorch_files import load_adapter
from pytorch_models import LoadedModel, Tuned, load_model, pick_device
from transformers import set_seed

from command_line.adapter_file import refuse_other_adapter
from command_line.fused_dir import check_model_folder
from command_line.parser import Parser
from command_line.shared_flags import adapter_description
from errors import UserError
from models.adapter_description import is_single_file
from run_folder.run import Run
from training.launch import run_training

# Options of the MLX side that nothing here computes in the same way.
REFUSED = {
    "quantize": "PyTorch has no counterpart that gives the same numbers",
    "reference_quantize": "PyTorch has no counterpart that gives the same numbers",
    "fused_dir": "--save-file FOLDER holds the merged model here",
    "compare_steps": "the baseline's best checkpoint is that of the best evaluation",
    "reference_samples": "the baseline samples no reference",
    "adlf_alpha": "internal rewards are measured on MLX alone",
    "use_curriculum": "the order of rows is the ordinary one here",
    "use_contrastive": "that loss is MLX's side alone",
    "soft_labels": "that loss is MLX's side alone",
    "use_decision_transformer": "scores before prompts are MLX's side alone",
    "target_score": "scores before prompts are MLX's side alone",
    "use_self_critique": "critiques are trained on MLX's side alone",
    "recompute_frozen": "the baseline runs every block in every pass",
    "compile": "the baseline runs PyTorch as it is",
}


class BaselineParser(Parser):
    """The parser of an MLX script, with what the baseline adds."""

    def __init__(self, **options):
        super().__init__(**options)
        self.script = f"pytorch_baseline/pytorch_{self.script}"
        self.description = f"{self.description} In PyTorch."
        add = self.add_argument_group("PyTorch").add_argument
        add("--device", choices=("cpu", "mps", "cuda"), default="cpu", help="where it runs")
        self.checks.append(refuse_what_is_missing)

    def parse_args(self, words=None, namespace=None):
        for action in self._actions:
            if action.dest == "save_file":
                action.default = None
                action.help = (
                    "folder for a transformers model with the adapter merged in, or an .npz or "
                    ".safetensors adapter (default: model/ in the run folder)"
                )
        return super().parse_args(words, namespace)


def refuse_what_is_missing(args) -> None:
    for name, reason in REFUSED.items():
        if getattr(args, name, None):
            raise UserError(f"--{name.replace('_', '-')}: {reason}; leave it out")
    if args.num_training_workers > 1:
        raise UserError("--num-training-workers: the baseline trains in one process; leave it out")


def parse(flags: ModuleType, words: list[str] | None = None):
    """The parsed command line; `flags` is command_line.sft_flags or command_line.ppo_flags."""
    with patch.object(flags, "Parser", BaselineParser):
        return flags.parse_arguments(words)


def start(args, load: Callable[[Any], Any]) -> tuple[Any, PyTorchBackend]:
    """Check where the model goes, seed everything, and `load(args)` what is trained on."""
    if args.save_file is not None and not is_single_file(args.save_file):
        check_model_folder(args, "save_file")
    set_seed(args.seed % 2**32)
    loaded = load(args)
    return loaded, PyTorchBackend(loaded.device)


def load_base(args) -> LoadedModel:
    return load_model(args.model, tokenizer=args.tokenizer, **loading(args))


def loading(args) -> dict[str, Any]:
    """Options of `load_model` for every model of the run."""
    options = {name: getattr(args, name) for name in ("dtype", "trust_remote_code")}
    return options | {"device": pick_device(args.device)}


def make_tuned(args, loaded: LoadedModel, file: str | None, ignore: tuple = ()) -> Tuned:
    """What is trained, on the base: the adapter in `file`, or a new one as the flags say."""
    if file is None:
        return Tuned(loaded.model, adapter_description(args)).to(loaded.device)
    model = load_adapter(loaded, file, any_base=args.any_base)
    blocks = loaded.model.config.num_hidden_layers
    refuse_other_adapter(args, file, model.description, blocks=blocks, ignore=ignore)
    return model


def place(args, run: Run) -> Path:
    """Where the trained model goes."""
    return Path(args.save_file or run.folder / "model")


def train(args, kind: str, make_loop: Callable, said: str, finish: Callable) -> None:
    """`run_training` on torch; `finish(run, loop)` writes to `place`."""
    run_training(
        args,
        f"pytorch_{kind}",
        make_loop,
        lambda _: said,
        finish,
        outputs=("model",),
        place=partial(place, args),
        computing={"torch_threads": torch.get_num_threads()},
    )
