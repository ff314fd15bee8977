"""Where the project stands, and what stands in a folder."""

import fast_blas  # noqa: F401, I001  before anything imports mlx.core
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def without_times(row: dict) -> dict:
    """A row of metrics without what the clock and the machine's memory say."""
    return {
        k: v for k, v in row.items() if not k.startswith(("time/", "memory/")) and k != "step_time"
    }
