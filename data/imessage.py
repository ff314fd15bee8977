#!/usr/bin/env python
"""Makes training rows of your own messages: iMessage, WhatsApp, Telegram. Nothing is sent.

    python data/imessage.py --database ~/Library/Messages/chat.db --output-dir my_messages
    python data/imessage.py --whatsapp "Chat with Ann.txt" --me Bob --output-dir my_messages

Your turns are what a model learns to write, the others' are what it answers; docs/imessage_bot.md
has the way from here to a chatbot. Files are readable by you alone.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shlex  # noqa: E402
import subprocess  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402
from dataclasses import replace  # noqa: E402
from datetime import timedelta  # noqa: E402

import right_python  # noqa: E402, F401  first
from command_line.exits import run_main  # noqa: E402
from command_line.parser import Parser  # noqa: E402
from errors import UserError  # noqa: E402
from histories.conversations import ME, History, Limits, Rows, make_rows, prompts_of, ratings_of  # noqa: E402  # noqa: E402
from histories.exporter import read_export  # noqa: E402
from histories.imessage import read_database  # noqa: E402
from histories.privacy import (  # noqa: E402
    QUESTIONS,
    Masker,  # noqa: E402
    as_row,
    make_canaries,
)
from histories.telegram import read_telegram  # noqa: E402
from histories.whatsapp import ORDERS, read_whatsapp  # noqa: E402
from run_folder.private import mark_private  # noqa: E402
from safe_files import write_atomically, writing  # noqa: E402


def make_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0], script="data/imessage.py")
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--database", type=Path, help="chat.db of a Mac, or a copy with its -wal")
    source.add_argument("--export", type=Path, help="folder that imessage-exporter wrote as txt")
    source.add_argument("--whatsapp", type=Path, nargs="+", help="chats that WhatsApp exported")
    source.add_argument("--telegram", type=Path, help="result.json of Telegram Desktop")
    add("--output-dir", type=Path, required=True, help="folder for the rows; made if missing")
    add("--me", help="your name as an exported file writes it (not needed with --database)")
    add("--date-order", choices=ORDERS, help="of WhatsApp's dates, where the file leaves it open")
    add("--groups", type=bool, default=False, help='chats of several people too, "Name: " in front')
    add(
        "--tapbacks",
        type=bool,
        default=False,
        help="others' reactions to your messages as rows for reward models and KTO",
    )
    add("--names", type=bool, default=False, help="mask names, numbers, mail addresses and links")
    add("--mask-words", nargs="+", default=[], help="further names to mask, with --names")
    add("--min-messages", type=int, default=20, help="shorter chats are left out")
    add("--gap", type=float, default=3.0, help="hours without a message that end a conversation")
    add("--max-length", type=int, default=4000, help="characters of a row; longer ones go on")
    add(
        "--context-turns",
        type=int,
        default=4,
        help="turns that a row takes over from the one before, not trained again",
    )
    add(
        "--canary",
        "--canaries",
        type=int,
        default=0,
        help="plant so many random codes, 8 at most, for data/memorisation.py",
    )
    add("--negatives", help="model whose replies stand against yours as preference pairs")
    add("--max-tokens", type=int, default=100, help="longest reply of --negatives")
    add("--seed", type=int, default=0, help="of --negatives and --canary")
    parser.checks.append(check)
    return parser


def check(args: argparse.Namespace) -> None:
    for name, least in (("min_messages", 2), ("max_length", 2), ("context_turns", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')}: at least {least}")
    if not 0 <= args.canary <= len(QUESTIONS):
        raise UserError(f"--canary: from 0 to {len(QUESTIONS)}")
    if not 0 < args.gap < 24 * 365:
        raise UserError("--gap: hours between 0 and a year")
    needs = (
        ("tapbacks", "--database", args.database),
        ("date_order", "--whatsapp", args.whatsapp),
        ("mask_words", "--names", args.names),
        ("max_tokens", "--negatives", args.negatives),
        ("seed", "--negatives or --canary", args.negatives or args.canary),
    )
    for flag, other, there in needs:
        if flag in args.changed and not there:
            raise UserError(f"--{flag.replace('_', '-')}: does nothing without {other}")
    if args.me and args.database:
        raise UserError("--me: does nothing with --database, which says whose messages are whose")


# ---- reading -----------------------------------------------------------------------------------


def read(args: argparse.Namespace) -> History:
    if args.database:
        return read_database(args.database, groups=args.groups, tapbacks=args.tapbacks)
    if args.export:
        return read_export(args.export, groups=args.groups, me=args.me or "Me")
    if args.telegram:
        return read_telegram(args.telegram, me=args.me, groups=args.groups)
    whole = History()
    for path in args.whatsapp:
        part = read_whatsapp(path, me=args.me, order=args.date_order)
        if part.groups and not args.groups:
            part.dropped["in a group"] += len(part.messages)
            part.messages = []
        whole.messages += part.messages
        whole.dropped += part.dropped
        whole.groups |= part.groups
    return whole


def masked(history: History, words: list[str]) -> History:
    """The same history with masked texts; the others in a group become Person 1, Person 2, ..."""
    senders = dict.fromkeys(m.sender for m in history.messages if m.sender != ME)
    aliases = {name: f"Person {i}" for i, name in enumerate(senders, start=1)}
    masker = Masker([*senders, *history.groups], words)
    messages = [
        replace(m, sender=aliases.get(m.sender, ME), text=masker.mask(m.text))
        for m in history.messages
    ]
    return replace(history, messages=messages)


# ---- writing -----------------------------------------------------------------------------------


def private_folder(folder: Path) -> None:
    """Make the folder, for its owner alone and ignored by git; refuse one that git tracks."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--", "."], capture_output=True, check=False
        ).stdout
    except OSError:  # no git here
        found = b""
    if found.strip():
        first = found.split(b"\n")[0].decode(errors="replace")
        raise UserError(
            f"{folder}: git tracks files in it ({first}), so your messages could be pushed; "
            "name another folder"
        )
    write_private(folder / ".gitignore", "*\n")
    mark_private(folder)


