"""The folder of a run's checkpoints: each whole or not there, the newest and the best kept.

    RUN/checkpoints/step-00000100/...             what a backend saves (checkpoints.py)
                                  manifest.json   SHA-256 of every other file, and the metric that
                                                  the checkpoint is judged by
    RUN/checkpoints/best.json                     which one is best, and by what

A checkpoint is written under a temporary name, synced, and renamed. Importing this loads no MLX.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from errors import UserError
from run_folder.manifest import (
    Metric,
    any_numbered,
    metric_of,
    problem,
    read_json,
    read_manifest,
    whole_manifest,
    write_manifest,
)
from run_folder.run_config import SUM, was_changed, with_sum
from run_folder.secrets import tell
from safe_files import sync_folder, write_json, writing

NAME = "step-{:08d}"
UNFINISHED = "-0"
TEMPORARY = ".tmp-"
BEST = "best.json"
MLX_CANNOT_WRITE = re.compile(r"\[(save_safetensors|write|save)\]")
ASIDE = "aside-"  # a checkpoint that the run went back behind; neither used nor deleted


# ------------------------------------------------------------------------------ saving


def write_checkpoint(
    folder: str | Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int = 2,
    metric: Metric | None = None,
    unfinished: bool = False,
    options: dict[str, Any] | None = None,
) -> Path:
    """Make a checkpoint of the files that ``write`` puts into the folder it is given.

    ``unfinished``: the step's evaluation was given up; a name of its own, ``step-00000100-0``,
    leaves the step's to the checkpoint that a resumed run makes after the evaluation.

    Returns the checkpoint's folder, having deleted those no longer kept: the newest ``keep`` stay,
    and the best one by ``metric``. Raises ``UserError`` when the disk refuses, with the checkpoints
    that were there untouched.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(exist_ok=True)  # no parents: a run folder that has vanished stays away
        for left_over in folder.glob(TEMPORARY + "*"):
            shutil.rmtree(left_over)
    temporary = folder / f"{TEMPORARY}{NAME.format(step)}-{os.getpid()}"
    try:
        with writing(temporary):
            temporary.mkdir()
            write(temporary)
            manifest = write_manifest(temporary, step, metric, options or {})
            name = NAME.format(step) + UNFINISHED * unfinished
            final = put_in_place(temporary, folder / name, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    note_best(folder)
    prune(folder, keep)
    return final


def disk_refused(wrong: Exception, folder: Path) -> OSError:
    """What to raise for an error of a library that does not say that the disk was the reason."""
    free = shutil.disk_usage(folder).free
    return OSError(0, f"{wrong} ({free / 1e6:.1f} MB free on this disk)")


def put_in_place(temporary: Path, wanted: Path, manifest: dict[str, Any]) -> Path:
    """Rename a finished folder to ``wanted``, or where that is taken to ``wanted-2`` and so on.

    A run that was resumed comes by its old checkpoints again: the same one is left as it is, a
    broken one replaced.
    """
    there = list_checkpoints(wanted.parent)
    taken = [path for path in there if path.name.startswith(wanted.name)]
    if not wanted.name.endswith(UNFINISHED):
        taken = [path for path in taken if not path.name.endswith(UNFINISHED)]
    final = wanted
    if taken:
        final = taken[-1]
        known = read_manifest(final)  # None where a disk gives it once and not again
        broken = known is None or problem(final)
        if broken or (final == wanted and wanted.name.endswith(UNFINISHED)):
            discard(final)
        elif known["files"] == manifest["files"]:
            return final
        else:
            number = int(final.name.removeprefix(wanted.name)[1:] or 1) + 1
            final = wanted.with_name(f"{wanted.name}-{number}")
    os.rename(temporary, final)
    sync_folder(final.parent)
    return final


def note_best(folder: Path) -> None:
    """Point ``best.json`` at the best of the checkpoints that are there, by the newest's metric.

    All of them are asked, for a process may have been killed between a checkpoint and its note.
    """
    judged = judged_checkpoints(folder)
    best = read_best(folder) if judged else None
    if best is None or best["metric"] != judged[-1][1].name or not best_checkpoint(folder):
        best = None
    best = best_of(judged, best)
    if best is not None and read_json(folder / BEST) != with_sum(best):  # or it was altered
        write_json(folder / BEST, with_sum(best))


def judged_checkpoints(folder: Path) -> list[tuple[Path, Metric]]:
    """Every checkpoint with a metric, oldest first."""
    return [(path, metric) for path in list_checkpoints(folder) if (metric := metric_of(path))]


def best_of(judged: list[tuple[Path, Metric]], best: dict[str, Any] | None) -> dict | None:
    """What ``best.json`` should hold: the first that beats the others, by the last one's metric."""
    for path, metric in judged:
        if metric.name == judged[-1][1].name and metric.beats(best["value"] if best else None):
            best = {"metric": metric.name, "value": metric.value, "checkpoint": path.name}
    return best


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints and the best one."""
    best = best_checkpoint(folder)
    with writing(folder):
        for old in list_checkpoints(folder)[: -max(keep, 1)]:
            if old != best:
                discard(old)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint so that a stop half-way leaves nothing that looks like one."""
    doomed = checkpoint.with_name(f"{TEMPORARY}old-{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def set_aside_after(checkpoint: Path | None, folder: Path) -> None:
    """Rename every checkpoint newer than the one that a run goes back to (None: all of them).

    Else a torn one would count among the newest that are kept, and a whole one be gone on from.
    """
    last = (-1, 0)
    if checkpoint is not None:
        last = place_of(checkpoint.name.removeprefix(ASIDE)) or (
            whole_manifest(checkpoint)["step"],
            1,
        )
    newer = [path for path in list_checkpoints(folder) if place_of(path.name) > last]
    with writing(folder):
        for path in reversed(newer):
            aside = free_name(path.with_name(ASIDE + path.name))
            os.rename(path, aside)
            tell(f"note: {path} is not gone on from; it is now {aside}")


def free_name(path: Path) -> Path:
    """``path``, or where that is taken the same with a number behind it."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Around the writing of trained weights to ``path``: a disk that refuses is a ``UserError``."""
    path, said = Path(path), None
    try:
        yield
    except OSError as wrong:
        said = f"{wrong.strerror or wrong}" + (f" ({wrong.filename})" if wrong.filename else "")
    except RuntimeError as wrong:
        if not MLX_CANNOT_WRITE.match(str(wrong)):
            raise
        said = str(wrong)
    if said is None:
        return
    raise UserError(
        f"{path}: cannot write: {said}; the trained weights are in the last checkpoint: --resume "
        "the run with another --save-file"
    )


# ------------------------------------------------------------------------------ finding


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Every finished checkpoint of a folder, oldest first, broken ones included."""
    found = [p for p in Path(folder).glob("step-*") if place_of(p.name) and p.is_dir()]
    return sorted(found, key=lambda path: place_of(path.name))


def place_of(name: str) -> tuple[int, int] | None:
    """(step, number) of ``step-00000100`` or ``step-00000100-2``, or None for other names."""
    found = re.fullmatch(r"step-(\d+)(?:-(\d+))?", name)
    return (int(found[1]), int(found[2] or 1)) if found else None


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that is whole, or None; warns of every newer one that is not."""
    for path in reversed(list_checkpoints(folder)):
        wrong = problem(path)
        if wrong is None:
            return path
        tell(f"warning: {path}: {wrong}; using the one before it")
    return None


def read_best(folder: str | Path) -> dict[str, Any] | None:
    """metric, value and checkpoint as ``best.json`` has them, or None where there is none.

    Where it was altered, what the checkpoints themselves say, and a warning.
    """
    file = Path(folder) / BEST
    if not file.exists():
        return None
    best = read_json(file) or {}
    if isinstance(best.get("checkpoint"), str) and {"metric", "value"} <= {*best}:
        old = SUM not in best and not any_numbered(file.parent)
        if old or not was_changed(best):
            return {name: best[name] for name in ("metric", "value", "checkpoint")}
    tell(f"warning: {file}: was altered; the best checkpoint is found by what each says of itself")
    return best_of(judged_checkpoints(file.parent), None)


def best_checkpoint(folder: str | Path) -> Path | None:
    """The best checkpoint by the metric it was saved with, or None."""
    best = read_best(folder)
    path = Path(folder) / Path(best["checkpoint"]).name if best else None
    return path if path is not None and path.is_dir() else None
