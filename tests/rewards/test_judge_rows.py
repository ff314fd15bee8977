"""judge.py: the rows that it reads and the labels that it writes."""

import math
import shlex

import pytest
from files import ROOT
from judge_runs import DIGITS, PAIRS, Scripted, lines, run, write

import judge
import sft
from rewards.constitution import Principle, drawn, read_constitution
from rewards.digits import digits_score

pytestmark = pytest.mark.usefixtures("in_tmp")

# ------------------------------------------------------------------------------ rows


def test_rows_are_preferences_with_log_odds_and_what_the_judge_said():
    _, err = run("--input", PAIRS, "--max-rows", 6, "--judge", DIGITS, "--output", "a.jsonl")
    names = {principle.name for principle in read_constitution(ROOT / "data/constitution.yaml")}
    for i, (row, given) in enumerate(zip(lines("a.jsonl"), lines(PAIRS), strict=False)):
        one, other = row["judge"]["first_wins"]
        p = (one + 1 - other) / 2
        assert row["judge"]["p"] == pytest.approx(max(p, 1 - p)) and row["judge"]["pair"] == i
        assert row["margin"] == pytest.approx(math.log(max(p, 1 - p) / min(p, 1 - p)))
        assert (row["chosen"] == given["chosen"]) == (p > 0.5)
        assert {row["chosen"], row["rejected"]} == {given["chosen"], given["rejected"]}
        assert row["judge"]["orders_agree"] is ((one > 0.5) == (other < 0.5))
        assert row["judge"]["principle"] in names and row["prompt"] == given["prompt"]
    # The digits model cannot read, and always names the same place.
    assert "warning: the judge prefers the first place in 100%" in err


def test_a_swapped_file_gives_the_same_labels():
    rows = lines(PAIRS)[:5]
    write("one.jsonl", rows)
    write("two.jsonl", [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows])
    for name in ("one", "two"):
        run("--input", f"{name}.jsonl", "--judge", DIGITS, "--output", f"{name}.out.jsonl")
    for a, b in zip(lines("one.out.jsonl"), lines("two.out.jsonl"), strict=True):
        assert (a["chosen"], a["rejected"]) == (b["chosen"], b["rejected"])
        assert a["judge"]["p"] == pytest.approx(b["judge"]["p"], abs=1e-6)


def test_the_true_score_as_judge_is_right_where_length_is_wrong():
    """Planted: the longer answer is the worse one in half of the pairs."""
    short, long = " 22 30 36 40 44", " 22 30 36 40 44 46 48 50 52 54"
    rows = []
    for i in range(8):
        good, bad = (short, long) if i % 2 else (long, short)
        bad = " ".join(str(int(n) + (n != "22")) for n in bad.split())
        rows.append({"prompt": "8 20", "chosen": good, "rejected": " " + bad})
        rows[-1] |= {"chosen": rows[-1]["rejected"], "rejected": good} if i > 3 else {}
    out, _ = run("--input", write("p.jsonl", rows), "--ground-truth-reward")
    for row in lines("judged.jsonl"):
        assert digits_score("8 20" + row["chosen"]) == 1 > digits_score("8 20" + row["rejected"])
        assert row["judge"]["p"] == 1 and row["margin"] is None
    assert "agreement  0.500 with what 8 rows prefer themselves" in out


def test_soft_labels_of_a_reward_are_the_sigmoid_of_the_difference():
    run("--input", PAIRS, "--ground-truth-reward", "--soft-labels", "--output", "a.jsonl")
    for row in lines("a.jsonl"):
        gain = digits_score(row["prompt"] + row["chosen"])
        gain -= digits_score(row["prompt"] + row["rejected"])
        assert row["judge"]["p"] == pytest.approx(1 / (1 + math.exp(-gain)))
        assert row["margin"] == pytest.approx(gain)


def test_ties_equal_answers_and_doubtful_pairs_are_counted_and_kept_aside():
    rows = [
        {"prompt": "2", "chosen": " 4 6", "rejected": " 8 10"},  # both right
        {"prompt": "2", "chosen": " 4 6", "rejected": " 4 6"},
        {"prompt": "2", "chosen": " 4 6", "rejected": " 4 5"},
        {"prompt": "2", "chosen": " 4 6 8 10", "rejected": " 3 3 1 1"},
    ]
    words = ["--input", write("p.jsonl", rows), "--ground-truth-reward", "--soft-labels"]
    out, _ = run(*words, "--min-confidence", 0.6)
    assert "4: 1 labelled, 1 left: a tie, 1 left: both answers are the same, 1 left: P" in out
    (row,) = lines("judged.jsonl")
    assert row["chosen"] == " 4 6 8 10"
    left = lines("judged.unlabelled.jsonl")
    assert [row["judge"]["pair"] for row in left] == [0, 1, 2] and left[0]["tie"] is True
    assert left[2]["responses"] == [" 4 6", " 4 5"]
    _, err = run(*words, "--min-confidence", 0.5, status=2)
    assert "was judged with another --min-confidence" in err


def test_an_answer_that_says_nothing_makes_no_record_that_a_reader_refuses(monkeypatch):
    from rewards import sampled_rows

    texts = iter(["", " 4 6", " 98", " 9 9", " 4\0", " 2"])
    monkeypatch.setattr(sampled_rows, "response_text", lambda *_: next(texts))
    words = ["--prompts", PAIRS, "--max-rows", 3, "--ground-truth-reward"]
    run(*words)
    assert [row["judge"]["pair"] for row in lines("judged.jsonl")] == [1]
    left = lines("judged.unlabelled.jsonl")
    whys = ["an answer says nothing, which no record holds"]
    whys.append("an answer has a NUL character, which no reader takes")
    assert [row["judge"]["why"] for row in left] == whys


