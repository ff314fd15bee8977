"""The rewards of a script that scores texts without a policy, by its flags. Loads no MLX."""

from functools import partial
from pathlib import Path

from command_line.adlf_flags import make_composite
from command_line.ppo_flags import own_ends
from command_line.reward_flags import make_rewards
from command_line.rules import refuse_idle
from errors import UserError


def scoring_rewards(args, tokenizer, reward_model, pairs):
    """The set of all rewards that were asked for; `pairs`: what is going to be scored."""
    rewards = make_rewards(args, make_learned_reward(args, tokenizer, reward_model))
    return make_composite(args, rewards, partial(first_rows, args, tokenizer, pairs))


def load_scorer(args, tokenizer=None):
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
    del given["ended"], given["answered_record"]  # no component asks for them
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
