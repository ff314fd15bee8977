"""Folders, splits and mixtures, and the report of what will be trained on."""

import io
import json
from collections import Counter

import pytest
from tiny_tokenizers import tiny_tokenizer

from data_utils import (
    BatchPlan,
    data_report,
    histogram,
    load_data,
    mix_records,
    preview,
    read_records,
    split_records,
    tokenise_preferences,
    tokenise_prompts,
    tokenise_scalar,
    tokenise_sft,
    use_colour,
)
from errors import UserError


def write(path, count, word="row"):
    path.write_text("".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(count)))
    return path


@pytest.fixture
def folder(tmp_path):
    for name, count in (("train", 20), ("valid", 5), ("test", 3)):
        write(tmp_path / f"task_{name}.jsonl", count, name)
    return tmp_path


def texts(records):
    return [row.text for row in records]


def test_folder_and_base_name(folder):
    splits = ("train", "valid", "test")
    found = load_data(data=folder, data_base="task_", splits=splits)
    assert {name: len(rows) for name, rows in found.items()} == {"train": 20, "valid": 5, "test": 3}
    assert list(load_data(data=folder, data_base="task_", splits=("test",))) == ["test"]
    (folder / "task_valid.jsonl").unlink()
    assert list(load_data(data=folder, data_base="task_")) == ["train"]


def test_a_missing_file_says_what_is_there(folder):
    with pytest.raises(UserError, match="other_train.jsonl: no such file; --data-base.*task_"):
        load_data(data=folder, data_base="other_")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_data(data=folder / "nowhere")


def test_files_given_by_name(folder, tmp_path):
    more = write(tmp_path / "more.jsonl", 4, "more")
    found = load_data(train_files=[folder / "task_train.jsonl", more], validation_file=more)
    assert len(found["train"]) == 24 and texts(found["valid"]) == [f"more {i}" for i in range(4)]


def test_validation_split_percentage(folder):
    found = load_data(data=folder, data_base="task_", validation_split_percentage=20, seed=1)
    train, valid = texts(found["train"]), texts(found["valid"])
    assert len(valid) == 4 and len(train) == 16
    assert sorted(train + valid) == sorted(f"train {i}" for i in range(20))
    again = load_data(data=folder, data_base="task_", validation_split_percentage=20, seed=1)
    other = load_data(data=folder, data_base="task_", validation_split_percentage=20, seed=2)
    assert texts(again["valid"]) == valid != texts(other["valid"])
    alone = load_data(
        data=folder, data_base="task_", splits=("valid",), validation_split_percentage=20, seed=1
    )
    assert texts(alone["valid"]) == valid


def test_impossible_splits_are_errors(folder):
    rows = read_records(folder / "task_train.jsonl")
    for percentage in (0, 100, -5, 99):
        with pytest.raises(UserError):
            split_records(rows, percentage)
    with pytest.raises(UserError, match="not both"):
        load_data(
            data=folder,
            data_base="task_",
            validation_file=folder / "task_valid.jsonl",
            validation_split_percentage=5,
        )


def test_mixing_without_weights_takes_every_row_once(folder):
    sets = [read_records(folder / f"task_{name}.jsonl") for name in ("train", "valid")]
    assert Counter(texts(mix_records(sets))) == Counter(texts(sets[0]) + texts(sets[1]))


@pytest.mark.parametrize("weights", [[1, 1], [0.5, 0.5], [3, 1], [1, 4], [20, 5]])
def test_weights_are_shares_of_an_epoch_and_no_row_is_left_out(folder, weights):
    sets = [read_records(folder / f"task_{name}.jsonl") for name in ("train", "valid")]
    mixed = mix_records(sets, weights, seed=4)
    times = Counter(texts(mixed))
    assert set(times) == set(texts(sets[0]) + texts(sets[1]))
    share = sum(n for text, n in times.items() if text.startswith("train")) / len(mixed)
    assert share == pytest.approx(weights[0] / sum(weights), abs=0.5 / len(mixed) + 1e-9)
    for name in ("train", "valid"):
        counts = {n for text, n in times.items() if text.startswith(name)}
        assert max(counts) - min(counts) <= 1
    assert texts(mixed) == texts(mix_records(sets, weights, seed=4))


