"""data/process_data.py and data/process_data_rlhf.py: trees, ratings, pairs, columns."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from files import ROOT

from data_utils import RawRow, to_instructions, to_pairs, to_prompts
from errors import UserError

TREES = ROOT / "data" / "conf" / "trees.jsonl"


def message(name, parent, role, text, rank=None, lang="en", **more):
    made = {"message_id": name, "parent_id": parent, "role": role, "text": text, "lang": lang}
    return {**made, "rank": rank, **more}


TREE = [
    message("q", None, "prompter", "What is a fig?"),
    message("a2", "q", "assistant", "No idea.", 2.0),
    message("a0", "q", "assistant", "A fruit.", 0.0),
    message("a1", "q", "assistant", "A plant.", 1),
    message("f", "a0", "prompter", "Sweet?"),
    message("fa", "f", "assistant", "Very.", 0.0),
    message("fb", "f", "assistant", "Blue.", 1.0),
    message("fw", "f", "assistant", "Yes!", None),
    message("d", None, "prompter", "Was?", lang="de"),
    message("da", "d", "assistant", "Nichts.", 0.0, "de"),
    message("db", "d", "assistant", "Etwas.", 1.0, "de"),
    message("u", None, "prompter", "Alone?"),
    message("ua", "u", "assistant", "Unranked.", None),
    message("e", None, "prompter", "Nobody answers"),
]
HISTORY = [["What is a fig?", "A fruit."]]


def nested(name="q"):
    """The tree of one question as OpenAssistant's files of trees have it."""
    by_name = {row["message_id"]: {**row, "replies": []} for row in TREE}
    for row in TREE:
        if row["parent_id"]:
            by_name[row["parent_id"]]["replies"].append(by_name[row["message_id"]])
    return {"message_tree_id": name, "tree_state": "ready_for_export", "prompt": by_name[name]}


def rows(*fields):
    return [RawRow(f"x:{i}", row) for i, row in enumerate(fields, 1)]


def write(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def script(name, *words, status=0):
    line = [sys.executable, str(ROOT / "data" / f"{name}.py"), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    if status:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr if status else done.stdout


# ------------------------------------------------------------------------------ trees

FORMS = {"messages": TREE, "trees": [nested("q"), nested("d"), nested("u"), nested("e")]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lang", [None, "en", "de"])
def test_the_best_answer_to_every_question(form, lang):
    done = to_instructions(rows(*FORMS[form]), lang, {})
    fig = {"instruction": "What is a fig?", "context": "", "response": "A fruit."}
    sweet = {"instruction": "Sweet?", "context": "", "history": HISTORY, "response": "Very."}
    was = {"instruction": "Was?", "context": "", "response": "Nichts."}
    wanted = {None: [fig, sweet, was], "en": [fig, sweet], "de": [was]}[lang]
    assert sorted(done.rows, key=str) == sorted(wanted, key=str)
    assert done.left_out["questions without an answer"] == 1
    assert sum(done.left_out.values()) == 5 - len(wanted)  # each question is a row or counted


@pytest.mark.parametrize("form", FORMS)
def test_the_best_against_each_that_ranks_lower(form):
    done = to_pairs(rows(*FORMS[form]), "en", {})
    fig = {"instruction": "What is a fig?", "chosen": "A fruit."}
    sweet = {"instruction": "Sweet?", "chosen": "Very.", "rejected": "Blue.", "history": HISTORY}
    wanted = [{**fig, "rejected": "A plant."}, {**fig, "rejected": "No idea."}, sweet]
    assert done.rows == wanted
    prompts = to_prompts(rows(*FORMS[form]), "en", {}).rows
    assert {"prompt": "Sweet?", "history": HISTORY} in prompts and {"prompt": "Alone?"} in prompts
    assert len(prompts) == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a0": {"deleted": True}}, "deleted or turned down"),
        ({"a0": {"review_result": False}}, "deleted or turned down"),
        ({"q": {"parent_id": "gone"}}, "their question is not there"),
    ],
)
def test_what_hangs_on_nothing_is_counted(change, reason):
    made = [{**row, **change.get(row["message_id"], {})} for row in TREE]
    done = to_instructions(rows(*made), "en", {})
    assert done.left_out[f"messages, {reason}"] == 1
    lost = done.left_out["messages, below one that is left out"]
    assert lost == {"q": 7, "a0": 4}[next(iter(change))]
    found = [row["response"] for row in done.rows]
    assert found == (["A plant."] if "a0" in change else [])


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (message("q", None, "prompter", "again"), "x:15: message q is there twice"),
        (message("z", "z", "prompter", "self"), "x:15: messages are one another's parents"),
        (message("z", "q", "judge", "who"), "role must be prompter or assistant, found 'judge'"),
        (message("z", "q", "assistant", ""), "x:15: text is empty"),
        (message("z", "q", "assistant", "x", "first"), "rank must be a number"),
        ({"instruction": "a", "response": "b"}, "x:15: is no message of a tree"),
    ],
)
def test_a_bad_message_is_named(row, wrong):
    with pytest.raises(UserError, match=wrong):
        to_instructions(rows(*TREE, row), None, {})


