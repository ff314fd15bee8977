"""Score responses, from a file or sampled, with any reward; pick the best response to each prompt.

Every record format that has a response is read; of preference rows every response is scored. The
rewards are those of ppo_training.py, and give the scores that PPO would get for the same texts.
With --prompts in place of --input, --model answers each prompt --samples times first.

Within seconds on a laptop, on the embedded model's data:
    python score.py --input data/preference_increasing_mult_2_test.jsonl --ground-truth-reward
A real one, rejection sampling: the best of several samples a prompt, for sft.py to train on:
    python score.py --prompts prompts.jsonl --model MODEL --samples 8 --best-of \\
        --reward-model ./my_reward_model/ --output best.jsonl
    python sft.py --model MODEL --train --train-file best.jsonl --mask-prompt
"""

import fast_blas

import json
from functools import partial
from pathlib import Path

from command_line.adlf_flags import make_composite
from command_line.data_flags import settle_date, tokenising
from command_line.exits import run_main
from command_line.ppo_flags import own_ends
from command_line.reward_flags import make_rewards
from command_line.rules import refuse_idle
from command_line.score_flags import parse_arguments, read_input, refuse_overwriting
from errors import UserError

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    records = read_input(args)
    # MLX and what stands on it come after the command line: help and mistakes answer at once.
    from data_utils import columns_of, data_report
    from rewards.scored_rows import make_pairs, refuse_promptless, score_pairs
    from run_folder.console import Wait

    fast_blas.tell_of_slowness()
    pairs, tokenizer = sample(args, records) if args.prompts else (None, None)
    tokenizer, reward_model = load(args, tokenizer)
    if pairs is None:
        settle_date(args, tokenizer)
        pairs, tokenised = make_pairs(records, tokenizer, tokenising(args))
        print(data_report("responses", records, tokenised, columns=True))
    rewards = make_rewards(args, make_learned_reward(args, tokenizer, reward_model))
    rewards = make_composite(args, rewards, partial(first_rows, args, tokenizer, pairs))
    if args.best_of:
        refuse_promptless(pairs)
    rewards.check_columns(columns_of(pair.whole for pair in pairs))
    with Wait("scoring", len(pairs)) as wait:
        score_pairs(rewards, pairs, args.batch_size, wait.advance)
    print_summary(pairs)
    if args.output is not None:
        write(args, pairs)
    return 0


# ------------------------------------------------------------------------------ model


def sample(args, records):
    """(--samples responses of --model to each prompt, as pairs; the model's tokenizer).

    The model is gone again before those of the rewards are loaded.
    """
    from command_line.data_flags import warn_of_model
    from command_line.model_limits import check_rows, fit_lengths
    from data_utils import data_report, tokenise_prompts
    from models.decoding import Sampling
    from models.load import load_model
    from rewards.sampled_rows import sample_pairs
    from run_folder.console import Wait

    loaded = load_model(
        args.model,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
    )
    warn_of_model(args, records, loaded.tokenizer)
    fit_lengths(args, loaded.limits, response=args.max_new_tokens)
    settle_date(args, loaded.tokenizer)
    prompts = tokenise_prompts(records, loaded.tokenizer, **tokenising(args))
    print(data_report("prompts", records, prompts))
    check_rows(prompts.rows, loaded.limits, response=args.max_new_tokens)
    with Wait("sampling", len(prompts) * args.samples) as wait:
        pairs = sample_pairs(
            loaded,
            records,
            prompts.rows,
            samples=args.samples,
            max_new_tokens=args.max_new_tokens,
            eos_ids=own_ends(args, loaded.tokenizer),
            sampling=Sampling(args.temperature, args.top_k, args.top_p, args.min_p),
            batch_size=args.batch_size,
            seed=args.seed,
            advance=wait.advance,
        )
    return pairs, loaded.tokenizer


