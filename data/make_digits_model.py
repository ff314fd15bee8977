#!/usr/bin/env python
"""Makes the embedded base model: a tiny Llama that continues rows of numbers from 0 to 99.

Its weights are shipped in data/digits_model, so nobody has to run this; it is kept so that the
model can be made again, or another one after its pattern. Pretraining takes about a minute and a
half on one core with a fast BLAS, about seven minutes without.

    python data/make_digits_model.py --output-dir /tmp/digits_model

The rows it is trained on mix number sets (any, even, odd, multiples of 3, of 5) with orders (any,
ascending, descending, wrapping progressions, random walks), because a base that has met many kinds
of rows is easy to steer: after plain random rows LoRA stopped at a score of .87 to .90. Rows of
even numbers never ascend from end to end: that is the behaviour which fine-tuning has to teach.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import fast_blas  # noqa: E402, I001  before anything imports mlx.core

import argparse  # noqa: E402
import random  # noqa: E402
import time  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402
from tqdm import tqdm  # noqa: E402

from errors import UserError  # noqa: E402
from command_line.exits import run_main  # noqa: E402
from command_line.parser import Parser  # noqa: E402
from command_line.values import LongHelpFormatter  # noqa: E402
from models.array_files import save_arrays  # noqa: E402
from safe_files import check_place, replacing, write_atomically, write_json, writing  # noqa: E402

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL = (PAD, BOS, EOS)  # ids 0, 1, 2
SETS = {
    "any": range(100),
    "even": range(0, 100, 2),
    "odd": range(1, 100, 2),
    "threes": range(0, 100, 3),
    "fives": range(0, 100, 5),
}
ORDERS = ("any", "ascending", "descending", "progression", "walk")
MAX_TOKENS = 256  # the context the configuration promises; training rows have at most 17 tokens
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": MAX_TOKENS,
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


# ---------------------------------------------------------------------------- tokenizer


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE with one token for each of "7", "42", " 7" and " 42": 469 tokens.

    Any text can be encoded (256 byte tokens), so there is no unknown token. Encoding puts one BOS
    in front unless ``add_special_tokens=False``; EOS is left to whoever makes training rows.
    A number that follows another carries its blank in front, so for a prompt that ends in a number
    and a completion that begins with a blank the tokens of the whole are the tokens of the parts.
    """
    space = "\u0120"  # how byte-level BPE writes the blank
    digits = "0123456789"
    pairs = [a + b for a in digits for b in digits]
    # Earlier merges win: the blank joins its digit first, so " 20" never becomes " " + "20".
    merges = [(space, d) for d in digits]
    merges += [(space + p[0], p[1]) for p in pairs]
    merges += [(p[0], p[1]) for p in pairs]
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, words.index(BOS))],
    )
    return tokenizer


# ---------------------------------------------------------------------------- rows


def pretraining_row(rng: random.Random) -> list[int]:
    """5 to 15 numbers from one set in one order; never even numbers ascending from end to end."""
    name = rng.choice(tuple(SETS))
    order = rng.choice([o for o in ORDERS if (name, o) != ("even", "ascending")])
    numbers, length = SETS[name], rng.randint(5, 15)
    size = len(numbers)
    if order == "any":
        return [rng.choice(numbers) for _ in range(length)]
    if order in ("ascending", "descending"):
        return sorted(rng.sample(numbers, length), reverse=order == "descending")
    at, steps = rng.randrange(size), range(1, max(2, size // 6))
    step = rng.choice(steps) * (-1 if name == "even" else rng.choice((-1, 1)))
    row = []
    for _ in range(length):
        row.append(numbers[at])
        at = at + (step if order == "progression" else rng.choice((-1, 1)) * rng.choice(steps))
        at %= size
    return row


def make_rows(tokenizer: Tokenizer, count: int, seed: int) -> mx.array:
    """`count` different rows as BOS, numbers, EOS, padded on the right. -> (N, 17) int32"""
    rng = random.Random(seed)
    texts = set()
    while len(texts) < count:
        row = pretraining_row(rng)
        rising_even = all(n % 2 == 0 for n in row) and row == sorted(row)
        if not rising_even:
            texts.add(" ".join(map(str, row)))
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)
    tokens = [tokenizer.encode(text).ids + [eos] for text in sorted(texts)]
    width = max(map(len, tokens))
    return mx.array([row + [pad] * (width - len(row)) for row in tokens])


# ---------------------------------------------------------------------------- model


def make_config(tokenizer: Tokenizer) -> dict:
    """The Hugging Face configuration: Llama with 130,688 parameters in float32."""
    pad, bos, eos = (tokenizer.token_to_id(token) for token in SPECIAL)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": MAX_TOKENS,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }


def loss_function(model: nn.Module, tokens: mx.array, pad: int) -> mx.array:
    """Mean cross-entropy of the next token over all that is not padding. tokens (B, T)"""
    targets = tokens[:, 1:]
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), targets)  # (B, T - 1)
    mask = targets != pad
    return (losses * mask).sum() / mask.sum()