def test_no_validation_row_is_trained_on_when_rows_are_repeated(folder, tmp_path):
    more = write(tmp_path / "more.jsonl", 4, "more")
    found = load_data(
        train_files=[folder / "task_train.jsonl", more],
        weights=[1, 1],
        validation_split_percentage=25,
    )
    assert not set(texts(found["train"])) & set(texts(found["valid"]))
    assert len(found["valid"]) == 6


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")]])
def test_weights_that_make_no_sense_are_errors(folder, weights):
    path = folder / "task_train.jsonl"
    with pytest.raises(UserError, match="weights"):
        load_data(train_files=[path, path], weights=weights)
    with pytest.raises(UserError, match="weights"):
        load_data(data=folder, data_base="task_", weights=weights)


# Report -------------------------------------------------------------------------------------


def test_the_report_counts_rows_and_says_why_some_are_missing(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "hello"}, {"text": ""}, {"text": "hello world " * 20}, {"text": "world"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    records = read_records(path, skip_bad_rows=True)
    tokenised = tokenise_sft(records, tiny_tokenizer(), max_length=12, too_long="refuse")
    report = data_report("train", records, tokenised)
    assert "train: 2 rows (3 text read; 2 refused, 0 cut)" in report
    assert f"refused 1: text is empty; remove the row or fill it in ({path}:2)" in report
    assert f"refused 1: longer than 12 tokens ({path}:3)" in report
    assert "1 cut)" in data_report(
        "train", records, tokenise_sft(records, tiny_tokenizer(), max_length=12)
    )


def test_the_report_names_the_shares_of_a_mixture(folder):
    sets = [read_records(folder / f"task_{name}.jsonl") for name in ("train", "valid")]
    mixed = mix_records(sets, [1, 1])
    report = data_report("train", mixed, tokenise_sft(mixed, tiny_tokenizer()))
    assert "task_valid.jsonl: 50% of an epoch, each of its 5 rows 4 times" in report


def test_histogram_counts_every_row():
    lines = histogram([2, 3, 3, 9, 40]).splitlines()
    assert lines[0] == "tokens a row: 2 to 40, mean 11.4, median 3, 57 in all"
    assert [int(line.split()[-1]) for line in lines[1:]] == [3, 1, 0, 0, 0, 0, 0, 1]
    assert len(lines[1].split("#")) - 1 == 40
    assert histogram([7]).splitlines()[1].split()[-1] == "1"


def test_preview_shows_what_is_trained(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "what is", "completion": " the answer"}))
    tokenizer = tiny_tokenizer()
    row = tokenise_sft(read_records(path), tokenizer, mask_prompt=True)[0]
    plain = preview(row, tokenizer, colour=False)
    assert plain.endswith("<s>what is[[ the answer</s>]]")
    assert f"{path}:1: {len(row.tokens)} tokens, {sum(row.mask)} trained" in plain
    colour = preview(row, tokenizer, colour=True)
    assert "\x1b[2m<s>what is\x1b[0m\x1b[32m the answer</s>\x1b[0m" in colour


def test_preview_of_other_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "what", "chosen": " yes", "rejected": " no", "reward": 2}')
    records, tokenizer = read_records(path), tiny_tokenizer()
    shown = preview(tokenise_preferences(records, tokenizer)[0], tokenizer, colour=False)
    assert "rank 0: <s>what[[ yes</s>]]\nrank 1: <s>what[[ no</s>]]" in shown
    shown = preview(tokenise_prompts(records, tokenizer)[0], tokenizer, colour=False)
    assert shown.endswith("<s>what")
    path.write_text('{"text": "what", "reward": 2}')
    shown = preview(tokenise_scalar(read_records(path), tokenizer)[0], tokenizer, colour=False)
    assert "reward 2\n<s>what</s>" in shown


def test_colour_is_for_terminals_and_can_be_switched_off(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert use_colour(Terminal()) and not use_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_colour(Terminal())


def test_the_plan_reports_its_efficiency_on_a_real_file(folder):
    rows = tokenise_sft(load_data(data=folder, data_base="task_")["train"], tiny_tokenizer())
    assert 0.9 <= BatchPlan(rows.lengths, 4).padding_efficiency() <= 1
