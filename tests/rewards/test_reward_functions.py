"""Rewards from files and functions, checked and added up, and how each of them can fail."""

import math
import threading
import time

import mlx.core as mx
import numpy as np
import pytest

from errors import UserError
from rewards.reward_set import OutOfTime, Reward, RewardSet, time_limit
from rewards.user_function import check_scores, load_function

PROMPTS = ["one", "two", "three"]
RESPONSES = ["uno", "dos", "tres"]


def lengths(prompts, responses):
    return [len(r) for r in responses]


# ---- a function from a file --------------------------------------------------------------------


def write(folder, text: str, name: str = "my_rewards.py"):
    path = folder / name
    path.write_text(text)
    return path


def test_load_function(tmp_path):
    write(tmp_path, "FACTOR = 3\n", "neighbour_of_my_rewards.py")
    path = write(
        tmp_path,
        "from dataclasses import dataclass\n"
        "from neighbour_of_my_rewards import FACTOR\n"
        "@dataclass\n"
        "class Settings:\n"
        "    factor: 'int' = FACTOR\n"
        "calls = []\n"
        "def score(prompts, responses, **columns):\n"
        "    calls.append(len(prompts))\n"
        "    return [Settings().factor * len(r) + b for r, b in zip(responses, columns['bonus'])]\n"
        "def count(prompts, responses, **columns):\n"
        "    return [len(calls)] * len(prompts)\n",
    )
    score = load_function(f"{path}:score")
    assert score(PROMPTS, RESPONSES, bonus=[1, 2, 3]) == [10, 11, 15]
    # The file is run once: a second function of it shares its state.
    assert load_function(f"{path}:count")(PROMPTS, RESPONSES) == [1, 1, 1]


def test_load_function_runs_no_file_but_the_named_one(tmp_path):
    ran = tmp_path / "ran"
    write(tmp_path, f"open({str(ran)!r}, 'w')\n", "other.py")
    load_function(f"{write(tmp_path, 'def f(prompts, responses): pass')}:f")
    assert not ran.exists()


@pytest.mark.parametrize(
    "text, name, message",
    [
        (None, "score", "there is no file"),
        ("def score(p, r): pass", "scores", "no scores in it; its functions are: score"),
        ("x = 1", "score", "its functions are: none"),
        ("score = [1, 2]", "score", "score is of type list, a function is needed"),
        ("\n\ndef score(p, r:\n", "score", "my_rewards.py:3: running"),
        ("x = 1\nimport no_such_module_at_all\n", "score", "my_rewards.py:2: running"),
        ("raise SystemExit(3)", "score", "raised SystemExit: 3"),
        ("def score(p, r): pass", "", "FILE.py:NAME is needed"),
    ],
)
def test_load_function_refuses(tmp_path, text, name, message):
    path = tmp_path / "my_rewards.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="my_rewards.py") as caught:
        load_function(f"{path}:{name}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["rewards.py", ":score", "", "rewards.py:not a name"])
def test_load_function_refuses_another_form(spec):
    with pytest.raises(UserError, match="FILE.py:NAME is needed"):
        load_function(spec)


# ---- checked scores ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores",
    [
        [1, 0.5, True],
        (1.0, 0.5, np.float32(1)),
        np.array([1, 0.5, 1], dtype=np.float16),
        mx.array([1, 0.5, 1]),
    ],
)
def test_check_scores_takes_numbers(scores):
    found = check_scores(scores, PROMPTS, RESPONSES, "r")
    assert found == [1.0, 0.5, 1.0]
    assert all(type(score) is float for score in found)


@pytest.mark.parametrize(
    "scores, message",
    [
        ([1, 2], "returned 2 scores for 3 responses"),
        ([1, 2, 3, 4], "returned 4 scores for 3 responses"),
        (None, "returned NoneType, a list"),
        (0.5, "returned float, a list"),
        (np.array(0.5), "returned float, a list"),
        ({"a": 1}, "returned dict, a list"),
        ([1, float("nan"), 3], "row 1: the score nan is not"),
        ([1, 2, float("-inf")], "row 2: the score -inf is not"),
        ([1, None, 3], "row 1: the score None is not"),
        (["1", 2, 3], "row 0: the score '1' is not"),
        (np.zeros((3, 1)), "row 0: the score [0.0] is not"),
        ([1, 10**400, 3], "row 1: the score 1000"),
    ],
)
def test_check_scores_refuses(scores, message):
    with pytest.raises(UserError) as caught:
        check_scores(scores, PROMPTS, RESPONSES, "mine")
    assert "'mine'" in str(caught.value) and message in str(caught.value)
    for row in range(3):
        if f"row {row}" in message:
            assert f"prompt {PROMPTS[row]!r}, response {RESPONSES[row]!r}" in str(caught.value)


