"""Results as Markdown, and what they were measured on. Standard library alone."""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path

from side_by_side import BLAS_SETTINGS, ROOT

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("mlx", "mlx-lm", "transformers", "numpy")


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shown(values: dict[str, float], digits: int = 3, scale: float = 1.0, unit: str = "") -> str:
    """Median and quartiles: ``0.512 s (0.500 to 0.530)``."""
    median, low, high = (f"{scale * values[k]:,.{digits}f}" for k in ("median", "low", "high"))
    return f"{median}{unit} ({low} to {high})"


def machine() -> dict:
    """What the figures were measured on."""
    return {
        "date": date.today().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "blas": blas(own=False),
        "blas_by_itself": blas(own=True),
        "blas_settings": {k: os.environ[k] for k in BLAS_SETTINGS if k in os.environ},
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "processor unknown"


def blas(own: bool) -> str:
    """Which BLAS MLX gets, and which kernels that uses; `own`: those it picks by itself."""
    environment = dict(os.environ)
    for name in BLAS_SETTINGS if own else ():
        environment.pop(name, None)
    code = (
        "import ctypes, fast_blas as f; l = ctypes.CDLL(f.NAME) if f.NAME else None\n"
        "c = getattr(l, 'openblas_get_corename', None)\n"
        "if c: c.restype = ctypes.c_char_p\n"
        "print(f.NAME or 'none', c().decode() if c else '')"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    return made.stdout.strip()


def replace_between(file: Path, mark: str, text: str) -> None:
    """Put `text` between the lines ``<!-- mark -->`` and ``<!-- /mark -->`` of a Markdown file."""
    before, start, rest = file.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->\n")
    if not start or not end:
        raise ValueError(f"{file}: the marks <!-- {mark} --> and <!-- /{mark} --> are missing")
    file.write_text(f"{before}{start}\n{text}\n\n{end}{after}", encoding="utf-8")


def save(name: str, result: dict, text: str) -> None:
    """Write results/NAME.json and results/NAME.md, and print the text."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(text)
