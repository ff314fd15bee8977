"""The grow step of ReST: responses of the policy with their rewards, in a file, and rows of them.

Rows keep the token ids that were sampled, and those are what is trained: a text read again may have
other ones.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_utils import Conditioning, Record, TextRow, encode_prompt, put_before
from errors import UserError
from models.decoding import Sampling
from models.tuning import Tuning
from rewards.sampled_rows import sample_pairs
from rewards.scored_rows import Pair, score_pairs
from safe_files import plain, write_atomically

GROW, EVALUATION = 1, 2  # purposes of random numbers


@dataclass
class Grower:
    """Samples from a model with `tuning` on it, and scores; `prompts` are (records, rows)."""

    loaded: Any
    tuning: Tuning
    rewards: Any
    prompts: dict[str, tuple[Sequence[Record], Any]]
    samples: int
    eos_ids: set[int]
    sampling: Sampling
    max_new_tokens: int
    batch_size: int
    seed: int
    prompt_form: dict[str, Any]  # of encode_prompt

    def sample(
        self,
        split: str,
        count: int,
        stream: tuple[int, int],
        *,
        samples: int,
        asked: Conditioning | None = None,
        advance: Callable[[int], None],
    ) -> list[Pair]:
        """Scored responses to the first `count` prompts of a split.

        `stream`: (purpose, number) of the random numbers. `asked`: the score that is asked for.
        """
        records, prompts = self.prompts[split]
        rows = prompts.rows[:count]
        if asked is not None:
            for row in rows:
                row.given = self.conditioned(row.prompt, asked.prefix())
        pairs = sample_pairs(
            self.loaded,
            records,
            rows,
            samples=samples,
            max_new_tokens=self.max_new_tokens,
            eos_ids=self.eos_ids,
            sampling=self.sampling,
            batch_size=self.batch_size,
            seed=int(np.random.default_rng([self.seed, *stream]).integers(2**31)),
            prefix=self.tuning.prefix,
            advance=advance,
        )
        score_pairs(self.rewards, pairs, self.batch_size, lambda count: None)
        return pairs

    def conditioned(self, prompt: Any, prefix: str) -> list[int]:
        """Tokens of a prompt behind words that say a score."""
        return encode_prompt(put_before(prompt, prefix), self.loaded.tokenizer, **self.prompt_form)


def grown_rows(pairs: Sequence[Pair], number: int) -> list[dict[str, Any]]:
    """What ``grow_G.jsonl`` holds of them."""
    return [
        {
            "prompt": pair.prompt,
            "completion": pair.response,
            "reward": pair.score,
            "rewards": pair.parts,
            "grow": number,
            "ended": pair.ended,
            "query_tokens": pair.tokens[: pair.start],
            "response_tokens": pair.tokens[pair.start :],
        }
        for pair in pairs
    ]


def grow_file(folder: Path, number: int) -> Path:
    return folder / f"grow_{number}.jsonl"


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(plain(row), ensure_ascii=True) + "\n" for row in rows]
    write_atomically(path, "".join(lines))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `write_rows` wrote. UserError where it is not so any more."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            float(row["reward"] or 0), list(row["query_tokens"]), list(row["response_tokens"])
        return rows
    except (ValueError, TypeError, KeyError, OSError):
        raise UserError(
            f"{path}: is not as it was written; delete it, and the run samples it anew"
        ) from None


def text_rows(rows: Sequence[dict[str, Any]], name: str, query_of=None) -> list[TextRow]:
    """Rows to train on the responses alone, each once; `query_of(row)`: other prompt tokens."""
    found: dict[tuple, TextRow] = {}
    for line, row in enumerate(rows, 1):
        query, response = row["query_tokens"], row["response_tokens"]
        if query_of is not None:
            query = query_of(row)
        key = tuple(query), tuple(response)
        mask = [0] * len(query) + [1] * len(response)
        where = f"{name}:{line}"
        found.setdefault(key, TextRow([*query, *response], mask, where, row["reward"]))
    return [*found.values()]
