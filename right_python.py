"""Refuses, in one line, a Python that cannot run the scripts: too old, or without their packages.

What scripts import first, so that they end before a traceback; hence, as they are, in the syntax of
Python 3.8. Loads nothing.
"""

import importlib.util
import sys
from pathlib import Path

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parent
FOLDERS = (ROOT, ROOT / "adlf", ROOT / "benchmarks", ROOT / "data")  # of scripts that run on MLX
NEEDED = ("numpy", "mlx", "mlx_lm", "tqdm")


def refuse_others(needed=NEEDED, environment=".venv", maker="make setup"):
    """Exit with one line in a Python that is too old, or has none of a library that is `needed`."""
    problem = None
    if sys.version_info < OLDEST:
        found, oldest = (".".join(map(str, v)) for v in (sys.version_info[:2], OLDEST))
        problem = f"is Python {found}, and {oldest} or newer is needed"
    for library in needed:
        if problem is None and importlib.util.find_spec(library) is None:
            problem = "has no " + library
    if problem is not None:
        print(
            f"error: {sys.executable} {problem}: type `. {environment}/bin/activate` first, or "
            f"{environment}/bin/python in place of python; `{maker}` makes that environment",
            file=sys.stderr,
        )
        raise SystemExit(2)


def script_folder():
    """The folder of the script that is being run; None where it is none."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return None if main is None else Path(main).resolve().parent


if script_folder() in FOLDERS:
    refuse_others()
