"""Where a training script leaves the trained model itself. Loads no MLX."""

import argparse
from pathlib import Path

from command_line.rules import flag_of
from errors import UserError
from models.tokenizer_files import GENERATION_CONFIG, TOKENIZER_FILES
from run_folder.run import OWN_NAMES, RUNS
from run_folder.run_config import config_of_run

# All that is in a model folder that was written here, and what a Mac adds.
WRITTEN = (
    *TOKENIZER_FILES,
    GENERATION_CONFIG,
    *"config.json adapter_config.json *.safetensors *.safetensors.index.json".split(),
    *"README.md plots *.py additional_chat_templates .DS_Store".split(),
)


def check_fused_dir(args: argparse.Namespace) -> None:
    """UserError where no model folder can be written to --fused-dir: before training, not after."""
    if args.fused_dir is None:
        return
    if not args.fused_dir.strip():
        raise UserError("--fused-dir: the name is empty; give a folder, or leave the flag out")
    check_model_folder(args, "fused_dir")


def check_model_folder(args: argparse.Namespace, name: str) -> None:
    """UserError where no model folder can be written to what the option `name` says.

    A folder that is there is replaced by the run that wrote it, resumed or begun anew with
    --overwrite.
    """
    given = getattr(args, name)
    path, said = Path(given).expanduser().resolve(), f"{flag_of(name)} {given}: "
    run = args.output_dir or f"{RUNS}/new"
    for other, there in {**vars(args), "output_dir": run}.items():
        if other in {"output_dir", "save_file", "model"} - {name} and there is not None:
            if Path(there).expanduser().resolve().is_relative_to(path):
                raise UserError(
                    f"{said}is, or holds, what {flag_of(other)} names; give another folder"
                )
    run = Path(run).resolve()
    if path.is_relative_to(run) and path.relative_to(run).parts[0] in OWN_NAMES:
        raise UserError(f"{said}is where the run keeps files of its own; give another folder")
    above = next(place for place in (path, *path.parents) if place.exists())
    if not above.is_dir():
        raise UserError(f"{said}{above} is no folder")
    if above == path and any(path.iterdir()) and not is_own(args, name, path):
        raise UserError(f"{said}exists already; give another name, or move it away")


def is_own(args: argparse.Namespace, name: str, path: Path) -> bool:
    """Whether the run that is resumed, or replaced with --overwrite, wrote all that is at `path`.

    `name`: the option in which it was told to.
    """
    again = args.output_dir and (args.resume or args.overwrite)
    before = config_of_run(Path(args.output_dir)) if again else None
    if before is None or not (path / "config.json").is_file() or config_of_run(path) is not None:
        return False
    written = before["options"].get(name)
    told = isinstance(written, str) and Path(written).expanduser().resolve() == path
    return told and all(any(map(file.match, WRITTEN)) for file in path.iterdir())
