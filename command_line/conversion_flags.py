"""What data/process_data.py and data/process_data_rlhf.py share: flags, reading, writing."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from command_line.parser import Parser
from command_line.rules import Needs, needs
from data_utils import Converted, RawRow, raw_rows
from errors import UserError
from safe_files import check_place, write_atomically, writing

NEEDS = (Needs("dataset_config split", "dataset", valued=False),)


def conversion_parser(description: str, script: str, keys: tuple[str, ...]) -> Parser:
    """`keys`: what --map may name."""
    parser = Parser(description=description, script=script)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="JSONL, JSON, CSV, TSV or Parquet file")
    source.add_argument("--dataset", help="name or path that the datasets library opens")
    add("--dataset-config", help="configuration of --dataset")
    add("--split", default="train", help="split of --dataset")
    add("--output", type=Path, required=True, help="JSONL file to write")
    add("--force", type=bool, default=False, help="replace --output where it is there")
    add("--lang", help="of question trees: messages in this language alone, such as en")
    add(
        "--map",
        nargs="+",
        default=[],
        metavar="KEY=COLUMN",
        help=f"columns of the rows: {', '.join(keys)}; answers.text.0 is a part of one",
    )
    parser.checks += [lambda args: check(args, keys), needs(NEEDS)]
    return parser


def check(args: argparse.Namespace, keys: tuple[str, ...]) -> None:
    """Raise UserError for what cannot be read or written; make --map a dictionary."""
    columns: dict[str, str] = {}
    for word in args.map:
        key, equals, name = word.partition("=")
        if not (key and equals and name):
            raise UserError(f"--map {word}: is not KEY=COLUMN, as in instruction=title")
        if key not in keys:
            raise UserError(f"--map {word}: {key} is none of {', '.join(keys)}")
        if columns.get(key, name) != name:
            raise UserError(f"--map {word}: {key} is {columns[key]} already")
        columns[key] = name
    args.map = columns
    if args.output.suffix != ".jsonl":
        said = f"is written as JSONL; name it {args.output.stem}.jsonl"
        raise UserError(f"--output {args.output}: {said}")
    if args.input is not None and args.output.resolve() == args.input.resolve():
        raise UserError(f"--output {args.output}: is the file that is read; name another")
    if args.output.exists() and not args.force:
        raise UserError(f"--output {args.output}: is there already; --force replaces it")
    check_place(args.output)


def read(args: argparse.Namespace) -> Iterator[RawRow]:
    return raw_rows(args.input, args.dataset, split=args.split, config=args.dataset_config)


def write(args: argparse.Namespace, done: Converted, going_on: str) -> None:
    """Write the rows, whole or not at all; say what was left out, and what takes them next."""
    for reason, count in done.left_out.most_common():
        if count:
            print(f"left out, {reason}: {count}")
    if not done.rows:
        name = args.input or args.dataset
        raise UserError(f"{name}: no row is left" + f" in {args.lang}" * bool(args.lang))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done.rows)
    with writing(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, lines)
    print(f"wrote {args.output}: {len(done.rows)} rows")
    print(f"next: {going_on}")
