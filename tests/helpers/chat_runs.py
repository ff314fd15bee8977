"""talk_to_model.py in a process of its own."""

import subprocess
import sys

from files import ROOT

SCRIPT = str(ROOT / "talk_to_model.py")


def run(*words, stdin=subprocess.DEVNULL, text=None, cwd=None):
    """(stdout, stderr) of a run that must end well."""
    done = run_any(*words, stdin=stdin, text=text, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def run_any(*words, stdin=None, text=None, cwd=None):
    given = {"stdin": stdin} if text is None else {"input": text}
    command = [sys.executable, SCRIPT, *map(str, words)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=cwd, **given)
