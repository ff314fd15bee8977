"""Logits beside transformers for every architecture of docs/architectures.md; writes its table.

Tiny random models are saved by transformers 5, read here, given a LoRA adapter on every linear
layer, fused by fuse.py's own code and read by transformers again. Needs the environment of
`make test-baseline`; takes some minutes. Names of cases (tests/helpers/transformers_models.py)
measure those alone:

    .venv-baseline/bin/python benchmarks/architectures.py
    .venv-baseline/bin/python benchmarks/architectures.py mixtral gemma3_text-yarn
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import fast_blas  # noqa: E402, F401, I001  before MLX

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from fuse_setup import fuse, make_adapter  # noqa: E402
from transformers_models import CASES, MORE, SIBLINGS, TOKENS, logits, write  # noqa: E402

from models.load import load_model  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
START, END = "<!-- written by benchmarks/architectures.py -->", "<!-- until here -->"


def ours(loaded) -> np.ndarray:
    return np.array(loaded.model(mx.array([TOKENS]))[0])


def difference(here: np.ndarray, there: np.ndarray) -> float:
    return float(np.abs(here[:, : there.shape[1]] - there).max())


def measure(case: str) -> tuple[float, float | None, float]:
    """Largest difference read here, the same after fusing, and the largest logit."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        theirs = write(case, folder / "base")
        read = difference(ours(load_model(folder / "base", dtype="float32")), theirs)
        loaded, _ = make_adapter(folder / "a.npz", "lora", folder / "base")
        expected, fused = ours(loaded), None
        fuse(folder, "--adapter-file", "a.npz", "--save-path", "fused")
        if case not in SIBLINGS:
            fused = difference(expected, logits(folder / "fused"))
        return read, fused, float(np.abs(theirs).max())


def main(words: list[str]) -> None:
    """Measure the cases named, or all without settings, and put their rows into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    kept, _, after = rest.partition(END)
    rows = dict.fromkeys([*CASES, *SIBLINGS, *MORE], "")
    for line in kept.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip(" `") for cell in line.split("|")[1:3]]
            rows["-".join(cell for cell in cells if cell).replace(" ", "_")] = line
    for case in words or [*CASES, *SIBLINGS]:
        kind, _, settings = case.partition("-")
        read, fused, size = measure(case)
        opened = "not in transformers" if fused is None else f"{fused:.0e}"
        rows[case] = (
            f"| `{kind}` | {settings.replace('_', ' ')} | {read:.0e} | {opened} | {size:.1f} |"
        )
        print(rows[case], flush=True)
    head = [
        "| `model_type` | settings | read here | fused, in transformers | largest logit |",
        "|---|---|---|---|---|",
    ]
    table = "\n".join([START, "", *head, *filter(None, rows.values()), "", END])
    PAGE.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
