"""Lengths that a model has positions for, and rows of tokens that it has rows for. Loads no MLX."""

from collections.abc import Iterable
from typing import Any, Protocol

from errors import UserError
from models.adapter_description import read_description


class Limits(Protocol):
    """What models/limits.py finds of a model."""

    tokens: int | None
    positions: int | None

    def check_one(self, ids: Any, where: str, room: int = 0) -> None: ...

    def check_context(self, count: int, where: str, response: int) -> None: ...


def fit_lengths(args: Any, limits: Limits, *, response: int = 0) -> None:
    """Lower a default --max-length to what the model has positions for, and say so.

    `response` tokens are left for what is written behind a prompt, and virtual tokens come first.
    Raises UserError for a longer one that was asked for, and where a response leaves no room.
    """
    if limits.positions is None:
        return
    virtual = virtual_tokens(args)
    room = limits.positions - response - virtual
    behind = f", {response} of them for the response" * bool(response)
    behind += f", {virtual} for the soft prompt" * bool(virtual)
    if room < 1:
        raise UserError(
            f"--max-new-tokens {response}: the model has {limits.positions} positions"
            f"{behind}; give fewer"
        )
    if args.max_length <= room:
        return
    if "max_length" in args.explicit and args.max_length > limits.positions - virtual:
        raise UserError(
            f"--max-length {args.max_length}: the model has {limits.positions} "
            f"positions{behind}; give at most {room}"
        )
    if "max_length" not in args.explicit:
        args.max_length = room
        print(f"note: --max-length is {room}: the model has {limits.positions} positions{behind}")


def virtual_tokens(args: Any) -> int:
    """How many a soft prompt puts before every text: that of a file, or one that is made."""
    file = getattr(args, "resume_adapter_file", None) or getattr(args, "resume_file", None)
    if file is not None:
        count = read_description(file).get("num_prompt_tokens", 0)
        return count if isinstance(count, int) else 0
    return args.num_prompt_tokens if getattr(args, "prompt_tuning", None) else 0


def check_rows(rows: Iterable[Any], limits: Limits, *, prefix: int = 0, response: int = 0) -> None:
    """Raise UserError, naming the row, for a token without a row in the model's embedding, and for
    a text that, with `prefix` tokens before it and `response` behind, has too many positions."""
    for row in rows:
        where = getattr(row, "where", "") or "a row"
        for ids in getattr(row, "responses", None) or [row.tokens]:
            limits.check_one(ids, where, prefix + response)
            if response:
                limits.check_context(prefix + len(ids), where, response)


def check_splits(
    rows: dict[str, Any], limits: Limits, tuning: Any = None, *, response: int = 0
) -> None:
    """`check_rows` of every split that a script reads, and of its --sample-prompts.

    The virtual tokens of `tuning` come first; None: nothing is trained.
    """
    prefix = 0 if tuning is None else len(tuning.prefix)
    for split in ("train", "valid", "test"):
        if split in rows:
            check_rows(rows[split].rows, limits, prefix=prefix, response=response)
    for ids in rows.get("samples", ()):
        limits.check_one(ids, "--sample-prompts", prefix + 1)
