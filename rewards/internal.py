"""Rewards that come from the text itself, as a reference model sees it: never the policy, which
could move its own yardstick.

`Signals` measures a batch of responses once for all components; each component is a row of
`COMPONENTS`. The formulas are in rl/adlf.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from errors import UserError
from rewards.reward_set import Reward
from rewards.texts import Prompt, plain
from rl.adlf import (
    coherence_score,
    copied_share,
    distinct_share,
    fluency_score,
    guard,
    length_score,
    likeness,
)

WINDOW = 16  # tokens of a segment where a response is one sentence
SENTENCE = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")
KINDS = ("prompt", "response", "segment")  # each has a mean of its own that is taken off
ROWS = 64  # responses that means and perplexity are calibrated on


@dataclass
class Response:
    """One response, taken apart; `tokens` are without EOS."""

    prompt: str
    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    segments: list[list[int]] = field(default_factory=list)
    # what the reference says: log perplexity, hidden states (D,) and (S, D), centred
    log_ppl: float = 0.0
    prompt_state: np.ndarray | None = None
    state: np.ndarray | None = None
    segment_states: np.ndarray | None = None


# ------------------------------------------------------------------------------ components

# name -> (what it needs of the reference, score in [0, 1] of a response before its guard)
Component = tuple[tuple[str, ...], Callable[[Response, "Signals"], float]]
COMPONENTS: dict[str, Component] = {
    "length": ((), lambda r, s: length_score(len(r.tokens), s.length_target)),
    "coherence": (("segment",), lambda r, s: coherence_score(r.segment_states)),
    "fluency": (("ppl",), lambda r, s: fluency_score(r.log_ppl, s.log_ppl0)),
    "faithfulness": (
        ("prompt", "response"),
        lambda r, s: likeness(r.prompt_state, r.state),
    ),
}


class Signals:
    """Scores of the chosen components, from one pass of the reference over a batch.

    Args:
        reference: a context that gives the reference model while it is open.
        names: of COMPONENTS.
        eos_ids: tokens that end a response; they do not count.
        sample: gives the columns of `calibrate` for ROWS responses of the reference; called once,
            when something is scored or saved before a checkpoint brought the numbers.
        entailment: ``probabilities(pairs)`` of prompt and sentence, in place of the states for
            faithfulness.
    """

    def __init__(
        self,
        reference: Callable[[], AbstractContextManager],
        tokenizer: Any,
        names: Sequence[str],
        *,
        eos_ids: set[int],
        length_target: int = 100,
        sample: Callable[[], Mapping[str, Sequence]] | None = None,
        entailment: Callable[[Sequence[tuple[str, str]]], Sequence[float]] | None = None,
    ):
        self.reference, self.tokenizer, self.names = reference, tokenizer, list(names)
        self.eos_ids, self.length_target = eos_ids, length_target
        self.sample, self.entailment = sample, entailment
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        needs = {need for name in names for need in COMPONENTS[name][0]}
        self.needs = needs - {"prompt", "response"} if entailment else needs
        self.means: dict[str, np.ndarray] = {}
        self.log_ppl0: float | None = None
        self._last: tuple[Any, dict[str, list[float]]] = (None, {})
        self._beside: dict[str, list[float]] = {}

    def described(self) -> dict[str, list[float]]:
        """What explains the last scores: a number for each response that is not empty."""
        return self._beside

    def rewards(self, weights: Mapping[str, float]) -> list[Reward]:
        """A reward for each component, all from one measurement of a batch."""
        return [
            Reward(name, self._component(name), weights[name], by_row=True) for name in self.names
        ]

    def _component(self, name: str) -> Callable:
        def component(
            prompts: Sequence[Prompt],
            responses: Sequence[str],
            token_ids: Sequence[Sequence[int]],
            response_start: Sequence[int | None],
            prompt_text: Sequence[str],
        ) -> list[float]:
            return self.scores(prompts, responses, token_ids, response_start, prompt_text)[name]

        return component

    def scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        token_ids: Sequence[Sequence[int]],
        response_start: Sequence[int | None],
        prompt_text: Sequence[str],
    ) -> dict[str, list[float]]:
        """{component: scores (B,)}.

        The same batch again (the same `token_ids`) is not measured again.
        """
        if self._last[0] is token_ids:
            return self._last[1]
        self.settle()
        rows = self.taken_apart(prompts, responses, token_ids, response_start, prompt_text)
        self.measure(rows)
        found = {name: self._scored(name, rows) for name in self.names}
        self._beside = self._described(rows)
        self._last = (token_ids, found)
        return found

    def _scored(self, name: str, rows: Sequence[Response]) -> list[float]:
        score = COMPONENTS[name][1]
        if name == "faithfulness" and self.entailment is not None:
            plain_scores = self._entailed(rows)
        else:
            plain_scores = [score(row, self) if row.tokens else 0.0 for row in rows]
        guards = [guard(row.tokens, row.prompt_tokens) for row in rows]
        return [float(s * g) for s, g in zip(plain_scores, guards, strict=True)]

    def _entailed(self, rows: Sequence[Response]) -> list[float]:
        """Mean over sentences of the probability that the prompt entails them."""
        pairs = [(row.prompt, part) for row in rows for part in sentences(row.text)]
        left = iter(self.entailment(pairs) if pairs else ())
        found = []
        for row in rows:
            own = [next(left) for _ in sentences(row.text)]
            found.append(float(np.mean(own)) if own else 0.0)
        return found

    def _described(self, rows: Sequence[Response]) -> dict[str, list[float]]:
        """What explains the scores, a number for each response."""
        there = [row for row in rows if row.tokens]
        found = {
            "adlf/distinct": [distinct_share(row.tokens) for row in there],
            "adlf/copied": [copied_share(row.tokens, row.prompt_tokens) for row in there],
        }
        if "segment" in self.needs:
            found["adlf/one_segment"] = [float(len(row.segments) < 2) for row in there]
        if "ppl" in self.needs:
            found["adlf/log_ppl"] = [row.log_ppl for row in there]
        return found

    # -------------------------------------------------------------------------- measuring

    def taken_apart(
        self, prompts, responses, token_ids, response_start, prompt_text
    ) -> list[Response]:
        """Prompt, response and segments of each row, as tokens."""
        columns = (prompts, responses, token_ids, response_start, prompt_text)
        return [self._taken_apart(*row) for row in zip(*columns, strict=True)]

    def _taken_apart(self, prompt, response, ids, start, prompt_text) -> Response:
        ids = list(ids)
        if start is None:  # a tokenizer that joins prompt and response in one token
            front, tokens = [*self.bos, *self._ids(prompt_text)], self._ids(response)
        else:
            front, tokens = ids[:start], ids[start:]
        while tokens and tokens[-1] in self.eos_ids:
            tokens.pop()
        row = Response(plain(prompt), front, tokens, response)
        if "segment" in self.needs:
            row.segments = self._segments(row)
        return row

    def _segments(self, row: Response) -> list[list[int]]:
        """Sentences, or where there is but one, windows of WINDOW tokens."""
        parts = sentences(row.text)
        if len(parts) > 1:
            return [ids for part in parts if (ids := self._ids(part))]
        return [row.tokens[at : at + WINDOW] for at in range(0, len(row.tokens), WINDOW)]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def measure(self, rows: Sequence[Response], watched_as: str | None = None) -> None:
        """Fill in what the components need, in one pass of the reference over all texts."""
        if not self.needs:
            return
        from models.text_signals import Text, measure

        def alone(tokens: Sequence[int]) -> Text:
            return Text((*self.bos, *tokens), len(self.bos))

        rows = [row for row in rows if row.tokens]
        texts: dict[str, list] = {kind: [] for kind in (*KINDS, "ppl")}
        for row in rows:
            # The first token of a text without a prompt and BOS is predicted by nothing.
            texts["ppl"].append(
                Text((*row.prompt_tokens, *row.tokens), max(1, len(row.prompt_tokens)), scored=True)
            )
            texts["prompt"].append(alone(self._ids(row.prompt) if "prompt" in self.needs else ()))
            texts["response"].append(alone(row.tokens))
            texts["segment"].append([alone(segment) for segment in row.segments])
        flat = [text for parts in texts["segment"] for text in parts]
        wanted = {**texts, "segment": flat}
        with self.reference() as model:
            all_texts = [text for kind in sorted(self.needs) for text in wanted[kind]]
            found = measure(model, all_texts, watched_as)
        width = next((len(v) for v in found.values() if np.ndim(v)), 0)

        def state(kind: str, text: Text) -> np.ndarray:
            return found.get(text, np.zeros(width)) - self.means.get(kind, 0.0)

        for i, row in enumerate(rows):
            if "ppl" in self.needs:
                row.log_ppl = -float(found.get(texts["ppl"][i], 0.0))
            if "prompt" in self.needs:
                row.prompt_state = state("prompt", texts["prompt"][i])
                row.state = state("response", texts["response"][i])
            if "segment" in self.needs:
                states = [state("segment", text) for text in texts["segment"][i]]
                row.segment_states = np.stack(states)

    # -------------------------------------------------------------------------- calibration

    def settle(self) -> None:
        """Calibrate on what the reference itself writes, unless that is done."""
        if self.log_ppl0 is None:
            self.calibrate(**(self.sample() if self.sample and self.needs else {}))

    def calibrate(self, **columns: Sequence) -> None:
        """Take means of hidden states of each kind, and the median perplexity, from some rows.

        `columns` are those of `scores`. Raises UserError where no row has a response.
        """
        if not self.needs:
            self.log_ppl0 = 0.0
            return
        self.means = {}
        rows = self.taken_apart(**columns)
        rows = [row for row in rows if row.tokens]
        if not rows:
            raise UserError(
                "internal rewards: the reference model writes nothing but ends at once, so there "
                "is nothing to compare with"
            )
        self.measure(rows, watched_as="calibration")
        if "ppl" in self.needs:
            self.log_ppl0 = float(np.median([row.log_ppl for row in rows]))
        else:
            self.log_ppl0 = 0.0
        if "prompt" in self.needs:
            self.means["prompt"] = np.mean([row.prompt_state for row in rows], axis=0)
            self.means["response"] = np.mean([row.state for row in rows], axis=0)
        if "segment" in self.needs:
            states = np.concatenate([row.segment_states for row in rows])
            self.means["segment"] = states.mean(axis=0)
        # As a checkpoint keeps them, in float32, so that a resumed run goes on with the same.
        self.take_numbers({"log_ppl0": self.log_ppl0, **self.means})

    def numbers(self) -> dict[str, np.ndarray]:
        """The calibration, for a checkpoint."""
        self.settle()
        return {"log_ppl0": np.array(self.log_ppl0), **self.means}

    def take_numbers(self, numbers: Mapping[str, Any]) -> None:
        """The calibration of a checkpoint, back."""
        found = {
            name: np.array(value, dtype=np.float32).astype(np.float64)
            for name, value in numbers.items()
        }
        self.log_ppl0 = float(found.pop("log_ppl0"))
        self.means = found


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text that hold a word."""
    return [part for part in SENTENCE.split(text.strip()) if re.search(r"\w", part)]
