"""What a run folder tells about a model: options, final metrics, plots, versions."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from models.adapter_description import RUN, is_single_file, read_description
from run_folder.run import read_rows
from run_folder.run_config import config_of_run
from run_folder.secrets import redact
from safe_files import copy_file, refuse_links

# How a run was carried out, not what the model learned from.
LEFT_OUT = {
    "output_dir",
    "overwrite",
    "config",
    "resume",
    "force_resume",
    "log_with",
    "keep_checkpoints",
    "save_every",
    "memory_limit",
    "max_bad_steps",
    "save_file",
    "fused_dir",
    "resume_file",
    "preview",
    "steps_per_report",
    "resume_adapter_file",
    "trust_remote_code",
}
MOST_METRICS, MOST_PLOTS = 24, 4


@dataclass
class RunFacts:
    """Facts for a model card; nothing secret, no path of the machine."""

    folder: Path
    script: str
    options: dict[str, Any]
    metrics: dict[str, float]  # the last value of each
    steps: int | None
    plots: list[Path]
    versions: dict[str, str]
    differing: list[str] | None = None  # names of options; None: an older run does not say


def read_run(folder: str | Path) -> RunFacts:
    """Raises UserError where `folder` holds no run."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        script, options = str(config["script"]), dict(config["options"])
    except FileNotFoundError:
        raise UserError(f"{folder}: not a run folder: config.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read: {error!r}") from None
    rows = read_rows(folder) if (folder / "metrics.jsonl").exists() else []
    plots = sorted((folder / "plots").glob("*.png"))[:MOST_PLOTS]
    return RunFacts(
        folder=folder,
        script=script,
        options={k: _public(v) for k, v in redact(options).items() if _counts(k, v)},
        differing=_differing(config, options),
        metrics=_last_values(rows),
        steps=max((row.get("step", 0) for row in rows), default=None),
        plots=plots,
        versions={k: v for k, v in dict(config.get("versions") or {}).items() if v},
    )


def find_run(adapter: str | Path, runs: str | Path = "runs") -> Path | None:
    """The run that made `adapter`: the one that it records, one that it lies in, or else the newest
    among the folders in `runs` whose result was saved as it."""
    target = Path(adapter).resolve()
    for folder in _recorded(target):
        config = config_of_run(folder)
        saved = config["options"].get("save_file") if config else None
        # Another adapter's, where the folder has been used for a run again.
        if isinstance(saved, str) and Path(saved).name == target.name:
            return folder
    found = []
    for file in Path(runs).glob("*/config.json"):
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))["options"].get("save_file")
        except (OSError, ValueError, KeyError, AttributeError):
            continue
        if isinstance(saved, str) and Path(saved).resolve() == target:
            found.append((file.stat().st_mtime, file.parent))
    return max(found)[1] if found else None


def _recorded(adapter: Path) -> list[Path]:
    """Folders that may be the run of an adapter, by what it says and where it lies."""
    beside = adapter.parent if is_single_file(adapter) else adapter
    try:
        said = read_description(adapter).get(RUN)
    except UserError:  # whoever reads its arrays says what is wrong
        said = None
    return [*([beside / said] if isinstance(said, str) else []), *adapter.parents[:2]]


def copy_plots(facts: RunFacts, folder: Path) -> list[str]:
    """Copy the run's plots into a model folder; returns their names relative to it."""
    names = []
    for plot in facts.plots:
        refuse_links(plot, facts.folder)
        (folder / "plots").mkdir(exist_ok=True)
        copy_file(plot, folder / plot_name(plot))
        names.append(plot_name(plot))
    return names


def plot_name(plot: Path) -> str:
    """Where a plot of a run lies in a model folder."""
    return f"plots/{plot.name}"


def _differing(config: dict[str, Any], options: dict[str, Any]) -> list[str] | None:
    names = config.get("differing")
    return [name for name in names if name in options] if isinstance(names, list) else None


def _counts(name: str, value: Any) -> bool:
    return name not in LEFT_OUT and value not in (None, False, [], "none")


def _public(value: Any) -> Any:
    """The value without the folders of the machine it was used on."""
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", ".")) and "/" in value:
        return Path(value).name or value
    return value


def _last_values(rows: list[dict]) -> dict[str, float]:
    last: dict[str, float] = {}
    for row in rows:
        last.update({k: v for k, v in row.items() if k != "step" and _is_number(v)})
    wanted = [k for k in last if not any(word in k for word in ("time", "total", "per_second"))]
    return {k: last[k] for k in sorted(wanted)[:MOST_METRICS]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
