"""Importing this lets the baseline find the modules it shares: data, flags, run folders.

A script in a Python without the baseline's libraries ends here, with one line and status 2.
"""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))
for library in ("torch", "transformers", "peft", "trl"):
    if importlib.util.find_spec(library) is None:
        line = f"error: {sys.executable} has no {library}: pip install -r {HERE}/requirements.txt"
        print(line, file=sys.stderr)
        raise SystemExit(2)
