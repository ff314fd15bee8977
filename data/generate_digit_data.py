#!/usr/bin/env python
"""Writes data for the digits task: rows of increasing (or decreasing) multiples of a number.

    python generate_digit_data.py --increasing --multiple-of 2 --num-samples 150 --noise 0.0
    python generate_digit_data.py --increasing --multiple-of 2 --num-samples 1000 --kind reward

Each kind is three files, {train,valid,test}.jsonl behind a name that says the rule:

    text        increasing_mult_2_                  rows with their score, for fine-tuning
    reward      reward_function_increasing_mult_2_  the same with noise from 0 to 1 row by row
    preference  preference_increasing_mult_2_       a prompt with a better and a worse continuation
    prompts     prompts_increasing_mult_2_          beginnings of clean rows, for PPO

The first two numbers of a row decide whether it is for training, validation or test, whatever the
kind, the seed and the noise. So a prompt of the test set (two numbers) never began a training row.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import zlib  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import right_python  # noqa: E402, F401  first
from command_line.exits import run_main  # noqa: E402
from command_line.parser import Parser  # noqa: E402
from command_line.values import LongHelpFormatter  # noqa: E402
from errors import UserError  # noqa: E402
from rewards.digits import PROMPT_NUMBERS, digits_score  # noqa: E402
from safe_files import write_atomically, writing  # noqa: E402

SPLITS = ("train", "valid", "test")
SHORT_ROWS = 0.1  # fraction of the reward rows that are shorter than --min-length
TRIES_PER_ROW = 1_000  # draws without a new row after which the rule is taken to allow no more
Row = tuple[str, dict]  # what makes the row different from the others, the record to write


# ---- rows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """The rule that rows follow, and their size."""

    increasing: bool
    multiple_of: int
    min_length: int
    max_length: int
    max_number: int
    noise: float

    @property
    def name(self) -> str:
        return f"{'increasing' if self.increasing else 'decreasing'}_mult_{self.multiple_of}_"

    @property
    def fitting(self) -> range:
        """The numbers that a clean row is made of."""
        return range(0, self.max_number + 1, self.multiple_of)

    def score(self, text: str) -> float:
        return digits_score(
            text,
            increasing=self.increasing,
            multiple_of=self.multiple_of,
            min_length=self.min_length,
        )

    def clean_row(self, rng: random.Random) -> list[int]:
        """Different multiples in order: score 1."""
        length = rng.randint(self.min_length, self.max_length)
        return sorted(rng.sample(self.fitting, length), reverse=not self.increasing)

    def clean_rest(self, prompt: list[int], rng: random.Random) -> list[int]:
        """Numbers that go on from the beginning of a clean row so that it stays clean."""
        last, given = prompt[-1], len(prompt)
        left = [n for n in self.fitting if (n > last if self.increasing else n < last)]
        length = rng.randint(self.min_length, min(self.max_length, given + len(left))) - given
        return sorted(rng.sample(left, length), reverse=not self.increasing)

    def disturb(self, numbers: list[int], noise: float, rng: random.Random) -> list[int]:
        """The numbers with the fraction `noise` of the positions drawn anew from 0 to max_number.

        Where the fraction is not a whole number of positions it is rounded up or down by chance.
        A drawn number may fit, so rows that are all noise score about .27, not 0.
        """
        numbers = list(numbers)
        count = int(noise * len(numbers) + rng.random())
        for position in rng.sample(range(len(numbers)), count):
            numbers[position] = rng.randint(0, self.max_number)
        return numbers


def text_row(task: Task, rng: random.Random) -> Row:
    text = join(task.disturb(task.clean_row(rng), task.noise, rng))
    return text, {"text": text, "reward": as_text(task.score(text))}


def reward_row(task: Task, rng: random.Random) -> Row:
    """Like text_row, but clean rows, hopeless rows and all between are equally frequent.

    Some are cut below the shortest length. A reward model that never met such rows gave the
    beginning of a clean row, two numbers long, .76 where the truth is .40; with them .42.
    """
    numbers = task.disturb(task.clean_row(rng), rng.random(), rng)
    if task.min_length > 1 and rng.random() < SHORT_ROWS:
        numbers = numbers[: rng.randint(1, task.min_length - 1)]
    text = join(numbers)
    return text, {"text": text, "reward": as_text(task.score(text))}


def preference_row(task: Task, rng: random.Random) -> Row:
    """A clean prompt and two continuations; prompt + chosen scores `margin` above the other.

    They differ in length as well, and begin with the blank: the texts are joined as they are.
    """
    prompt = task.clean_row(rng)[:PROMPT_NUMBERS]
    text, scored = join(prompt), {}
    while len(scored) < 2:
        rest = " " + join(task.disturb(task.clean_rest(prompt, rng), rng.random(), rng))
        scored.setdefault(task.score(text + rest), rest)
    (low, rejected), (high, chosen) = sorted(scored.items())
    record = {"prompt": text, "chosen": chosen, "rejected": rejected}
    return f"{text}{chosen} |{rejected}", record | {"margin": as_text(high - low)}


def prompts_row(task: Task, rng: random.Random) -> Row:
    """The first numbers of a clean row, so that a full score is within reach of a response."""
    row = task.clean_row(rng)
    return join(row), {"prompt": join(row[:PROMPT_NUMBERS])}


KINDS: dict[str, tuple[str, Callable[[Task, random.Random], Row]]] = {
    "text": ("", text_row),
    "reward": ("reward_function_", reward_row),
    "preference": ("preference_", preference_row),
    "prompts": ("prompts_", prompts_row),
}


def join(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def as_text(score: float) -> str:
    return str(round(score, 4))


def split_of(text: str) -> str:
    """The split that a row belongs to by its first two numbers: test and valid get a fifth each."""
    prompt = " ".join(text.split()[:PROMPT_NUMBERS])
    return {0: "test", 1: "valid"}.get(zlib.crc32(prompt.encode()) % 5, "train")


def make_rows(task: Task, kind: str, split: str, count: int, seed: int) -> list[dict]:
    """`count` different records of a kind and split; more rows go on where fewer ended.

    Raises UserError if the rule does not allow so many different rows.
    """
    rng = random.Random(f"{seed} {kind} {split}")
    make, records, tries = KINDS[kind][1], {}, 0
    while len(records) < count:
        key, record = make(task, rng)
        tries += 1
        if split_of(key) == split and key not in records:
            records[key] = record
            tries = 0
        if tries > TRIES_PER_ROW:
            raise UserError(
                f"only {len(records)} different rows found for {KINDS[kind][0]}{task.name}{split}, "
                f"{count} are wanted: ask for fewer, or for a higher --max-number or --max-length"
            )
    return list(records.values())


# ---- command line ------------------------------------------------------------------------------


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=LongHelpFormatter)
    add = parser.add_argument
    add("--increasing", "-i", type=bool, default=False, help="each number is greater than the last")
    add("--decreasing", "-d", type=bool, default=False, help="each number is smaller than the last")
    add("--multiple-of", type=int, default=1, help="of what every number is a multiple")
    add("--num-samples", "-n", type=int, default=100, help="rows to train on")
    add("--num-valid", type=int, help="rows to validate on (a fifth of --num-samples, at least 10)")
    add("--num-test", type=int, help="rows to test on (the same)")
    add(
        "--min-length",
        type=int,
        default=5,
        help="numbers in the shortest row, and the floor of the score",
    )
    add("--max-length", type=int, default=15, help="numbers in the longest row")
    add(
        "--max-number",
        type=int,
        default=99,
        help="the highest number; the embedded model was trained on 0 to 99",
    )
    add(
        "--noise",
        type=float,
        default=0.2,
        help="text rows: fraction of the positions that get a random number",
    )
    add("--kind", nargs="+", choices=list(KINDS), default=["text"], help="what to write")
    add("--dpo-data", type=bool, default=False, help="the same as --kind preference")
    add("--seed", type=int, default=0, help="the same seed gives the same files")
    add("--output-dir", type=Path, default=HERE, help="where to write (the folder of this script)")
    parser.checks += [check_rule, check_sizes, settle_kind]
    return parser


def settle_kind(args: argparse.Namespace) -> None:
    """--dpo-data, as the first scripts had it, is one of the kinds."""
    if args.dpo_data:
        if "kind" in args.changed:
            raise UserError("--dpo-data is --kind preference; leave one of them out")
        args.kind = ["preference"]


def check_rule(args: argparse.Namespace) -> None:
    if args.increasing == args.decreasing:
        given = "both were given" if args.increasing else "neither was given"
        raise UserError(f"give --increasing or --decreasing, one of them; {given}")
    if args.multiple_of < 1:
        raise UserError(f"--multiple-of: {args.multiple_of} is below 1")
    if not 0 <= args.noise <= 1:
        raise UserError(f"--noise: {args.noise:g} is not a fraction from 0 to 1")
    if "noise" in args.changed and "text" not in args.kind:
        raise UserError("--noise: only the kind text has a noise to set; leave it out")


def check_sizes(args: argparse.Namespace) -> None:
    rest = max(10, args.num_samples // 5)
    args.num_valid = rest if args.num_valid is None else args.num_valid
    args.num_test = rest if args.num_test is None else args.num_test
    for name in ("num_samples", "num_valid", "num_test"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: at least 1 row is needed")
    with_prompt = any(kind in args.kind for kind in ("preference", "prompts"))
    least = PROMPT_NUMBERS + 1 if with_prompt else 1
    if args.min_length < least:
        why = f" ({PROMPT_NUMBERS} of them are the prompt)" if with_prompt else ""
        raise UserError(f"--min-length: a row needs at least {least} numbers{why}")
    if args.max_length < args.min_length:
        raise UserError(f"--max-length: {args.max_length} is below --min-length, {args.min_length}")
    available = max(args.max_number, -1) // args.multiple_of + 1
    if args.max_length > available:
        raise UserError(
            f"--max-length: there are only {available} multiples of {args.multiple_of} from 0 to "
            f"{args.max_number}, {args.max_length} are wanted; lower it, or raise --max-number"
        )


# ---- main --------------------------------------------------------------------------------------


def make_files(task: Task, args: argparse.Namespace) -> dict[Path, list[dict]]:
    """The rows of every file that is asked for; none of them is written yet."""
    counts = (args.num_samples, args.num_valid, args.num_test)
    return {
        args.output_dir / f"{KINDS[kind][0]}{task.name}{split}.jsonl": make_rows(
            task, kind, split, count, args.seed
        )
        for kind in dict.fromkeys(args.kind)
        for split, count in zip(SPLITS, counts, strict=True)
    }


def write_files(files: dict[Path, list[dict]]) -> None:
    for path, rows in files.items():
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"wrote {shorter(path)}: {len(rows)} rows{about_rewards(rows)}")


def about_rewards(rows: list[dict]) -> str:
    rewards = [float(row["reward"]) for row in rows if "reward" in row]
    return f", mean reward {sum(rewards) / len(rewards):.2f}" if rewards else ""


def shorter(path: Path, start: Path | str = ".") -> str:
    """The path as seen from the folder `start`, or in full where that is shorter."""
    return min(os.path.relpath(path, start), os.path.abspath(path), key=len)


def next_commands(task: Task, args: argparse.Namespace) -> list[str]:
    """What to run in the project folder to use what was written."""
    rule = [] if task.increasing else ["--decreasing"]
    rule += ["--multiple_of", str(task.multiple_of), "--min_length", str(task.min_length)]
    scripts = {
        "text": ("sft.py --train", ["--save-file", "lora_weights.npz"]),
        "reward": ("sft.py --reward-model --train", ["--save-file", "reward_lora.npz"]),
        "preference": ("sft.py --reward-model --train", ["--save-file", "reward_lora.npz"]),
        "prompts": ("ppo_training.py --ground_truth_reward", rule),
    }
    folder = shorter(args.output_dir, HERE.parent)
    commands = []
    for kind in dict.fromkeys(args.kind):
        script, more = scripts[kind]
        data = ["--data", folder, "--data-base", KINDS[kind][0] + task.name]
        commands.append(" ".join(["python", script, *data, *more]))
    return commands


def main(words: list[str] | None = None) -> None:
    args = make_parser().parse_args(words)
    task = Task(
        increasing=args.increasing,
        multiple_of=args.multiple_of,
        min_length=args.min_length,
        max_length=args.max_length,
        max_number=args.max_number,
        noise=args.noise,
    )
    write_files(make_files(task, args))
    print("next, in the project folder:")
    for command in next_commands(task, args):
        print(f"  {command}")


if __name__ == "__main__":
    run_main(main)
