"""What a checkpoint says of itself, so that one changed bit of it is noticed.

    manifest.json   format number, step, metric, SHA-256 of every other file, and its own sum
    options.json    script and options that it was made with

A checkpoint without a format number is of an older version, whose step and options nothing checks.
It is taken with a warning, and given what it lacks; where one checkpoint has a number, all need it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from run_folder.run_config import SUM, was_changed, with_sum
from run_folder.secrets import tell
from safe_files import plain, sync_folder, synced_sum, write_atomically, write_checked

FORMAT = 2
MANIFEST, OPTIONS = "manifest.json", "options.json"
STATES = {"state.json", "state.pt"}  # one of them is in every checkpoint: of MLX, of PyTorch


@dataclass(frozen=True)
class Metric:
    """What makes one checkpoint better than another."""

    name: str
    value: float
    higher_is_better: bool = False

    def beats(self, other: float | None) -> bool:
        """Whether this value is better than ``other``; NaN beats nothing."""
        if self.value != self.value:
            return False
        if other is None:
            return True
        return self.value > other if self.higher_is_better else self.value < other


# ------------------------------------------------------------------------------ writing


def write_manifest(
    folder: Path, step: int, metric: Metric | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Options, then the sums of every file of a checkpoint, which is synced by this."""
    write_checked(folder / OPTIONS, as_text(options))
    sums = {file.name: synced_sum(file) for file in sorted(folder.iterdir())}
    metric = asdict(metric) if metric else None
    manifest = numbered_manifest({"step": step, "sha256": sums, "metric": metric})
    write_checked(folder / MANIFEST, as_text(manifest))
    sync_folder(folder)
    return manifest


def numbered_manifest(contents: dict[str, Any]) -> dict[str, Any]:
    """Contents with the format number and a sum of all of them."""
    files = contents["sha256"]
    rest = {"format": FORMAT, **{k: v for k, v in contents.items() if k != "sha256"}}
    return with_sum({**plain(rest), "files": files})


def as_text(value: dict[str, Any]) -> str:
    return json.dumps(plain(value), indent=1, allow_nan=False)


def number_old_ones(folder: Path, options: dict[str, Any]) -> None:
    """Give every whole checkpoint without a format number what the others have, oldest first.

    A stop half-way leaves the newest without it, which is then passed over for one before it.
    """
    old = [path for path in sorted(folder.glob("*step-*")) if is_old(path) and not problem(path)]
    if old:
        tell(
            f"warning: {folder}: its checkpoints are of an older version, which did not keep sums "
            "of their steps and options; they are taken as they are"
        )
    for path in old:
        manifest = whole_manifest(path)
        write_atomically(path / OPTIONS, as_text(options))
        sums = {**manifest["files"], OPTIONS: synced_sum(path / OPTIONS)}
        new = {"step": manifest["step"], "sha256": sums, "metric": manifest["metric"]}
        write_atomically(path / MANIFEST, as_text(numbered_manifest(new)))


# ------------------------------------------------------------------------------ reading


def read_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """step, metric and files (name -> SHA-256); None where the manifest is missing or altered."""
    found = read_json(checkpoint / MANIFEST)
    if found is None:
        return None
    if is_numbered(found):
        if was_changed(found) or found.get("format") != FORMAT:
            return None
        files = found.get("files")
    else:
        files = found.get("sha256")
    usable = isinstance(files, dict) and all(Path(name).name == name for name in files)
    if not usable or type(found.get("step")) is not int:
        return None
    return {"step": found["step"], "metric": found.get("metric"), "files": files}


def is_numbered(manifest: dict[str, Any]) -> bool:
    """Whether there is anything that older versions did not write: one bit may have hit a name."""
    return bool({"format", "files"} & manifest.keys()) or isinstance(manifest.get(SUM), str)


def is_old(checkpoint: Path) -> bool:
    found = read_json(checkpoint / MANIFEST)
    return found is not None and not is_numbered(found)


def metric_of(checkpoint: Path) -> Metric | None:
    """What a checkpoint is judged by, or None where it was saved with no metric, or with NaN."""
    try:
        metric = Metric(**read_manifest(checkpoint)["metric"])
        return metric if isinstance(metric.value, int | float) else None
    except (TypeError, KeyError):
        return None


def whole_manifest(checkpoint: Path) -> dict[str, Any]:
    """`read_manifest` of a checkpoint that had one a moment ago. Raises UserError."""
    found = read_manifest(checkpoint)
    if found is None:
        raise UserError(f"{checkpoint / MANIFEST}: cannot be read any more")
    return found


def options_of(checkpoint: Path) -> dict[str, Any] | None:
    """Script and options that a whole checkpoint was made with; None in an old one."""
    found = read_json(checkpoint / OPTIONS)
    return found if found and isinstance(found.get("options"), dict) else None


def problem(checkpoint: str | Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file has the sum it was written with."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such checkpoint"
    manifest = read_manifest(checkpoint)
    if manifest is None or not STATES & manifest["files"].keys():
        found = read_json(checkpoint / MANIFEST)
        number = found.get("format") if found and not was_changed(found) else None
        if isinstance(number, int) and number > FORMAT:
            return f"is of a newer version of this program (format {number}; this reads {FORMAT})"
        return f"{MANIFEST} is missing, torn or was altered"
    if is_old(checkpoint) and any_numbered(checkpoint.parent):
        return f"{MANIFEST} has no format number, which other checkpoints here have"
    for name, expected in manifest["files"].items():
        file = checkpoint / name
        try:
            with open(file, "rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != expected:
                    return f"{name} is torn or was altered"
        except OSError as wrong:
            return f"{name} cannot be read: {wrong.strerror}"
    return None


def any_numbered(folder: Path) -> bool:
    """Whether any checkpoint of a folder is of this version."""
    found = (read_json(path / MANIFEST) for path in folder.glob("*step-*"))
    return any(manifest is not None and is_numbered(manifest) for manifest in found)
