"""Memory that training will take, said before its first step, and minibatches small enough for it.

Loads no MLX until a model is there.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from command_line.rules import flag_of
from rl.rollouts import passes_over
from run_folder.console import say_gb

# Of a gradient on rollouts: its rows, and how many are summed up for an update.
ROWS = ("mini_batch_size", "gradient_accumulation_steps")
SHARE = 0.8  # of the machine's memory; the rest is for the system and for what was not foreseen


def settle_rollout_memory(
    args: Namespace,
    loaded: Any,
    tuning: Any,
    rows: Sequence[Any],
    *others: Any,
    unit: int = 1,
    texts: int = 1,
    compared: bool = True,
) -> None:
    """Say what steps on prompts take, and choose --mini-batch-size where nothing was asked for.

    `others` are models (or None) in memory beside the policy's; a minibatch stays a multiple of
    `unit`; `texts` responses are written to a prompt of the batch, one after another. `compared`:
    the policy's model is the reference as well. What frozen blocks give is kept where it fits.
    """
    from models.memory_estimate import kept_bytes, rollout_memory

    shape, trained = described(args, loaded, tuning, others)
    prompt = len(tuning.prefix) + max(len(row.query) for row in rows)
    prompt += (texts - 1) * args.max_new_tokens  # each reads those before it

    def expected(count: int, kept: bool) -> Any:
        rows, response = count * texts, args.max_new_tokens
        return rollout_memory(shape, trained, batch, rows, prompt, response, kept=kept)

    batch = args.batch_size * texts
    each = args.mini_batch_size or args.batch_size // args.gradient_accumulation_steps
    frozen = blocks_to_keep(args, loaded.model, expected, each, unit, compared)
    when = f" if responses take all --max-new-tokens {args.max_new_tokens}"
    settle(args, partial(expected, kept=bool(frozen)), each, unit, ROWS, when=when)
    if frozen:
        size = say_gb(kept_bytes(shape, batch, prompt + args.max_new_tokens - 1) / 1e9)
        print(f"kept for the epochs: what {frozen} frozen blocks give, {size} at most")


def blocks_to_keep(
    args: Namespace,
    model: Any,
    expected: Callable[[int, bool], Any],
    count: int,
    unit: int,
    compared: bool,
) -> int:
    """How many frozen blocks give what is kept; 0 with --recompute-frozen, which is set where the
    states do not fit beside a gradient of as many rows as fit without them."""
    from models.trunk import frozen_below

    again = passes_over(args, compared) > 1
    frozen = frozen_below(model) if again and not args.recompute_frozen else 0
    if not frozen or args.resume is not None:
        return frozen
    usable = usable_memory(args.memory_limit)
    if not set(ROWS) & args.explicit:
        count = largest_that_fits(partial(expected, kept=False), count, unit, usable)
    if expected(count, kept=True).total <= usable:
        return frozen
    args.recompute_frozen = True
    print("to fit the memory: --recompute-frozen")
    return 0


def settle_supervised_memory(
    args: Namespace, loaded: Any, tuning: Any, rows: Any, *others: Any, least: int = 1
) -> None:
    """Say what updates on `rows` (of data_utils) take, and choose --batch-size where none was.

    `others` are models (or None) in memory beside; a batch keeps at least `least` rows.
    """
    from models.memory_estimate import supervised_memory

    shape, trained = described(args, loaded, tuning, others)
    length = len(tuning.prefix) + max(rows.lengths)
    sequences = max(map(len, rows.sequences))  # that a row brings into a batch
    scored = getattr(args, "reward_model", False)
    counted = 0 if scored else max(map(trained_tokens, rows.rows))

    def expected(count: int) -> Any:
        count = min(count, len(rows.rows))
        return supervised_memory(shape, trained, count * sequences, length, count * counted)

    names = ("batch_size", "gradient_accumulation_steps")
    settle(args, expected, args.batch_size, 1, names, least=least)


def trained_tokens(row: Any) -> int:
    """Tokens of a row, or of all its responses, that are trained on."""
    masks = row.masks if hasattr(row, "masks") else [row.mask]
    return sum(sum(mask[1:]) for mask in masks)


def described(args: Namespace, loaded: Any, tuning: Any, others: Sequence[Any]) -> tuple[Any, Any]:
    """(sizes of the model, what is trained of it) of models/memory_estimate.py."""
    from models.memory_estimate import shape_of, trained_of

    beside = [model for model in others if hasattr(model, "parameters")]
    trained = trained_of(
        loaded.model, tuning, args.optimizer, checkpointed=bool(args.grad_checkpoint)
    )
    return shape_of(loaded.model, loaded.config, tuning, *beside), trained


# ------------------------------------------------------------------------------ the choice


def settle(
    args: Namespace,
    expected: Callable[[int], Any],
    count: int,
    unit: int,
    names: tuple[str, str],
    least: int = 1,
    when: str = "",
) -> None:
    """Say what a gradient of `count` rows takes; of fewer, where those fit and none were asked for.

    `names`: the options that set the rows and how many gradients are summed up for an update. They
    are changed together, so that an update stays one of as many rows; a resumed run keeps its own.
    `when`: what is assumed of the rows, for people.
    """
    usable = usable_memory(args.memory_limit)
    memory = expected(count)
    fewer = count
    if memory.total > usable:
        fewer = largest_that_fits(expected, count, unit, usable, least)
    changed = {names[0]: fewer, names[1]: getattr(args, names[1]) * (count // fewer)}
    flags = " ".join(f"{flag_of(name)} {value}" for name, value in changed.items())
    alone = getattr(args, "num_training_workers", 1) == 1  # all workers need the same batches
    if fewer < count and alone and args.resume is None and not set(names) & args.explicit:
        vars(args).update(changed)
        print(f"to fit the memory: {flags}")
        memory, fewer = expected(fewer), count
    if memory.total <= usable:
        print(f"memory expected{when}: {said(memory)} of {say_gb(usable / 1e9)}")
        return
    less = LESS.get(memory.moment, ELSE)
    if fewer < count:
        less = f"{flags} ({say_gb(expected(fewer).total / 1e9)})"
    print(
        f"warning: memory expected{when}: {said(memory)}, and {say_gb(usable / 1e9)} may be used; "
        f"less is taken by {less}"
    )


def largest_that_fits(
    expected: Callable[[int], Any], count: int, unit: int, usable: float, least: int = 1
) -> int:
    """The largest divisor of `count`, from `least` on a multiple of `unit`, of which the rows fit.

    Where none does: the largest of those that take least.
    """
    sizes = [n for n in range(count, least - 1, -1) if not count % n and not n % unit] or [count]
    usable = max(usable, expected(sizes[-1]).total)
    return next(n for n in sizes if expected(n).total <= usable)


def usable_memory(limit: float | None) -> float:
    """Bytes that training may fill: --memory-limit (GB), or else what the machine can spare.

    On Apple silicon that is what Metal recommends, where MLX tells it.
    """
    import mlx.core as mx

    from models.file_checks import machine_memory

    if limit is not None:
        return limit * 1e9
    told = mx.device_info() if hasattr(mx, "device_info") else {}
    return told.get("max_recommended_working_set_size") or SHARE * machine_memory()


# ------------------------------------------------------------------------------ words

# What takes less memory, by the fullest moment.
LESS = {
    "sampling": "a smaller --batch-size or --max-new-tokens, fewer or shorter prompts",
    "moving the adapter": "a lower --lora-rank, or --optimizer lion",
    "moving the weights": "an adapter in place of every weight, or --optimizer lion",
}
ELSE = "--grad-checkpoint, fewer --lora-layers, a shorter --max-length, or --quantize 4"


def said(memory: Any) -> str:
    """``1.23 GB (logits: weights 0.54 GB, activations 0.45 GB)``: the fullest moment, its parts."""
    parts = [
        f"{name} {say_gb(size / 1e9)}"
        for name, size in memory.terms.items()
        if size >= 1e-3 * memory.total
    ]
    return f"{say_gb(memory.total / 1e9)} ({memory.moment}: {', '.join(parts)})"
