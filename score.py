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

from command_line.data_flags import settle_date, tokenising, warn_of_model
from command_line.exits import run_main
from command_line.sampling import sample
from command_line.score_flags import parse_arguments, read_input, refuse_overwriting
from command_line.scoring import load_scorer, scoring_rewards

# ------------------------------------------------------------------------------ main


def main(words=None) -> int:
    args = parse_arguments(words)
    records = read_input(args)
    # MLX and what stands on it come after the command line: help and mistakes answer at once.
    from data_utils import columns_of, data_report
    from rewards.best_of import refuse_promptless
    from rewards.scored_rows import make_pairs, score_pairs
    from run_folder.console import Wait

    fast_blas.tell_of_slowness()
    pairs, tokenizer = sample(args, records, args.samples) if args.prompts else (None, None)
    tokenizer, reward_model = load_scorer(args, tokenizer)
    if pairs is None:
        warn_of_model(args, records, tokenizer)
        settle_date(args, tokenizer)
        pairs, tokenised = make_pairs(records, tokenizer, tokenising(args))
        print(data_report("responses", records, tokenised, columns=True))
    rewards = scoring_rewards(args, tokenizer, reward_model, pairs)
    if args.best_of:
        refuse_promptless(pairs)
    rewards.check_columns(columns_of(pair.whole for pair in pairs))
    with Wait("scoring", len(pairs)) as wait:
        score_pairs(rewards, pairs, args.batch_size, wait.advance)
    print_summary(pairs)
    if args.output is not None:
        write(args, pairs)
    return 0


# ------------------------------------------------------------------------------ results


def print_summary(pairs) -> None:
    """A line for the score and one for each reward, aligned."""
    from rewards.scored_rows import same_score, summary
    from run_folder.console import NUMBER_WIDTH, short

    found = summary(pairs)
    width = max(map(len, found))
    for name, values in found.items():
        cells = [f"{key} {short(value):<{NUMBER_WIDTH}}" for key, value in values.items()]
        print(f"{name:<{width}}  " + "  ".join(cells).rstrip())
    if (same := same_score(pairs)) is not None:
        print(f"warning: every response has the score {same:g}, so none is better than another")


def pick(args, pairs) -> list:
    """The best response to each prompt, with a line on it."""
    from rewards.best_of import best_of, by_prompt, kl_of_best, trainable, weighted_best_of
    from run_folder.secrets import tell

    candidates = trainable(pairs)
    if args.weigh_answers is None:
        best = best_of(candidates)
        how = f", KL from the model at most {kl_of_best(pairs):.3g} nats"
    else:
        best = weighted_best_of(candidates, args.weigh_answers, args.answer_from, args.answer_tag)
        how = f", answers weighed by {args.weigh_answers}"
    count = len(by_prompt(pairs))
    before, after = (sum(p.score for p in some) / len(some) for some in (pairs, best))
    print(
        f"best of {len(pairs) / count:.3g} responses to each of {count} prompts: "
        f"mean score {before:.4g} -> {after:.4g}{how}"
    )
    if len(best) < count:
        tell(f"note: {count - len(best)} prompts left out: no response to them has any text")
    return best


def write(args, pairs) -> None:
    """All rows with their scores, or the best of each prompt; aside, then renamed."""
    from rewards.best_of import best_rows
    from rewards.scored_rows import scored_rows
    from run_folder.console import command, next_lines
    from safe_files import plain, write_atomically

    rows = scored_rows(pairs)
    if args.best_of:
        rows = best_rows(pick(args, pairs))
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
    run_main(main, tidies=True)