def test_messages_are_one_short_line():
    with pytest.raises(UserError) as caught:
        check_scores([None], ["a\nb" * 1000], ["c\n" * 5000], "r")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# ---- several rewards ---------------------------------------------------------------------------


def test_weighted_sum_by_name():
    def bonus(prompts, responses, *, extra, **columns):
        assert columns == {"other": ["a", "b", "c"]}
        return extra

    rewards = RewardSet([Reward("long", lengths, 2.0), Reward("bonus", bonus, -0.5)])
    totals, parts = rewards(PROMPTS, RESPONSES, extra=[1, 2, 3], other=["a", "b", "c"])
    assert parts == {"long": [3, 3, 4], "bonus": [1, 2, 3]}
    assert totals == [5.5, 5.0, 6.5]
    assert rewards.names == ["long", "bonus"] and rewards.weights == [2.0, -0.5]


def test_a_row_may_be_left_without_a_score_where_that_is_allowed():
    def sometimes(prompts, responses):
        return [None, math.nan, 2]

    def huge(prompts, responses):
        return np.array([1.0, 1e300, 1.0])

    rewards = [Reward("some", sometimes), Reward("huge", huge, 0.0)]
    totals, parts = RewardSet(rewards, unscored=True)(PROMPTS, RESPONSES)
    assert [math.isnan(total) for total in totals] == [True, True, False] and totals[2] == 2
    assert [math.isnan(score) for score in parts["some"]] == [True, True, False]
    assert parts["huge"] == [1, math.inf, 1]
    rewards[1].weight = 1.0
    totals = RewardSet(rewards, unscored=True)(PROMPTS, RESPONSES)[0]
    assert totals[0] == 1 and math.isnan(totals[1]) and totals[2] == 3
    with pytest.raises(UserError, match="reward 'some', row 0: the score None is not a finite"):
        RewardSet(rewards)(PROMPTS, RESPONSES)
    for wrong in ("1", [1.0]):  # no numbers, so no row that was left out
        bad = Reward("bad", lambda prompts, responses, wrong=wrong: [1, wrong, 1])
        with pytest.raises(UserError, match="reward 'bad', row 1"):
            RewardSet([bad], unscored=True)(PROMPTS, RESPONSES)


def test_columns_go_only_to_functions_that_take_them():
    def picky(prompts, responses, extra):
        return extra

    rewards = RewardSet([Reward("a", lengths), Reward("b", picky)])
    assert rewards(PROMPTS, RESPONSES, extra=[1, 1, 1], more=[0, 0, 0])[0] == [4, 4, 5]


def test_a_reward_cannot_change_the_rows_of_the_next():
    def destructive(prompts, responses):
        prompts.clear()
        return [float(len(responses.pop())) for _ in list(responses)]

    rewards = RewardSet([Reward("a", destructive), Reward("b", lengths)])
    assert rewards(PROMPTS, RESPONSES)[1] == {"a": [4, 3, 3], "b": [3, 3, 4]}


def test_names_are_made_unique():
    rewards = RewardSet([Reward(name, lengths) for name in ("r", "r", "r_2", "r")])
    assert rewards.names == ["r", "r_2", "r_2_2", "r_3"]
    totals, parts = rewards(["p"], ["ab"])
    assert totals == [8] and parts == dict.fromkeys(rewards.names, [2])


@pytest.mark.parametrize(
    "rewards",
    [[], [Reward("r", lengths, float("nan"))], [Reward("r", lengths, timeout=0)]],
)
def test_reward_set_refuses(rewards):
    with pytest.raises(UserError):
        RewardSet(rewards)


