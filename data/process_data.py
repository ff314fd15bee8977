#!/usr/bin/env python
"""Makes rows for fine-tuning of question trees, or of any rows: instruction, context, response.

    python data/process_data.py --input trees.jsonl --lang en --output sft_data.jsonl
    python data/process_data.py --dataset OpenAssistant/oasst1 --lang en --output sft_data.jsonl
    python data/process_data.py --input posts.csv --map instruction=title --output sft_data.jsonl

Of a tree each question comes once, with the answer that people ranked highest; docs/conf_files.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import right_python  # noqa: E402, F401  first
from command_line.conversion_flags import conversion_parser, read, write  # noqa: E402
from command_line.exits import run_main  # noqa: E402
from command_line.parser import Parser  # noqa: E402
from data_utils import to_instructions  # noqa: E402
from run_folder.console import command  # noqa: E402

KEYS = ("instruction", "context", "response")


def make_parser() -> Parser:
    return conversion_parser(__doc__.splitlines()[0], "data/process_data.py", KEYS)


def main(words: list[str] | None = None) -> None:
    args = make_parser().parse_args(words)
    done = to_instructions(read(args), args.lang, args.map)
    going_on = command("sft.py", "--train", "--mask-prompt", train_file=args.output)
    write(args, done, going_on)


if __name__ == "__main__":
    run_main(main)
