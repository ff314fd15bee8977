"""Rows of any kind as those of the conf-file workflow: instruction and response, pairs, prompts.

``{instruction, context, response}``, ``{instruction, chosen, rejected}`` and ``{prompt}``; where a
conversation came before, `history` has its turns as pairs, and `system` what stood above it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from data_loading.fields import ANSWER_FIELDS, given
from data_loading.formats import recognise, to_record
from data_loading.messages import BadRow, Message, text_of
from data_loading.records import Record, Text
from data_loading.trees import (
    Node,
    best_answers,
    better_and_worse,
    is_tree_row,
    questions,
    read_trees,
)
from data_loading.values import RawRow, shorten
from errors import UserError

RATINGS = ("rating", "overall_score", "score", "reward", "meta_eval_score", "helpfulness")
TEXTS = ("response", "text", "answer", "output", "completion")  # of one answer in a list of them
SEVERAL = ("completions", "answers", "responses")
Row = dict[str, Any]
Columns = Mapping[str, str]  # our key -> column, or a way into one such as answers.text.0


@dataclass
class Converted:
    """Rows to write; what was left out, counted by reason."""

    rows: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def to_instructions(rows: Iterable[RawRow], lang: str | None, columns: Columns) -> Converted:
    """Rows for fine-tuning. Of a question tree the answers that rank highest, each once.

    Raises UserError, naming the row, for one that has no question or no answer.
    """
    trees, rows = _trees(rows, lang, columns)
    done = Converted()
    if trees is not None:
        nodes, done.left_out = trees
        for best, why in best_answers(nodes, lang):
            if best is None:
                done.left_out[why] += 1
            else:
                asked = _asked_in(best, best.asked()[:-1], "instruction")
                done.rows.append({**_with_context(asked), "response": best.text})
        return done
    for row in rows:
        done.rows.append(_converted(row, _instruction, columns))
    return done


def to_pairs(rows: Iterable[RawRow], lang: str | None, columns: Columns) -> Converted:
    """Rows for a reward model: the best answer to each question against each that is worse.

    Of question trees with ranks, answers with ratings (several in a row, or a row each), and rows
    with chosen and rejected. Raises UserError, naming the row, for one that ranks nothing.
    """
    trees, rows = _trees(rows, lang, columns)
    done = Converted()
    if trees is not None:
        nodes, done.left_out = trees
        for best, others in better_and_worse(nodes, lang):
            asked = _asked_in(best, best.asked()[:-1], "instruction")
            texts = [node.text for node in others]
            _put_pairs(done, asked, best.text, texts)
        return done
    rated: dict[str, list[tuple[Row, str, float]]] = {}
    for row in rows:
        made = _converted(row, _ranked, columns)
        if isinstance(made, Record):
            best = min(made.ranks)
            texts = [_plain(answer) for answer in made.responses]
            order = sorted(zip(made.ranks, texts, strict=True), key=lambda pair: pair[0])
            worse = [text for rank, text in order if rank > best]
            _put_pairs(done, _of_record(made, "instruction"), order[0][1], worse)
        else:
            for asked, text, rating in made:
                rated.setdefault(repr(asked), []).append((asked, text, rating))
    for answers in rated.values():
        answers.sort(key=lambda answer: -answer[2])
        asked, best, highest = answers[0]
        _put_pairs(done, asked, best, [text for _, text, rating in answers if rating < highest])
    return done


def to_prompts(rows: Iterable[RawRow], lang: str | None, columns: Columns) -> Converted:
    """Prompts alone, each once. Raises UserError, naming the row, for one without a prompt."""
    trees, rows = _trees(rows, lang, columns)
    done, seen = Converted(), set()
    if trees is not None:
        nodes, done.left_out = trees
        made = [_asked_in(node, node.asked(), "prompt") for node in questions(nodes, lang)]
    else:
        made = [_converted(row, _prompt, columns) for row in rows]
    for row in made:
        if repr(row) in seen:
            done.left_out["prompts that are there twice"] += 1
        else:
            seen.add(repr(row))
            done.rows.append(row)
    return done


# ------------------------------------------------------------------------------ one row


def _trees(rows: Iterable[RawRow], lang: str | None, columns: Columns):
    """((messages, what was left out) or None, all rows)."""
    rows = list(rows)
    is_tree = bool(rows) and rows[0].fields is not None and is_tree_row(rows[0].fields)
    if is_tree and columns:
        raise UserError(f"{rows[0].where}: --map does nothing for question trees")
    if is_tree:
        return read_trees(rows), ()
    if lang is not None:
        raise UserError(f"--lang {lang}: does nothing for rows that are no question trees")
    return None, rows


def _converted(row: RawRow, make: Callable[[Row, str, Columns], Any], columns: Columns) -> Any:
    """What `make` makes of a row's fields; UserError that names the row where it cannot."""
    with _naming(row.where):
        if row.fields is None:
            raise BadRow(row.problem)
        return make(row.fields, row.where, columns)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except BadRow as why:
        raise UserError(f"{where}: {why}") from None


