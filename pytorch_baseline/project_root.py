"""Importing this lets the baseline find the modules it shares: data, flags, run folders.

A script in a Python without the baseline's libraries ends here, with one line and status 2.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import right_python  # noqa: E402

if right_python.script_folder() == Path(__file__).resolve().parent:
    right_python.refuse_others(("numpy", "torch", "tqdm"), ".venv-baseline", "make test-baseline")
