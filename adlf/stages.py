"""Stages of the two scripts in this folder: scripts of this project, run as child processes.

A folder keeps what each stage makes. `stages.json` says which are finished; a run that was stopped
goes on after the last of these, and inside the next one from its last checkpoint.
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from errors import UserError
from run_folder.secrets import redact
from safe_files import check_place, copy_file, write_atomically

ROOT = Path(__file__).resolve().parent.parent
RECORD = "stages.json"
SAID = 2  # the status of a stage that has said in one line what a person can put right


@dataclass
class Stage:
    """One command. `makes` is what it leaves behind; `run` its run folder, where it has one."""

    name: str
    script: str
    words: list[str]
    makes: Path
    run: Path | None = None
    extras: list[str] = field(default_factory=list)  # may differ when it goes on


def run_stages(folder: Path, stages: Sequence[Stage]) -> None:
    """Run what is not finished. Raises UserError where a finished one was made by other options.

    A stage that fails, or is stopped, ends the program with its exit status.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_place(folder / RECORD)  # not after the first stage
    done = read_record(folder)
    for stage in stages:
        made = done.get(stage.name)
        if made is not None and made != plain_words(stage) and stage.makes.exists():
            raise UserError(
                f"{folder}: its stage {stage.name} was made by other options "
                f"({shlex.join(made)}); give another --output_dir"
            )
    for stage in stages:
        if stage.name in done and stage.makes.exists():
            print(f"{stage.name}: done before, in {stage.makes}")
            continue
        run(stage)
        if not stage.makes.exists():
            raise UserError(
                f"{stage.name}: {stage.script} ended well, and {stage.makes} is missing"
            )
        done[stage.name] = plain_words(stage)
        write_atomically(folder / RECORD, json.dumps(done, indent=2) + "\n")


def plain_words(stage: Stage) -> list[str]:
    """Its command as the record keeps it, without secrets."""
    return redact([stage.script, *stage.words])


def read_record(folder: Path) -> dict[str, list[str]]:
    """Finished stages with the words that made them."""
    file = folder / RECORD
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if all(isinstance(words, list) for words in found.values()):
            return found
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(f"{file}: is no record of stages; delete it to begin anew")


def run(stage: Stage) -> None:
    """Run a stage as a child process, from its last checkpoint if it was begun."""
    words = [*stage.words, *stage.extras]
    if stage.run is not None and any(stage.run.glob("checkpoints/step-*")):
        words = ["--resume", str(stage.run), *stage.extras]
    elif stage.run is not None and stage.run.exists():
        words.append("--overwrite")  # stopped before its first checkpoint
    shown = shlex.join(["python", stage.script, *words])
    print(f"\n== {stage.name}\n{shown}", flush=True)
    child = subprocess.Popen([sys.executable, str(ROOT / stage.script), *words])
    with handing_on(child):
        status = child.wait()
    if status:
        code = 128 - status if status < 0 else status
        if code != SAID:
            print(f"error: {stage.name} ended with status {code}", file=sys.stderr)
        raise SystemExit(code)


@contextmanager
def handing_on(child: subprocess.Popen) -> Iterator[None]:
    """Within this context a stop that reaches this process alone reaches the child."""
    # A terminal's Ctrl-C goes to both, and the child ends in good order by itself.
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM)),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------ files


def found(path: str | None) -> str | None:
    """A path as it is, or below the project's root where it is not here; other names as they are.

    In full, as the record of stages must not depend on the folder a command was started in.
    """
    if path is None:
        return None
    for place in (Path(path).expanduser(), ROOT / path):
        if place.exists():
            return str(place.resolve())
    return path


def with_tokenizer(model: str, tokenizer: str, folder: Path) -> str:
    """A copy of a model folder with the tokenizer of another one; returns its path.

    Raises UserError unless both are local folders.
    """
    for flag, path in (("--model_name", model), ("--tokenizer_name", tokenizer)):
        if not Path(path or "").is_dir():
            raise UserError(
                f"{flag} {path}: not a folder; another tokenizer is put beside local models alone"
            )
    made = folder / "base_model"
    if not made.exists():
        part = folder / "base_model.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for source, of_tokenizer in ((model, False), (tokenizer, True)):
            for file in Path(source).iterdir():
                if file.is_file() and is_of_tokenizer(file.name) == of_tokenizer:
                    copy_file(file, part / file.name)
        part.rename(made)
    return str(made)


def is_of_tokenizer(name: str) -> bool:
    """Whether a file of a model folder belongs to its tokenizer."""
    starts = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
    return name.startswith(starts)
