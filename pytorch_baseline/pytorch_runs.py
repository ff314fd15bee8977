"""What both scripts do around their loop: flags, seed, model, what is trained; where it goes."""

import importlib.metadata
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pytorch_backend import PyTorchBackend
from pytorch_files import is_output, load_adapter
from pytorch_models import LoadedModel, Tuned, load_model, pick_device

from command_line.adapter_file import refuse_other_adapter
from command_line.parser import Parser
from command_line.shared_flags import adapter_description
from errors import UserError
from models.adapter_description import is_single_file, read_json
from run_folder.run import OWN_NAMES, RUNS, Run
from run_folder.run_config import with_sum
from safe_files import write_json
from training.launch import run_training

WRITTEN = "written.json"  # in a run's folder: where it has written its model
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
    check_free(args)
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
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


def train(args, kind: str, make_loop: Callable, said: str, finish: Callable) -> None:
    """`run_training` with a model folder; `finish(run, loop, path)` writes to `path`."""

    def about(loop: Any) -> str:  # nothing refuses any more
        config = loop.run_folder.config
        names = ("torch", "peft", "trl")
        config["versions"] |= {name: importlib.metadata.version(name) for name in names}
        config["machine"]["torch_threads"] = torch.get_num_threads()
        loop.run_folder.config = with_sum(config)
        loop.run_folder.write_config()
        return said

    def place(run: Run) -> Path:
        """Where the model goes; noted there, so that the same run may replace it."""
        path = Path(args.save_file or run.folder / "model")
        write_json(run.folder / WRITTEN, {"path": str(path.resolve())})
        return path

    def end(run: Run, loop: Any) -> None:
        finish(run, loop, place(run))

    own = ("model", WRITTEN)
    run_training(args, f"pytorch_{kind}", make_loop, about, end, outputs=own, place=place)


def check_free(args) -> None:
    """Raise UserError unless --save-file may be written: before the work, not after it.

    A folder that is there is replaced where the run that is resumed has written it itself, or where
    --overwrite deletes it with its run.
    """
    if args.save_file is None or is_single_file(args.save_file):
        return
    path, refused = Path(args.save_file).resolve(), f"--save-file {args.save_file}: "
    run = (Path(args.output_dir) if args.output_dir else Path(RUNS, "new")).resolve()
    inside = path.relative_to(run).parts if path.is_relative_to(run) else ()
    if path in (run, *run.parents) or (inside and inside[0] in OWN_NAMES):
        raise UserError(f"{refused}is where the run is kept; give another name")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if args.overwrite and inside == ("model",):
        return
    written = run / WRITTEN
    own = args.resume is not None and written.exists() and read_json(written)["path"] == str(path)
    if not own or not is_output(path):
        raise UserError(f"{refused}is there already; give another name, or move it away")
