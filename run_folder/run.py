"""The run folder: options, a row of metrics a step, decoded samples, plots, checkpoints.

    config.json     every resolved option, versions of the libraries, the machine
    metrics.jsonl   one row a step, flushed at once
    samples.jsonl   decoded prompts and responses with their scores
    bad_rows.jsonl  what was in the batches of skipped updates
    summary.json    written when the run has finished
    checkpoints/    see checkpoint_folders.py        plots/    see plots.py

Importing this loads neither MLX nor W&B.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from errors import UserError
from run_folder.folder import default_folder, describe, lock_folder, remove
from run_folder.loggers import WandbRun, check_installed
from run_folder.run_config import config_of_run, read_run_config
from run_folder.secrets import tell
from safe_files import plain, write_json, writing

OWN_NAMES = (
    "config.json metrics.jsonl samples.jsonl bad_rows.jsonl summary.json checkpoints plots wandb"
).split()
ROW_FILES = ("metrics.jsonl", "samples.jsonl", "bad_rows.jsonl")


class Run:
    """One training run and its folder. Use as a context manager; ``close`` frees the folder.

    A second process that opens the same folder is refused. The lock belongs to the process, so a
    dead one leaves none behind.
    """

    def __init__(
        self,
        script: str,
        options: Mapping[str, Any],
        *,
        output_dir: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        log_with: str = "none",
        outputs: Sequence[str] = (),
        blas: str | None = None,
    ) -> None:
        """Open a new folder, or with ``resume`` the one of an earlier start.

        That one stays as it is until ``load_state_dict``, so that a script can still refuse.
        ``options``: every resolved option by name. ``outputs``: names of what the script itself
        writes into the folder, deleted with the rest by ``overwrite``. ``blas``: name of the BLAS
        in use. Raises ``UserError`` when the folder holds another run, is in use, or holds files
        under a run's names that are no run's, with ``overwrite`` too.
        """
        if log_with == "wandb":
            check_installed()
        self.folder = Path(output_dir) if output_dir else default_folder(script)
        if not resume:
            self._refuse_what_is_no_run(outputs)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder)
        try:
            self._open(script, options, resume, overwrite, outputs, blas)
            self.wandb, self._track = None, log_with == "wandb"
            if not resume:
                self.write_config()
                self._start_tracking()
        except BaseException:
            self._lock.close()
            raise
        self.started = time.monotonic()

    def _refuse_what_is_no_run(self, outputs: Sequence[str]) -> None:
        """UserError where files that would be taken for a run's are not: a model's, say."""
        there = [name for name in (*OWN_NAMES, *outputs) if os.path.lexists(self.folder / name)]
        if there and config_of_run(self.folder) is None:
            raise UserError(
                f"{self.folder}: holds {there[0]}, and no run that it belongs to (a run's "
                "config.json has its script and options); choose another --output-dir"
            )

    def _open(self, script, options, resume, overwrite, outputs, blas) -> None:
        if resume:
            old = read_run_config(self.folder)
            created = old.get("created")
            if old["script"] != script:  # sft.py has two kinds, and --force-resume forces much
                raise UserError(
                    f"{self.folder}: is a run of {old['script']}, and {script} cannot go on with "
                    "it; start anew"
                )
        else:
            created = None
            if config_of_run(self.folder) is not None and not overwrite:
                raise UserError(
                    f"{self.folder}: holds a run already; go on with it by --resume "
                    f"{self.folder}, choose another --output-dir, or delete it with --overwrite"
                )
            # config.json is replaced, not deleted: a stop half-way must leave a run's folder.
            for name in (*OWN_NAMES, *outputs):
                if name != "config.json":
                    remove(self.folder / name)
        self.config = describe(script, options, blas, created)
        self._files = {name: self._append_to(name) for name in ROW_FILES}

    def _append_to(self, name: str) -> BinaryIO:
        with writing(self.folder / name):
            return open(self.folder / name, "ab", buffering=0)

    def _start_tracking(self) -> None:
        if self._track:
            self.wandb = WandbRun(self.folder, self.config["script"], self.config)

    # ----------------------------------------------------------------- writing

    def write_config(self) -> None:
        """Write ``self.config`` into ``config.json``, from where a plain ``--resume`` takes it."""
        write_json(self.folder / "config.json", self.config)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.folder / "plots"

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Append one row and send its numbers to W&B; return the row as written.

        NaN and infinity become null, which JSON has and they are not.
        """
        row = {"step": int(step), **plain(dict(metrics))}
        write_line(self._files["metrics.jsonl"], row)
        if self.wandb is not None:
            self.wandb.log(step, row)
        return row

    def log_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append decoded samples: prompt, response, score, KL, and whatever else they hold."""
        for sample in samples:
            write_line(self._files["samples.jsonl"], {"step": int(step), **plain(dict(sample))})

    def log_bad_rows(self, step: int, reason: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append what an update that was skipped was to be made from, and why it was skipped."""
        for row in rows:
            entry = {"step": int(step), "reason": reason, **plain(dict(row))}
            write_line(self._files["bad_rows.jsonl"], entry)

    # ----------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, int]:
        """Lengths of the row files in bytes, for a checkpoint."""
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def cut_back(self, state: Mapping[str, int]) -> None:
        """Take back rows beyond these lengths, and make sure of the others on the disk."""
        for name, file in self._files.items():
            wanted, there = state.get(name, 0), os.fstat(file.fileno()).st_size
            if there < wanted:
                tell(f"warning: {file.name}: rows before the checkpoint are gone")
            with writing(file.name):
                os.ftruncate(file.fileno(), min(wanted, there))
                os.fsync(file.fileno())

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint, with the options of this start in ``config.json``.

        The row files are cut back to its lengths: later rows are going to be made again. An empty
        state (no checkpoint yet) empties them. The run is no longer a finished one.
        """
        self._start_tracking()  # may refuse, and then nothing has been written
        self.write_config()
        remove(self.folder / "summary.json")
        self.cut_back(state)

    # ----------------------------------------------------------------- the end

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Mark the run as finished and close it; ``summary`` goes into ``summary.json``."""
        seconds = round(time.monotonic() - self.started, 3)
        result = {"finished": True, **plain(dict(summary or {})), "seconds": seconds}
        write_json(self.folder / "summary.json", result)
        self.close(result)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Close files, W&B and the lock; a second call does nothing."""
        if self._lock.closed:
            return
        try:
            for file in self._files.values():
                file.close()
            if self.wandb is not None:
                self.wandb.finish(read_rows(self.folder / "samples.jsonl"), summary)
        finally:
            self._lock.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------ rows


def write_line(file: BinaryIO, row: Mapping[str, Any]) -> None:
    """Append one JSON object as one line, handed to the system at once."""
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: legal in Python, not in UTF-8
        line = json.dumps(row, ensure_ascii=True, allow_nan=False).encode("ascii")
    if os.fstat(file.fileno()).st_nlink == 0:
        raise UserError(f"{file.name}: was deleted while the run was writing to it")
    with writing(file.name):
        rest = memoryview(line + b"\n")
        while rest:
            rest = rest[file.write(rest) :]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` or ``samples.jsonl``; a torn last line is left out."""
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as wrong:
        raise UserError(f"{path}: cannot read: {wrong.strerror}") from None
    rows = []
    for at, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}:{at}: not a JSON object") from None
    return rows
