"""Pairs of answers out of any records, what becomes of them when they are judged, and a report."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from data_utils import Record, Records
from errors import UserError
from rewards.judge import Unanswered, Verdict
from rewards.scored_rows import answer_of, prompt_of, singles, unanswered
from rewards.texts import Prompt

TIE, EQUAL = "a tie", "both answers are the same"
EMPTY = "an answer says nothing, which no record holds"
NUL = "an answer has a NUL character, which no reader takes"
NEVER = (EQUAL, EMPTY, NUL)  # whatever a judge says
BIASED = 0.8  # a share of verdicts for one place beyond which the place is what is judged


@dataclass
class Answer:
    """One answer of a row; a `Pair` of scored_rows.py has the same and more."""

    record: Record
    whole: Record
    rank: int | None = None


@dataclass
class Comparison:
    """Two answers to a prompt, `number` among all; `better`: the one its row prefers, if it does"""

    number: int
    first: Any  # an Answer, or a Pair
    second: Any
    better: int | None = None

    @property
    def prompt(self) -> Prompt:
        return prompt_of(self.first.record)

    @property
    def answers(self) -> list:
        """Both as they were written: texts or messages."""
        return [answer_of(self.first.record), answer_of(self.second.record)]


def answers_of(records: Records) -> list[Answer]:
    """Every answer of every row. Raises UserError for a row without one, or without a prompt."""
    for record in records:
        problem = unanswered(record)
        if problem is None and record.kind == "text":
            problem = "plain text has no prompt, to which there could be two answers"
        if problem is None and record.kind == "preference" and not record.prompt:
            problem = "the row has no prompt"
        if problem is not None:
            raise UserError(f"{record.where}: {problem}")
    return [Answer(*single) for record in records for single in singles(record)]


def comparisons(answers: Sequence[Any]) -> list[Comparison]:
    """All pairs of answers of a row, or of rows with the same prompt. UserError for a lone one."""
    groups: dict[Any, list[Any]] = {}
    for answer in answers:
        key = json.dumps([prompt_of(answer.record), answer.record.extras], sort_keys=True)
        groups.setdefault(key if answer.rank is None else id(answer.whole), []).append(answer)
    found: list[Comparison] = []
    for group in groups.values():
        if len(group) < 2:
            raise UserError(
                f"{group[0].whole.where}: one answer to its prompt; two are needed to compare: "
                "chosen and rejected, or rows with the same prompt"
            )
        for one, other in combinations(group, 2):
            better = None
            if one.rank is not None and one.rank != other.rank:
                better = int(one.rank > other.rank)
            found.append(Comparison(len(found), one, other, better))
    return found


def neighbours(answers: Sequence[Any]) -> list[Comparison]:
    """Pairs of answers that were sampled to one prompt, two at a time."""
    both = zip(answers[::2], answers[1::2], strict=True)
    return [Comparison(number, *pair) for number, pair in enumerate(both)]


def question_text(prompt: Prompt, extras: Mapping[str, Any] | None = None) -> str:
    """A prompt for a judge: the text, or the turns of a conversation with who says them.

    What the row gives to chat templates beside it (tools, documents) stands before it.
    """
    beside = [f"{name}: {as_json(value)}" for name, value in (extras or {}).items()]
    if isinstance(prompt, str):
        turns = [prompt.strip()]
    elif len(prompt) == 1 and prompt[0]["role"] == "user":
        turns = [turn_text(prompt[0])]
    else:
        turns = [f"{turn['role']}: {turn_text(turn)}".strip() for turn in prompt]
    return "\n\n".join([*beside, *turns])


def answer_text(answer: Prompt) -> str:
    if isinstance(answer, str):
        return answer.strip()
    return "\n\n".join(filter(None, map(turn_text, answer)))


def turn_text(turn: Mapping[str, Any]) -> str:
    """What a message says, and the tools that it calls."""
    calls = [
        f"calls {as_json(call.get('function', call))}" for call in turn.get("tool_calls") or ()
    ]
    return "\n".join(filter(None, [(turn.get("content") or "").strip(), *calls]))


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ---- rows --------------------------------------------------------------------------------------


def verdict_row(
    comparison: Comparison, verdict: Verdict | Unanswered, about: dict[str, Any], least: float
) -> tuple[dict[str, Any], bool]:
    """(the row that is written, whether it is a label): a preference record, or why it is none.

    `about` is what else the row says of its judge; a label has a P of at least `least`.
    """
    shared = {"prompt": comparison.prompt}
    extras = comparison.first.record.extras
    judge = {"pair": comparison.number} | about
    if isinstance(verdict, Unanswered):
        row = {"responses": comparison.answers, "skipped": True}
        return {**shared, **row, **extras, "judge": judge | {"why": verdict.why}}, False
    orders = {} if verdict.orders is None else {"first_wins": [*verdict.orders]}
    p = max(verdict.p, 1 - verdict.p)
    judge = {"p": p, **judge, "orders_agree": verdict.orders_agree, **orders}
    if verdict.p == 0.5:
        row = {"responses": comparison.answers, "tie": True}
        return {**shared, **row, **extras, "judge": judge | {"why": TIE}}, False
    if p < least:
        row = {"responses": comparison.answers, "skipped": True}
        return {**shared, **row, **extras, "judge": judge | {"why": below(least)}}, False
    best, other = comparison.answers[:: 1 if verdict.p > 0.5 else -1]
    margin = math.log(p / (1 - p)) if p < 1 else None
    row = {"chosen": best, "rejected": other}
    return {**shared, **row, **extras, "margin": margin, "judge": judge}, True


def below(least: float) -> str:
    return f"P is below --min-confidence {least:g}"


def may_answer_later(row: dict[str, Any]) -> bool:
    """Whether a row was left without a label because the judge gave no answer."""
    judge = row.get("judge")
    return isinstance(judge, dict) and "p" not in judge and judge.get("why") not in NEVER


def not_to_judge(comparison: Comparison) -> str | None:
    """Why two answers need no judge; None where they do."""
    one, other = comparison.answers
    if one == other:
        return EQUAL
    texts = answer_text(one), answer_text(other)
    if "\0" in "".join(texts):
        return NUL
    return None if all(texts) else EMPTY


def earlier(
    rows: Iterable[dict[str, Any]],
    where: str,
    of: Sequence[Comparison],
    about: Sequence[dict[str, Any]],
    least: float,
) -> dict[int, dict[str, Any]]:
    """Rows of an earlier start by their pair's number.

    Raises UserError for one of other pairs than `of`, or of a judge that is not as `about` and
    `least` say.
    """
    found = {}
    for line, row in enumerate(rows, 1):
        judge = row.get("judge")
        number = judge.get("pair") if isinstance(judge, dict) else None
        problem = None
        if not isinstance(number, int) or not 0 <= number < len(of):
            problem = "is no row of this input"
        else:
            answers = row.get("responses") or [row.get("chosen"), row.get("rejected")]
            same = row.get("prompt") == of[number].prompt
            if not same or answers not in (of[number].answers, of[number].answers[::-1]):
                problem = "is about other answers than this input has there"
            for name, value in about[number].items():
                if judge.get(name) != value:
                    problem = f"was judged with another {name}: {judge.get(name)!r}, not {value!r}"
            why = judge.get("why", "")
            other = why.startswith("P is below") and why != below(least)
            if other or ("chosen" in row and judge.get("p", 1) < least):
                problem = "was judged with another --min-confidence"
        if problem is not None:
            raise UserError(
                f"{where}:{line}: {problem}; --force begins anew, --output names another file"
            )
        found[number] = row
    return found


# ---- what came out -----------------------------------------------------------------------------


def report(rows: dict[int, dict[str, Any]], of: Sequence[Comparison]) -> list[str]:
    """Lines about all verdicts: kept, the two orders, the place, agreement with the rows' own."""
    kept = [row for row in rows.values() if "chosen" in row]
    reasons: dict[str, int] = {}
    for row in rows.values():
        if "chosen" not in row:
            why = row["judge"]["why"]
            why = "no answer of the judge" if may_answer_later(row) else why
            reasons[why] = reasons.get(why, 0) + 1
    said = "".join(f", {count} left: {why}" for why, count in reasons.items())
    lines = [f"pairs      {len(of)}: {len(kept)} labelled{said}"]
    verdicts = [row["judge"]["first_wins"] for row in rows.values() if "first_wins" in row["judge"]]
    if verdicts:
        agree = sum(row["judge"].get("orders_agree") is True for row in rows.values())
        share, mean = first_place(verdicts)
        lines.append(f"orders     agree on {agree / len(verdicts):.3f} of {len(verdicts)} pairs")
        lines.append(f"place      the first one wins {share:.3f} of verdicts, mean P {mean:.3f}")
    both = [
        (of[number].better, int(row["chosen"] != of[number].answers[0]))
        for number, row in rows.items()
        if "chosen" in row and of[number].better is not None
    ]
    if both:
        same = sum(a == b for a, b in both) / len(both)
        lines.append(f"agreement  {same:.3f} with what {len(both)} rows prefer themselves")
    return lines


def first_place(verdicts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(share of verdicts for the answer that stood first, ties half; mean P of it)."""
    flat = [p for both in verdicts for p in both]
    won = sum((p > 0.5) + 0.5 * (p == 0.5) for p in flat)
    return won / len(flat), sum(flat) / len(flat)


def place_warning(rows: Iterable[dict[str, Any]]) -> str | None:
    """A warning where the place decides, whatever stands there."""
    verdicts = [row["judge"]["first_wins"] for row in rows if "first_wins" in row["judge"]]
    if not verdicts:
        return None
    share, _ = first_place(verdicts)
    if 1 - BIASED <= share <= BIASED:
        return None
    which = "first" if share > BIASED else "second"
    return (
        f"the judge prefers the {which} place in {max(share, 1 - share):.0%} of verdicts, whatever "
        "stands there; averaged over both orders little is left: take a larger judge"
    )
