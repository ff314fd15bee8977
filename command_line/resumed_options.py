"""What ``--resume`` needs before any model is loaded: the old run's options. Loads no MLX."""

from pathlib import Path

from command_line.setting import Setting
from errors import UserError
from run_folder.manifest import any_numbered
from run_folder.run_config import (
    MADE_BY,
    OF_ONE_START,
    REDACTED,
    SUM,
    read_run_config,
    run_folder_of,
    was_changed,
)
from run_folder.secrets import tell
from run_folder.stopping import resume_command


def check_script(path: str | Path, script: str) -> None:
    """Raise ``UserError`` unless ``script`` made the run: another one would begin it anew."""
    made = read_run_config(path)["script"]
    maker = MADE_BY.get(made, made)
    if maker != script:
        go_on = f"; go on with it by: {resume_command(maker, path)}" if made in MADE_BY else ""
        raise UserError(f"{run_folder_of(path)}: is a run of {maker}, and this is {script}{go_on}")


def read_run_options(path: str | Path) -> list[Setting]:
    """The options of a run as settings for the parser; those with a secret in them are left out."""
    folder, config = run_folder_of(path), read_run_config(path)
    file, options = str(folder / "config.json"), config["options"]
    if was_changed(config) and (SUM in config or any_numbered(folder / "checkpoints")):
        tell(f"warning: {file}: was changed since the run wrote it")
    # Optional: an option that this version no longer has is no reason to refuse the run.
    return [
        Setting(key, value, file, optional=True)
        for key, value in options.items()
        if key not in OF_ONE_START and REDACTED not in str(value)
    ]


def begun_before(path: str | Path, option: str) -> bool:
    """Whether a run was begun by a version that had no such option yet."""
    return option not in read_run_config(path)["options"]


def redacted_options(path: str | Path) -> set[str]:
    """Names of the options that had a secret in them, which is not in the file."""
    options = read_run_config(path)["options"]
    return {key for key, value in options.items() if REDACTED in str(value)}