def test_a_question_that_follows_a_question_is_refused():
    made = [*TREE, message("z", "e", "prompter", "more"), message("za", "z", "assistant", "x", 0)]
    with pytest.raises(UserError, match="x:16: the conversation is more than questions"):
        to_instructions(rows(*made), None, {})


# ------------------------------------------------------------------------------ other rows

SAME = {"instruction": "Name it.", "context": "", "response": "Fig."}


@pytest.mark.parametrize(
    ("row", "columns", "made"),
    [
        ({"title": "Name it.", "response": "Fig."}, {"instruction": "title"}, SAME),
        (
            {"title": "Name it.", "selftext": "Here.", "answers": {"text": ["Fig.", "No."]}},
            {"instruction": "title", "context": "selftext", "response": "answers.text.0"},
            {**SAME, "context": "Here."},
        ),
        (
            {"q.title": "Name it.", "best": {"body": "Fig."}},
            {"instruction": "q.title", "response": "best.body"},
            SAME,
        ),
        ({"instruction": "Name it.", "input": "", "output": "Fig."}, {}, SAME),
        (
            {"instruction": "Name it.", "input": "Pears", "output": "Fig."},
            {},
            {**SAME, "context": "Pears"},
        ),
        ({"question": "Name it.", "answer": "Fig."}, {}, SAME),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "What is a fig?"},
                    {"role": "assistant", "content": "A fruit."},
                    {"role": "user", "content": "Name it."},
                    {"role": "assistant", "content": "Fig."},
                ]
            },
            {},
            {**SAME, "history": HISTORY, "system": "Be brief."},
        ),
    ],
)
def test_columns_become_instruction_and_response(row, columns, made):
    assert to_instructions(rows(row), None, columns).rows == [made]


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        (
            [
                {"prompt": "p", "response": "good", "rating": 5},
                {"prompt": "p", "response": "worse", "rating": "2"},
                {"prompt": "o", "response": "alone", "rating": 1},
                {"prompt": "p", "response": "as good", "rating": 5.0},
            ],
            {},
        ),
        (
            [
                {"ask": "p", "text": "worse", "stars": 1},
                {"ask": "p", "text": "good", "stars": 2},
                {"ask": "o", "text": "alone", "stars": 1},
            ],
            {"instruction": "ask", "response": "text", "rating": "stars"},
        ),
        (
            [
                {
                    "instruction": "p",
                    "completions": [
                        {"response": "worse", "overall_score": 3.5},
                        {"response": "good", "overall_score": 8.0},
                    ],
                },
                {"instruction": "o", "completions": [{"response": "x", "overall_score": 1}]},
            ],
            {},
        ),
        ([{"prompt": "p", "responses": ["worse", "good"], "scores": [0.1, 0.9]}], {}),
        ([{"chosen": "\n\nHuman: p\n\nAssistant: good",
           "rejected": "\n\nHuman: p\n\nAssistant: worse"}], {}),
        ([{"question": "p", "chosen": "good", "rejected": "worse"}], {}),
        (
            [{"ask": "p", "j": "good", "k": "worse"}],
            {"instruction": "ask", "chosen": "j", "rejected": "k"},
        ),
    ],
)  # fmt: skip
def test_ratings_and_pairs_become_pairs(fields, columns):
    done = to_pairs(rows(*fields), None, columns)
    assert done.rows == [{"instruction": "p", "chosen": "good", "rejected": "worse"}]


def test_a_dialogue_keeps_what_came_before():
    talk = "\n\nHuman: What is a fig?\n\nAssistant: A fruit.\n\nHuman: Sweet?\n\nAssistant:"
    row = {"chosen": f"{talk} Very.", "rejected": f"{talk} Blue."}
    wanted = {"instruction": "Sweet?", "chosen": "Very.", "rejected": "Blue.", "history": HISTORY}
    assert to_pairs(rows(row), None, {}).rows == [wanted]
    assert to_prompts(rows(row, row), None, {}).rows == [{"prompt": "Sweet?", "history": HISTORY}]


