"""Bad data files: always rows, or one clean error with the line; nothing lost without a word.

The property-based test writes 300 files; BAD_INPUT_FILES=10000 in the environment asks for more.
"""

import csv
import io
import json
import os
from collections import Counter
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import tiny_tokenizer

from data_loading import files as data_files
from data_utils import (
    read_records,
    tokenise_preferences,
    tokenise_prompts,
    tokenise_scalar,
    tokenise_sft,
)
from errors import UserError

FILES = int(os.environ.get("BAD_INPUT_FILES", "300"))
ONE_FILE = timedelta(seconds=5)  # longer counts as a hang

GOOD = b'{"text": "good"}\n'

# (what stands in line 2 of a file whose lines 1 and 3 are good, what the error says)
BAD_LINES = [
    (b'{"text": "cut off', "broken JSON at column"),
    (b'{"text": "a"} {"text": "b"}', "more text after the object"),
    (b'{"text": "a"},', "more text after the object"),
    (b"[1, 2]", "an object {...} was expected, found [1, 2]"),
    (b"null", "an object {...} was expected, found None"),
    (b'"text"', "an object {...} was expected"),
    (b'{"text": 12}', "text must be a string, found 12"),
    (b'{"text": null}', "text must be a string, found None"),
    (b'{"text": ["a"]}', "text must be a string"),
    (b'{"test": "a"}', "the field text is missing; the row has 'test'"),
    (b"{}", "the field text is missing; the row has none"),
    (b'{"text": ""}', "text is empty"),
    (b'{"text": " \\n\\t\\u3000"}', "text is empty"),
    (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9)"),
    (b'{"text": "a\x00b"}', "broken JSON at column"),
    (b'{"text": "a\\u0000b"}', "NUL character"),
    (b'{"text": "a", "more": ["x\\u0000"]}', "NUL character"),
    (b'{"text": "a\\ud83d"}', "half of a surrogate pair (\\ud83d)"),
    (b'{"text": "a", "k\\udc00": 1}', "half of a surrogate pair (\\udc00)"),
    (b'{"text": "a", "text": "b"}', "the field 'text' stands twice"),
    (b'{"text": "a", "x": {"y": 1, "y": 2}}', "the field 'y' stands twice"),
    (b'{"text": "a", "x": ' + b"[" * 80 + b"]" * 80 + b"}", "nested deeper than 64"),
    (b"[" * 100_000, "nested deeper than 64"),
    (b'{"x":' * 100_000, "nested deeper than 64"),
    (b'{"text": "a", "n": ' + b"9" * 10_000 + b"}", "a number that cannot be read"),
    (b'{"text": "a", "reward": "high"}', "reward must be a number, found 'high'"),
    (b'{"text": "a", "reward": "1_0"}', "reward must be a number, found '1_0'"),
    (b'{"text": "a", "reward": true}', "reward must be a number, found True"),
    (b'{"text": "a", "reward": NaN}', "reward must be a finite number"),
    (b'{"text": "a", "reward": "inf"}', "reward must be a finite number"),
    (b'{"text": "a", "reward": 1e999}', "reward must be a finite number"),
    (b'{"text": "a", "reward": 1' + b"0" * 400 + b"}", "reward must be a number"),
    (b'{"text": "a", "meta_eval_score": 7}', "meta_eval_score must lie between 0 and 5"),
    (b"\xef\xbb\xbf" + b'{"text": "a"}', "broken JSON"),
    (b"\x00\x00\x00", "broken JSON"),
    (b"{'text': 'a'}", "broken JSON"),
    (b"text", "broken JSON"),
]


@pytest.mark.parametrize(("line", "says"), BAD_LINES, ids=lambda x: str(x)[:40])
def test_a_bad_line_is_one_error_with_its_place_or_counted(tmp_path, line, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(UserError) as error:
        read_records(path)
    message = str(error.value)
    assert message.startswith(f"{path}:2: ") and says in message
    assert "\n" not in message and len(message) < 400
    records = read_records(path, skip_bad_rows=True)
    assert [row.where for row in records] == [f"{path}:1", f"{path}:3"]
    assert [f"{where}: {why}" for where, why in records.refused] == [message]


# Rows of other formats: the fields, what the error says.
BAD_ROWS = [
    ({"chosen": "a"}, "the field rejected is missing"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": ["c", 4]}, "rejected[1] must be a string"),
    ({"prompt": "", "completion": "b"}, "prompt is empty"),
    ({"prompt": "a", "completion": None}, "completion must be a string, found None"),
    ({"prompt": "a", "completion": "b", "label": "good"}, "label must be true or false"),
    ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, "begin with an assistant"),
    ({"completion": "b"}, "no known format in the fields 'completion'"),
    ({}, "no known format in the fields none"),
    ({"text": "a", "prompt": "b"}, "has both text and prompt"),
    ({"instruction": "a", "context": 3, "response": "b"}, "context must be a string"),
    ({"question": "a", "response": "b", "system_prompt": 1}, "system_prompt must be a string"),
    ({"messages": []}, "messages is an empty list"),
    ({"messages": "hello"}, "messages must be a list"),
    ({"messages": "[broken"}, "messages is not a valid JSON list"),
    ({"messages": ["hello"]}, "messages[0] must be an object"),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages[0]: role 'king' is none of"),
    ({"messages": [{"content": "a"}]}, "messages[0]: role None"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages[0]: content is empty"),
    ({"messages": [{"role": "user"}]}, "messages[0]: content must be a string"),
    ({"messages": [{"role": "system", "content": "a"}]}, "no user or assistant message"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        "a system message that is not the first",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "only text and thinking",
    ),
    (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        "no first turn in common",
    ),
    (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"},
        "rejected must end with an assistant turn",
    ),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "others are not"),
    ({"chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}, "there is no prompt"),
    ({"prompt": "a", "responses": ["b"]}, "responses needs two or more"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1]}, "2 responses but 1 scores"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}, "all scores are equal"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "margin must be a number"),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS, ids=lambda x: str(x)[:40])
