"""No flag is parsed and ignored; help is complete."""

import re
import subprocess
import sys

import pytest
from files import ROOT
from flag_check import unread_flags

import fuse
import group_training
import ppo_training
import preference_training
import score
import sft
import talk_to_model
from command_line.parser import Parser

TRAINING = [
    f
    for room in ("command_line", "run_folder", "training", "rewards")
    for f in ROOT.glob(f"{room}/*.py")
]
SCRIPTS = {
    sft: ["sft.py"],
    ppo_training: ["ppo_training.py", "mlx_ppo_trainer.py"],
    preference_training: ["preference_training.py"],
    group_training: ["group_training.py", "mlx_group_trainer.py", "rl/group_losses.py"],
    fuse: ["fuse.py", "publishing/*.py"],
    score: ["score.py"],
    talk_to_model: ["talk_to_model.py", "chat/*.py"],
}


def parser_of(script, monkeypatch):
    found = []

    def caught(self, words=None, namespace=None):
        found.append(self)
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_args", caught)
    with pytest.raises(SystemExit):
        script.parse_arguments([])
    return found[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_is_read(script, monkeypatch):
    sources = [path for name in SCRIPTS[script] for path in ROOT.glob(name)] + TRAINING
    owners = ("args", "config", "settings")
    assert unread_flags(parser_of(script, monkeypatch), sources, owners) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_has_help(script, monkeypatch):
    for action in parser_of(script, monkeypatch)._actions:
        assert action.help, action.dest


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_answers_without_loading_mlx(script):
    code = (
        f"import runpy, sys; sys.argv = ['{script.__name__}.py', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'mlx.core' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"--model", done.stdout)
