"""The parsers of all scripts, and command lines that they take."""

import argparse
import contextlib
import importlib
import io
import sys

from files import ROOT

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
    "judge": [
        "--input x --judge y",
        "--input x --ground-truth-reward",
        "--prompts x --judge y --debate 1",
        "--input x --judge y --revise",
        "--input x --judge-url http://h",
    ],
    "label": ["--prompts x", "--prompts x --web", "--prompts x --against y", "--report x"],
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
    "process_data": ["--input x.csv --output y.jsonl", "--dataset x --output y.jsonl"],
    "process_data_rlhf": [
        "--kind preference --input x.csv --output y.jsonl",
        "--kind prompts --dataset x --output y.jsonl",
    ],
    "rest": ["--ground-truth-reward", "--reward-model x --thresholds .5 .7"],
}


SCRIPTS = sorted(
    path.stem
    for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py"))
    if "run_main(main" in path.read_text(encoding="utf-8")
)


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