def _asked_in(node: Node, turns: list[Message], key: str) -> Row:
    with _naming(node.where):
        return _asked(turns, key)


def _instruction(fields: Row, where: str, columns: Columns) -> Row:
    if columns or "instruction" in fields:
        answers = ("response", *ANSWER_FIELDS)
        text = _column(fields, columns, "response", answers)
        asked = _column(fields, columns, "instruction", ("instruction",))
        context = _column(fields, columns, "context", ("context", "input"), needed=False)
        more = {k: fields[k] for k in ("history", "system") if given(fields, k)}
        return {"instruction": asked, "context": context, "response": text, **more}
    record = _record(fields, where)
    if record.kind == "conversation":
        if record.messages[-1]["role"] != "assistant":
            raise BadRow("the conversation does not end with an answer")
        record = replace(record, prompt=record.messages[:-1], completion=record.messages[-1:])
    elif record.kind != "prompt_completion":
        hint = "; data/process_data_rlhf.py reads pairs" if record.kind == "preference" else ""
        raise BadRow(f"has no question with one answer{hint or NAME_THEM}")
    asked = _of_record(record, "instruction")
    return {**_with_context(asked), "response": _plain(record.completion)}


NAME_THEM = "; --map instruction=COLUMN response=COLUMN names them"


def _ranked(fields: Row, where: str, columns: Columns) -> Record | list[tuple[Row, str, float]]:
    """A record of ranked answers, or (what was asked, an answer, its rating) of each answer."""
    if {"chosen", "rejected"} & columns.keys():
        named = {key: _column(fields, columns, key, (key,)) for key in ("chosen", "rejected")}
        asked = _column(fields, columns, "instruction", ("instruction", "prompt", "question"))
        return to_record({"prompt": asked, **named}, "preference", where)
    listed = next((fields[n] for n in SEVERAL if _is_rated_list(fields.get(n))), None)
    if listed is not None:
        asked = _prompt(fields, where, columns, "instruction")
        return [(asked, _text_in(one), _rating(one, {})) for one in listed]
    try:
        format = recognise(fields)
    except BadRow:
        format = ""
    if format in ("preference", "ranked", "hh_rlhf"):
        return to_record(fields, format, where)
    rating = _rating(fields, columns)
    asked = _prompt(fields, where, columns, "instruction")
    return [(asked, _column(fields, columns, "response", ("response", *ANSWER_FIELDS)), rating)]


def _prompt(fields: Row, where: str, columns: Columns, key: str = "prompt") -> Row:
    if key in columns:
        return {key: _column(fields, columns, key, (key,))}
    record = _record(fields, where)
    if record.kind == "text" or not (asked := record.asked()):
        raise BadRow(f"has no prompt; --map {key}=COLUMN names it")
    made = _of_record(replace(record, kind="prompt", prompt=asked), key)
    return made