def test_sampled_pairs_are_two_answers_to_each_prompt():
    words = ["--prompts", PAIRS, "--max-rows", 5, "--judge", DIGITS, "--max-new-tokens", 8]
    run(*words)
    rows = lines("judged.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in lines(PAIRS)[:5]]
    assert len({row["chosen"] for row in rows} | {row["rejected"] for row in rows}) > 6
    run(*words, "--output", "other.jsonl", "--seed", 1)
    assert [r["chosen"] for r in lines("other.jsonl")] != [r["chosen"] for r in rows]


def test_principles_are_drawn_by_seed_and_row():
    several = [Principle(str(i), "p") for i in range(5)]
    first = [drawn(several, 0, row).name for row in range(50)]
    assert first == [drawn(several, 0, row).name for row in range(50)]
    assert first != [drawn(several, 1, row).name for row in range(50)]
    assert set(first) == {"0", "1", "2", "3", "4"}


def test_labels_train_a_reward_model_as_the_command_that_is_printed_says():
    out, _ = run("--input", PAIRS, "--judge", DIGITS, "--soft-labels", "--max-rows", 8)
    (command,) = [line for line in out.splitlines() if "sft.py" in line]
    words = command.removeprefix("next: ").split()[2:]
    assert {"--soft-labels", "--reward-model", "judged.jsonl"} <= {*words}
    assert sft.main([*words, "--iters", "2", "--save-every", "0", "--steps-per-eval", "0"]) == 0


TOOLS = [{"type": "function", "function": {"name": "rain_in", "parameters": {}}}]
ASKED = [{"role": "user", "content": "rain?"}]
CALL = {"type": "function", "function": {"name": "rain_in", "arguments": {"town": "Oslo"}}}
CALLS = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            {"prompt": ASKED, "tools": TOOLS, "chosen": "yes", "rejected": "no"},
            ["Question:\ntools:", "rain_in", "rain?", "Answer 1:\nyes"],
        ),
        (
            {"prompt": "rain?", "documents": [{"text": "wet"}], "chosen": "yes", "rejected": "no"},
            ["documents:", "wet", "rain?"],
        ),
        (
            {
                "prompt": [*ASKED, *CALLS, {"role": "tool", "content": "wet"}],
                "chosen": "yes",
                "rejected": "no",
            },
            ["user: rain?", "assistant: calls", '"town": "Oslo"', "tool: wet"],
        ),
        (
            {
                "prompt": ASKED,
                "tools": TOOLS,
                "chosen": CALLS,
                "rejected": [{"role": "assistant", "content": "no"}],
            },
            ["Answer 1:\ncalls", '"town": "Oslo"', "Answer 2:\nno"],
        ),
    ],
)
def test_the_judge_reads_tools_documents_and_calls(monkeypatch, row, parts):
    reader = Scripted()
    monkeypatch.setattr(judge, "load_judge", lambda args: reader)
    run(
        "--input", write("rows.jsonl", [row]), "--judge", "any", "--judge-url", "http://127.0.0.1:9"
    )
    text, at = reader.verdicts[0], 0
    for part in parts:
        at = text.index(part, at) + len(part)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"foo": 3}, "foo"),
        ({"tools": TOOLS, "context": "CTX", "topic": "t", "rating": 1}, "topic, rating"),
        ({"context": "CTX", "system": "SYS", "history": [["a", "b"]]}, None),
    ],
)
def test_fields_that_a_judge_does_not_read_are_named(more, named):
    row = {"prompt": "rain?", "chosen": "yes", "rejected": "no"} | more
    out, _ = run("--input", write("rows.jsonl", [row]), "--judge", DIGITS)
    assert ("fields that nothing used" in out) == (named is not None)
    assert named is None or f"fields that nothing used: {named}\n" in out


def test_answers_to_other_tools_are_no_pair():
    rows = [{"prompt": ASKED, "tools": TOOLS, "completion": "a"}]
    rows.append({"prompt": ASKED, "completion": "b"})
    words = ["--judge", DIGITS, "--input", write("rows.jsonl", rows)]
    assert "one answer to its prompt" in run(*words, status=2)[1]


@pytest.mark.parametrize(
    ("prompt", "more", "named"),
    [
        ("8 20", [], []),
        ("what", [], ["--model", "MODEL"]),
        ("8 20", ["--model", DIGITS, "--prompt-template", "Q: {prompt}\\n"], ["--prompt-template"]),
    ],
)
def test_the_next_command_reads_the_labels_as_they_were_made(prompt, more, named):
    if more:  # prompts, which the model answers
        path = write("rows.jsonl", [{"prompt": f"{prompt} {i}"} for i in range(4)])
        out, _ = run("--prompts", path, "--judge", DIGITS, *more, "--max-new-tokens", 6)
    else:
        path = write("rows.jsonl", [{"prompt": prompt, "chosen": "1 2", "rejected": "3"}] * 2)
        out, _ = run("--input", path, "--judge", DIGITS)
    lines = [line for line in out.splitlines() if "python " in line]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line.removeprefix("next: "))
        assert [word for word in words if word in named] == named
        assert more or ("--model" in words) == bool(named)
        if more:
            assert words[words.index("--prompt-template") + 1] == "Q: {prompt}\\n"