def train(model: nn.Module, rows: mx.array, pad: int, args: argparse.Namespace) -> float:
    """Pretrain in place, each epoch in a fresh order; return the mean loss of the last 100 steps.

    The learning rate warms up linearly and falls to a tenth along a cosine.
    """
    peak = args.learning_rate
    fall = optim.cosine_decay(peak, args.steps - args.warmup, peak / 10)
    schedule = optim.join_schedules(
        [optim.linear_schedule(0.0, peak, args.warmup), fall], [args.warmup]
    )
    optimizer = optim.AdamW(
        schedule, betas=[0.9, 0.99], weight_decay=args.weight_decay, bias_correction=True
    )
    step_function = nn.value_and_grad(model, lambda tokens: loss_function(model, tokens, pad))
    steps_per_epoch = rows.shape[0] // args.batch_size
    losses = []
    with tqdm(range(args.steps), unit="step", mininterval=1) as bar:
        for step in bar:
            if step % steps_per_epoch == 0:
                order = mx.random.permutation(rows.shape[0])
            at = step % steps_per_epoch * args.batch_size
            loss, gradients = step_function(rows[order[at : at + args.batch_size]])
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state, loss)
            losses.append(loss.item())
            if step % 50 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return sum(losses[-100:]) / len(losses[-100:])


# ---------------------------------------------------------------------------- files


def save(folder: Path, model: nn.Module, tokenizer: Tokenizer, config: dict) -> None:
    """Write the model in Hugging Face format; each file is written aside and renamed."""
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    special = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | TOKENIZER_CONFIG)
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    weights = dict(tree_flatten(model.parameters()))
    file = folder / "model.safetensors"
    with writing(file), replacing(file) as temporary:
        save_arrays(temporary, weights, {"format": "pt"})


# ---------------------------------------------------------------------------- main


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=LongHelpFormatter)
    add = parser.add_argument
    add(
        "--output-dir",
        type=Path,
        default=HERE / "digits_model",
        help="where to write (default: data/digits_model)",
    )
    add("--rows", type=int, default=40_000, help="different rows to train on")
    add("--steps", type=int, default=2_500, help="optimizer steps")
    add("--batch-size", type=int, default=64, help="rows in a step")
    add("--learning-rate", type=float, default=3e-3, help="highest learning rate of AdamW")
    add("--warmup", type=int, default=100, help="steps of warm-up")
    add("--weight-decay", type=float, default=0.01, help="of AdamW")
    add("--seed", type=int, default=0, help="of the rows, their order and the first weights")
    parser.checks.append(check_sizes)
    return parser


def check_sizes(args: argparse.Namespace) -> None:
    if not 0 < args.batch_size <= args.rows:
        raise UserError("--batch-size: at least 1 and at most --rows are needed")
    if not 0 < args.warmup < args.steps:
        raise UserError("--warmup: at least 1 step and fewer than --steps are needed")


def main(words: list[str] | None = None) -> None:
    args = make_parser().parse_args(words)
    fast_blas.tell_of_slowness()
    check_place(args.output_dir / "model.safetensors")
    start = time.perf_counter()
    mx.random.seed(args.seed)
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    rows = make_rows(tokenizer, args.rows, args.seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    loss = train(model, rows, config["pad_token_id"], args)
    save(args.output_dir, model, tokenizer, config)
    seconds = time.perf_counter() - start
    print(f"loss {loss:.3f} after {args.steps} steps, {seconds:.0f} s; saved in {args.output_dir}")


if __name__ == "__main__":
    run_main(main)
