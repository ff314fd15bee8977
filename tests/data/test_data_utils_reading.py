"""Record formats and file kinds: each is recognised and means the same wherever it comes from."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_utils import KNOWN_FORMATS, read_dataset, read_records
from errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = {"role": "system", "content": "be brief"}
ASK = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi"}


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def one(tmp_path, row, **options):
    """The record of a file with this one row."""
    return read_records(write_lines(tmp_path / "rows.jsonl", [row]), **options)[0]


# (the row, kind, what the record must hold)
FORMATS = [
    ({"text": "8 20 22", "reward": "0.5"}, "text", {"text": "8 20 22", "reward": 0.5}),
    ({"text": "8 20 22", "reward": 1}, "text", {"reward": 1.0}),
    (
        {"instruction": "add", "context": "1 2", "response": "3"},
        "prompt_completion",
        {
            "prompt": [{"role": "user", "content": "add\n\n1 2"}],
            "completion": [{"role": "assistant", "content": "3"}],
        },
    ),
    (
        {"instruction": "hello", "context": "", "response": "hi"},
        "prompt_completion",
        {"prompt": [ASK], "completion": [ANSWER]},
    ),
    (
        {"instruction": "hello", "input": "", "output": "hi", "text": "Below is ..."},
        "prompt_completion",
        {"prompt": [ASK], "completion": [ANSWER]},
    ),
    (
        {"prompt": "8 20", "completion": " 22"},
        "prompt_completion",
        {"prompt": "8 20", "completion": " 22"},
    ),
    (
        {"prompt": [ASK], "completion": [ANSWER]},
        "prompt_completion",
        {"prompt": [ASK], "completion": [ANSWER]},
    ),
    ({"messages": [SYSTEM, ASK, ANSWER]}, "conversation", {"messages": [SYSTEM, ASK, ANSWER]}),
    (
        {
            "conversation": [{"role": "human", "content": "hello"}, ANSWER],
            "meta_eval_score": "4",
            "score_reason": "fine",
        },
        "conversation",
        {"messages": [ASK, ANSWER], "reward": 4.0},
    ),
    (
        {
            "system": "be brief",
            "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}],
        },
        "conversation",
        {"messages": [SYSTEM, ASK, ANSWER]},
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, ANSWER]},
        "conversation",
        {"messages": [ASK, ANSWER]},
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2},
        "preference",
        {"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1], "margin": 2.0},
    ),
    (
        {"instruction": "hello", "chosen": [ANSWER], "rejected": "no"},
        "preference",
        {"prompt": [ASK], "responses": [[ANSWER], [{"role": "assistant", "content": "no"}]]},
    ),
    (
        {"prompt": "hello", "chosen": [ASK, ANSWER], "rejected": [ASK, {**ANSWER, "content": "x"}]},
        "preference",
        {"prompt": [ASK], "responses": [[ANSWER], [{"role": "assistant", "content": "x"}]]},
    ),
    (
        {
            "chosen": "\n\nHuman: hello\n\nAssistant: hi",
            "rejected": "\n\nHuman: hello\n\nAssistant: go away",
        },
        "preference",
        {"prompt": [ASK], "responses": [[ANSWER], [{"role": "assistant", "content": "go away"}]]},
    ),
    (
        {"prompt": "\n\nHuman: hello\n\nAssistant:", "chosen": " hi", "rejected": " no"},
        "preference",
        {"prompt": [ASK], "responses": [[ANSWER], [{"role": "assistant", "content": "no"}]]},
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": ["c", "d"]},
        "preference",
        {"responses": ["b", "c", "d"], "ranks": [0, 1, 1]},
    ),
    (
        {"prompt": "a", "responses": ["b", "c", "d"]},
        "preference",
        {"responses": ["b", "c", "d"], "ranks": [0, 1, 2]},
    ),
    (
        {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, "5", 1]},
        "preference",
        {"responses": ["c", "b", "d"], "ranks": [0, 1, 1]},
    ),
    (
        {"prompt": "a", "completion": "b", "label": False},
        "unpaired",
        {"prompt": "a", "completion": "b", "label": False},
    ),
    (
        {"prompt": "2 + 2 =", "answer": "4"},
        "prompt",
        {"prompt": "2 + 2 =", "columns": {"prompt": "2 + 2 =", "answer": "4"}},
    ),
    (
        {"question": "hello", "response": "hi", "system_prompt": "be brief"},
        "prompt_completion",
        {"prompt": [SYSTEM, ASK], "completion": [ANSWER]},
    ),
    (
        {"question": "hello", "answer": "hi"},
        "prompt_completion",
        {"prompt": [ASK], "completion": [ANSWER]},
    ),
]


@pytest.mark.parametrize(("row", "kind", "expected"), FORMATS, ids=lambda x: str(x)[:40])
def test_every_format_is_recognised_from_its_fields(tmp_path, row, kind, expected):
    record = one(tmp_path, row)
    assert record.kind == kind
    assert {name: getattr(record, name) for name in expected} == expected
    assert record.fields == row
    assert record.where == f"{tmp_path}/rows.jsonl:1"


@pytest.mark.parametrize(
    ("format", "row", "kind"),
    [
        ("prompt", {"prompt": "a", "completion": "b"}, "prompt"),
        ("prompt-completion", {"prompt": "a", "completion": "b", "label": 1}, "prompt_completion"),
        ("text", {"text": "a", "prompt": "b"}, "text"),
        ("alpaca", {"instruction": "a", "output": "b"}, "prompt_completion"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, "conversation"),
    ],
)
def test_a_named_format_is_used_instead(tmp_path, format, row, kind):
    assert one(tmp_path, row, format=format).kind == kind


def test_a_wrong_format_name_lists_the_right_ones(tmp_path):
    with pytest.raises(UserError) as error:
        one(tmp_path, {"text": "a"}, format="csv")
    assert all(name in str(error.value) for name in KNOWN_FORMATS)


def test_all_rows_of_a_file_have_the_format_of_its_first(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}]
    with pytest.raises(UserError, match=r"rows.jsonl:2: the field rejected is missing"):
        read_records(write_lines(tmp_path / "rows.jsonl", rows))


ROWS = [
    {"prompt": "a, b", "completion": 'say "x"\nand y', "reward": "0.5"},
    {"prompt": "ä 漢 🙂", "completion": "ok\u2028still one row", "reward": "1"},
]


def write_csv(path, rows, delimiter=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
    "rows.jsonl": write_lines,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "compact.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "lines.json": write_lines,
    "bom.jsonl": lambda path, rows: path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig"
    ),
    "crlf.jsonl": lambda path, rows: path.write_bytes(
        b"\r\n\r\n".join(json.dumps(row).encode() for row in rows)
    ),
    "rows.csv": write_csv,
    "bom.csv": lambda path, rows: write_csv(path, rows, encoding="utf-8-sig"),
    "rows.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    records = read_records(tmp_path / name)
    assert [row.fields for row in records] == ROWS
    assert [row.reward for row in records] == [0.5, 1.0]
    assert not records.refused


def test_places_are_lines_of_the_file(tmp_path):
    """Of a row that spans lines: its first; blank lines count."""
    WRITERS["rows.csv"](tmp_path / "rows.csv", ROWS)
    assert [r.where.rpartition(":")[2] for r in read_records(tmp_path / "rows.csv")] == ["2", "4"]
    array = '[\n\n{"text": "a"},\n{"text":\n"b"}, {"text": "c"}]'
    (tmp_path / "rows.json").write_text(array)
    places = [r.where.rpartition(":")[2] for r in read_records(tmp_path / "rows.json")]
    assert places == ["3", "4", "5"]
    (tmp_path / "rows.jsonl").write_text('\n{"text": "a"}\n \n{"text": "b"}')
    places = [r.where.rpartition(":")[2] for r in read_records(tmp_path / "rows.jsonl")]
    assert places == ["2", "4"]


def test_messages_in_a_csv_cell_are_json(tmp_path):
    write_csv(tmp_path / "rows.csv", [{"messages": json.dumps([ASK, ANSWER]), "n": "1"}])
    assert read_records(tmp_path / "rows.csv")[0].messages == [ASK, ANSWER]
    twice = '[{"role": "user", "role": "user", "content": "a"}]'
    write_csv(tmp_path / "rows.csv", [{"messages": twice}])
    with pytest.raises(UserError, match="'role' stands twice"):
        read_records(tmp_path / "rows.csv")


def test_max_rows_reads_no_further(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nbroken')
    assert len(read_records(path, max_rows=2)) == 2


def test_datasets_library(tmp_path, monkeypatch):
    """A folder of files, a saved data set, a named split, streaming, a local file."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "train.jsonl", ROWS)
    write_lines(folder / "test.jsonl", ROWS[:1])
    expected = [row["prompt"] for row in ROWS]
    for streaming in (False, True):
        records = read_dataset(str(folder), streaming=streaming)
        assert [row.prompt for row in records] == expected
        assert records[1].where == f"{folder}[train]:row 2"
        assert len(read_dataset(str(folder), split="test", streaming=streaming)) == 1
    assert len(read_dataset(str(folder), streaming=True, max_rows=1)) == 1
    saved = tmp_path / "saved"
    made = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": made}).save_to_disk(str(saved))
    assert [row.prompt for row in read_dataset(str(saved))] == expected
    assert [r.prompt for r in read_dataset(str(folder / "train.jsonl"))] == expected
    with pytest.raises(UserError, match="datasets cannot read it"):
        read_dataset(str(folder), split="nowhere")


