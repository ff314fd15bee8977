"""Where else metrics go: scalars step by step, decoded text once, nothing secret, no questions.

Another logger is a class here and a row in `LOGGERS`.
"""

import contextlib
import importlib.util
import json
import netrc
import os
import sys
import uuid
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from errors import UserError
from run_folder.secrets import tell
from safe_files import write_atomically

PROJECT = "mlx-rlhf"
# What one table can show; the file in the run folder holds all of them.
TABLE_ROWS = 2000


def choose_mode(server: str) -> tuple[str | None, str]:
    """W&B's mode, or None to leave the choice to W&B, and a note; ``server``: its URL."""
    if os.environ.get("WANDB_MODE"):
        return None, ""
    if os.environ.get("WANDB_API_KEY") or has_netrc_key(server):
        return None, ""
    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        return None, ""
    # Without a terminal, W&B's question for a key would wait for ever.
    return "offline", "note: no W&B key found, logging offline; send it later with `wandb sync`"


def has_netrc_key(server: str) -> bool:
    """Whether the user has logged in to W&B on this machine."""
    host = urlsplit(server).hostname
    path = os.environ.get("NETRC") or Path.home() / ".netrc"
    try:
        return bool(host) and netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_installed(name: str) -> None:
    """Raise ``UserError`` where a logger's library is missing, before a run folder is touched."""
    library = LOGGERS[name].library
    if importlib.util.find_spec(library) is None:
        raise UserError(f"--log-with {name}: not installed; pip install {library}")


class WandbRun:
    """One W&B run whose files lie inside the run folder."""

    library = "wandb"

    def __init__(self, folder: Path, script: str, config: Mapping[str, Any]) -> None:
        """``config``: what config.json holds, secrets redacted."""
        # Artifacts are staged here; without this they would pile up in the home directory.
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            os.environ.setdefault(name, str((folder / "wandb").resolve()))
        import wandb

        self.wandb = wandb
        mode, note = choose_mode(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url)
        if note:
            tell(note)
        try:
            self.run = self._start(folder, script, config, mode)
        except Exception as wrong:  # its own errors are many and not all of them public
            if mode == "offline":
                raise UserError(f"--log-with wandb: {wrong}") from None
            reason = str(wrong).strip().partition("\n")[0]
            tell(f"note: W&B cannot be reached ({reason}); logging offline")
            wandb.teardown()  # its service would go on trying, and keeps the run's id in use
            self.run = self._start(folder, script, config, "offline")
        where = Path(self.run.dir).parent if self.run.offline else self.run.url
        tell(f"W&B: {where}")

    def _start(self, folder: Path, script: str, config: Mapping[str, Any], mode: str | None) -> Any:
        # Off: command line, host name, packages, git remote, printed output; config has the rest.
        settings = self.wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            init_timeout=20,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        number = folder / "wandb" / "run-id"
        if not number.exists():
            number.parent.mkdir(exist_ok=True)
            write_atomically(number, uuid.uuid4().hex[:12])
        args = Namespace(**config["options"])
        flat = {**config["options"], "versions": config["versions"], "machine": config["machine"]}
        return self.wandb.init(
            project=getattr(args, "wandb_project", None)
            or os.environ.get("WANDB_PROJECT", PROJECT),
            name=getattr(args, "wandb_run_name", None) or folder.name,
            id=number.read_text(encoding="utf-8"),  # a resumed run goes on in the same W&B run
            resume="allow",
            job_type=script,
            dir=str(folder),
            config=flat,
            mode=mode,
            settings=settings,
        )

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Send the numbers of one row under their own names."""
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self.run.log(numbers, step=step)

    def log_values(self, step: int, name: str, values: Sequence[float]) -> None:
        """Send numbers of one step as a histogram."""
        self.run.log({name: self.wandb.Histogram(list(values))}, step=step)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int | None = None) -> None:
        """Send every decoded sample so far in one table.

        A table logged at each step is a new artifact each time: fifty steps, fifty artifacts.
        """
        shown = samples[-TABLE_ROWS:]
        columns = list(dict.fromkeys(name for row in shown for name in row))
        data = [[row.get(name) for name in columns] for row in shown]
        table = self.wandb.Table(columns=columns, data=data, allow_mixed_types=True)
        self.run.log({"samples": table}, step=step)

    def finish(
        self,
        samples: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any] | None,
        plots: Sequence[Path] = (),
    ) -> None:
        """Send every decoded sample and the plots, and end the run."""
        if samples:
            self.log_samples(samples)
        if plots:
            self.run.log({f"plots/{p.stem}": self.wandb.Image(str(p)) for p in plots})
        for name, value in (summary or {}).items():
            self.run.summary[name] = value
        self.run.finish()

    def abandon(self) -> None:
        """After an error: nothing more is sent, at the end of the process neither."""
        with contextlib.suppress(Exception):
            self.wandb.teardown()


class TensorboardRun:
    """Event files in the run folder's ``tensorboard``, for `tensorboard --logdir RUN`."""

    library = "tensorboardX"

    def __init__(self, folder: Path, script: str, config: Mapping[str, Any]) -> None:
        """``config``: what config.json holds, secrets redacted."""
        self.folder, self.config, self.writer = folder / "tensorboard", config, None

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Write the numbers of one row under their own names."""
        if self.writer is None:
            from tensorboardX import SummaryWriter

            # A resumed run comes by its last steps again: what an older file says of them is void.
            self.writer = SummaryWriter(logdir=str(self.folder), purge_step=step)
            self.writer.add_text("config", as_block(self.config), step)
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_values(self, step: int, name: str, values: Sequence[float]) -> None:
        """Write numbers of one step as a histogram."""
        import numpy as np  # here: --help loads none

        if self.writer is not None and values:
            self.writer.add_histogram(name, np.asarray(values, dtype=float), step)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int | None = None) -> None:
        """Write the last step's decoded samples as text."""
        if self.writer is not None:
            last = samples[-1]["step"]
            shown = [sample for sample in samples if sample["step"] == last]
            self.writer.add_text("samples", as_block(shown), last)

    def finish(
        self,
        samples: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any] | None,
        plots: Sequence[Path] = (),
    ) -> None:
        """Write the last decoded samples and the summary as text, and close the file."""
        if self.writer is None:
            return
        if samples:
            self.log_samples(samples)
        if summary:
            self.writer.add_text("summary", as_block(summary))
        self.writer.close()

    def abandon(self) -> None:
        """After an error: nothing more is written."""
        self.writer = None


def as_block(value: Any) -> str:
    """JSON as TensorBoard shows it line by line: indented, as Markdown's code."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return "".join(f"    {line}\n" for line in text.splitlines())


# What --log-with offers, and the name of each one's own folder within a run's.
LOGGERS = {"wandb": WandbRun, "tensorboard": TensorboardRun}
