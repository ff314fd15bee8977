"""judge.py in this process, its files, and a judge that says what it is told."""

import contextlib
import io
import json
from pathlib import Path

import pytest
from files import ROOT

import judge
from command_line.exits import run_main

DIGITS = str(ROOT / "data" / "digits_model")


PAIRS = str(ROOT / "data" / "preference_increasing_mult_2_test.jsonl")


def run(*words, status: int = 0) -> tuple[str, str]:
    """(standard output, standard error) of judge.py."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as end:
            run_main(lambda: judge.main([str(word) for word in words]))
    assert end.value.code == status, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def lines(name) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def write(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


class Scripted:
    """A judge that remembers what it reads; `first` says how sure it is of answer 1."""

    name = "scripted"

    def __init__(self, first=lambda text: 0.5, writes=lambda text: "because"):
        self.first, self.writes, self.verdicts, self.asked = first, writes, [], []

    def first_wins(self, texts):
        self.verdicts += texts
        return [self.first(text) for text in texts]

    def write(self, texts):
        self.asked += texts
        return [self.writes(text) for text in texts]
