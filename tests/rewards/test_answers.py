"""Rewards for answers that can be checked: what is right, and that no text makes them raise."""

import json
import re
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from rewards import answers
from rewards.answers import (
    answer_reward,
    as_number,
    boxed,
    format_reward,
    json_reward,
    last_number,
    length_reward,
    tagged,
)
from rewards.reward_set import RewardSet, time_limit

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[a-z]+$"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": {"$ref": "#/$defs/any"},
    "$defs": {"any": True},
}
# What a model may write: nothing, cut off, nested without end, huge, of other alphabets.
HOSTILE = [
    "",
    " ",
    "\n",
    "\x00",
    "\ud800",
    "NaN",
    "Infinity",
    "-",
    "+",
    "1/0",
    "\\frac{1}{0}",
    "1e999999",
    "9" * 10_000,
    "-" * 10_000,
    "[" * 100_000,
    "{" * 5_000,
    '{"a":' * 3_000,
    "\\boxed{" * 20_000,
    "\\boxed{1" + "{" * 50_000,
    "\\boxed{}" * 10_000,
    "\\boxed{",
    "}",
    "<answer>",
    "</answer><answer>",
    "<answer>" * 1_000,
    "١٢",
    "½",
    "１２",
    "²",
    "1,2,3,",
    "1." * 1_000,
    "null",
    "true",
    '"',
    "```json\n",
    "```json\n{\n```",
    "a" * 40 + "!",
    "(1,2]",
    "\\int_0^1 x dx",
    "x^{x^{x^{x}}}",
    "9^{9^{9^{9^9}}}",
    "\\sqrt[",
    "\\left(",
]


def scores(reward, responses, **columns) -> list:
    return reward.function(["p"] * len(responses), list(responses), **columns)


def answers_to(known, *responses, **options) -> list:
    return scores(answer_reward("answer", **options), responses, answer=[known] * len(responses))


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