@pytest.mark.parametrize(
    ("convert", "row", "wrong"),
    [
        (to_instructions, {"title": "a", "body": "b"}, "x:1: .*--map instruction=COLUMN"),
        (to_instructions, {"instruction": "a", "response": ""}, "has no response"),
        (to_instructions, {"prompt": "a", "chosen": "b", "rejected": "c"}, "process_data_rlhf"),
        (to_instructions, {"text": "all of it"}, "no question with one answer"),
        (to_pairs, {"prompt": "a", "response": "b"}, "ranks nothing"),
        (to_pairs, {"prompt": "a", "response": "b", "rating": "high"}, "must be a number"),
        (to_pairs, {"prompt": "a", "response": "b", "rating": True}, "must be a number"),
        (to_prompts, {"text": "all of it"}, "has no prompt"),
        (to_prompts, {"body": "b"}, "--map"),
    ],
)
def test_rows_that_do_not_fit_are_named(convert, row, wrong):
    with pytest.raises(UserError, match=wrong):
        convert(rows(row), None, {})


# ------------------------------------------------------------------------------ scripts


def test_files_of_every_kind(tmp_path):
    with open(tmp_path / "posts.csv", "w", newline="", encoding="utf-8") as file:
        made = csv.writer(file)
        made.writerows([["title", "response"], ["Name it.", "Fig."]])
    told = script("process_data", "--input", tmp_path / "posts.csv", "--map", "instruction=title",
                  "--output", tmp_path / "new" / "o.jsonl")  # fmt: skip
    assert f"wrote {tmp_path}/new/o.jsonl: 1 rows\nnext: python sft.py " in told
    assert json.loads((tmp_path / "new" / "o.jsonl").read_text()) == SAME
    write(tmp_path / "trees.jsonl", TREE)
    given = ["--input", tmp_path / "trees.jsonl", "--lang", "en", "--output"]
    told = script("process_data", *given, tmp_path / "sft.jsonl")
    assert "left out, questions without an answer: 1" in told
    told = script("process_data_rlhf", "--kind", "preference", *given, tmp_path / "rm.jsonl")
    assert "sft.py --model MODEL --train-file" in told and "--reward-model --train" in told
    told = script("process_data_rlhf", "--kind", "prompts", *given, tmp_path / "ppo.jsonl")
    assert "ppo_training.py" in told
    assert all((tmp_path / f"{name}.jsonl").read_text() for name in ("sft", "rm", "ppo"))


def test_a_data_set_is_read_as_training_reads_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(TREE)  # ranks that are missing are null
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "saved")
    given = ["--dataset", tmp_path / "saved", "--split", "validation", "--lang", "de", "--output"]
    script("process_data", *given, tmp_path / "o.jsonl")
    assert json.loads((tmp_path / "o.jsonl").read_text())["response"] == "Nichts."


@pytest.mark.parametrize(
    ("name", "words", "wrong"),
    [
        ("process_data", "--input gone.jsonl --output o.jsonl", "gone.jsonl"),
        ("process_data", "--input t.jsonl --lang fr --output o.jsonl", "no row is left in fr"),
        ("process_data", "--input t.jsonl --output t.jsonl", "is the file that is read"),
        ("process_data", "--input t.jsonl --output there.jsonl", "--force replaces it"),
        ("process_data", "--input t.jsonl --output o.json", "name it o.jsonl"),
        ("process_data", "--input t.jsonl --output o.jsonl --map a=b", "a is none of instruction"),
        ("process_data", "--input t.jsonl --output o.jsonl --map title", "is not KEY=COLUMN"),
        (
            "process_data",
            "--input t.jsonl --output o.jsonl --map response=text",
            "--map does nothing for question trees",
        ),
        ("process_data", "--input pairs.jsonl --lang en --output o.jsonl", "--lang en: does"),
        ("process_data", "--input t.jsonl --split test --output o.jsonl", "--dataset"),
        ("process_data", "--output o.jsonl", "--input"),
        ("process_data_rlhf", "--input t.jsonl --output o.jsonl", "--kind"),
        ("process_data_rlhf", "--kind best --input t.jsonl --output o.jsonl", "--kind"),
        (
            "process_data_rlhf",
            "--kind prompts --map rating=x --input pairs.jsonl --output o.jsonl",
            "is not for --kind prompts",
        ),
        ("process_data_rlhf", "--kind prompts --input torn.jsonl --output o.jsonl", "torn.jsonl:1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(name, words, wrong, tmp_path, monkeypatch, capsys):
    import importlib.util

    from command_line.exits import run_main

    monkeypatch.chdir(tmp_path)
    write(Path("t.jsonl"), TREE)
    write(Path("pairs.jsonl"), [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    Path("torn.jsonl").write_text('{"prompt": "a", "chos')
    Path("there.jsonl").write_text("kept")
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as end:
        run_main(lambda: made.main(words.split()))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: ") and wrong in said, said
    assert said.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_sample_trees_have_what_the_page_says():
    made = [json.loads(line) for line in TREES.read_text().splitlines()]
    assert len(to_instructions(rows(*made), "en", {}).rows) == 22
    assert len(to_pairs(rows(*made), None, {}).rows) == 51
    assert len(to_prompts(rows(*made), None, {}).rows) == 28
