"""Rewards for answers that can be checked: a known answer, a form, a length, JSON by a schema.

Each maker returns a `Reward` whose function takes texts and gives a number for each. None of them
raises on anything that a model writes: what cannot be read, or takes too long to check, scores 0.
A row whose known answer is missing is left unscored (None).
"""

import json
import logging
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from data_utils import PromptRow
from errors import UserError
from rewards.reward_set import OutOfTime, Reward, time_limit
from rewards.user_function import shorten
from safe_files import read_small

AnswerFrom = Literal["auto", "tag", "boxed", "number", "text"]
AnswerMatch = Literal["value", "text", "math"]

# Seconds for one response. A pattern that backtracks without end, or algebra that explodes, is the
# response's fault as much as the pattern's, and must not cost the run.
PATIENCE = 1.0

# A sign belongs to a number unless something that can be subtracted from stands before it. What is
# only the beginning of one (3.1 in 3.1.4, 1 in 1e100) is none. The bounds keep conversion linear on
# hostile text.
NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![)\]}])[-+\u2212])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}){1,12}(?![0-9])|[0-9]{1,60}+)(?:\.[0-9]{1,60}+)?+|\.[0-9]{1,60}+)"
    r"(?:[eE][-+]?[0-9]{1,2}+)?+(?!\.?[0-9]|[eE][-+]?[0-9])"
    r"(?:/[0-9]{1,60}+(?!\.?[0-9]))?"
)
SPACES = re.compile(r"\s+")
BOX, BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{"), re.compile(r"[{}]")
FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)
# \frac{1}{2} and \frac12
FRACTION = re.compile(
    r"\\[dt]?frac\s*(?:\{\s*(?P<over>-?[0-9]{1,60})\s*\}|(?P<o>[0-9]))"
    r"\s*(?:\{\s*(?P<under>[0-9]{1,60})\s*\}|(?P<u>[0-9]))"
)
# What LaTeX writes around a number or a word without changing it.
LATEX_WORD = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")
LATEX_NOISE = re.compile(
    r"\\left|\\right|\\[,;:! ]|\\\(|\\\)|\\\[|\\\]|\$|\\(?=[%$])|\^\{?\\circ\}?"
)


# ---- finding the answer ------------------------------------------------------------------------