# ---- finding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, number",
    [
        ("The answer is 12.", "12"),
        ("3 + 4 = 7", "7"),
        ("12-5", "5"),
        ("it is -5", "-5"),
        ("x=(-3)", "-3"),
        ("(2)-3", "3"),
        ("1,234.5 apples", "1,234.5"),
        ("1,2,3", "3"),
        ("2/3", "2/3"),
        (".5", ".5"),
        ("no number", None),
        ("v2", None),
        ("\u22124", "\u22124"),
        ("The answer is 2/3.", "2/3"),
        ("It is 12/18 = 2/3. Done", "2/3"),
        ("so $\\frac{2}{3}$.", "2/3"),
        ("-\\dfrac12", "-1/2"),
        ("2\\frac{1}{2}", "1/2"),
        ("5, or 1e100", "5"),
        ("5, or 1.5e100", "5"),
        ("see 3.1.4", None),
        ("7 " + "9" * 61, "7"),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_boxed_and_tagged():
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{2}} and \boxed{cut") == r"\frac{1}{2}"
    assert boxed("no box") is None
    assert tagged("<answer>1</answer> no, <answer> 2 </answer>", "answer") == " 2 "
    assert tagged("</answer><answer>", "answer") is None
    assert tagged("<answer>3", "answer") is None


@pytest.mark.parametrize(
    "text, value",
    [
        ("1,000", 1000),
        ("$5", 5),
        ("50\\%", 50),
        ("3.0", 3),
        ("1e3", 1000),
        ("-7.", -7),
        ("\\frac{3}{4}", 0.75),
        ("\\frac34", 0.75),
        ("\\dfrac{-3}4", -0.75),
        ("2\\frac{1}{2}", None),
        ("\\text{8}", 8),
        ("6/4", 1.5),
        ("5 apples", None),
        ("12 13", None),
        ("1/0", None),
    ],
)
def test_as_number(text, value):
    assert as_number(text) == value


# ---- answers -----------------------------------------------------------------------------------


def test_answer_auto_takes_tag_then_box_then_number_then_text():
    responses = ["<answer>7</answer> 8", "\\boxed{7} 8", "8 then 7", "7 then 8", "seven"]
    assert answers_to(7, *responses) == [1, 1, 1, 0, 0]
    assert answers_to("Paris", " paris.", "It is Paris", "<answer>Paris</answer>") == [1, 0, 1]


def test_a_fraction_at_the_end_of_a_sentence_is_one_number():
    ends = ["The answer is 2/3.", "so $\\frac23$.", "4/6, I think"]
    assert answers_to("2/3", *ends) == [1, 1, 1]
    assert answers_to(3, *ends) == [0, 0, 0]


def test_answer_from_one_place():
    responses = ["<answer>7</answer>", "\\boxed{7}", "so 7", "7"]
    assert answers_to("7", *responses, answer_from="tag") == [1, 0, 0, 0]
    assert answers_to("7", *responses, answer_from="boxed") == [0, 1, 0, 0]
    assert answers_to("7", *responses, answer_from="number") == [1, 1, 1, 1]
    assert answers_to("7", *responses, answer_from="text") == [0, 0, 0, 1]
    assert answers_to("7", "<a>7</a>", answer_from="tag", answer_tag="a") == [1]


def test_answer_compares_values_or_texts():
    assert answers_to("0.5", "1/2", ".50", "0.51") == [1, 1, 0]
    assert answers_to("0.5", "1/2", "0.5", answer_match="text", answer_from="text") == [0, 1]
    assert answers_to("12345678", "12345679") == [0]  # exactly, whatever the size


def test_known_answers_as_data_sets_write_them():
    assert answers_to("6 + 1 = 7\n#### 7", "7") == [1]
    assert answers_to("so \\boxed{7}", "7") == [1]
    assert answers_to(True, "true") == [1]


@pytest.mark.parametrize("missing", [None, "", "  ", [], {}])
def test_a_row_without_a_known_answer_is_not_scored(missing):
    assert answers_to(missing, "7") == [None]


def test_mathematics():
    pytest.importorskip("math_verify")
    assert answers_to("x+1", "$1 + x$", "$x$", answer_match="math") == [1, 0]


def test_math_verify_missing_is_said_when_the_reward_is_made(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install math-verify"):
        answer_reward("answer", answer_match="math")


# ---- form, length, JSON ------------------------------------------------------------------------


def test_format():
    reward = format_reward(r"<answer>.*</answer>")
    found = scores(reward, ["a <answer>1\n2</answer> b", "<answer>", ""])
    assert found == [1, 0, 0]


def test_length():
    assert scores(length_reward(4), ["a b c d", "a b", "", "a " * 6, "a " * 99]) == [
        1,
        0.5,
        0,
        0.5,
        0,
    ]


def test_json(schema):
    good = ['{"name": "bo"}', '```json\n{"name": "bo", "age": 3}\n```', ' {"name": "bo", "x": 1}\n']
    bad = ['{"name": "Bo"}', '{"age": 3}', '{"name": "bo", "age": NaN}', '{"name": "bo"} ok', "[]"]
    assert scores(json_reward(schema), good) == [1, 1, 1]
    assert scores(json_reward(schema), bad) == [0] * 5


# ---- whatever a model writes -------------------------------------------------------------------


def every_reward(schema) -> list:
    found = [answer_reward("answer", answer_from=f) for f in ("auto", "boxed", "number", "text")]
    found += [answer_reward("answer", answer_match="text"), format_reward("(a+)+$")]
    return [*found, length_reward(3), json_reward(schema)]


def test_hostile_texts_score_and_never_raise(schema, monkeypatch):
    monkeypatch.setattr(answers, "PATIENCE", 0.2)
    for reward in every_reward(schema):
        for known in (7, "Paris", "\\boxed{"):
            columns = {"answer": [known] * len(HOSTILE)} if reward.columns else {}
            found = scores(reward, HOSTILE, **columns)
            assert all(0 <= score <= 1 for score in found), reward.name


def test_hostile_mathematics_scores_and_never_raises(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(answers, "PATIENCE", 0.2)
    hostile = [text for text in HOSTILE if len(text) < 200]
    assert set(answers_to("x + 1", *hostile, answer_match="math")) <= {0.0, 1.0}


@given(st.text(max_size=60), st.text(max_size=20) | st.integers() | st.floats())
@settings(max_examples=150, deadline=None)
def test_any_text_and_any_known_answer(response, known):
    for place in ("auto", "number"):
        assert answers_to(known, response, answer_from=place)[0] in (None, 0, 1)


@given(st.text("0123456789.,/-+eE $%\\frac{}", max_size=30))
@settings(max_examples=300, deadline=None)
def test_numbers_of_any_form_are_read_or_not(text):
    number = as_number(text)
    if number is not None and max(map(len, re.findall("[0-9]+", str(number)))) <= 60:
        assert number == as_number(str(number))


@pytest.mark.parametrize("text", ["\\boxed{" * 9, "\\boxed{1}{" * 9, "}" * 9 + "\\boxed{2{" * 9])
def test_the_time_of_a_box_grows_with_the_text_alone(text):
    def steps(text: str) -> int:
        count = 0

        def seen(frame, event, _):
            nonlocal count
            count += 1
            return seen

        sys.settrace(seen)
        try:
            boxed(text)
        finally:
            sys.settrace(None)
        return count

    assert steps(text * 20) < 25 * steps(text)


def test_a_search_that_does_not_end_costs_its_row_alone(monkeypatch):
    monkeypatch.setattr(answers, "PATIENCE", 0.1)
    monkeypatch.setattr(answers, "boxed", lambda text: "7" if text == "7" else slow())
    reward = answer_reward("answer", answer_from="boxed")
    with time_limit(30):
        assert scores(reward, ["x", "7"], answer=["7", "7"]) == [0, 1]


def slow():
    while True:
        pass


def test_a_pattern_that_backtracks_without_end_costs_its_row_alone(monkeypatch):
    monkeypatch.setattr(answers, "PATIENCE", 0.1)
    reward = format_reward("(a+)+$")
    with time_limit(30):  # as a reward set calls it
        assert scores(reward, ["a" * 50 + "!", "aaa"]) == [0, 1]


def test_off_the_main_thread_there_is_no_alarm(schema):
    found = []
    thread = threading.Thread(target=lambda: found.extend(scores(format_reward("a"), ["a", "b"])))
    thread.start()
    thread.join()
    assert found == [1, 0]


# ---- what a person gets wrong ------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda f: format_reward("("), "not a regular expression"),
        (lambda f: format_reward("a{99999999999}"), "not a regular expression"),
        (lambda f: length_reward(0), "words, at least 1"),
        (lambda f: answer_reward("a", answer_tag="<b>"), "a name without blanks"),
        (lambda f: json_reward(f / "none.json"), "no JSON can be read"),
        (lambda f: json_reward(f), "no JSON can be read"),
    ],
)
def test_refused_in_a_line(make, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "no JSON can be read"),
        ('{"type": "strin"}', "not a JSON Schema"),
        ("[1]", "not a JSON Schema"),
        ("3", "not a JSON Schema"),
        ('{"pattern": "("}', "not a JSON Schema"),
        ('{"$ref": "https://example.org/schema.json"}', "leads nowhere in it"),
        ('{"properties": {"a": {"$ref": "#/$defs/b"}}}', "leads nowhere in it"),
    ],
)
def test_schemas_refused_in_a_line(text, message, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        json_reward(path)
    assert "\n" not in str(caught.value) and "schema.json" in str(caught.value)


# ---- in a set ----------------------------------------------------------------------------------


def test_unscored_rows_are_left_out_where_the_set_says_so():
    rewards = [answer_reward("answer"), length_reward(1)]
    columns = {"answer": [7, None]}
    totals, parts = RewardSet(rewards, unscored=True)(["p", "p"], ["7", "a b"], **columns)
    assert totals == [2, 0] and str(parts["answer"]) == "[1.0, nan]"
    alone = RewardSet([answer_reward("answer")], unscored=True)
    assert str(alone(["p", "p"], ["7", "a b"], **columns)[0]) == "[1.0, nan]"
    with pytest.raises(UserError, match="row 1: the score None is not a finite number"):
        RewardSet(rewards)(["p", "p"], ["7", "a b"], **columns)


def test_a_reward_that_is_only_logged_scores_no_row():
    logged = length_reward(1)
    logged.weight = 0.0
    rewards = RewardSet([answer_reward("answer"), logged], unscored=True)
    assert str(rewards(["p"], ["7"], answer=[None])[0]) == "[nan]"
    assert RewardSet([logged])(["p"], ["7"])[0] == [0]


def test_a_column_that_the_data_has_not_is_said_before_anything_runs():
    def own(prompts, responses, level, ended, scale=1, **rest):
        raise AssertionError

    from rewards.reward_set import Reward

    rewards = RewardSet([answer_reward("answer"), Reward("own", own)])
    rewards.check_columns(["answer", "level"])
    with pytest.raises(UserError, match="'answer' asks for the column 'answer'.*are: level"):
        rewards.check_columns(["level"])
    with pytest.raises(UserError, match="'own' asks for the column 'level'"):
        rewards.check_columns(["answer"])
