"""A default that is written out changes nothing and is never refused, whatever it stands beside."""

import argparse
import json

import pytest
from parsers import LINES, SCRIPTS, parse

from command_line.parser import Parser

CASES = [(script, line) for script, lines in LINES.items() for line in lines]


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
