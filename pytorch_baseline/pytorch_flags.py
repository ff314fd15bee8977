"""The command lines of the MLX scripts, with --tokenizer and --device.

The flags are declared once, in sft.py and ppo_training.py, which load no MLX before they need it.
"""

import os
from types import ModuleType
from unittest.mock import patch

import project_root  # noqa: F401
import torch

from errors import UserError
from training.arguments import Parser

# Importing a script loads a BLAS for MLX and limits its threads; PyTorch brings its own.
os.environ.setdefault("MLX_RLHF_BLAS", "off")
_threads = torch.get_num_threads()
import fast_blas  # noqa: E402, F401

from training import ppo_flags as ppo_script  # noqa: E402, F401
from training import sft_flags as sft_script  # noqa: E402, F401

torch.set_num_threads(_threads)

# Options of the MLX side that nothing here computes in the same way.
REFUSED = {
    "quantize": "PyTorch has no counterpart that gives the same numbers",
    "reference_quantize": "PyTorch has no counterpart that gives the same numbers",
    "compile": "the baseline runs PyTorch as it is",
}


class BaselineParser(Parser):
    """The parser of an MLX script, with what the baseline adds."""

    def __init__(self, **options):
        super().__init__(**options)
        self.description = f"{self.description} In PyTorch."
        add = self.add_argument_group("PyTorch").add_argument
        add("--tokenizer", help="folder or hub name of the tokenizer (default: --model)")
        add("--device", choices=("cpu", "mps", "cuda"), default="cpu", help="where it runs")
        self.checks.append(refuse_what_is_missing)

    def parse_args(self, words=None, namespace=None):
        for action in self._actions:
            if action.dest == "save_file":
                action.default = None
                action.help = (
                    "folder for a transformers model with the adapter merged in, or an .npz or "
                    ".safetensors adapter (default: model/ in the run folder)"
                )
        return super().parse_args(words, namespace)


def refuse_what_is_missing(args) -> None:
    for name, reason in REFUSED.items():
        if getattr(args, name, None):
            raise UserError(f"--{name.replace('_', '-')}: {reason}; leave it out")


def parse(script: ModuleType, words: list[str] | None = None):
    """The parsed command line of `sft_script` or `ppo_script`."""
    with patch.object(script, "Parser", BaselineParser):
        return script.parse_arguments(words)
