"""The command lines of the MLX scripts, with --device.

The flags are declared once, in command_line/sft_flags.py and command_line/ppo_flags.py.
"""

from types import ModuleType
from unittest.mock import patch

import project_root  # noqa: F401

from command_line.parser import Parser
from errors import UserError

# Options of the MLX side that nothing here computes in the same way.
REFUSED = {
    "quantize": "PyTorch has no counterpart that gives the same numbers",
    "reference_quantize": "PyTorch has no counterpart that gives the same numbers",
    "fused_dir": "--save-file FOLDER holds the merged model here",
    "adlf_alpha": "internal rewards are measured on MLX alone",
    "use_curriculum": "the order of rows is the ordinary one here",
    "use_contrastive": "that loss is MLX's side alone",
    "use_decision_transformer": "scores before prompts are MLX's side alone",
    "target_score": "scores before prompts are MLX's side alone",
    "use_self_critique": "critiques are trained on MLX's side alone",
    "compile": "the baseline runs PyTorch as it is",
    "compare_steps": "the baseline's best checkpoint is that of the best evaluation",
    "reference_samples": "the baseline samples no reference",
}


class BaselineParser(Parser):
    """The parser of an MLX script, with what the baseline adds."""

    def __init__(self, **options):
        super().__init__(**options)
        self.script = f"pytorch_baseline/pytorch_{self.script}"
        self.description = f"{self.description} In PyTorch."
        add = self.add_argument_group("PyTorch").add_argument
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


def parse(flags: ModuleType, words: list[str] | None = None):
    """The parsed command line; `flags` is command_line.sft_flags or command_line.ppo_flags."""
    with patch.object(flags, "Parser", BaselineParser):
        return flags.parse_arguments(words)
