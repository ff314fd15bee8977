"""The process that forks runs for reliable_runs.py: it has imported all, and touched no array."""

import fast_blas  # noqa: F401  isort: skip

import gc
import importlib
import json
import os
import platform
import signal
import sys
from collections.abc import Callable

from script_table import DATA, ROOT

TOUCHES = "touches of files:"


def serve() -> None:
    """Fork a run for each request on standard input; answer with its number, later its end."""
    import mlx_lm.models.llama
    import mlx_lm.tuner.utils
    import mlx_lm.utils
    from PIL import Image

    for script in ("sft", "preference_training", "ppo_training", "group_training", "rest", "fuse"):
        importlib.import_module(script)
    for kind in ("sft_trainer", "preference_tasks", "ppo_trainer", "group_trainer"):
        importlib.import_module(f"mlx_{kind}")
    for folder in ("models", "publishing", "reports", "rewards", "training"):
        for file in (ROOT / folder).glob("[a-z]*.py"):
            importlib.import_module(f"{folder}.{file.stem}")
    mlx_lm.utils.load_tokenizer(DATA / "digits_model")  # imports more
    Image.preinit()
    platform.uname().processor  # noqa: B018  a process of its own, and kept
    draw_nothing()
    gc.freeze()  # or the first collection of each run copies all that it shares with this process
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "code of" in request:
            pid = request["code of"]
            if codes[pid] is None and (status := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                codes[pid] = os.waitstatus_to_exitcode(status[1])
            answer = codes[pid]
        else:
            answer = os.fork()
            if answer == 0:
                run(request)
            codes[answer] = None
        print(json.dumps(answer), flush=True)
    for pid, code in codes.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)


def draw_nothing() -> None:
    """Plots are a pixel: drawing is half of the time of a short run. They are written as ever."""
    from matplotlib.figure import Figure
    from PIL import Image

    def savefig(self: Figure, file, **_: object) -> None:
        Image.new("L", (1, 1)).save(file, format="png")

    Figure.savefig = savefig


def run(request: dict) -> None:
    """In the child: become the script."""
    import resource  # noqa: F401

    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    sys.argv = [request["script"] + ".py", *request["words"]]
    script = importlib.import_module(request["script"])
    exec(request["prelude"], {"script": script, "resource": resource})
    at_the_end = die_at(request["kill_at"], request["cwd"])
    if request["fault"]:
        import ctypes

        count, action = request["fault"]
        folder = os.fsencode(os.path.realpath(request["cwd"]))
        ctypes.CDLL(None).fault_arm(folder, ctypes.c_long(count), action)
    code = 1
    try:
        script.run_main(script.main)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    at_the_end()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_at(count: int | None, folder: str) -> Callable[[], None]:
    """SIGKILL at the `count`-th time that a file below `folder` is touched; 0: never, but count."""
    if count is None:
        return lambda: None
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if not event.startswith(("open", "os.", "shutil.")) or not arguments:
            return
        if not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.path.abspath(os.fspath(arguments[0]))
        if isinstance(path, str) and path.startswith(folder + os.sep):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if count == 0:
        return lambda: print(TOUCHES, seen)
    return lambda: None


if __name__ == "__main__":
    serve()