def test_reward_set_refuses_columns_that_do_not_fit():
    rewards = RewardSet([Reward("r", lengths)])
    with pytest.raises(UserError, match="extra: 2 entries for 3 responses"):
        rewards(PROMPTS, RESPONSES, extra=[1, 2])
    with pytest.raises(UserError, match="prompts: 2 entries"):
        rewards(PROMPTS[:2], RESPONSES)
    with pytest.raises(UserError, match="column 'responses'"):
        rewards(PROMPTS, RESPONSES, responses=[1, 2, 3])


def raised_by(function, timeout=None, **columns) -> str:
    with pytest.raises(UserError) as caught:
        RewardSet([Reward("fine", lengths), Reward("bad", function, timeout=timeout)])(
            PROMPTS, RESPONSES, **columns
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_reward_that_raises_names_the_row():
    def raises(prompts, responses, target):
        return [1 / (t - 7) for t in target]

    message = raised_by(raises, target=[1, 7, 2])
    assert message == (
        "reward 'bad' raised ZeroDivisionError: division by zero; "
        "row 1: prompt 'two', response 'dos'"
    )


def test_a_reward_that_raises_for_no_single_row():
    def raises(prompts, responses):
        if len(prompts) > 1:
            raise ValueError("one\nat a time")
        return [1.0]

    message = raised_by(raises)
    assert "raised ValueError: one at a time; no single row of the 3" in message
    assert "row 0: prompt 'one', response 'uno'" in message


def test_a_reward_that_exits_or_returns_nonsense():
    assert "raised SystemExit: 4; row 0" in raised_by(lambda prompts, responses: exit(4))
    assert "'bad' returned NoneType" in raised_by(lambda prompts, responses: None)
    assert "'bad' returned 2 scores" in raised_by(lambda prompts, responses: [1, 2])
    nan = raised_by(lambda prompts, responses: [0, 0, float("nan")])
    assert "'bad', row 2: the score nan" in nan and "response 'tres'" in nan


@pytest.mark.parametrize("kind", ["sleep", "loop", "swallow"])
def test_a_reward_that_hangs(kind):
    def hangs(prompts, responses):
        deadline = time.monotonic() + 20
        while "three" in prompts and time.monotonic() < deadline:
            try:
                time.sleep(20 if kind == "sleep" else 0)
            except Exception:
                assert kind != "swallow"
        return [0.0] * len(prompts)

    start = time.monotonic()
    message = raised_by(hangs, timeout=0.3)
    assert message == (
        "reward 'bad': no answer within 0.3 s; row 2: prompt 'three', response 'tres'"
    )
    assert time.monotonic() - start < 5


def test_a_bare_except_does_not_swallow_the_time_limit_for_good():
    def stubborn(prompts, responses):
        try:
            time.sleep(20)
        except:  # noqa: E722
            time.sleep(20)
        return [0.0] * len(prompts)

    start = time.monotonic()
    assert "no answer within 0.05 s" in raised_by(stubborn, timeout=0.05)
    assert time.monotonic() - start < 10


def test_time_limit_lets_in_time_through_and_is_gone_afterwards():
    def slow(prompts, responses):
        time.sleep(0.05)
        return [1.0] * len(prompts)

    assert RewardSet([Reward("r", slow, timeout=1)])(PROMPTS, RESPONSES)[0] == [1, 1, 1]
    time.sleep(1.1)  # an alarm that was left on would ring here


def test_time_limits_nest():
    with pytest.raises(OutOfTime), time_limit(0.2):
        with time_limit(5):
            pass
        time.sleep(2)


def test_a_reward_with_a_time_limit_may_use_mlx():
    weight = mx.random.normal((4,))  # not evaluated yet: another thread could not

    def score(prompts, responses):
        return mx.array([len(r) for r in responses]) + 0 * weight.sum()

    assert RewardSet([Reward("r", score, timeout=30)])(PROMPTS, RESPONSES)[0] == [3, 3, 4]


def test_time_limit_off_the_main_thread_is_refused():
    messages = []

    def work():
        try:
            RewardSet([Reward("r", lengths, timeout=1)])(PROMPTS, RESPONSES)
        except UserError as error:
            messages.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(messages) == 1 and "main thread" in messages[0]
