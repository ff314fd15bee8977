"""An end to a wait that holds Python's lock, as MLX's start does: no thread could. Loads no MLX."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from run_folder.output import errors

# Waits for the end of what it guards, which closes its input. Alarms end a process by default.
CODE = """
import os, select, signal, sys
if not select.select([0], [], [], float(sys.argv[2]))[0]:
    sys.stderr.write(sys.argv[3] + "\\n")
    sys.stderr.flush()
    os.kill(int(sys.argv[1]), signal.SIGALRM)
"""


@contextlib.contextmanager
def ended_after(seconds: float, message: str) -> Iterator[None]:
    """What runs in it ends this process by SIGALRM if it takes longer; `message` is said then."""
    words = [sys.executable, "-I", "-S", "-c", CODE, str(os.getpid()), str(seconds), message]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": errors().fileno()}
    with subprocess.Popen(words, **pipes):  # whose end closes its input, and waits
        yield