@pytest.fixture
def saved(tmp_path):
    """Data sets as `save_to_disk` writes them, a file and a folder with ten rows a split."""
    datasets = pytest.importorskip("datasets")
    text = {split: [f"{split} {i}" for i in range(10)] for split in ("train", "test")}
    sets = {split: datasets.Dataset.from_dict({"text": rows}) for split, rows in text.items()}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "dict")
    sets["train"].save_to_disk(tmp_path / "plain")
    datasets.Dataset.from_dict({"text": text["test"]}, split="test").save_to_disk(tmp_path / "test")
    datasets.Dataset.from_dict(
        {"text": text["test"]}, split=datasets.Split("test[:50%]")
    ).save_to_disk(tmp_path / "half")
    (tmp_path / "folder").mkdir()
    for split, rows in text.items():
        write_lines(tmp_path / "folder" / f"{split}.jsonl", [{"text": row} for row in rows])
    write_lines(tmp_path / "rows.jsonl", [{"text": row} for row in text["train"]])
    return tmp_path


TRAIN, TEST = [f"train {i}" for i in range(10)], [f"test {i}" for i in range(10)]


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("dict", "train", TRAIN),
        ("dict", "test", TEST),
        ("dict", "train[:50%]", TRAIN[:5]),
        ("folder", "train[:50%]", TRAIN[:5]),
        ("dict", "train[7:]+test[-20%:]", TRAIN[7:] + TEST[-2:]),
        ("plain", "train", TRAIN),
        ("plain", "train[2:4]", TRAIN[2:4]),
        ("test", "test[:10%]", TEST[:1]),
        ("half", "test", TEST),
        ("rows.jsonl", "train", TRAIN),
    ],
)
def test_a_split_is_what_is_read(saved, monkeypatch, name, split, rows):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", saved / "cache")
    assert [row.text for row in read_dataset(str(saved / name), split=split)] == rows


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("plain", {"split": "test"}, "--split 'test'.*there is train"),
        ("test", {"split": "train"}, "--split 'train'.*there is test"),
        ("dict", {"split": "valid"}, "--split 'valid'.*there is train, test"),
        ("dict", {"split": "train[:"}, "--split 'train.*there is train, test"),
        ("dict", {"split": "train[:150%]"}, "--split 'train.*[Pp]ercent"),
        ("dict", {"split": "train[5:5]"}, "no rows"),
        ("dict", {"config": "x"}, "a saved data set, which has no configurations"),
        ("plain", {"config": "x"}, "a saved data set, which has no configurations"),
        ("plain", {"streaming": True}, "--streaming has no effect"),
        ("folder", {"config": "x"}, "datasets cannot read it.*'x' not found"),
        ("folder", {"split": "train[:20%]", "streaming": True}, "cannot read it.*Bad split"),
        ("rows.jsonl", {"split": "test"}, "no split 'test'"),
        ("rows.jsonl", {"split": "train[:50%]"}, "no split 'train"),
        ("rows.jsonl", {"config": "x"}, "a file, which has no configurations"),
        ("rows.jsonl", {"streaming": True}, "--streaming has no effect"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(saved, monkeypatch, name, options, says):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", saved / "cache")
    with pytest.raises(UserError, match=says) as error:
        read_dataset(str(saved / name), **options)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(saved / name))


@pytest.mark.parametrize("library", ["pyarrow", "datasets"])
def test_a_missing_library_is_named_with_the_command(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=f"pip install {library}"):
        if library == "pyarrow":
            read_records(tmp_path / "rows.parquet")
        else:
            read_dataset(str(tmp_path))


def test_importing_loads_no_framework():
    """The PyTorch baseline uses this module as well; optional libraries wait until needed."""
    script = (
        "import sys, data_utils; "
        "print([m for m in ('mlx', 'torch', 'transformers', 'datasets', 'pyarrow') "
        "if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "[]\n", ran.stderr
