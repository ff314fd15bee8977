"""--fused-dir: where a training script leaves the trained model itself. Loads no MLX."""

import argparse
from pathlib import Path

from errors import UserError
from run_folder.run_config import config_of_run


def check_fused_dir(args: argparse.Namespace) -> None:
    """UserError where no model folder can be written to --fused-dir: before training, not after it.

    A folder that is there is replaced by the run that wrote it, resumed or begun anew with
    --overwrite.
    """
    if args.fused_dir is None:
        return
    if not args.fused_dir.strip():
        raise UserError("--fused-dir: the name is empty; give a folder, or leave the flag out")
    path = Path(args.fused_dir).expanduser().resolve()
    said = f"--fused-dir {args.fused_dir}: "
    for name in ("output_dir", "save_file", "model"):
        other = getattr(args, name)
        if other is not None and Path(other).expanduser().resolve().is_relative_to(path):
            raise UserError(
                f"{said}is, or holds, what --{name.replace('_', '-')} names; give another folder"
            )
    if args.output_dir is not None:
        from run_folder.run import OWN_NAMES

        run = Path(args.output_dir).resolve()
        if path.is_relative_to(run) and path.relative_to(run).parts[0] in OWN_NAMES:
            raise UserError(f"{said}is where the run keeps files of its own; give another folder")
    above = next(place for place in (path, *path.parents) if place.exists())
    if not above.is_dir():
        raise UserError(f"{said}{above} is no folder")
    if above == path and any(path.iterdir()) and not is_own(args, path):
        raise UserError(f"{said}exists already; give another name, or move it away")


def is_own(args: argparse.Namespace, path: Path) -> bool:
    """Whether the run that is resumed, or replaced with --overwrite, wrote the model at `path`."""
    again = args.output_dir and (args.resume or args.overwrite)
    before = config_of_run(Path(args.output_dir)) if again else None
    if before is None or not (path / "config.json").is_file() or config_of_run(path) is not None:
        return False
    written = before["options"].get("fused_dir")
    return isinstance(written, str) and Path(written).expanduser().resolve() == path