def test_a_bad_row_of_any_format(tmp_path, row, says):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}:1: ") and says in str(error.value)
    with pytest.raises(UserError, match="all 1 rows are bad"):
        read_records(path, skip_bad_rows=True)


# Whole files: (name, bytes, what the error says after the path)
BAD_FILES = [
    ("empty.jsonl", b"", ": no rows"),
    ("blank.jsonl", b"\n \n\t\r\n", ": no rows"),
    ("empty.json", b"[]", ": no rows"),
    ("empty.csv", b"", ": no rows"),
    ("header.csv", b"text\n", ": no rows"),
    ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), ":1: the file is UTF-16"),
    ("open.json", b'[\n{"text": "a"},\n', ":3: broken JSON at column"),
    ("comma.json", b'[{"text": "a"}\n\n{"text": "b"}]', ":3: broken JSON: ',' or ']' expected"),
    ("last.json", b'[{"text": "a"},\n]', ":2: broken JSON at column"),
    ("after.json", b'[{"text": "a"}]\nmore', ":2: more text after the closing ']'"),
    ("latin.json", b'[{"text": "a"},\n{"text": "\xe9"}]', ":2: not UTF-8 (byte 0xe9)"),
    ("cut.json", b'[{"text": "a"},\n{"text":\n"b', ":3: broken JSON at column"),
    ("deep.json", b"[" * 100_000, ":1: nested deeper than 64"),
    ("number.json", b'[{"text": "a", "n": ' + b"9" * 10_000 + b"}]", ":1: a number that cannot"),
    ("row.json", b'[{"text": "a"},\n5]', ":2: an object {...} was expected, found 5"),
    ("twice.json", b'[{"text": "a"},\n{"text": "a", "text": "b"}]', ":2: the field 'text' stands"),
    ("short.csv", b"text,reward\na,1\nb\n", ":3: 1 cells, but the header names 2"),
    ("long.csv", b"text,reward\na,1\nb,2,3\n", ":3: 3 cells, but the header names 2"),
    ("twice.csv", b"text,text\na,b\n", ":1: the column 'text' stands twice"),
    ("quote.csv", b'text\na\n"b\nc\n', ":3: broken CSV"),
    ("latin.csv", b"text\na\ncaf\xe9\n", ":3: not UTF-8 (byte 0xe9)"),
    ("nul.csv", b"text\na\nb\x00\n", ":3: a NUL character"),
    ("other.csv", b"a,b\n1,2\n", ":2: no known format in the fields 'a, b'"),
    ("cell.csv", b"text,reward\na,1\n ,1\n", ":3: text is empty"),
    ("broken.parquet", b"PAR1 and then nothing", ":row 1: broken Parquet file"),
]


@pytest.mark.parametrize(("name", "data", "says"), BAD_FILES, ids=lambda x: str(x)[:30])
def test_a_bad_file_is_one_error_with_its_place(tmp_path, name, data, says):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}{says}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_paths_that_are_no_data_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, says in (
        (tmp_path / "nowhere.jsonl", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe.jsonl", "not a regular file"),
        (tmp_path / ("x" * 5000), "cannot be read"),
        ("a\0b", "no such file|cannot be read"),
    ):
        with pytest.raises(UserError, match=says):
            read_records(path)


def test_a_huge_line_is_refused_without_reading_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MAX_LINE_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b'{"text": "' + b"a" * 1000 + b'"}\n' + GOOD)
    with pytest.raises(UserError, match=r"rows.jsonl:2: line longer than"):
        read_records(path)
    records = read_records(path, skip_bad_rows=True)
    assert [row.where for row in records] == [f"{path}:1", f"{path}:3"]


