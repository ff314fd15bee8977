"""Flags of responses that a model samples to prompts, and the responses. Loads no MLX."""

import math

from command_line.data_flags import settle_date, tokenising, warn_of_model
from command_line.model_limits import check_rows, fit_lengths
from command_line.ppo_flags import own_ends
from command_line.shared_flags import at_least
from data_utils import data_report, tokenise_prompts
from errors import UserError

# What has no effect where nothing is sampled.
OF_SAMPLING = "max_new_tokens temperature top_k top_p min_p"


def add_sampling_arguments(add) -> None:
    """How long responses may be, and how tokens are picked."""
    longest = "longest response, in tokens"
    add("--max-new-tokens", "--max-tokens", type=int, default=128, help=longest)
    text = "of sampling; 0 takes the likeliest token"
    add("--temperature", "--temp", type=float, default=1.0, help=text)
    add("--top-k", type=int, default=0, help="sample among this many tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="sample among tokens of this probability in all")
    add("--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest")


def check_sampling(args) -> None:
    """Refuse what no sampling can be."""
    at_least(args, 1, "max_new_tokens")
    at_least(args, 0, "top_k", "seed")
    if not 0 <= args.temperature < math.inf:
        raise UserError("--temperature: give a number that is not below 0")
    if not 0 < args.top_p <= 1:
        raise UserError("--top-p: give a probability above 0; 1 leaves every token")
    if not 0 <= args.min_p < 1:
        raise UserError("--min-p: give a share from 0 up to, not including, 1")


def sample(args, records, samples: int):
    """(`samples` responses of --model to each prompt, as pairs to score; the model's tokenizer).

    The model is gone again before others are loaded.
    """
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
    with Wait("sampling", len(prompts) * samples) as wait:
        pairs = sample_pairs(
            loaded,
            records,
            prompts.rows,
            samples=samples,
            max_new_tokens=args.max_new_tokens,
            eos_ids=own_ends(args, loaded.tokenizer),
            sampling=Sampling(args.temperature, args.top_k, args.top_p, args.min_p),
            batch_size=args.batch_size,
            seed=args.seed,
            advance=wait.advance,
        )
    return pairs, loaded.tokenizer
