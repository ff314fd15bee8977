"""Rewards that a user plugs in: loading a Python function, checking what it returns.

A reward is ``function(prompts, responses, **columns) -> list[float]``: lists of texts, the other
columns of the data as lists of the same length, and one finite number back for each response. A
learned reward is one more function of this form, so there is no model code here. reward_set.py
calls rewards; http_reward.py is one that asks a service.
"""

import importlib.machinery
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from errors import UserError

RewardFunction = Callable[..., Sequence[float]]

# ---- a function from a file --------------------------------------------------------------------

_modules: dict[Path, ModuleType] = {}  # two functions of one file share its state


def load_function(spec: str) -> RewardFunction:
    """The function that ``FILE.py:NAME`` names.

    Runs FILE (once), which no other part of the program does. Its folder goes to the end of the
    import path, so that it can import its neighbours. Raises UserError if the file is missing or
    fails, or if NAME is missing or cannot be called.
    """
    file, _, name = spec.rpartition(":")
    if not file or not name.isidentifier():
        raise UserError(f"reward function {spec!r}: FILE.py:NAME is needed")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"reward function {spec!r}: there is no file {path}")
    if path not in _modules:
        _modules[path] = _run_file(path)
    module = _modules[path]
    if not hasattr(module, name):
        own = [n for n, f in vars(module).items() if inspect.isfunction(f) and n[0] != "_"]
        raise UserError(f"{path}: no {name} in it; its functions are: {', '.join(own) or 'none'}")
    function = getattr(module, name)
    if not callable(function):
        kind = type(function).__name__
        raise UserError(f"{path}: {name} is of type {kind}, a function is needed")
    return function


def _run_file(path: Path) -> ModuleType:
    """The module that running `path` gives, under a name that hides no other module."""
    name = f"reward_file_{len(_modules)}_{path.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location(name, path, loader=loader)
    )
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        problem = f"running this file of reward functions raised {describe(error)}"
        raise UserError(f"{path}:{_line_in(error, path)}: {problem}") from error
    return module


def _line_in(error: BaseException, path: Path) -> int:
    """The line of `path` at which `error` was raised; 1 if it was raised elsewhere."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno or 1
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return lines[-1] if lines else 1


# ---- checked scores ----------------------------------------------------------------------------


LARGEST = float(np.finfo(np.float32).max)  # scores become float32


def check_scores(
    scores: object,
    prompts: Sequence[str],
    responses: Sequence[str],
    name: str,
    *,
    unscored: bool = False,
) -> list[float]:
    """`scores` as a list of floats, one for each response.

    Takes a list, tuple or array of numbers (bool included). Raises UserError for anything else, a
    wrong count, or (naming the row) something that is not a finite number. With `unscored`, None
    and NaN are no score, and NaN in the result; a number beyond float32 is infinity there.
    """
    scores = as_list(scores)
    if not isinstance(scores, list | tuple):
        kind = type(scores).__name__
        raise UserError(f"reward {name!r} returned {kind}, a list of numbers is needed")
    if len(scores) != len(responses):
        raise UserError(
            f"reward {name!r} returned {len(scores)} scores for {len(responses)} responses; "
            f"row 0: {quote_row(prompts, responses, 0)}"
        )
    checked = []
    for row, score in enumerate(scores):
        number = _as_float(score)
        if unscored and score is None:
            number = math.nan
        elif unscored and no_float32(score):
            number = number if math.isnan(number) else math.copysign(math.inf, number)
        elif not math.isfinite(number):
            raise UserError(
                f"reward {name!r}, row {row}: the score {shorten(repr(score))} is not a finite "
                f"number; {quote_row(prompts, responses, row)}"
            )
        checked.append(number)
    return checked


def as_list(scores: object) -> object:
    """NumPy, MLX and PyTorch arrays as lists (lazy ones are computed here); the rest as it is."""
    return scores.tolist() if hasattr(scores, "tolist") else scores


def _as_float(score: object) -> float:
    """The number that `score` is; NaN if it is none (a text that spells a number is none)."""
    if not hasattr(type(score), "__float__"):
        return math.nan
    try:
        return float(score)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def no_float32(score: object) -> bool:
    """Whether this is a number, and one that float32 has no finite value for."""
    try:
        number = float(score) if hasattr(type(score), "__float__") else 0.0
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return not abs(number) <= LARGEST


# ---- words for messages ------------------------------------------------------------------------


def quote_row(prompts: Sequence[str], responses: Sequence[str], row: int) -> str:
    """The row's texts on one line, cut to a readable length."""
    if row >= len(responses):
        return "there are no responses"
    return f"prompt {shorten(repr(prompts[row]))}, response {shorten(repr(responses[row]))}"


def shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def describe(error: BaseException) -> str:
    """``TypeName: message`` on one line."""
    message = shorten(" ".join(str(error).split()))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
