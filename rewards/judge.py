"""A language model as a judge: which of two answers is better by a principle, and why.

RLAIF (Bai et al. 2022, Lee et al. 2023): the judge reads the question and both answers and is asked
for 1 or 2. P is the softmax over the log-probabilities of the two as its next token, averaged over
both orders of the answers, as judges favour a place (Lee et al. 2023, section 2.1.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, Protocol

import mlx.core as mx

from data_utils import Template, encode_prompt, pad_rows
from errors import UserError
from models.decoding import Sampling, generate
from models.trunk import logits_from_hidden, picked_hidden
from rewards.constitution import Principle


@dataclass(frozen=True)
class Unanswered:
    """Why there is no answer of a judge."""

    why: str


@dataclass(frozen=True)
class Case:
    """Two answers to a question, in the order in which a judge reads them."""

    question: str
    first: str
    second: str
    principle: Principle

    def swapped(self) -> "Case":
        return Case(self.question, self.second, self.first, self.principle)


class Judge(Protocol):
    """What answers questions; `name` stands in its records."""

    name: str

    def first_wins(self, texts: Sequence[str]) -> list[float | Unanswered]:
        """For each text that asks for 1 or 2, the probability of 1."""

    def write(self, texts: Sequence[str]) -> list[str | Unanswered]:
        """A text in answer to each."""


@dataclass(frozen=True)
class Verdict:
    """`p`: that the first answer of a row is the better one; `orders`: of the answer that stood
    first, in the order of the row and in the other one."""

    p: float
    orders: tuple[float, float] | None = None  # None: of a judge that knows no order

    @property
    def orders_agree(self) -> bool:
        """Whether both orders prefer the same answer."""
        if self.orders is None:
            return True
        one, other = self.orders
        return (one - 0.5) * (0.5 - other) > 0


def judge_cases(judge: Judge, cases: Sequence[Case], debate: int = 0) -> list[Verdict | Unanswered]:
    """The verdict on each case, over both orders; after `debate` rounds of arguments in each."""
    asked = [order for case in cases for order in (case, case.swapped())]
    said: list[list[str] | Unanswered] = [[] for _ in asked]
    for _ in range(debate):
        for side in (1, 2):
            _answer(judge.write, said, lambda i: argument_text(asked[i], side, said[i]))  # noqa: B023
    found: list[Any] = [[] if isinstance(s, list) else s for s in said]
    _answer(judge.first_wins, found, lambda i: verdict_text(asked[i], said[i]))
    verdicts: list[Verdict | Unanswered] = []
    for one, other in zip(found[::2], found[1::2], strict=True):
        missing = next((x for x in (one, other) if isinstance(x, Unanswered)), None)
        if missing is None:
            (one,), (other,) = one, other
            missing = Verdict((one + (1 - other)) / 2, (one, other))
        verdicts.append(missing)
    return verdicts


def _answer(ask, lists: list, text_of) -> None:
    """Ask for every list that no earlier answer is missing in; an answer goes to its end."""
    open_ones = [i for i, own in enumerate(lists) if isinstance(own, list)]
    for i, answer in zip(open_ones, ask([text_of(i) for i in open_ones]), strict=True):
        if isinstance(answer, Unanswered):
            lists[i] = answer
        else:
            lists[i].append(answer)


# ---- what a judge reads ------------------------------------------------------------------------


def _shown(case: Case) -> str:
    return (
        f"Principle:\n{case.principle.principle}\n\nQuestion:\n{case.question}\n\n"
        f"Answer 1:\n{case.first}\n\nAnswer 2:\n{case.second}\n\n"
    )


def verdict_text(case: Case, said: Sequence[str] = ()) -> str:
    """Asks for 1 or 2; `said`: arguments for answers 1, 2, 1, 2..."""
    return (
        "Two answers to a question are compared by one principle.\n\n"
        f"{_shown(case)}{_arguments(said)}"
        "Which answer is better by the principle? Reply with its number alone, 1 or 2."
    )


def argument_text(case: Case, side: int, said: Sequence[str]) -> str:
    """Asks for an argument for answer `side`."""
    other = " and refute what was said for the other one" if said else ""
    return (
        "Two answers to a question are compared by one principle, and each has an advocate.\n\n"
        f"{_shown(case)}{_arguments(said)}"
        f"You are the advocate of answer {side}. Say in at most three sentences why it is the "
        f"better one by the principle{other}."
    )


def _arguments(said: Sequence[str]) -> str:
    if not said:
        return ""
    lines = [f"For answer {1 + i % 2}: {text.strip()}" for i, text in enumerate(said)]
    return "What their advocates said:\n" + "\n".join(lines) + "\n\n"


def critique_text(question: str, answer: str, principle: Principle) -> str:
    """Asks for what an answer lacks."""
    return f"Question:\n{question}\n\nAnswer:\n{answer}\n\n{principle.critique}"


def revision_text(question: str, answer: str, critique: str, principle: Principle) -> str:
    """Asks for a better answer."""
    return (
        f"Question:\n{question}\n\nAnswer:\n{answer}\n\nCritique of this answer:\n{critique}\n\n"
        f"{principle.revision} Reply with the new answer alone."
    )


# ---- a model on this machine -------------------------------------------------------------------


class LocalJudge:
    """A LoadedModel that is asked through its chat template, or, without one, by plain text."""

    def __init__(self, loaded: Any, *, batch_size: int = 16, max_new_tokens: int = 128):
        """`batch_size` texts are read together; `max_new_tokens` is the longest that it writes."""
        self.loaded, self.name = loaded, loaded.name
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        template = Template(loaded.tokenizer)
        self.chat = template.uses_chat_template
        self.ends = {*loaded.tokenizer.eos_token_ids, template.turn_end_id()} - {None}
        loaded.model.eval()

    def first_wins(self, texts: Sequence[str]) -> list[float | Unanswered]:
        rows = [self.choice(text) for text in texts]
        return self._batched([row[0] for row in rows], 0, lambda part: self._odds(rows, part))

    def write(self, texts: Sequence[str]) -> list[str | Unanswered]:
        rows = [encode_prompt(self._asked(text), self.loaded.tokenizer) for text in texts]
        return self._batched(rows, self.max_new_tokens, lambda part: self._written(rows, part))

    def choice(self, text: str) -> tuple[list[int], int, int]:
        """(tokens up to where the answer begins, the token of 1 that follows, that of 2)."""
        blank = "" if self.chat else " "
        asked = self._asked(text)
        one, two = (
            encode_prompt(asked, self.loaded.tokenizer, behind=blank + digit) for digit in "12"
        )
        pairs = enumerate(zip(one, two, strict=False))
        start = next((i for i, (a, b) in pairs if a != b), None)
        if not start:
            raise UserError(f"judge {self.name}: its tokenizer does not tell 1 from 2")
        return one[:start], one[start], two[start]

    def _asked(self, text: str) -> str:
        return text if self.chat else f"{text}\n\nAnswer:"

    def _batched(self, rows: list[list[int]], room: int, work) -> list:
        """What `work` makes of places in `rows`, the longest together; too long: Unanswered."""
        found: list[Any] = [None] * len(rows)
        for i, ids in enumerate(rows):
            try:
                self.loaded.limits.check_one(ids, "the question", room)
            except UserError as wrong:
                found[i] = Unanswered(f"too long for the judge: {wrong}")
        order = [i for i in range(len(rows)) if found[i] is None]
        order.sort(key=lambda i: -len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            for i, answer in zip(part, work(part), strict=True):
                found[i] = answer
        return found

    def _odds(self, rows: list[tuple[list[int], int, int]], part: list[int]) -> list[float]:
        tokens, lengths = pad_rows([rows[i][0] for i in part])
        index = mx.array([row * tokens.shape[1] + n - 1 for row, n in enumerate(lengths.tolist())])
        model = self.loaded.model
        hidden = picked_hidden(model, mx.array(tokens), index)  # (N, D)
        logits = logits_from_hidden(model, hidden).astype(mx.float32)  # (N, V)
        places = mx.array([rows[i][1:] for i in part])
        two = mx.take_along_axis(logits, places, axis=1)  # (N, 2)
        return [1 / (1 + exp(b - a)) if b - a < 700 else 0.0 for a, b in two.tolist()]

    def _written(self, rows: list[list[int]], part: list[int]) -> list[str]:
        made = generate(
            self.loaded.model,
            [rows[i] for i in part],
            max_tokens=self.max_new_tokens,
            eos_ids=self.ends,
            sampling=Sampling(temperature=0),
        )
        decode = self.loaded.tokenizer.decode
        return [decode(r, skip_special_tokens=True).strip() for r in made.responses]
