"""A parser with the flags that scripts share, and what it says of a wrong command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from command_line.dataclass_flags import add_dataclass_arguments
from command_line.parser import Parser
from command_line.shared_flags import (
    add_adapter_arguments,
    add_model_arguments,
    add_optimizer_arguments,
    add_run_arguments,
)


@dataclass
class Knobs:
    ppo_epochs: int = field(default=4, metadata={"help": "passes over a batch"})
    adap_kl_ctrl: bool = field(default=True, metadata={"help": "adapt the coefficient"})
    score_clip: float | None = field(default=None, metadata={"help": "clip scores"})
    kl_mode: Literal["kl", "abs"] = field(default="kl", metadata={"help": "estimator"})
    stops: list[str] = field(default_factory=list, metadata={"help": "stop strings"})


def new_parser() -> Parser:
    parser = Parser(prog="sft.py", description="Test.", harmless=("sample_every",))
    add_run_arguments(parser)
    add_model_arguments(parser)
    add_adapter_arguments(parser)
    add_optimizer_arguments(parser, learning_rate=1e-4)
    add_dataclass_arguments(parser, Knobs)
    parser.add_argument("--iters", type=int, default=1000, help="updates")
    parser.add_argument("--save-file", default="w.npz", help="where to")
    parser.add_argument("--batch-size", type=int, default=4, help="rows")
    parser.add_argument("--mini-batch-size", type=int, help="rows at a time")
    parser.add_argument("--reward-model", type=bool, default=False, help="train a reward model")
    parser.add_argument("--train-file", nargs="+", help="data")
    parser.add_argument("--max-length", type=int, default=64, help="tokens")
    parser.add_argument("--sample-every", type=int, default=0, help="steps")
    return parser


def parse(*words: str):
    return new_parser().parse_args(list(words))


def refused(capsys, *words: str) -> str:
    """The one line that a wrong command line ends with."""
    with pytest.raises(SystemExit) as stop:
        parse(*words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)
