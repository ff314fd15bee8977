"""Runs of the real scripts in processes of their own: killed, signalled, limited, compared.

A script spends two seconds on imports. So one server process imports everything once, and every
run is a fork of it that has touched no array yet; `command` runs a script from scratch instead.
"""

import fast_blas  # noqa: F401  isort: skip

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from files import without_times
from run_server import TOUCHES
from script_table import DATA, ROOT, RUNS, SHORT, words  # noqa: F401

KILLS = int(os.environ.get("MLX_RLHF_KILLS", "2"))  # 20 in the long version
LIST_FAULTS = 0  # an action of reliability/fault_shim.c: says each touch
TOO_LONG = 120.0  # seconds for a run of a test
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "WANDB_MODE")


def quick(names: str, every: Iterable[str]) -> list:
    """`names`, and those of `every` that are not among them with the mark of a long test."""
    rest = [name for name in every if name not in names.split()]
    return [*names.split(), *(pytest.param(name, marks=pytest.mark.long) for name in rest)]


# Put into a run, makes steps and validations last long enough to be hit by something; each says
# NOW on standard error when it begins.
NOW = "a slow part begins"
SLOW = """
import sys, time, mlx_ppo_trainer, mlx_sft_trainer
def slowed(owner, name):
    inner = getattr(owner, name)
    def slow(*words, **options):
        sys.stderr.write("a slow part begins\\n")
        time.sleep({seconds})
        return inner(*words, **options)
    setattr(owner, name, slow)
slowed(mlx_ppo_trainer.PPOTrainer, "update")
slowed(mlx_sft_trainer.SupervisedTrainer, "step")
slowed(mlx_ppo_trainer.PPOTrainer, "sample_for_evaluation")
slowed(mlx_sft_trainer.SupervisedTrainer, "evaluate")
"""

# ------------------------------------------------------------------------------ one run


@dataclass
class Ended:
    """How a run ended; `code` is negative where a signal ended it."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What follows "error: " on the one line that stands for it."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0].removeprefix("error: ")


def command(script: str, line: list[str], folder: Path, **environment: str) -> Ended:
    """A script as a person starts it, in `folder`."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *line],
        cwd=folder,
        env=clean_environment() | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SECRETS}


class Running:
    """A run that a server started; `wait` for its end, or `kill` it."""

    def __init__(self, server: "Server", pid: int, out: Path, err: Path) -> None:
        self.server, self.pid, self.out, self.err = server, pid, out, err

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def until(self, reached: Callable[[], bool], pause: float = 0.005) -> int | None:
        """Wait until something is so, or the run has ended; its exit status then."""
        started = time.monotonic()
        while (code := self.server.ask({"code of": self.pid})) is None and not reached():
            if time.monotonic() - started > TOO_LONG:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"the run hangs: {self.err.read_text()}")
            time.sleep(pause)
        return code

    def wait(self) -> Ended:
        code = self.until(lambda: False, 0.02)
        return Ended(code, self.out.read_text(), self.err.read_text())

    def wait_for(self, text: str) -> None:
        """Until the run has written `text` on standard error, or has ended."""
        self.until(lambda: text in self.err.read_text())

    def wait_for_file(self, path: Path, size: int = 1) -> None:
        """Until a file has `size` bytes, or the run has ended."""
        self.until(lambda: path.exists() and path.stat().st_size >= size)


class Server:
    """A process that forks runs. Use as a context manager, or take `shared_server()`."""

    def __init__(self, folder: Path, preload: Path | None = None) -> None:
        """`preload`: a library that is loaded before all others."""
        self.folder, self.count, self.preload = folder, 0, preload

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/helpers/run_server.py")],
            cwd=ROOT,
            env=clean_environment()
            | {"PYTHONPATH": str(ROOT)}
            | ({"LD_PRELOAD": str(self.preload)} if self.preload else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def ask(self, request: dict):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        script: str,
        line: list[str],
        folder: Path,
        *,
        kill_at: int | None = None,
        fault: tuple[int, int] | None = None,
        prelude: str = "",
        **environment: str,
    ) -> Running:
        """A run in `folder`. It kills itself at its `kill_at`-th touch of a file in `folder`; 0
        counts them, for `touches`.

        `fault`: (count, action) for fault_arm of reliability/fault_shim.c, which is preloaded.
        `prelude`: Python that the run executes first, with `resource` and `script` in reach.
        """
        self.count += 1
        out, err = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        out.touch()
        err.touch()
        request = {
            "script": script.removesuffix(".py"),
            "words": line,
            "cwd": str(folder),
            "out": str(out),
            "err": str(err),
            "kill_at": kill_at,
            "fault": fault,
            "prelude": prelude,
            "environment": environment,
        }
        return Running(self, self.ask(request), out, err)

    def run(self, script: str, line: list[str], folder: Path, **options) -> Ended:
        return self.start(script, line, folder, **options).wait()


