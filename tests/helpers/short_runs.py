"""Scripts in this process, and short trainings by sft.py."""

import contextlib
import io
import json

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT

import sft
from command_line.exits import run_main

DATA = ROOT / "data"


TRAIN, VALID = (DATA / f"increasing_mult_2_{split}.jsonl" for split in ("train", "valid"))


ROWS = 12  # of the training file; with batches of 4, three batches an epoch


SMALL = [
    "--train",
    "--data",
    DATA,
    "--max-rows",
    ROWS,
    "--batch-size",
    4,
    "--learning-rate",
    1e-3,
    "--steps-per-eval",
    0,
    "--save-every",
    0,
]


def run(script, *words, status=0) -> str:
    """A script's main in this process; what it printed, or its error where one is expected."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as end:
            run_main(lambda: script.main([str(word) for word in words]))
    assert end.value.code == status, out.getvalue() + err.getvalue()
    return err.getvalue() if status else out.getvalue()


class Run:
    """A short training: its weights, its rows of metrics, what it printed."""

    def __init__(self, *words, iters: int | None = 2):
        global count
        count += 1
        length = [] if iters is None else ["--iters", iters]
        self.folder, file = f"run{count}", f"w{count}.npz"
        words = (*SMALL, *length, "--output-dir", self.folder, "--save-file", file, *words)
        self.out = run(sft, *words)
        self.file = file
        arrays = mx.load(file)
        described = bytes(arrays.pop("adapter_config").tolist())
        self.config = json.loads(described)
        self.weights = {name: np.array(array) for name, array in arrays.items()}

    @property
    def rows(self) -> list[dict]:
        with open(f"{self.folder}/metrics.jsonl", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    def flat(self) -> np.ndarray:
        return np.concatenate([self.weights[name].ravel() for name in sorted(self.weights)])


count = 0


def same(one: Run, other: Run, tolerance: float = 0.0) -> bool:
    if one.weights.keys() != other.weights.keys():
        return False
    return float(np.abs(one.flat() - other.flat()).max()) <= tolerance
