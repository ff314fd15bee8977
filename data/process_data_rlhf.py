#!/usr/bin/env python
"""Makes rows for reward models or PPO of question trees, of ratings, or of pairs.

    python data/process_data_rlhf.py --kind preference --input trees.jsonl --output rm_data.jsonl
    python data/process_data_rlhf.py --kind prompts --input trees.jsonl --output ppo_data.jsonl

``preference``: {instruction, chosen, rejected}, the best answer against each that is worse;
``prompts``: {prompt}, each once; docs/conf_files.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import right_python  # noqa: E402, F401  first
from command_line.conversion_flags import conversion_parser, read, write  # noqa: E402
from command_line.exits import run_main  # noqa: E402
from command_line.parser import Parser  # noqa: E402
from data_utils import to_pairs, to_prompts  # noqa: E402
from errors import UserError  # noqa: E402
from run_folder.console import command  # noqa: E402

# What --map may name, of each kind; an answer and its rating stand for chosen and rejected.
KEYS = {
    "preference": ("instruction", "chosen", "rejected", "response", "rating"),
    "prompts": ("prompt",),
}


def make_parser() -> Parser:
    keys = tuple(key for own in KEYS.values() for key in own)
    parser = conversion_parser(__doc__.splitlines()[0], "data/process_data_rlhf.py", keys)
    parser.add_argument("--kind", choices=tuple(KEYS), required=True, help="rows to write")
    return parser


def main(words: list[str] | None = None) -> None:
    args = make_parser().parse_args(words)
    if wrong := [key for key in args.map if key not in KEYS[args.kind]]:
        raise UserError(f"--map {wrong[0]}={args.map[wrong[0]]}: is not for --kind {args.kind}")
    if args.kind == "preference":
        done = to_pairs(read(args), args.lang, args.map)
        going_on = command("sft.py", "--reward-model", "--train", train_file=args.output)
    else:
        done = to_prompts(read(args), args.lang, args.map)
        going_on = command("ppo_training.py", reward_model="REWARD_MODEL", train_file=args.output)
    write(args, done, going_on)


if __name__ == "__main__":
    run_main(main)