def load(args, tokenizer=None):
    """(the tokenizer whose templates make texts of rows, the reward model or None).

    A fused reward model brings its tokenizer along; --model, as in PPO, is the model whose
    responses are scored; its `tokenizer` may be at hand. An adapter goes on --model, or on the base
    that it names.
    """
    from models.adapter_files import read_adapter
    from models.load import load_model
    from models.parts import recorded_base
    from models.reward_model import load_reward_model

    options = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    path = Path(args.reward_model or "")
    if args.reward_model and path.exists() and not (path / "config.json").exists():
        base = args.model or recorded_base(args.reward_model, read_adapter(path)[1])
        loaded = load_model(base, quantize=args.quantize, tokenizer=args.tokenizer, **options)
        return loaded.tokenizer, load_reward_model(path, loaded, any_base=args.any_base, **options)
    if args.quantize and not args.prompts:
        raise UserError("--quantize is for the base of an adapter in --reward-model")
    reward_model = load_reward_model(args.reward_model, **options) if args.reward_model else None
    own = reward_model is not None and not getattr(reward_model, "reads_pairs", False)
    if own and args.model is None:
        refuse_idle(args, "tokenizer", "without --model: the reward model brings its own")
        return reward_model.source.tokenizer, reward_model
    if tokenizer is not None:
        return tokenizer, reward_model
    return load_model(args.model, tokenizer=args.tokenizer, **options).tokenizer, reward_model


def make_learned_reward(args, tokenizer, reward_model):
    """The reward model as a reward, or None."""
    from rewards.learned import learned_reward

    if reward_model is None:
        return None
    return learned_reward(
        reward_model,
        tokenizer,
        batch_size=args.batch_size,
        prompt_template=args.prompt_template,
        token_format=args.token_format,
    )


def first_rows(args, tokenizer, pairs, names, **options):
    """Internal rewards under --model, calibrated on the first rows that are scored."""
    from contextlib import nullcontext

    from models.load import load_model
    from rewards.internal import ROWS, Signals
    from rewards.scored_rows import given_columns

    choice = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    loaded = load_model(args.model, quantize=args.quantize, **choice)
    first = pairs[:ROWS]
    given = given_columns(first)
    del given["ended"]  # no component asks for it
    given["prompts"] = [pair.prompt for pair in first]
    given["responses"] = [pair.response for pair in first]
    return Signals(
        lambda: nullcontext(loaded.model),
        loaded.tokenizer,
        names,
        eos_ids=own_ends(args, tokenizer),
        sample=lambda: given,
        **options,
    )


# ------------------------------------------------------------------------------ results


def print_summary(pairs) -> None:
    """A line for the score and one for each reward, aligned."""
    from rewards.scored_rows import summary
    from run_folder.console import NUMBER_WIDTH, short

    found = summary(pairs)
    width = max(map(len, found))
    for name, values in found.items():
        cells = [f"{key} {short(value):<{NUMBER_WIDTH}}" for key, value in values.items()]
        print(f"{name:<{width}}  " + "  ".join(cells).rstrip())


def write(args, pairs) -> None:
    """All rows with their scores, or the best of each prompt; aside, then renamed."""
    from rewards.scored_rows import best_of, best_rows, scored_rows
    from run_folder.console import command, next_lines
    from safe_files import plain, write_atomically

    rows = scored_rows(pairs)
    if args.best_of:
        best = best_of(pairs)
        rows = best_rows(best)
        before, after = (sum(p.score for p in some) / len(some) for some in (pairs, best))
        print(
            f"best of {len(pairs) / len(best):.3g} responses to each of {len(best)} prompts: "
            f"mean score {before:.4g} -> {after:.4g}"
        )
    refuse_overwriting(args)
    lines = [json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows]
    write_atomically(args.output, "".join(lines))
    print(f"wrote {args.output}: {len(rows)} rows")
    if args.best_of:
        going_on = command(
            "sft.py", "--train", "--mask-prompt", model=args.model, train_file=args.output
        )
        print(next_lines([going_on]))


if __name__ == "__main__":
    run_main(main)
