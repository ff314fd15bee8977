"""Names masked in histories, and the rows that are made of them."""

import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from files import ROOT
from hypothesis import given
from hypothesis import strategies as some

from histories.conversations import (
    ME,
    History,
    Limits,
    Message,
    make_rows,
    prompts_of,
    trained_turns,
)
from histories.privacy import Masker

# ---- masks -------------------------------------------------------------------------------------

HARD = [
    ("mail ann.b+x@mail.example.co.uk now", "mail [MAIL] now"),
    ("ann(at)example.org", "[MAIL]"),
    ("call +1 (555) 010-2030.", "call [NUMBER]."),
    ("0176/1234567 or 0041 79 123 45 67", "[NUMBER] or [NUMBER]"),
    ("see https://x.org/a?b=c, and www.y.net/z", "see [LINK] and [LINK]"),
    ("on maps.google.com/place", "on [LINK]"),
    ("Ann's dog, ANN, annual", "[NAME]'s dog, [NAME], annual"),
    ("ask Ann Lee-Brown or lee-brown", "ask [NAME] or [NAME]"),
    ("@ann_b wrote", "[NAME] wrote"),
    ("in 2024 for 1,000 at 10:30", "in 2024 for 1,000 at 10:30"),
    ("+49 (0) 170 / 123 45 67 or 0170\u2011123\u201145\u201167", "[NUMBER] or [NUMBER]"),
    ("to DE89 3704 0044 0532 0130 00, GB29NWBK60161331926819", "to [NUMBER], [NUMBER]"),
    ("mu\u0308ller wrote", "[NAME] wrote"),
    ("O’Brien and o'brien", "[NAME] and [NAME]"),
    ("李雷你好", "[NAME]你好"),
    ("at foo.xyz/abc, and/or e.g. this", "at [LINK] and/or e.g. this"),
    ("Müller and müller", "[NAME] and [NAME]"),
]


MORE = ["Pat O'Brien", "李雷"]


@pytest.mark.parametrize(("text", "masked"), HARD)
def test_a_hard_case_is_masked(text, masked):
    assert Masker(["Ann Lee-Brown", "Müller", "+15550100", "a@b.org", *MORE]).mask(text) == masked


def test_words_of_one_s_own_are_masked_and_nothing_else_without_names():
    assert Masker([], ["Acme"]).mask("at Acme with Ann") == "at [NAME] with Ann"
    assert Masker([]).mask("at Acme with Ann") == "at Acme with Ann"


# ---- rows --------------------------------------------------------------------------------------

START = datetime(2024, 1, 1, tzinfo=UTC)


def history(*told, chat="Ann", groups=()):
    """Messages from (minutes, sender, text)."""
    messages = [
        Message(chat, sender, START + timedelta(minutes=minute), text, f"{chat}{i}")
        for i, (minute, sender, text) in enumerate(told)
    ]
    return History(messages, Counter(), set(groups))


def test_turns_join_sessions_end_and_the_last_turn_is_mine():
    found = make_rows(
        history(
            (0, ME, "lost"),
            (1, "Ann", "a"),
            (2, "Ann", "b"),
            (3, ME, "c"),
            (4, ME, "d"),
            (5, "Ann", "e"),
            (400, "Ann", "f"),
            (401, ME, "g"),
        ),
        Limits(min_messages=2),
        valid_share=0,
    )
    assert [[m["content"] for m in row["messages"]] for row in found.train] == [
        ["a\nb", "c\nd"],
        ["f", "g"],
    ]
    assert found.dropped == {
        "mine, without anything before it in its session": 1,
        "unanswered in its session": 1,
    }


def test_a_long_session_goes_on_with_context_that_is_not_trained_again():
    told = [(i, "Ann" if i % 2 == 0 else ME, f"{i:010d}") for i in range(20)]
    found = make_rows(history(*told), Limits(max_length=60, min_messages=2), valid_share=0)
    assert all(sum(len(m["content"]) for m in row["messages"]) <= 60 for row in found.train)
    trained = [text for row in found.train for _, text, _ in trained_turns(row)]
    assert trained == [f"{i:010d}" for i in range(1, 20, 2)]  # each once
    second = found.train[1]["messages"]
    assert [m.get("train") for m in second[:4]] == [None, False, None, False]
    assert second[0]["role"] == "user"


def test_an_exchange_that_is_too_long_is_left_out_and_counted():
    told = [(0, "Ann", "x" * 50), (1, ME, "y" * 50), (2, "Ann", "a"), (3, ME, "b")]
    found = make_rows(history(*told), Limits(max_length=60, min_messages=2), valid_share=0)
    assert [r["messages"][0]["content"] for r in found.train] == ["a"]
    assert found.dropped == {"in an exchange longer than --max-length": 2}


def test_the_newest_sessions_validate_and_none_is_in_both():
    told = [
        m
        for day in range(20)
        for m in ((day * 1440, "Ann", f"q{day}"), (day * 1440 + 1, ME, f"a{day}"))
    ]
    found = make_rows(history(*told), Limits(min_messages=2))
    assert [r["messages"][1]["content"] for r in found.valid] == ["a18", "a19"]
    assert len(found.train) == 18


def test_in_a_group_others_have_their_names_before_their_turns():
    found = make_rows(
        history((0, "Ann", "hi"), (1, "Eve", "ho"), (2, ME, "hey"), groups=["Ann"]),
        Limits(min_messages=2),
        valid_share=0,
    )
    assert found.train[0]["messages"][0]["content"] == "Ann: hi\nEve: ho"


@given(
    told=some.lists(
        some.tuples(
            some.integers(0, 600), some.sampled_from([ME, "Ann"]), some.text("ab", min_size=1)
        ),
        max_size=30,
    ),
    max_length=some.integers(2, 40),
    context=some.integers(0, 6),
)
def test_every_message_is_in_a_row_once_or_counted(told, max_length, context):
    limits = Limits(max_length=max_length, context_turns=context, min_messages=2)
    found = make_rows(history(*told), limits)
    rows = [*found.train, *found.valid]
    mine = [key for row in rows for _, _, keys in trained_turns(row) for key in keys]
    assert len(mine) == len(set(mine))
    for row in rows:
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert sum(len(m["content"]) for m in row["messages"]) <= max_length
    assert len(list(prompts_of(rows))) == sum(len(row["keys"]) for row in rows)
    others = sum(found.dropped.values())
    answered = len(told) - others - len(mine)
    assert answered >= sum(len(row["keys"]) for row in rows)  # at least one before each of mine


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--telegram", "x", "--tapbacks"], "--tapbacks: does nothing without --database"),
        (["--telegram", "x", "--mask-words", "a"], "--mask-words: does nothing without --names"),
        (["--database", "x", "--me", "a"], "--me: does nothing with --database"),
        (["--database", "x", "--gap", "0"], "--gap: hours between"),
        (["--database", "x", "--min-messages", "1"], "--min-messages: at least 2"),
        (["--export", "x", "--seed", "3"], "--seed: does nothing without --negatives"),
    ],
)
def test_flags_that_contradict_are_one_line(words, said, tmp_path):
    done = subprocess.run(
        [sys.executable, "data/imessage.py", *words, "--output-dir", tmp_path / "o"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
