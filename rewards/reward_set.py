"""Several rewards as one: called under a time limit, checked, weighted, each reported by name."""

import inspect
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from data_utils import PromptRow
from distributed.membership import member
from errors import UserError
from rewards.texts import BY_NAME, GIVEN
from rewards.user_function import (
    RewardFunction,
    as_list,
    check_scores,
    describe,
    no_float32,
    quote_row,
)


@dataclass
class Reward:
    """One reward under the name that it is reported by."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    timeout: float | None = None  # seconds for one call, all rows together; None: no limit
    columns: tuple[str, ...] = ()  # of the data that it reads, beside those its signature names
    # Looks at prompts, and how many tokens a response may have, before any is scored.
    check: Callable[[Sequence[PromptRow], int], None] | None = None
    model: Any = None  # that gives the scores, where one in this process does
    by_row: bool = False  # a model runs, and the score of a row does not depend on others


class RewardSet:
    """The weighted sum of several rewards, each reported by its name.

    A name that occurs again gets a number: ``score``, ``score_2``. `unscored`: a reward may leave a
    row without a score, None or NaN; it is NaN in the result, and the sum is over the others. A
    reward of weight 0, which is only logged, scores no row. Raises UserError for an empty list, a
    weight that is not finite, or a timeout that is not above 0.
    """

    def __init__(self, rewards: Sequence[Reward], *, unscored: bool = False):
        if not rewards:
            raise UserError("no reward was given: at least one is needed")
        for reward in rewards:
            if not math.isfinite(reward.weight):
                raise UserError(f"reward {reward.name!r}: weight {reward.weight} is not finite")
            if reward.timeout is not None and not 0 < reward.timeout < math.inf:
                raise UserError(f"reward {reward.name!r}: timeout {reward.timeout} is not above 0")
        self.rewards, self.unscored = list(rewards), unscored
        self.names: list[str] = []
        for reward in rewards:
            name, number = reward.name, 2
            while name in self.names:
                name, number = f"{reward.name}_{number}", number + 1
            self.names.append(name)

    @property
    def weights(self) -> list[float]:
        return [reward.weight for reward in self.rewards]

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], /, **columns: Sequence
    ) -> tuple[list[float], dict[str, list[float]]]:
        """(weighted sums, {name: unweighted scores}), one number for each response.

        Raises UserError if a reward raises, runs out of time, or returns something that
        `check_scores` refuses.
        """
        prompts, responses = list(prompts), list(responses)
        _check_columns(prompts, responses, columns)
        call = _call if member() is None else SharedCall(len(responses), columns)
        parts = {
            name: call(name, reward, prompts, responses, columns, self.unscored)
            for name, reward in zip(self.names, self.rewards, strict=True)
        }
        totals = [self._total(row) for row in zip(*parts.values(), strict=True)]
        return totals, parts

    def metrics(self, parts: dict[str, list[float]]) -> dict[str, float]:
        """What a step logs of the scores of a batch beside their means."""
        return {}

    def __str__(self) -> str:
        pairs = zip(self.rewards, self.names, strict=True)
        return ", ".join(f"{reward.weight:g} x {name}" for reward, name in pairs)

    def _total(self, scores: Sequence[float]) -> float:
        """The weighted sum of one row's scores; NaN where none is a number, or it is not finite."""
        found = [
            weight * score
            for weight, score in zip(self.weights, scores, strict=True)
            if weight and not math.isnan(score)
        ]
        if not all(map(math.isfinite, found)):
            return math.nan
        total = math.fsum(found) if found or not any(self.weights) else math.nan
        return math.nan if self.unscored and no_float32(total) else total

    def check_prompts(self, rows: Sequence[PromptRow], response: int) -> None:
        """Raise UserError where a reward cannot read prompts, or responses of `response` tokens."""
        for reward in self.rewards:
            if reward.check is not None:
                reward.check(rows, response)

    def check_columns(self, given: Iterable[str]) -> None:
        """Raise UserError where a reward needs a column of the data that is not among `given`."""
        given = {*given, *GIVEN}
        for name, reward in zip(self.names, self.rewards, strict=True):
            for column in [*reward.columns, *_required(reward.function)]:
                if column not in given:
                    there = ", ".join(sorted(given - {*GIVEN})) or "none"
                    raise UserError(
                        f"reward {name!r} asks for the column {column!r}, which the data does not "
                        f"have; its columns are: {there}"
                    )


def _check_columns(prompts: list[str], responses: list[str], columns: dict[str, Sequence]) -> None:
    taken = {"prompts", "responses"} & set(columns)
    if taken:
        raise UserError(f"the data has a column {min(taken)!r}, which rewards get from the model")
    for name, column in {"prompts": prompts, **columns}.items():
        if len(column) != len(responses):
            raise UserError(f"{name}: {len(column)} entries for {len(responses)} responses")


