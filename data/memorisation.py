#!/usr/bin/env python
"""What a model repeats of the messages that it was trained on: before you share it.

    python data/memorisation.py --data my_messages --model MODEL --resume-file me.npz

For each planted code (data/imessage.py --canary) the exposure in bits: how much likelier the
model makes it than codes that it never saw. And of sampled answers the longest run of words that
stands in the training rows.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import fast_blas  # noqa: E402, F401  before MLX

import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402

from command_line.exits import run_main  # noqa: E402
from command_line.parser import Parser  # noqa: E402
from errors import UserError  # noqa: E402
from histories.privacy import Grams, exposure, longest_overlap, others  # noqa: E402
from run_folder.console import Progress, Wait  # noqa: E402

LONG_OVERLAP = 8  # words; shorter runs are phrases that anybody writes


def make_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0], script="data/memorisation.py")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that data/imessage.py wrote")
    add("--model", help="model that was trained on it (default: the digits model)")
    add("--resume-file", help="adapter that was trained on it")
    add("--samples", type=int, default=200, help="answers to sample to training prompts")
    add("--max-tokens", type=int, default=60, help="longest sampled answer")
    add("--others", type=int, default=255, help="codes that a planted one is compared with")
    add("--batch-size", type=int, default=16, help="answers that are sampled together")
    add("--seed", type=int, default=0, help="of codes and samples")
    parser.checks.append(check)
    return parser


def check(args: argparse.Namespace) -> None:
    for name in ("samples", "max_tokens", "others", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: at least 1")


def read_rows(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path}: missing; data/imessage.py writes it") from None
    except (OSError, ValueError) as wrong:
        raise UserError(f"{path}: cannot read: {wrong}") from None


def answers(row: dict) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == "assistant"]


# ---- the model ---------------------------------------------------------------------------------


class Model:
    """A model with its adapter: how likely it makes answers, and answers of its own."""

    def __init__(self, args: argparse.Namespace):
        from chat.conversation import Prompting
        from models.adapter_files import load_adapter
        from models.load import load_model

        self.loaded = load_model(args.model)
        self.prefix: list[int] = []
        if args.resume_file is not None:
            self.prefix = list(load_adapter(self.loaded, args.resume_file).prefix)
        self.loaded.model.eval()
        self.prompting = Prompting(self.loaded.tokenizer)
        self.prompting.stop_at_turn_end()

    def prompt(self, messages: list[dict]) -> list[int]:
        return self.prompting.tokens(messages)[0]

    def fits(self, messages: list[dict], response: int) -> bool:
        return self.loaded.limits.fits(len(self.prefix) + len(self.prompt(messages)), response)

    def logprobs(self, messages: list[dict], texts: list[str]) -> list[float]:
        """log p of each text as the answer to `messages`, its end not counted."""
        from models.actor_critic import reference_logprobs
        from models.packing import pack

        tokenizer, prompt = self.loaded.tokenizer, self.prompt(messages)
        coded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        packed = pack([prompt] * len(texts), coded, prefix=self.prefix)
        return reference_logprobs(self.loaded.model, packed).sum(axis=-1).tolist()

    def sample(self, prompts: list[list[dict]], max_tokens: int, seed: int) -> list[str]:
        import mlx.core as mx

        from models.decoding import generate

        made = generate(
            self.loaded.model,
            [[*self.prefix, *self.prompt(messages)] for messages in prompts],
            max_tokens=max_tokens,
            eos_ids=self.loaded.eos_ids,
            key=mx.random.key(seed),
        )
        decode = self.loaded.tokenizer.decode
        return [decode(r, skip_special_tokens=True).strip() for r in made.responses]


# ---- main --------------------------------------------------------------------------------------


def report_canaries(args: argparse.Namespace, model: Model) -> None:
    path = args.data / "canaries.json"
    if not path.exists():
        print("no planted codes: data/imessage.py --canary 5 plants some before training")
        return
    canaries = json.loads(path.read_text(encoding="utf-8"))
    print(
        f"exposure of planted codes in bits, of at most {args.others + 1} codes "
        "(unseen: 1.4 on average):"
    )
    lines = []
    with Wait("codes", len(canaries) * (args.others + 1)) as wait:
        for canary in canaries:
            messages = [{"role": "user", "content": canary["question"]}]
            codes = [canary["answer"], *others(canary, args.others, args.seed)]
            found: list[float] = []
            for start in range(0, len(codes), args.batch_size):
                texts = codes[start : start + args.batch_size]
                found += model.logprobs(messages, texts)
                wait.advance(len(texts))
            chance = f"probability {math.exp(found[0]):.1e}"
            lines.append(f"  {exposure(found[0], found[1:]):5.1f}  {chance}  {canary['question']}")
    print("\n".join(lines))


def report_overlap(args: argparse.Namespace, model: Model, rows: list[dict]) -> None:
    grams = Grams(answer for row in rows for answer in answers(row))
    asked = read_rows(args.data / "prompts_train.jsonl")
    if not asked:
        raise UserError(f"{args.data / 'prompts_train.jsonl'}: holds no prompts")
    fitting = [row["prompt"] for row in asked if model.fits(row["prompt"], args.max_tokens)]
    if left := len(asked) - len(fitting):
        print(f"left out: {left} prompts that are longer than the model's positions allow")
    if not fitting:
        raise UserError("no prompt fits the model's positions; give fewer --max-tokens")
    prompts = list(itertools.islice(itertools.cycle(fitting), args.samples))
    longest: list[str] = []
    with Progress(args.samples, name="sampling") as progress:
        for start in range(0, args.samples, args.batch_size):
            batch = prompts[start : start + args.batch_size]
            for text in model.sample(batch, args.max_tokens, args.seed + start):
                longest.append(longest_overlap(text, grams))
            progress.advance(len(batch))
    longest.sort(key=lambda run: -len(run.split()))
    many = sum(len(run.split()) >= LONG_OVERLAP for run in longest)
    print(
        f"{args.samples} sampled answers: {many} with {LONG_OVERLAP} words or more in a row as "
        f"in a training row; the longest has {len(longest[0].split())}"
    )
    if longest[0]:
        print(f"  {longest[0]!r}")


def main(words: list[str] | None = None) -> None:
    args = make_parser().parse_args(words)
    rows = read_rows(args.data / "train.jsonl")
    model = Model(args)
    report_canaries(args, model)
    report_overlap(args, model, rows)


if __name__ == "__main__":
    run_main(main)
