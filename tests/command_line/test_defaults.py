"""A default that is written out changes nothing and is never refused, whatever it stands beside."""

import argparse
import contextlib
import importlib
import io
import json
import sys

import pytest
from conftest import ROOT

from command_line.parser import Parser

# Command lines that a script takes; every flag is tried beside each of them.
LINES = {
    "sft": [
        "--train",
        "--test",
        "--preview",
        "--train --reward-model",
        "--train --prompt-tuning",
        "--train --fine-tune-type full",
        "--train --optimizer sgd",
        "--train --optimizer adafactor",
        "--train --train-file x",
        "--train --steps-per-eval 0 --save-every 0",
        "--train --lr-schedule cosine",
        "--train --epochs 2",
    ],
    "ppo_training": [
        "--ground-truth-reward",
        "--reward-model x",
        "--reward-url http://h",
        "--reward-function f",
        "--ground-truth-reward --prompt-tuning",
        "--ground-truth-reward --use-peft False",
        "--ground-truth-reward --fine-tune-type full",
        "--ground-truth-reward --optimizer lion",
        "--ground-truth-reward --eval-every 0",
        "--ground-truth-reward --lr-schedule constant",
        "--ground-truth-reward --train-file x",
        "--ground-truth-reward --overlong-buffer 3",
    ],
    "score": [
        "--input x --ground-truth-reward",
        "--dataset x --reward-function f",
        "--input x --reward-url http://h",
    ],
    "fuse": [
        "--adapter-file a --save-path b",
        "--model a --upload-repo u/n",
        "--adapter-file a --save-path b --format peft",
        "--model a --dequantize --save-path b",
    ],
    "talk_to_model": ["", "--compare x", "--temp 0.7", "--num-beams 2", "--rate", "hello"],
    "generate_digit_data": ["--increasing", "--decreasing --kind preference"],
    "make_digits_model": [""],
    "imessage": ["--database x --output-dir y"],
    "preference_training": ["--train", "--train --algorithm kto", "--train --test", "--preview"],
    "group_training": ["--ground-truth-reward"],
    "memorisation": ["--data x"],
}
SCRIPTS = sorted(
    path.stem
    for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py"))
    if "run_main(main" in path.read_text(encoding="utf-8")
)
CASES = [(script, line) for script, lines in LINES.items() for line in lines]


def parse(script: str, words: list[str]) -> tuple[argparse.Namespace, Parser]:
    """Its arguments and its parser."""
    sys.path[:0] = [str(ROOT / "data")]
    module, inner = importlib.import_module(script), Parser.parse_args

    def caught(self, words=None, namespace=None):
        parse.parser = self
        return inner(self, words, namespace)

    Parser.parse_args = caught
    try:
        with contextlib.chdir(ROOT):
            take = getattr(module, "parse_arguments", None)
            args = take(words) if take else module.make_parser().parse_args(words)
            return args, parse.parser
    finally:
        Parser.parse_args = inner


def parser_of(script: str) -> Parser:
    """Its parser, without a command line."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        parse(script, [])
    return parse.parser


def flags_of(parser: Parser) -> list[tuple[str, list[str], object]]:
    """(flag, the words of its default, the default as a file has it) of all that have one."""
    found = []
    for action in parser._actions:
        value = action.default
        if not action.option_strings or value in (None, argparse.SUPPRESS):
            continue
        many = isinstance(value, list)
        words = [str(item) for item in value] if many else [str(value)]
        if not many or value:
            found.append((action.option_strings[0], words, value))
    return found


def plain(args: argparse.Namespace) -> dict:
    noted = ("explicit", "changed", "typed", "config")
    return {name: value for name, value in vars(args).items() if name not in noted}


@pytest.mark.parametrize("script, line", CASES, ids=[f"{s} {line}" for s, line in CASES])
def test_no_default_is_refused(script, line, tmp_path):
    bare, parser = parse(script, line.split())
    given = {word.split("=")[0] for word in line.split()}
    flags = [row for row in flags_of(parser) if row[0] not in given]
    for flag, words, _ in flags:
        one, _ = parse(script, [*line.split(), flag, *words])
        assert plain(one) == plain(bare), flag
    every = [word for flag, words, _ in flags for word in (flag, *words)]
    assert plain(parse(script, [*line.split(), *every])[0]) == plain(bare)
    if "--config" in parser._flags():
        config = tmp_path / "all.json"
        config.write_text(json.dumps({flag[2:]: value for flag, _, value in flags}))
        assert plain(parse(script, [*line.split(), "--config", str(config)])[0]) == plain(bare)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_tried(script):
    if script not in LINES:
        pytest.fail("give it a line in LINES")