def last_number(text: str) -> str | None:
    """The last number written in `text`, as it stands there but for LaTeX's fractions, which become
    ``1/2``; None without one.
    """
    found = [match.group() for match in NUMBER.finditer(plain_fractions(text))]
    return found[-1] if found else None


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` whose braces close; None without one."""
    starts = {match.end() for match in BOX.finditer(text)}
    last, answer, opened = -1, None, []
    for brace in BRACE.finditer(text):  # one pass, however many boxes are left open
        if brace.group() == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in starts and start > last:
            last, answer = start, text[start : brace.start()]
    return answer


def tagged(text: str, tag: str) -> str | None:
    """What stands in the last ``<tag>...</tag>``; None without one."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else text[start + len(tag) + 2 : end]


def find_answer(text: str, where: AnswerFrom, tag: str, *, number: bool) -> str | None:
    """The answer in a response. "auto" takes the tag, else the box, else the last number if the
    known answer is one (`number`), else the whole text.
    """
    if where == "auto":
        found = tagged(text, tag)
        found = boxed(text) if found is None else found
        if found is None:
            found = last_number(text) if number else text
        return found
    if where == "tag":
        return tagged(text, tag)
    if where == "boxed":
        return boxed(text)
    return last_number(text) if where == "number" else text


def known_answer(value: Any, tag: str) -> str | None:
    """The answer in a field of the data: as it is, or what its tag, box or ``####`` marks.

    None for what is no answer: null, an empty text, or something with parts.
    """
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        return None
    for found in (tagged(value, tag), boxed(value)):
        if found is not None:
            return found
    return value.rpartition("####")[2].strip() or None  # GSM8K's mark


# ---- comparing ---------------------------------------------------------------------------------


def as_number(text: str) -> Fraction | None:
    """The number that the whole of `text` spells, exactly; None if it is none.

    Takes signs, thousands, decimals, exponents to 99, fractions, a currency sign in front, a
    percent sign or full stop behind, and LaTeX's fractions.
    """
    plain = plain_fractions(LATEX_NOISE.sub("", LATEX_WORD.sub(r"\1", text)))
    plain = plain.strip().strip("€£").rstrip(".%").strip().replace("\u2212", "-")
    if len(plain) > 200 or not NUMBER.fullmatch(plain):
        return None
    over, _, under = plain.replace(",", "").partition("/")
    try:
        return Fraction(over) / Fraction(under or 1)
    except (ValueError, ZeroDivisionError):
        return None


def plain_fractions(text: str) -> str:
    r"""``\frac{1}{2}`` and ``\frac12`` as ``1/2``."""

    def plain(match: re.Match) -> str:
        over, under = match["over"] or match["o"], match["under"] or match["u"]
        mixed = text[match.start() - 1 : match.start()].isdigit()  # 2\\frac12 is not 21/2
        return f"{' ' * mixed}{over}/{under}"

    return FRACTION.sub(plain, text)


def same_value(found: str, known: str) -> bool:
    """Equal as numbers where both are numbers, else as texts."""
    numbers = as_number(found), as_number(known)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return same_text(found, known)


def same_text(found: str, known: str) -> bool:
    """Equal but for case, spacing, LaTeX's wrappings and a full stop at the end."""
    return plain_answer(found) == plain_answer(known)


def plain_answer(text: str) -> str:
    """Without case, spacing, LaTeX's wrappings and a full stop at the end."""
    text = LATEX_NOISE.sub("", LATEX_WORD.sub(r"\1", text))
    return SPACES.sub(" ", text).strip().rstrip(".").strip().casefold()


def same_mathematics(found: str, known: str) -> bool:
    """Equal as mathematics (math-verify): expressions, sets, intervals, matrices.

    Raises UserError where math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("--answer-match math needs math-verify: pip install math-verify") from None
    # Its own time limits use the alarm signal that ours needs; it warns of each call without them.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    sides = [parse(f"${side}$", parsing_timeout=None) for side in (known, found)]
    return all(sides) and verify(*sides, timeout_seconds=None)


MATCHES: dict[str, Callable[[str, str], bool]] = {
    "value": same_value,
    "text": same_text,
    "math": same_mathematics,
}


# ---- rewards -----------------------------------------------------------------------------------


def answer_reward(
    column: str,
    *,
    answer_from: AnswerFrom = "auto",
    answer_tag: str = "answer",
    answer_match: AnswerMatch = "value",
) -> Reward:
    """1 where the response has the answer that stands in the data's `column`, else 0.

    Raises UserError for names that do not exist, and for ``math`` without math-verify.
    """
    if answer_from not in get_args(AnswerFrom) or answer_match not in MATCHES:
        raise UserError(f"no answers from {answer_from!r}, or no match by {answer_match!r}")
    if not re.fullmatch(r"[\w-]+", answer_tag):
        raise UserError(f"--answer-tag {answer_tag!r}: a name without blanks or brackets is needed")
    same = MATCHES[answer_match]
    same("1", "1")  # says now, not after the first rollout, that a package is missing

    def check(response: str, value: Any) -> float | None:
        known = known_answer(value, answer_tag)
        if known is None:
            return None
        number = as_number(known) is not None

        def right(response: str) -> bool:
            found = find_answer(response, answer_from, answer_tag, number=number)
            return found is not None and same(found, known)

        return float(bool(patiently(right, response)))

    def answer(
        prompts: Sequence[str], responses: Sequence[str], **columns: Sequence
    ) -> list[float | None]:
        pairs = zip(responses, columns[column], strict=True)
        return [check(response, value) for response, value in pairs]

    def check_rows(rows: Sequence[PromptRow], response: int) -> None:
        known = [known_answer(row.columns.get(column), answer_tag) for row in rows]
        if any(column in row.columns for row in rows):  # else the set says which there are
            check_known(column, rows, known)

    return Reward("answer", answer, columns=(column,), check=check_rows)


def check_known(column: str, rows: Sequence[PromptRow], known: Sequence[str | None]) -> None:
    """Raise UserError where no row has a `known` answer; warn where some have none."""
    without = [row for row, answer in zip(rows, known, strict=True) if answer is None]
    if not without:
        return
    value = shorten(repr(without[0].columns.get(column)), 60)
    where = f"{without[0].where}: {column} is {value}"
    if len(without) == len(rows):
        raise UserError(
            f"--answer-reward {column}: no row has an answer there, a text or a number ({where})"
        )
    warnings.warn(
        f"{len(without)} of {len(rows)} rows have no answer in {column}, a text or a number, and "
        f"are not scored by it ({where})",
        stacklevel=2,
    )


def format_reward(pattern: str) -> Reward:
    """1 where the regular expression is found in the response (dots match line ends), else 0.

    Anchor it with ``\\A`` and ``\\Z`` for the whole response. Raises UserError for one that does
    not compile.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as problem:
        raise UserError(
            f"--format-reward {pattern!r}: not a regular expression: {problem}"
        ) from None

    def form(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(patiently(compiled.search, text) is not None) for text in responses]

    return Reward("format", form)


def length_reward(target: int) -> Reward:
    """1 for a response of `target` words, falling evenly to 0 at none and at twice as many."""
    if target < 1:
        raise UserError(f"--length-reward {target}: words, at least 1")

    def length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [max(0.0, 1 - abs(len(text.split()) - target) / target) for text in responses]

    return Reward("length", length)


def json_reward(schema_file: str | Path) -> Reward:
    """1 where the response is JSON (alone, or in one ``` fence) that fits the schema, else 0.

    Raises UserError for a file that is no JSON Schema, or whose references lie outside it: nothing
    is fetched.
    """
    validator = load_schema(schema_file)

    def valid(text: str) -> bool:
        fenced = FENCE.fullmatch(text)
        try:
            value = json.loads(fenced.group(1) if fenced else text, parse_constant=_refuse)
            return validator.is_valid(value)
        except (ValueError, RecursionError, OverflowError):
            return False

    def is_valid(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(bool(patiently(valid, text))) for text in responses]

    return Reward("json", is_valid)


def load_schema(path: str | Path):
    """A jsonschema validator of a file that holds a JSON Schema."""
    import jsonschema
    from jsonschema_specifications import REGISTRY  # the drafts' own; it fetches nothing
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    where = f"--json-reward {path}"
    try:
        schema = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{where}: no JSON can be read: {' '.join(str(problem).split())}") from None
    try:
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        # With the formats, so that a pattern that is no regular expression is found now.
        kind.check_schema(schema, format_checker=kind.FORMAT_CHECKER)
        root = DRAFT202012.create_resource(schema)
        _check_references(schema, REGISTRY.resolver_with_root(root), DRAFT202012.create_resource)
    except (jsonschema.SchemaError, TypeError) as problem:
        reason = getattr(problem, "message", "an object, true or false is needed")
        raise UserError(f"{where}: not a JSON Schema: {reason}") from None
    except Unresolvable as problem:
        raise UserError(f"{where}: its $ref {problem.ref!r} leads nowhere in it") from None
    return kind(schema, registry=REGISTRY)


def _check_references(part: Any, resolver: Any, resource: Callable) -> None:
    """Raise Unresolvable for a reference that leaves the schema."""
    if isinstance(part, dict):
        if isinstance(part.get("$id"), str):
            resolver = resolver.in_subresource(resource(part))
        for name in ("$ref", "$dynamicRef"):
            if isinstance(part.get(name), str):
                resolver.lookup(part[name])
        part = [v for k, v in part.items() if k not in ("enum", "const", "default", "examples")]
    for inner in part if isinstance(part, list) else ():
        _check_references(inner, resolver, resource)


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")


def patiently(check: Callable, *texts: str) -> Any:
    """``check(*texts)``, or None where that raises or takes longer than PATIENCE.

    The limit is an alarm, so there is none off the main thread.
    """
    main = threading.current_thread() is threading.main_thread()
    try:
        with time_limit(PATIENCE if main else None):
            return check(*texts)
    except OutOfTime:
        return None
    except UserError:
        raise
    except Exception:  # sympy raises of every kind on what a model writes
        return None
