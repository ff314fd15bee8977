"""The file of labels: what is said to be there is there, whatever happens."""

import fast_blas  # noqa: F401  isort: skip

import json
import subprocess
import sys

import pytest
from files import ROOT
from label_setup import REPLIES, line, rows_of, write_samples

from data_utils import mix_records, read_records, split_records
from errors import UserError
from labelling.desk import Desk
from labelling.items import Choice, make_item
from labelling.label_file import LabelFile
from labelling.sample_file import SampleFile


def row(number: int) -> dict:
    return {"prompt": "8 20", "chosen": " 22", "rejected": " 7", "labeller": "anna"} | {
        "pair": f"p{number}",
        "label_id": f"id{number}",
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.jsonl"


def opened(path) -> LabelFile:
    return LabelFile(path)


def reread(path) -> list[dict]:
    labels = LabelFile(path)
    labels.close()
    return labels.rows


def test_a_label_is_whole_on_the_disk_and_undo_takes_off_the_last(path):
    labels = opened(path)
    for number in range(3):
        labels.append(row(number))
        assert [json.loads(x) for x in path.read_text().splitlines()] == labels.rows
    assert labels.take_back() == row(2)
    assert path.read_text().count("\n") == 2
    labels.close()
    labels = opened(path)  # another day
    assert labels.take_back() == row(1) and labels.take_back() == row(0)
    assert labels.take_back() is None and path.read_bytes() == b""
    labels.append(row(7))
    labels.close()
    assert reread(path) == [row(7)]


def test_every_write_is_synced_before_it_returns(path, monkeypatch):
    """In the order write, fsync; and truncate, fsync."""
    import os

    done = []
    for name in ("write", "fsync", "ftruncate"):
        real = getattr(os, name)
        monkeypatch.setattr(
            f"labelling.label_file.os.{name}",
            lambda *words, name=name, real=real: (done.append(name), real(*words))[1],
        )
    labels = opened(path)
    labels.append(row(0))
    done.clear()
    labels.append(row(1))
    assert done == ["write", "fsync"]
    done.clear()
    labels.take_back()
    assert done == ["ftruncate", "fsync"]
    labels.close()


@pytest.mark.parametrize("rows", [0, 2])
def test_half_a_row_at_the_end_is_no_label(path, rows):
    whole = "".join(json.dumps(row(n)) + "\n" for n in range(rows))
    path.write_text(whole + json.dumps(row(9))[:40])
    labels = opened(path)
    assert labels.rows == [row(n) for n in range(rows)]
    labels.append(row(5))
    labels.close()
    assert reread(path) == [*(row(n) for n in range(rows)), row(5)]


def test_a_last_row_without_its_line_end_is_one(path):
    path.write_text(json.dumps(row(0)) + "\n\n" + json.dumps(row(1)))
    labels = opened(path)
    labels.append(row(2))
    labels.close()
    assert reread(path) == [row(0), row(1), row(2)]


@pytest.mark.parametrize(
    "text, where",
    [
        ('{"prompt": "x", "chosen": "a", "rejected": "b"}\n', "1"),  # of the chat's rating
        (json.dumps(row(0)) + "\nno row\n", "2"),
        ("half a line of prose", "1"),
        ("[1]\n", "1"),
    ],
)
def test_a_file_of_something_else_is_left_alone(path, text, where):
    path.write_text(text)
    with pytest.raises(UserError, match=f"labels.jsonl:{where}: is no row of label.py"):
        opened(path)
    assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["labels.jsonl"]  # no lock stays


def test_a_second_program_is_refused_and_a_dead_one_is_not(path):
    labels = opened(path)
    labels.append(row(0))
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
    code += "from labelling.label_file import LabelFile\nfrom errors import UserError\n"
    code += f"try: LabelFile({str(path)!r})\nexcept UserError as e: print(e)\n"
    code += "else: print('open')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "labels.jsonl: is going to be written by process" in done.stdout, done.stderr
    labels.close()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "open\n"


def test_what_another_program_wrote_meanwhile_is_not_overwritten(path):
    labels = opened(path)
    labels.append(row(0))
    with open(path, "a") as other:
        other.write(json.dumps(row(1)) + "\n")
    for act in (lambda: labels.append(row(2)), labels.take_back):
        with pytest.raises(UserError, match="changed or deleted by another program"):
            act()
    path.unlink()
    with pytest.raises(UserError, match="changed or deleted"):
        labels.append(row(2))
    labels.close()


# ------------------------------------------------------------------------------ ties elsewhere


def test_rows_left_out_are_counted_wherever_rows_go(path):
    tie = {"prompt": "8", "responses": [" 1", " 2"], "tie": True}
    path.write_text("".join(json.dumps(r) + "\n" for r in (tie, row(0), tie, row(1), row(2))))
    records = read_records(path)
    assert len(records) == 3
    note = f"{path}: 2 left out: a tie, in which nothing is preferred"
    assert records.notes == [note]
    assert note in mix_records([records]).notes
    assert split_records(records, 40)[0].notes == [note]
    path.write_text(json.dumps(tie) + "\n")
    with pytest.raises(UserError, match="nothing to use: 1 rows: a tie"):
        read_records(path)
    # Only a row that prefers nothing is one.
    path.write_text(json.dumps(row(0) | {"tie": True}) + "\n")
    assert len(read_records(path)) == 1


# ------------------------------------------------------------------------------ the desk


def desk_of(tmp_path, count=4, labeller="anna", **options):
    ids = write_samples(tmp_path, [REPLIES] * count)
    samples = SampleFile(tmp_path / "labels.samples.jsonl")
    labels = LabelFile(tmp_path / "labels.jsonl")
    models = [{"model": "m"}]
    return Desk(ids, samples, labels, None, models=models, labeller=labeller, **options)


def test_a_label_that_is_sent_twice_is_one(tmp_path):
    desk = desk_of(tmp_path)
    first = desk.current().id
    assert desk.label(first, Choice([0, 1]), "one")
    assert desk.label(first, Choice([0, 1]), "one")  # its answer got lost
    assert not desk.label(first, Choice([1, 0]), "two")  # another page was slower
    assert [r["label_id"] for r in desk.labels.rows] == ["one"]
    second = desk.current().id
    assert desk.label(second, Choice([1, 0]), "three")
    assert desk.undo("three") and not desk.undo("three")  # sent twice: one is taken back
    assert desk.current().id == second and desk.done == 1
    desk.labels.close()


def test_sides_change_by_seed_and_the_same_for_the_same(tmp_path):
    ids = write_samples(tmp_path, [REPLIES] * 200)
    rows = SampleFile(tmp_path / "labels.samples.jsonl").rows

    def orders(seed):
        return [make_item(rows[id], seed).order for id in ids]

    assert orders(0) == orders(0) != orders(1)
    left = sum(order == [0, 1] for order in orders(0))
    assert 70 <= left <= 130  # 200 throws of a coin: 4.2 standard deviations


def test_two_labellers_and_two_seeds_see_other_sides(tmp_path):
    """Or a habit of one side would look like agreement."""

    def orders(**options):
        desk = desk_of(tmp_path, 20, **options)
        desk.labels.close()
        return [item.order for item in desk.items.values()]

    assert orders() == orders() and orders() != orders(labeller="berta") != orders(seed=1)


def test_the_time_left_is_the_pace_of_the_last_labels(tmp_path):
    desk = desk_of(tmp_path, 30)
    assert desk.seconds_left() is None
    for number in range(22):
        desk.label(desk.current().id, Choice([0, 1], seconds=1000.0 if number < 2 else 4.0))
    assert desk.seconds_left() == 4.0 * 8
    desk.labels.close()


def test_the_command_line_of_the_helper_is_that_of_the_samples(tmp_path):
    """What the other tests label was made for their command, and no model is loaded."""
    write_samples(tmp_path, [REPLIES])
    words = line(tmp_path)
    assert words[2] == "--prompts" and rows_of(tmp_path) == []