def test_a_large_row_below_the_limit_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "hello " * 1_000_000}))
    assert len(read_records(path)[0].text) == 6_000_000
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "hello " * 1_000_000)
    assert len(read_records(path)[0].text) == 6_000_000


# Generated files ----------------------------------------------------------------------------


@st.composite
def mostly(draw, good, odd):
    """`odd` one time in sixteen, so that whole files of good rows come up too."""
    return draw(odd if draw(st.integers(0, 15)) == 15 else good)


WORDS = st.text(st.sampled_from("ab 8é漢🙂\n\u2028\x85,\"'\\{}[]"), max_size=12)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)  # NUL and control characters included, surrogates below
    | st.sampled_from(["1.0", "0", "nan", "", " ", "\ud800", "x\udfff", "\0", "true", 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
FILLED = mostly(WORDS.map("w{}".format), WORDS)
MESSAGES = mostly(
    st.lists(st.tuples(FILLED, FILLED), min_size=1, max_size=2).map(
        lambda pairs: [
            {"role": role, "content": content}
            for pair in pairs
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
    ),
    st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "system", "human", "x"]),
                "content": WORDS | ANYTHING,
            }
        ),
        max_size=4,
    ),
)
DIALOGUE = WORDS.map("\n\nHuman: a\n\nAssistant: b{}".format)
SCORES = st.lists(st.integers(0, 2), max_size=3)
FIELDS = {
    "text": FILLED,
    "reward": mostly(st.sampled_from([1, 0.5, "1.0"]), ANYTHING),
    "prompt": mostly(FILLED, MESSAGES),
    "completion": FILLED,
    "chosen": mostly(FILLED, MESSAGES | DIALOGUE),
    "rejected": mostly(FILLED, MESSAGES | DIALOGUE),
    "responses": mostly(st.lists(FILLED, min_size=3, max_size=3), st.lists(WORDS, max_size=3)),
    "scores": mostly(st.permutations([0, 1, 2]), SCORES),
    "label": mostly(st.booleans(), st.sampled_from([0, "true", "x", None])),
    "instruction": FILLED,
    "input": WORDS,
    "output": FILLED,
    "question": FILLED,
    "response": FILLED,
    "messages": MESSAGES,
    "conversations": MESSAGES.map(
        lambda messages: [{"from": m["role"], "value": m["content"]} for m in messages]
    ),
}
SHAPES = [
    ("text",),
    ("text", "reward"),
    ("prompt", "completion"),
    ("prompt", "completion", "label"),
    ("prompt",),
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected", "question"),
    ("prompt", "responses", "scores"),
    ("instruction", "input", "output"),
    ("question", "response"),
    ("messages",),
    ("conversations", "reward"),
]


@st.composite
def rows_of_one_shape(draw, least=0):
    """Rows with odd contents, and here and there another type or a missing field."""
    shape = draw(st.sampled_from(SHAPES))
    rows = []
    for _ in range(draw(st.integers(least, 5))):
        row = {name: draw(FIELDS[name]) for name in shape}
        match draw(st.integers(0, 31)):
            case 31:
                row[draw(st.sampled_from(shape))] = draw(ANYTHING)
            case 30:
                del row[draw(st.sampled_from(shape))]
            case 29 | 28 | 27:
                row[draw(WORDS)] = draw(ANYTHING)
            case 26:
                row = draw(ANYTHING)
        rows.append(row)
    return rows


def as_csv(rows):
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names] if isinstance(row, dict) else [row]
        writer.writerow([json.dumps(c) if isinstance(c, (list, dict)) else c for c in cells])
    return out.getvalue().encode("utf-8", "surrogatepass")


@st.composite
def files(draw, accidents=(0, 0, 1, 1, 2), least=0):
    """(suffix, bytes, rows in it): a JSONL, JSON or CSV file, whole or damaged (rows: None)."""
    rows = draw(rows_of_one_shape(least))
    kind = draw(st.sampled_from(["jsonl", "jsonl", "jsonl", "json", "csv"]))
    ascii_only = draw(st.booleans())
    if kind == "csv":
        data = as_csv(rows)
    elif kind == "json":
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=draw(st.sampled_from([None, 1])))
        data = text.encode("utf-8", "surrogatepass")
    else:
        end = draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        data = end.join(lines).encode("utf-8", "surrogatepass")
    accidents = draw(st.sampled_from(accidents))
    for _ in range(accidents):
        data = draw(damaged(data))
    return kind, data, None if accidents or data == b"\r\n" else len(rows)


