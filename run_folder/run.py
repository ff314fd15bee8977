"""The run folder: options, a row of metrics a step, decoded samples, plots, checkpoints.

    config.json     every resolved option, versions of the libraries, the machine
    metrics.jsonl   one row a step, flushed at once
    samples.jsonl   decoded prompts and responses with their scores
    bad_rows.jsonl  what was in the batches of skipped updates
    summary.json    written when the run has finished
    checkpoints/    see checkpoint_folder.py        plots/    see plots.py

Importing this loads neither MLX nor W&B.
"""

import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from run_folder.locks import OutputLock, lock_folder
from run_folder.loggers import LOGGERS, check_installed
from run_folder.private import is_number, mark_private, private_folder, without_texts
from run_folder.rows import NO_ROWS, ROW_FILES, RowFile, numbered, read_rows
from run_folder.run_config import (
    OF_ONE_START,
    config_of_run,
    own_options,
    read_run_config,
    versions,
    with_sum,
)
from run_folder.secrets import redact, tell
from safe_files import (
    check_place,
    plain,
    refuse_links,
    refuse_links_below,
    sweep,
    write_json,
    writing,
)

HELD_OUT = ("eval/", "valid/")  # how metrics of held-out rows begin
RUNS = "runs"  # where runs lie that are given no folder
OWN_NAMES = ["config.json", *ROW_FILES, "summary.json", "checkpoints", "plots", *LOGGERS]


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
        computing: Mapping[str, Any] | None = None,
    ) -> None:
        """Open a new folder, or with ``resume`` the one of an earlier start.

        That one stays as it is until ``load_state_dict``, so that a script can still refuse.
        ``options``: every resolved option by name. ``outputs``: names of what the script itself
        writes into the folder, deleted with the rest by ``overwrite``. ``computing``: what matrix
        products are computed with (``settings`` of fast_blas.py). Raises ``UserError`` when the
        folder holds another run, is in use, or holds files under a run's names that are no run's,
        with ``overwrite`` too.
        """
        if log_with != "none":
            check_installed(log_with)
        self.folder = Path(output_dir) if output_dir else default_folder(script)
        if not resume:
            self._refuse_what_is_no_run(outputs)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder)
        self._output, self._files, self._umask = OutputLock(None), {}, None
        try:
            self._refuse_links(outputs)
            self._sweep()
            if resume:
                self._refuse_what_is_in_the_way(outputs)
            saved = options.get("save_file")
            self._output = OutputLock(Path(saved).expanduser() if saved else None)
            self.may_change = tuple(options.get("may_change", ()))
            self.typed = frozenset(options.get("explicit", ()))
            self._find_out_whether_private(options)
            self._open(script, options, resume, overwrite, outputs, computing or {})
            if self.private:
                mark_private(self.folder)
            self.logger, self._log_with = None, log_with
            if not resume:
                self._start_tracking()
        except BaseException:
            self._free()
            raise
        self.started = time.monotonic()

    def _refuse_what_is_no_run(self, outputs: Sequence[str]) -> None:
        """UserError where files that would be taken for a run's are not: a model's, say."""
        there = [name for name in (*OWN_NAMES, *outputs) if os.path.lexists(self.folder / name)]
        # Versions before this one could be killed between these files and config.json.
        there = [name for name in there if not is_empty(self.folder / name)]
        if there and config_of_run(self.folder) is None:
            raise UserError(
                f"{self.folder}: holds {there[0]}, and no run that it belongs to (a run's "
                "config.json has its script and options); choose another --output-dir"
            )

    def _open(self, script, options, resume, overwrite, outputs, computing) -> None:
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
        self.config = describe(script, options, computing, created)
        if not resume:  # before any other file: without it they would be no run's
            self.write_config()
        self._files = {name: RowFile(self.folder / name) for name in ROW_FILES}

    def _refuse_links(self, outputs: Sequence[str]) -> None:
        """UserError where something of the run is a link; W&B makes some inside its folder."""
        for name in (*OWN_NAMES, *outputs):
            refuse_links(self.folder / name)
            refuse_links_below(self.folder / name, may_stay_inside=name == "wandb")

    def _refuse_what_is_in_the_way(self, outputs: Sequence[str]) -> None:
        """UserError where a file cannot be written at the end of this run: before its beginning."""
        for name in ("config.json", *ROW_FILES, "summary.json", "checkpoints", "plots", *outputs):
            place, is_file = self.folder / name, bool(Path(name).suffix)
            if place.is_dir() and not is_file:
                check_place(place / "x")
            elif place.is_dir() if is_file else place.exists():
                what, wanted = ("folder", "file") if is_file else ("file", "folder")
                raise UserError(f"{place}: is a {what}, in the place of a run's {wanted}")
        for plot in self.plots.glob("*.png"):
            if plot.is_dir():
                raise UserError(f"{plot}: is a folder, in the place of a plot")

    def _sweep(self) -> None:
        """Clear away what dead processes left half-written in this folder."""
        for name in OWN_NAMES:
            sweep(self.folder / name)
        for folder in (self.checkpoints, self.plots):
            sweep(folder, all_names=True)

    def _find_out_whether_private(self, options: Mapping[str, Any]) -> None:
        """A run on private texts is private too: it holds samples, and weights that know them."""
        source = private_folder(dict(options) | {"run": self.folder})
        self.private = source is not None
        if self.private:
            self._umask = os.umask(0o077)  # for all that is written until the run is closed

    def _start_tracking(self) -> None:
        if self._log_with == "none":
            return
        config = self.config
        if self.private:
            tell(f"note: trains on private texts, so {self._log_with} is sent numbers alone")
            config = without_texts(config)
        self.logger = LOGGERS[self._log_with](self.folder, config["script"], config)

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
        """Append one row and send its numbers to the logger; return the row as written.

        NaN and infinity become null, which JSON has and they are not.
        """
        row = numbered(step, metrics)
        self._files["metrics.jsonl"].append(row)
        self._to_logger(lambda logger: logger.log(step, row))
        if any(name.startswith(HELD_OUT) for name in row) and not self.private:
            self._send_samples(step)
        return row

    def log_values(self, step: int, name: str, values: Sequence[float]) -> None:
        """Send the finite ones among numbers of one step to the logger, as a histogram."""
        known = [float(value) for value in values if math.isfinite(value)]
        if known:
            self._to_logger(lambda logger: logger.log_values(step, name, known))

    def _send_samples(self, step: int) -> None:
        """The samples so far, to the logger: during training at each look at held-out rows."""
        if self.logger is not None and (samples := read_rows(self.folder / "samples.jsonl")):
            self._to_logger(lambda logger: logger.log_samples(samples, step))

    def _to_logger(self, send: Callable[[Any], None]) -> None:
        """Give the logger something; one that fails (its process was killed, say) costs itself."""
        if self.logger is None:
            return
        try:
            send(self.logger)
        except Exception as wrong:  # its own errors are many and not all of them public
            reason = str(wrong).strip().partition("\n")[0] or type(wrong).__name__
            tell(
                f"warning: --log-with {self._log_with}: {reason}; the run goes on without it, and "
                f"{self.folder / 'metrics.jsonl'} has every row"
            )
            self.logger.abandon()
            self.logger = None

    def log_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append decoded samples: prompt, response, score, KL, and whatever else they hold."""
        for sample in samples:
            self._files["samples.jsonl"].append(numbered(step, sample))

    def log_bad_rows(self, step: int, reason: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append what an update that was skipped was to be made from, and why it was skipped."""
        for row in rows:
            entry = numbered(step, {"reason": reason, **row})
            self._files["bad_rows.jsonl"].append(entry)

    # ----------------------------------------------------------------- resume

    @property
    def own_options(self) -> dict[str, Any]:
        """Script and options, for a checkpoint: what it was made with."""
        return own_options(self.config)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Lengths and sums of the row files, for a checkpoint."""
        return {name: file.state() for name, file in self._files.items()}

    def cut_back(self, state: Mapping[str, Any]) -> None:
        """Take back rows beyond these lengths, and make sure of the others on the disk."""
        for name, file in self._files.items():
            file.cut_back(state.get(name, NO_ROWS))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, with the options of this start in ``config.json``.

        The row files are cut back to its lengths: later rows are going to be made again. An empty
        state (no checkpoint yet) empties them. The run is no longer a finished one.
        """
        self._start_tracking()  # may refuse, and then nothing has been written
        self.write_config()
        remove(self.folder / "summary.json")
        self.cut_back(state)

    @property
    def recorded(self) -> Path | None:
        """The folder, for what the run makes to record; None for one that is named by the time.

        Those lie in ``runs/``, where a model card looks anyway; the same command twice makes the
        same files.
        """
        return None if self.folder.resolve().parent == Path(RUNS).resolve() else self.folder

    # ----------------------------------------------------------------- the end

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Mark the run as finished and close it; ``summary`` goes into ``summary.json``."""
        seconds = round(time.monotonic() - self.started, 3)
        result = {"finished": True, **plain(dict(summary or {})), "seconds": seconds}
        write_json(self.folder / "summary.json", result)
        self.close(result)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Close files, the logger and the locks; a second call does nothing."""
        if self._lock.closed:
            return
        try:
            self._to_logger(lambda logger: logger.finish(*self._last_words(summary)))
        finally:
            self._free()

    def _last_words(
        self, summary: Mapping[str, Any] | None
    ) -> tuple[list, Mapping | None, list[Path]]:
        """(samples, summary, plots) for the logger: of a private run numbers alone."""
        if self.private:
            return [], {k: v for k, v in (summary or {}).items() if is_number(v)}, []
        plots = sorted(self.plots.glob("*.png"))
        return read_rows(self.folder / "samples.jsonl"), summary, plots

    def _free(self) -> None:
        if self._umask is not None:
            os.umask(self._umask)
            self._umask = None
        for file in (*self._files.values(), self._output, self._lock):
            file.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------ folders