def _record(fields: Row, where: str) -> Record:
    try:
        return to_record(fields, recognise(fields), where)
    except BadRow as why:
        raise BadRow(f"{why}{NAME_THEM}") from None


def _of_record(record: Record, key: str) -> Row:
    """What a record asks, with the fields that only a chat template reads."""
    made = {key: record.prompt}
    if isinstance(record.prompt, list):
        made = _asked(record.prompt, key)
    elif not record.prompt:
        raise BadRow(f"has no question{NAME_THEM}")
    return made | record.extras


def _asked(turns: list[Message], key: str) -> Row:
    """Messages that end with a question as `{key, history, system}`."""
    above = [turn["content"] for turn in turns if turn["role"] == "system"]
    talk = [turn for turn in turns if turn["role"] != "system"]
    asks, answers = talk[::2], talk[1::2]
    plain = all(set(turn) <= {"role", "content"} for turn in turns)
    taken = {t["role"] for t in asks} == {"user"} and {t["role"] for t in answers} <= {"assistant"}
    if not (plain and taken and len(asks) == len(answers) + 1 and len(above) <= 1):
        raise BadRow(
            "the conversation is more than questions and answers that take turns, which "
            f"{key} cannot hold; train on the rows as they are"
        )
    made: Row = {key: asks[-1]["content"]}
    if answers:
        pairs = zip(asks, answers, strict=False)
        made["history"] = [[ask["content"], answer["content"]] for ask, answer in pairs]
    return made | ({"system": above[0]} if above else {})


def _with_context(asked: Row) -> Row:
    return {"instruction": asked["instruction"], "context": "", **asked}


def _put_pairs(done: Converted, asked: Row, best: str, worse: list[str]) -> None:
    """A row for each worse answer that says something else."""
    others = [text for text in worse if text != best]
    done.left_out["worse answers that say the same"] += len(worse) - len(others)
    if not worse:
        done.left_out["questions without a worse answer"] += 1
    done.rows += [
        {"instruction": asked["instruction"], "chosen": best, "rejected": text, **asked}
        for text in others
    ]


def _plain(answer: Text) -> str:
    """The text of an answer; BadRow where it is more than one text."""
    if isinstance(answer, str):
        return answer
    if len(answer) != 1 or answer[0].get("tool_calls") or answer[0]["role"] != "assistant":
        raise BadRow("an answer of several turns, or with tool calls, is no text")
    return answer[0]["content"]


# ------------------------------------------------------------------------------ columns


def _column(
    fields: Row, columns: Columns, key: str, usual: tuple[str, ...], *, needed: bool = True
) -> str:
    """The text in the column that stands for `key`: the one that was named, else the usual one."""
    name = columns.get(key) or next((name for name in usual if given(fields, name)), None)
    if name is None:
        if not needed:
            return ""
        raise BadRow(f"has no {key}; its columns are {', '.join(fields)}: --map {key}=COLUMN")
    value = _inside(fields, name)
    if not needed and (value is None or value == ""):
        return ""
    if isinstance(value, list | dict):
        raise BadRow(f"{name} is no text but {shorten(value)}; name a part of it: {name}.0")
    return text_of(value, name)


def _inside(fields: Row, name: str) -> Any:
    """What stands at `answers.text.0`; a column with dots in its name comes first."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for part in name.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise BadRow(f"has no column {name}; its columns are {', '.join(fields)}")
    return value


def _rating(fields: Row, columns: Columns) -> float:
    name = columns.get("rating") or next((n for n in RATINGS if given(fields, n)), None)
    if name is None:
        raise BadRow("ranks nothing: no rank, rating, or chosen and rejected; --map rating=COLUMN")
    value = _inside(fields, name)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{name} must be a number, found {shorten(value)}")
    return number


def _is_rated_list(value: Any) -> bool:
    """Whether a value is a list of answers with a rating each."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and any(n in one for n in RATINGS) for one in value)
    )


def _text_in(one: Row) -> str:
    return _column(one, {}, "response", TEXTS)