@st.composite
def damaged(draw, data):
    """The file after one accident."""
    at = draw(st.integers(0, len(data)))
    match draw(st.integers(0, 9)):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at:]
        case 2:
            return data[:at] + b"\0" + data[at:]
        case 3:
            return b"\xef\xbb\xbf" + data
        case 4:
            encoding = draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32", "latin-1", "cp500"]))
            return data.decode("utf-8", "replace").encode(encoding, "replace")
        case 5:
            return data[:at] + b"[" * draw(st.sampled_from([70, 3000])) + data[at:]
        case 6:
            return data.replace(b": ", b': "x", "text": ', 1)
        case 7:
            return data[:at] + draw(st.sampled_from([b"\\ud800", b"\\u0000", b"NaN", b"9" * 5000]))
        case 8:
            return data[:at] + data[at + draw(st.integers(1, 5)) :]
        case _:
            return data + data[at:]


def outcome(function, *arguments, **options):
    """What it returns, or the UserError's one line; any other exception fails the test."""
    try:
        return function(*arguments, **options), None
    except UserError as error:
        message = str(error)
        assert "\n" not in message and "\r" not in message and 0 < len(message) < 600
        message.encode()  # can be printed
        return None, message


@settings(
    max_examples=FILES,
    deadline=ONE_FILE,
    derandomize="BAD_INPUT_FILES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(file=files())
def test_any_file_is_rows_or_one_clean_error(tmp_path, file):
    check_file(tmp_path, file)


@pytest.mark.long
def test_five_thousand_files_of_which_half_are_rows(tmp_path):
    """Most of them whole: an error that every file ends in would be found by nothing above."""
    accepted = []

    @settings(
        max_examples=5000,
        deadline=ONE_FILE,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(file=files(accidents=(0,) * 7 + (1,), least=1))
    def run(file):
        accepted.append(check_file(tmp_path, file))

    run()
    print(f"{sum(accepted)} of {len(accepted)} files accepted")
    assert len(accepted) >= 5000 and 2 * sum(accepted) >= len(accepted)


def check_file(tmp_path, file) -> bool:
    """Whether the file is rows, all of them; else it is one clean error."""
    kind, data, count = file
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(data)
    strict, error = outcome(read_records, path)
    lenient, lenient_error = outcome(read_records, path, skip_bad_rows=True)
    event(f"{kind}: " + ("rows" if error is None else "an error, some rows" if lenient else "none"))
    if error is None:
        assert repr(lenient.rows) == repr(strict.rows)  # NaN does not equal itself
        assert not lenient.refused and count in (None, len(strict))
        check_tokenised(strict)
        return True
    place = error.removeprefix(str(path))
    assert place.startswith(":"), error
    has_line = place[1:].partition(":")[0].isdigit()
    assert has_line or place == ": no rows", error
    if lenient is None:
        assert lenient_error.startswith(str(path))
        return False
    if count is not None:
        assert len(lenient) + len(lenient.refused) == count
    # The strict reader stops at the first row that the lenient one counts.
    assert f"{lenient.refused[0][0]}: {lenient.refused[0][1]}" == error
    if kind == "jsonl":
        lines = [n for n, line in enumerate(data.split(b"\n"), 1) if line.strip(b" \t\r\n")]
        if lines and lines[0] == 1 and data.partition(b"\n")[0].strip() == b"\xef\xbb\xbf":
            lines = lines[1:]
        found = [row.where for row in lenient] + [where for where, _ in lenient.refused]
        assert Counter(found) == Counter(f"{path}:{n}" for n in lines)
    check_tokenised(lenient)
    return False


def check_tokenised(records):
    """Every row is tokenised, or refused and counted, by whatever it is given to."""
    tokenizer = tiny_tokenizer()
    for function, options in (
        (tokenise_sft, {"mask_prompt": records[0].kind != "text"}),
        (tokenise_scalar, {}),
        (tokenise_preferences, {}),
        (tokenise_prompts, {"prompt_words": 1}),
    ):
        done, _ = outcome(function, records, tokenizer, max_length=20, **options)
        if done is not None:
            assert len(done) + len(done.refused) == len(records)
            assert all(0 < length <= 20 for length in done.lengths)


PARQUET_ROWS = [{"prompt": f"what is {i}", "completion": "the answer" * i} for i in range(1, 30)]


@settings(max_examples=max(50, FILES // 20), deadline=ONE_FILE, derandomize=True)
@given(cuts=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), min_size=1, max_size=3))
def test_a_damaged_parquet_file_is_rows_or_one_clean_error(tmp_path_factory, cuts):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path_factory.getbasetemp() / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(PARQUET_ROWS), path, compression="none")
    data = path.read_bytes()
    for at, put in cuts:
        place = int(at * len(data))
        data = data[:place] + put + data[place + len(put) :] if put else data[:place]
    path.write_bytes(data)
    records, error = outcome(read_records, path)
    if error is None:
        assert len(records) == len(PARQUET_ROWS)
    else:
        assert error.startswith(f"{path}:row ") or error == f"{path}: no rows"
