"""How many tokens and positions a model has a row for. MLX reads beyond a table without a word."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from errors import UserError
from models.trunk import find_trunk

POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


@dataclass(frozen=True)
class Limits:
    """Rows of the embedding, virtual tokens included, and of the table of positions, if any."""

    tokens: int | None = None
    positions: int | None = None
    context: int | None = None  # tokens that the model was made for, where it could run on

    def check(
        self, sequences: Iterable[Sequence[int]], *, where: str = "a text", room: int = 0
    ) -> None:
        """Raise UserError for a token without a row, and for a text that, `room` for a response
        included, is longer than the table of positions."""
        for ids in sequences:
            self.check_one(ids, where, room)

    def check_one(self, ids: Sequence[int], where: str, room: int = 0) -> None:
        if self.tokens is not None and len(ids):
            last = max(ids)
            if last >= self.tokens or min(ids) < 0:
                wrong = last if last >= self.tokens else min(ids)
                raise UserError(
                    f"{where}: has token {wrong}, and the model has rows for 0 to "
                    f"{self.tokens - 1} alone; its tokenizer knows tokens that were added and "
                    "never given a row: take a template without them, or resize the model's "
                    "embeddings"
                )
        if self.positions is not None and len(ids) + room > self.positions:
            response = f" and a response of up to {room}" if room else ""
            raise UserError(
                f"{where}: has {len(ids)} tokens{response}, and the model has "
                f"{self.positions} positions; give shorter ones"
            )

    def check_context(self, count: int, where: str, response: int) -> None:
        """Raise UserError for a prompt of `count` tokens whose response may leave the context."""
        if self.context is None or count + response <= self.context:
            return
        least = self.context - count
        shorter = f"--max-new-tokens {least} or fewer" if least > 0 else "a shorter prompt"
        rest = self.context - response
        fits = f", or --max-length {rest} --too-long cut" if rest > 0 else ""
        raise UserError(
            f"{where}: a prompt of {count} tokens and a response of up to {response} are longer "
            f"than the model's context, {self.context} tokens; give {shorter}{fits}"
        )

    def fits(self, count: int, response: int) -> bool:
        """Whether there are positions for `count` tokens and a whole response."""
        return self.positions is None or count + response <= self.positions

    def room(self, count: int, wanted: int) -> int:
        """How many of `wanted` tokens fit behind `count` others; at least one."""
        return wanted if self.positions is None else max(1, min(wanted, self.positions - count))


CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def context_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model was trained for, by its config.json, with what stretches its positions
    (YaRN and others, whose factor multiplies the length before)."""
    config = {**config, **(config.get("text_config") or {})}
    known = next((config[name] for name in CONTEXT if isinstance(config.get(name), int)), None)
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    if known is None or not isinstance(factor, int | float) or factor <= 1:
        return known
    return int(known * factor)


def find_limits(model: nn.Module) -> Limits:
    """The limits of `model` as it stands: with a soft prompt on it, its virtual tokens count."""
    from models.opt import OFFSET
    from models.soft_prompt import SoftPromptEmbedding, find_embedding

    try:
        trunk, _, embedding = find_embedding(model)
    except UserError:  # an architecture that cannot be trained here, but may be looked at
        return Limits()
    virtual = 0
    if isinstance(embedding, SoftPromptEmbedding):
        virtual, embedding = len(embedding.prompt), embedding.embedding
    owner, name = find_trunk(model)
    tables = [
        part[table]
        for part in (owner[name], owner)
        for table in POSITION_TABLES
        if table in part and "weight" in part[table]
    ]
    positions = tables[0].weight.shape[0] if tables else None
    if positions is not None and getattr(model, "model_type", None) == "opt":
        positions -= OFFSET
    return Limits(embedding.weight.shape[0] + virtual, positions)