def write_private(path: Path, text: str) -> None:
    """A file that its owner alone may read, at every moment."""
    before = os.umask(0o077)
    try:
        write_atomically(path, text)
    finally:
        os.umask(before)
    with writing(path):
        path.chmod(0o600)


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_private(path, "".join(line + "\n" for line in lines))
    print(f"wrote {path}: {len(lines)} rows")
    return len(lines)


def write_all(args: argparse.Namespace, history: History, rows: Rows) -> None:
    folder = args.output_dir
    private_folder(folder)
    canaries = make_canaries(args.canary, args.seed)
    if canaries:
        write_private(folder / "canaries.json", json.dumps(canaries, indent=2) + "\n")
    for split, made in (("train", rows.train), ("valid", rows.valid)):
        planted = [as_row(canary) for canary in canaries] if split == "train" else []
        told = ({"messages": row["messages"]} for row in made)
        write_rows(folder / f"{split}.jsonl", itertools.chain(told, planted))
        write_rows(folder / f"prompts_{split}.jsonl", prompts_of(made))
        if args.tapbacks:
            write_rows(folder / f"ratings_{split}.jsonl", ratings_of(history, made))
    if args.negatives:
        write_negatives(args, rows)


def write_negatives(args: argparse.Namespace, rows: Rows) -> None:
    """My answer against a model's to the same context; equal ones are left out and counted."""
    from run_folder.console import Wait

    left: Counter[str] = Counter()
    reply = make_replier(args)
    asked = {"train": [*prompts_of(rows.train)], "valid": [*prompts_of(rows.valid)]}
    with Wait("replies", sum(map(len, asked.values()))) as wait:
        for split, prompts in asked.items():
            pairs = []
            for prompt in prompts:
                chosen, rejected = prompt["mine"].strip(), reply(prompt["prompt"])
                wait.advance()
                if rejected is None:
                    left["whose prompt and reply are longer than the model's positions"] += 1
                elif rejected.strip() in ("", chosen):
                    left["whose reply is empty or the same as yours"] += 1
                else:
                    pairs.append(pair(prompt, rejected.strip()))
            if split == "train" and not pairs:
                refuse_no_pairs(args, left)
            write_rows(args.output_dir / f"preference_{split}.jsonl", pairs)
    for why, count in left.items():
        print(f"left out: {count} pairs {why}")


def pair(prompt: dict, rejected: str) -> dict:
    sides = {"chosen": prompt["mine"], "rejected": rejected}
    answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"prompt": prompt["prompt"], **answers}


def refuse_no_pairs(args: argparse.Namespace, left: Counter[str]) -> None:
    why = ", ".join(f"{count} {reason}" for reason, count in left.items()) or "nothing was asked"
    raise UserError(
        f"--negatives {args.negatives}: no pair is left: {why}; another model, fewer --max-tokens, "
        "or a shorter --max-length"
    )


def make_replier(args: argparse.Namespace) -> Callable[[list[dict]], str | None]:
    """A function from a conversation to the reply that --negatives writes to it; None where the
    model has too few positions for both."""
    import fast_blas  # noqa: F401, I001  before MLX

    import mlx.core as mx

    from chat.conversation import Prompting
    from models.decoding import generate
    from models.load import load_model

    loaded = load_model(args.negatives)
    prompting, numbers = Prompting(loaded.tokenizer), itertools.count()
    prompting.stop_at_turn_end()

    def reply(messages: list[dict]) -> str | None:
        tokens, _ = prompting.tokens(messages)
        if not loaded.limits.fits(len(tokens), args.max_tokens):
            return None
        key = mx.random.split(mx.random.key(args.seed), next(numbers) + 2)[-1]
        made = generate(
            loaded.model, [tokens], max_tokens=args.max_tokens, eos_ids=loaded.eos_ids, key=key
        )
        return loaded.tokenizer.decode(made.responses[0], skip_special_tokens=True)

    return reply


def report(dropped: Counter[str]) -> None:
    """Every message that is in no row is counted here."""
    for reason, count in dropped.most_common():
        print(f"left out, {reason}: {count}")


def main(words: list[str] | None = None) -> None:
    args = make_parser().parse_args(words)
    history = read(args)
    if args.names:
        history = masked(history, args.mask_words)
    limits = Limits(
        gap=timedelta(hours=args.gap),
        max_length=args.max_length,
        context_turns=args.context_turns,
        min_messages=args.min_messages,
    )
    rows = make_rows(history, limits)
    report(rows.dropped)
    if not rows.train:
        raise UserError(
            f"no conversation is left of {len(history.messages)} messages: chats need "
            f"{args.min_messages} messages (--min-messages), of both sides"
        )
    write_all(args, history, rows)
    folder = shlex.quote(str(args.output_dir))
    print("next, in the project folder:")
    print(f"  python sft.py --train --data {folder} --data-base '' --mask-prompt --model MODEL")


if __name__ == "__main__":
    run_main(main)