def _call(
    name: str,
    reward: Reward,
    prompts: list[str],
    responses: list[str],
    columns: dict,
    unscored: bool,
) -> list[float]:
    """The reward's checked scores, or a UserError that says which reward and row failed."""
    columns = _accepted(reward.function, columns)
    try:
        # Copies: a function that sorts or shortens its input must not change the rows.
        scores = _timed(reward, list(prompts), list(responses), columns)
    except UserError as error:
        raise UserError(f"reward {name!r}: {error}") from error
    except OutOfTime:
        row = _row_to_blame(reward, prompts, responses, columns)
        problem = f"no answer within {reward.timeout:g} s"
        raise UserError(f"reward {name!r}: {problem}; {row}") from None
    except (Exception, SystemExit) as error:
        row = _row_to_blame(reward, prompts, responses, columns)
        raise UserError(f"reward {name!r} raised {describe(error)}; {row}") from error
    return check_scores(scores, prompts, responses, name, unscored=unscored)


class SharedCall:
    """`_call` of several workers: a model's scores are made by all, each of its own rows; any other
    reward is called once, by worker 0, with all rows. Scores and errors are the same at all.
    """

    def __init__(self, count: int, columns: dict[str, Sequence]) -> None:
        from distributed.group import here

        self.workers = here()
        # Without one of its own a worker scores the first row, which nobody reads.
        self.places = [*self.workers.share(range(count))] or [0]
        self.columns = {n: [column[i] for i in self.places] for n, column in columns.items()}

    def __call__(self, name, reward, prompts, responses, columns, unscored) -> list[float]:
        if not reward.by_row:
            call = (name, reward, prompts, responses, columns, unscored)
            return self.workers.once(lambda: _call(*call), "the rewards")
        own = [[column[i] for i in self.places] for column in (prompts, responses)]
        try:
            said = {"scores": _call(name, reward, *own, self.columns, unscored)}
        except UserError as wrong:
            said = {"error": str(wrong)}
        every = self.workers.gather(said, "the rewards")
        for answer in every:
            if "error" in answer:
                raise self.workers.error_of_all(answer["error"])
        found = [math.nan] * len(responses)
        for rank, answer in enumerate(every):
            count = len(found[rank :: self.workers.size])
            found[rank :: self.workers.size] = answer["scores"][:count]
        return found


def _timed(reward: Reward, prompts: list[str], responses: list[str], columns: dict) -> object:
    with time_limit(reward.timeout):
        return as_list(reward.function(prompts, responses, **columns))


def _accepted(function: RewardFunction, columns: dict) -> dict:
    """The columns that `function` takes: all, if it has **columns, else those it names."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature
        return columns
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        unnamed = {name for name in BY_NAME if name not in parameters}
        return {name: column for name, column in columns.items() if name not in unnamed}
    return {name: column for name, column in columns.items() if name in parameters}


def _required(function: RewardFunction) -> list[str]:
    """The columns that `function` cannot be called without."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    # The first two are prompts and responses, whatever they are called.
    return [p.name for p in parameters[2:] if p.kind in named and p.default is p.empty]


def _row_to_blame(reward: Reward, prompts: list[str], responses: list[str], columns: dict) -> str:
    """Which row a failed call failed on, found by calling the function on one row at a time.

    The run is over, so calls more do no harm; together they get one more `timeout`.
    """
    row = 0
    try:
        with time_limit(reward.timeout):
            for row in range(len(responses)):
                one = {name: [column[row]] for name, column in columns.items()}
                as_list(reward.function([prompts[row]], [responses[row]], **one))
    except (OutOfTime, Exception, SystemExit):
        return f"row {row}: {quote_row(prompts, responses, row)}"
    rows = f"no single row of the {len(responses)} does it alone"
    return f"{rows}; row 0: {quote_row(prompts, responses, 0)}"


class OutOfTime(BaseException):
    """Not an Exception, so that an ``except Exception`` in the user's function lets it through."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise OutOfTime inside the block once `seconds` have passed; None sets no limit.

    By an alarm signal (SIGALRM), not a thread: a thread cannot be stopped, and in another thread
    MLX finds no stream for arrays made in this one. Therefore it works on the main thread only
    (UserError elsewhere), and compiled code that does not return to Python is not interrupted.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise UserError("a reward's time limit works on the main thread only; set none elsewhere")
    running = True

    def ring(*_):
        if running:
            raise OutOfTime

    previous = signal.signal(signal.SIGALRM, ring)
    # Again every second, in case a bare "except:" swallowed the first.
    outer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            yield
        finally:
            running = False  # an alarm from here on must not keep the two lines below from running
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, previous)