def touches(ended: Ended) -> int:
    """How often a run with `kill_at` 0 touched a file."""
    return int(ended.out.rpartition(TOUCHES)[2])


@functools.cache
def fault_shim() -> Path | str:
    """The library of reliability/fault_shim.c, or why there is none."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "no C compiler here"
    source, folder = ROOT / "tests/reliability/fault_shim.c", Path(tempfile.mkdtemp(prefix="shim-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    line = [compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(folder / "s.so"), "-ldl"]
    done = subprocess.run(line, capture_output=True, text=True)
    return f"the shim is for Linux: {done.stderr[:200]}" if done.returncode else folder / "s.so"


@functools.cache
def shared_server() -> Server:
    """One server for all tests of one pytest run."""
    folder, shim = Path(tempfile.mkdtemp(prefix="runs-")), fault_shim()
    server = Server(folder, shim if isinstance(shim, Path) else None).__enter__()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.__exit__)
    return server


# ------------------------------------------------------------------------------ what a run leaves


def metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def checkpoint_contents(path: Path) -> dict:
    """Bytes of every array file, and the state; row files have lengths that times change."""
    found = {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}
    state = json.loads((path / "state.json").read_text())
    state.pop("run")
    return found | {"state": state}


def left_by(run: Path, saved: str) -> dict:
    """All that has to be the same however often a run was killed; `saved`: its --save-file."""
    from run_folder.checkpoint_folder import best_checkpoint, latest_checkpoint

    checkpoints = run / "checkpoints"
    summary = json.loads((run / "summary.json").read_text())
    summary.pop("seconds")
    found = {"metrics": metrics(run), "summary": summary}
    for name in ("samples.jsonl", "bad_rows.jsonl"):
        found[name] = (run / name).read_bytes()
    found["last"] = checkpoint_contents(latest_checkpoint(checkpoints))
    if best := best_checkpoint(checkpoints):
        found["best"] = checkpoint_contents(best)
        found["best.json"] = json.loads((checkpoints / "best.json").read_text())
    found |= {file.name: file.read_bytes() for file in sorted(run.glob("grow_*.jsonl"))}
    stem = Path(saved).stem
    for file in sorted(run.parent.glob(f"{stem}.*")):
        found[file.name] = file.read_bytes()
    assert saved in found
    return found


@functools.cache
def whole(name: str) -> tuple[dict, int]:
    """What one of RUNS leaves when nothing stops it, and how often it touches a file."""
    server, (script, line) = shared_server(), RUNS[name]
    (folder := server.folder / name).mkdir()
    ended = server.run(script, line, folder, kill_at=0)
    assert ended.code == 0, ended.err
    assert "peak memory" in ended.out
    return left_by(folder / "run", "out.npz"), touches(ended)


def data_in(folder: Path, **more) -> Path:
    """A copy of the sample data, each row with the fields `more`."""
    folder.mkdir(parents=True)
    for file in DATA.glob("*increasing_mult_2_*.jsonl"):
        rows = [json.loads(line) | more for line in file.read_text().splitlines()[:40]]
        (folder / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start_of(name: str, folder: Path) -> Path:
    """A folder with what a run of SHORT needs to begin."""
    folder.mkdir()
    if needs := SHORT[name].needs:
        shutil.copytree(whole_short(needs)[0], folder, dirs_exist_ok=True)
    return folder


@functools.cache
def whole_short(name: str) -> tuple[Path, dict, list[str]]:
    """The folder that a run leaves which nothing stops, what is in it, and every touch of it."""
    server, short = shared_server(), SHORT[name]
    folder = start_of(name, server.folder / f"whole {name}")
    ended = server.run(short.script, short.line, folder, fault=server.preload and (0, LIST_FAULTS))
    assert ended.code == 0, ended.err
    touches = [line[6:] for line in ended.err.splitlines() if line.startswith("touch ")]
    return folder, left_by_short(folder, name), touches


def left_by_short(folder: Path, name: str) -> dict:
    """What has to be the same: all bytes of what was saved, and of the run."""
    short = SHORT[name]
    if (folder / short.saved).is_dir():
        return {p.name: p.read_bytes() for p in (folder / short.saved).rglob("*") if p.is_file()}
    return left_by(folder / "run", short.saved)


def differences(one: dict, other: dict, path: str = "") -> list[str]:
    """Names of what differs, for a message that a person can read."""
    found = []
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{path}{name}/")
        elif a != b:
            if isinstance(a, list) and isinstance(b, list):
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)
                found.append(f"{path}{name}[{at}] of {len(a)} and {len(b)}")
            else:
                found.append(path + name)
    return found