def default_folder(script: str, base: str | Path = RUNS) -> Path:
    """Make and return a folder ``runs/<script>-<time>`` that did not exist before."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with writing(base):
        for number in range(1, 1000):
            folder = Path(base) / (f"{script}-{stamp}" + (f"-{number}" if number > 1 else ""))
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
    raise UserError(f"{base}: a thousand runs of this second are there already")


def remove(path: Path) -> None:
    """Delete a file or a folder that may not be there; links are deleted, never followed."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_empty(path: Path) -> bool:
    """Whether a path is a file of rows without any."""
    return (
        path.name in ROW_FILES
        and path.is_file()
        and not path.is_symlink()
        and not path.stat().st_size
    )


# ------------------------------------------------------------------------------ contents


def differing(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Names of the options that have another value than their default, typed or settled."""
    return sorted(name for name, value in options.items() if value != defaults.get(name))


def describe(
    script: str,
    options: Mapping[str, Any],
    computing: Mapping[str, Any],
    created: str | None,
) -> dict[str, Any]:
    """What ``config.json`` holds; secrets are redacted."""
    kept = {name: value for name, value in options.items() if name not in OF_ONE_START}
    return with_sum(
        {
            "script": script,
            "created": created or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "options": redact(plain(kept)),
            "differing": differing(kept, options.get("defaults", kept)),
            "versions": versions(),
            "machine": {
                "platform": platform.platform(),
                "processor": platform.processor() or platform.machine(),
                "cpu_count": os.cpu_count(),
                **computing,
                "folder": os.getcwd(),  # which relative paths among the options start from
            },
        }
    )
