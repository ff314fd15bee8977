"""No flag is parsed and ignored; help is complete."""

import ast
import re
import subprocess
import sys

import pytest
from files import ROOT
from flag_check import unread_flags
from script_table import training_scripts

import fuse
import group_training
import judge
import label
import ppo_training
import preference_training
import rest
import score
import sft
import talk_to_model
from command_line.parser import COMMON, Parser

TRAINING = [
    f
    for room in ("command_line", "run_folder", "training", "rewards")
    for f in ROOT.glob(f"{room}/*.py")
]
SCRIPTS = {
    sft: ["sft.py"],
    ppo_training: ["ppo_training.py", "mlx_ppo_trainer.py", "rl/scores.py"],
    preference_training: ["preference_training.py"],
    group_training: ["group_training.py", "mlx_group_trainer.py", "rl/group_losses.py"],
    fuse: ["fuse.py", "publishing/*.py"],
    score: ["score.py"],
    judge: ["judge.py"],
    rest: ["rest.py"],
    label: ["label.py", "labelling/*.py"],
    talk_to_model: ["talk_to_model.py", "chat/*.py"],
}


def test_every_training_script_is_known_here():
    assert {*training_scripts()} <= {f"{script.__name__}.py" for script in SCRIPTS}


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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_is_short_and_help_all_has_every_flag(script, monkeypatch):
    parser = parser_of(script, monkeypatch)
    actions = [a for a in parser._actions if a.option_strings]
    short = parser.format_help()
    parser.short_help = False
    full = parser.format_help()
    for action in actions:
        assert re.search(rf"^  .*{action.option_strings[0]}\b", full, re.M), action.dest
    assert short == full or len(short.splitlines()) < 100
    shown = [a for a in actions if re.search(rf"^  {a.option_strings[0]}\b", short, re.M)]
    assert {"--help-all", "--model"} <= {a.option_strings[0] for a in shown}
    if short != full:
        hidden = len(actions) - len(shown)
        assert f"\n{hidden} flags more: --help-all\n" in short


def test_the_names_of_the_short_help_are_flags(monkeypatch):
    known = {a.dest for s in SCRIPTS for a in parser_of(s, monkeypatch)._actions}
    assert COMMON <= known


def run_in_wrong_python(script: str, folder, before: str = "") -> str:
    """The one line that a script says; -S and -I: no packages but the standard library's."""
    path, search = str(ROOT / script), [str(ROOT), str((ROOT / script).parent)]
    code = f"import runpy, sys; sys.path[:0] = {search!r}; sys.argv = [{path!r}, '--help']; "
    code += before + f"runpy.run_path({path!r}, run_name='__main__')"
    words = [sys.executable, "-S", "-I", "-c", code]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


RUN_BY_PEOPLE = [path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text("utf-8")]
RUN_BY_PEOPLE += [
    f"{path.parent.name}/{path.name}"
    for folder in ("adlf", "data", "pytorch_baseline")
    for path in sorted((ROOT / folder).glob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text("utf-8")
]


@pytest.mark.parametrize("script", [*RUN_BY_PEOPLE, "benchmarks/apple.py"])
def test_a_python_without_the_packages_is_one_line(tmp_path, script):
    line = run_in_wrong_python(script, tmp_path)
    place = ".venv-baseline" if script.startswith("pytorch") else ".venv"
    assert "has no numpy" in line and f"`. {place}/bin/activate`" in line


@pytest.mark.parametrize("script", ["sft.py", "adlf/training.py", "data/imessage.py"])
def test_a_python_that_is_too_old_is_one_line(tmp_path, script):
    line = run_in_wrong_python(script, tmp_path, "sys.version_info = (3, 9, 18, 'final', 0); ")
    assert "is Python 3.9, and 3.11 or newer is needed" in line


def test_what_comes_before_that_line_is_read_by_old_pythons():
    for script in [*RUN_BY_PEOPLE, "benchmarks/apple.py", "right_python.py", "fast_blas.py"]:
        ast.parse((ROOT / script).read_text("utf-8"), script, feature_version=(3, 8))
