"""label.py at a keyboard (a pseudo-terminal), on the embedded model and on samples at hand."""

import fast_blas  # noqa: F401  isort: skip

import json
import os
import re
import shlex
import signal
import termios

import mlx.core as mx
import pexpect
import pytest
from adapters import LORA, write_adapter
from label_setup import REPLIES, hear_hangups, line, rows_of, write_samples
from tiny import tiny_model_folder

from data_utils import read_records, tokenise_pairs, tokenise_preferences, tokenise_unpaired
from models.load import load_model

CTRL_C, LEFT, RIGHT = "\x03", "\x1b[D", "\x1b[C"
KEY = r"\? \d+ of \d+ done"


class Person:
    """At a terminal of 100 columns; `shown` is what the terminal has shown so far."""

    def __init__(self, folder, *words, command=None):
        words = command or line(folder, *words)
        environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
        self.child = pexpect.spawn(
            words[0],
            words[1:],
            cwd=folder,
            env=environment,
            encoding="utf-8",
            codec_errors="replace",
            timeout=60,
            preexec_fn=hear_hangups,
            dimensions=(50, 100),
        )
        self.shown = ""

    def see(self, pattern: str) -> str:
        self.child.expect(pattern)
        self.shown += self.child.before + self.child.after
        return self.child.before + self.child.after

    def press(self, keys: str) -> None:
        """Each key once the question is there."""
        for key in keys if not keys.startswith("\x1b") else [keys]:
            self.see(KEY)
            self.child.send(key)

    def end(self) -> tuple[int, str]:
        """(exit status, all that was shown), once the program has ended."""
        self.child.expect(pexpect.EOF)
        self.shown += self.child.before
        self.child.close()
        return self.child.exitstatus, self.shown.replace("\r\n", "\n")


@pytest.fixture
def prompts(tmp_path):
    rows = [json.dumps({"prompt": f"8 {20 + 2 * i}", "answer": "x"}) + "\n" for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    return tmp_path


def test_pairs_of_the_model_become_rows_that_are_trained_on(prompts):
    words = ("--max-new-tokens", 8, "--seed", 3, "--labeller", "anna", "--batch-size", 4)
    person = Person(prompts, *words)
    person.press("l2ts")
    person.see(KEY)
    person.child.send("q")
    code, shown = person.end()
    assert code == 0 and "4 labels (2 choices, 1 ties, 1 skipped), 4 new" in shown
    assert "2 prompts are left" in shown
    for script in ("label.py --report", "sft.py", "preference_training.py --train"):
        assert f"python {script}" in shown
    sampled = (prompts / "labels.samples.jsonl").read_bytes()
    first, second, tie, skipped = rows_of(prompts)
    assert tie["tie"] is True and skipped["skipped"] is True
    for row in (tie, skipped):  # no other program takes them for a preference
        assert len(row["responses"]) == 2 and "chosen" not in row
    assert first["labeller"] == "anna" and first["time"].startswith("20")
    assert first["shown"] == [0, 1] and second["shown"] == [1, 0]
    assert [m["model"] for m in first["models"]] == ["data/digits_model"] * 2
    assert first["models"][0]["sampling"]["max_new_tokens"] == 8
    # Where the keys point is what stood there.
    column = next(x for x in shown.splitlines() if "│" in x and first["chosen"].strip() in x)
    cells = [cell.strip() for cell in column.split("│")]
    assert cells[0] == first["chosen"].strip()[: len(cells[0])]
    # The training scripts' readers take the choices, and say what they leave out.
    records = read_records(prompts / "labels.jsonl")
    assert [r.kind for r in records] == ["preference"] * 2
    assert [n.partition(": ")[2] for n in records.notes] == [
        "1 left out: a tie, in which nothing is preferred",
        "1 left out: skipped by the labeller",
    ]
    tokenizer = load_model().tokenizer
    assert len(tokenise_preferences(records, tokenizer)) == 2
    assert len(tokenise_pairs(records, tokenizer)) == 2
    # A restart goes on where it was, samples nothing again, and undo reaches back over it.
    person = Person(prompts, *words)
    assert "8 28" in person.see(KEY)
    person.child.send("u")
    assert "8 26" in person.see(KEY)  # the one that was skipped
    person.child.send(RIGHT)
    person.press("rr")
    code, shown = person.end()
    assert code == 0 and "6 labels (5 choices, 1 ties, 0 skipped), 3 new" in shown
    assert (prompts / "labels.samples.jsonl").read_bytes().startswith(sampled)
    rows = rows_of(prompts)
    assert rows[:3] == [first, second, tie]
    assert len({row["pair"] for row in rows}) == len({row["label_id"] for row in rows}) == 6


def test_the_same_seed_samples_the_same_and_a_stop_changes_nothing(prompts, tmp_path):
    words = ("--max-new-tokens", 6, "--samples", 3, "--temperature", 1.5)
    whole = Person(prompts, *words)
    whole.press("1s" + "s" * 5)
    whole.end()
    file = prompts / "labels.samples.jsonl"
    before = file.read_bytes()
    lines = before.splitlines(keepends=True)
    assert len(lines) == 7
    # As a kill in the midst of a batch leaves it: some of its rows, and half of one.
    file.write_bytes(b"".join(lines[:4]) + lines[4][:30])
    (prompts / "labels.jsonl").unlink()
    again = Person(prompts, *words)
    again.press("ssssss")
    again.end()
    assert strip_date(file.read_bytes()) == strip_date(before)


def strip_date(samples: bytes) -> list[dict]:
    rows = [json.loads(row) for row in samples.splitlines()]
    rows[0]["samples_of"].pop("template_date")
    return rows


def test_lists_are_ranked_with_aspects_and_notes(tmp_path):
    texts = [" one", " two", " three", " four"]
    words = ("--samples", "4", "--aspects", "helpful,harmless")
    write_samples(tmp_path, [texts, texts, texts], *words)
    person = Person(tmp_path, *words)
    person.see(KEY)
    screen = person.shown
    order = [screen.split(f"[{place}]")[1].split()[0] for place in (1, 2, 3, 4)]
    assert sorted(order) == ["four", "one", "three", "two"]  # all there, in an order of the seed
    person.child.send("3")
    person.see("best of the rest: 1, 2, 4, tie")
    person.press("1")
    person.press("n")
    person.see("note: ")
    person.child.send("short one\r")
    person.press("t")  # 2 and 4 are as good
    person.see("most helpful")
    person.press("2")
    person.see("most harmless")
    person.press("t")
    person.see("labelled: 3 > 1 > 2 = 4")
    person.press("4u")  # an undo within a list begins it again
    person.see("asked again")
    person.press("u")  # and the next one takes the label before back
    person.see("its label is taken back")
    assert rows_of(tmp_path) == []
    person.press("31t2t")
    person.press("tt2")  # all are as good, and of an aspect one is better
    person.press("q")
    person.end()
    ranked, tie = rows_of(tmp_path)
    best_first = [order[2], order[0], order[1], order[3]]
    assert [text.strip() for text in ranked["responses"]] == best_first
    assert ranked["scores"] == [2, 1, 0, 0]
    assert ranked["shown"] == [2, 0, 1, 3]
    assert ranked["aspects"] == {"helpful": 2, "harmless": "tie"}
    assert tie["tie"] is True and tie["aspects"] == {"helpful": "tie", "harmless": 1}
    assert read_records(tmp_path / "labels.jsonl")[0].ranks == [0, 1, 2, 2]


def test_a_note_is_kept_and_two_models_take_turns(prompts, tmp_path):
    write_adapter(tmp_path / "lora.npz", LORA)
    words = ("--against", tmp_path / "lora.npz", "--max-new-tokens", 6, "--temperature", 0)
    person = Person(prompts, *words)
    person.press("n")
    person.see("note: ")
    person.child.send("rises\r")
    person.press(LEFT)
    person.see("labelled: left")
    person.press(CTRL_C)
    code, shown = person.end()
    assert code == 130 and "1 labels" in shown
    (row,) = rows_of(prompts)
    assert row["note"] == "rises"
    adapters = [model.get("adapter") for model in row["models"]]
    assert sorted(map(str, adapters)) == sorted(["None", str(tmp_path / "lora.npz")])
    # Each text is that of the model it is said to be of: greedy, so it can be written again.
    text = row["chosen" if adapters[0] is None else "rejected"]
    loaded = load_model()
    tokens = list(loaded.tokenizer.encode(row["prompt"]))
    for _ in range(6):
        tokens.append(int(mx.argmax(loaded.model(mx.array([tokens]))[0, -1])))
    assert loaded.tokenizer.decode(tokens, skip_special_tokens=True).startswith(
        row["prompt"] + text
    )


@pytest.mark.parametrize("samples", [2, 1])
def test_a_reply_cannot_rewrite_the_screen(tmp_path, samples):
    texts = [" \x1b[2J\x1b]0;gone\x07 one \x9b31m two\r", " three"][:samples]
    words = ("--samples", str(samples))
    write_samples(tmp_path, [texts], *words, prompts=["8 \x1b[1A 20"])
    person = Person(tmp_path, *words)
    person.press("lg"[samples == 1])
    code, shown = person.end()
    assert code == 0 and "[2J]0;gone one 31m two" in shown
    for sign in ("\x1b[2J", "\x1b]0", "\x9b", "\x1b[1A", "\x07"):
        assert sign not in shown
    (row,) = rows_of(tmp_path)
    kept = [row.get(name) for name in ("chosen", "rejected", "completion")]
    assert {*filter(None, kept)} == {*texts}  # what was sampled is what is kept


def test_a_reply_alone_is_good_or_bad(tmp_path):
    write_samples(tmp_path, [[" 22 30"], [" 7"], [""], [" 9"]], "--samples", "1")
    person = Person(tmp_path, "--samples", 1)
    person.see(r"good \(g\), bad \(b\), skip \(s\)\? 0 of 3 done")
    person.child.send("t")  # no tie with nothing
    person.child.send("g")
    person.see("labelled: good")
    person.press("b")
    person.press("s")
    code, shown = person.end()
    assert code == 0 and "3 labels (2 choices, 0 ties, 1 skipped)" in shown
    assert "preference_training.py --algorithm kto" in shown
    records = read_records(tmp_path / "labels.jsonl")
    assert [(r.kind, r.completion, r.label) for r in records] == [
        ("unpaired", " 22 30", True),
        ("unpaired", " 7", False),
    ]
    assert len(tokenise_unpaired(records, load_model().tokenizer)) == 2


def test_replies_that_are_the_same_are_not_asked_about(tmp_path):
    write_samples(tmp_path, [REPLIES, [" 22", " 22 "], ["", " 3"], REPLIES, [" 2\0", " 4"]])
    person = Person(tmp_path)
    person.press("l1")
    code, shown = person.end()
    assert code == 0 and len(rows_of(tmp_path)) == 2
    assert re.search("not asked: 3 prompts whose replies are all the same or empty, or hold", shown)
    assert len(read_records(tmp_path / "labels.jsonl")) == 2  # a NUL would make all unreadable


def test_a_note_that_no_reader_takes_is_not_kept(tmp_path):
    """Of a terminal that writes Latin-1, say."""
    write_samples(tmp_path, [REPLIES])
    person = Person(tmp_path)
    for note in (b"caf\xe9\n", b"fine \xc3\xa9\n"):
        person.press("n")
        person.see("note: ")
        os.write(person.child.child_fd, note)
        if b"caf" in note:
            person.see("the note holds a NUL, or what is no UTF-8 text, and is not kept")
    person.press("l")
    assert person.end()[0] == 0
    (record,) = read_records(tmp_path / "labels.jsonl")
    assert record.fields["note"] == "fine é"


def test_the_question_fits_a_line_of_a_narrow_terminal(tmp_path):
    """The rest of a longer one would stay on the screen."""
    write_samples(tmp_path, [REPLIES] * 2)
    person = Person(tmp_path)
    person.child.setwinsize(40, 80)
    person.press("l")
    asked = person.see(r"better: [^?]*\? 1 of 2 done[^\r\x1b]*")
    person.child.send("q")
    assert len(asked[asked.index("better") :]) < 80 and person.end()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(tmp_path, number):
    write_samples(tmp_path, [REPLIES] * 2)
    person = Person(tmp_path)
    person.press("l")
    person.see("1 of 2 done")
    assert not termios.tcgetattr(person.child.child_fd)[3] & termios.ICANON
    person.child.kill(number)
    person.see("next: ")
    assert termios.tcgetattr(person.child.child_fd)[3] & termios.ICANON
    code, shown = person.end()
    assert code == 128 + number and "1 labels (1 choices" in shown


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "my base"],
        ["--model", "my base", "--tokenizer", "my base"],
        ["--prompt-template", "Q {prompt}\\nA: "],
    ],
)
def test_the_commands_at_the_end_read_as_the_replies_were_made(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    tiny_model_folder(tmp_path / "my base")
    write_samples(tmp_path, [REPLIES], *words)
    person = Person(tmp_path, *words)
    person.press("l")
    said = person.end()[1]
    lines = [shlex.split(x.removeprefix("next: ")) for x in said.splitlines() if "python " in x]
    assert [line[1] for line in lines] == ["label.py", "sft.py", "preference_training.py"]
    pairs = {*zip(words[::2], words[1::2], strict=True)}
    assert all(pairs <= {*zip(line, line[1:], strict=False)} for line in lines[1:]), said


def test_a_model_with_a_chat_template_makes_messages(tmp_path):
    tiny_model_folder(tmp_path / "chatty", template="chatml", bos=False)
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    rows = [{"messages": turns}, {"prompt": "what is the answer", "context": "a question"}]
    text = "".join(json.dumps(row) + "\n" for row in rows[:1])
    (tmp_path / "prompts.jsonl").write_text(text)
    (tmp_path / "more.jsonl").write_text(json.dumps(rows[1]) + "\n")
    words = ("--prompts", tmp_path / "prompts.jsonl", tmp_path / "more.jsonl")
    model = ("--model", tmp_path / "chatty", "--max-new-tokens", 8)
    person = Person(tmp_path, *words, *model)
    shown = person.see(KEY)
    assert "> system: be kind" in shown and "> user: hello" in shown
    person.child.send("1")
    assert "> user: what is the answer" in person.see(KEY)
    person.child.send("2")
    assert person.end()[0] == 0
    records = read_records(tmp_path / "labels.jsonl")
    assert records[0].prompt == turns
    assert records[1].prompt == [{"role": "user", "content": "what is the answer\n\na question"}]
    tokenizer = load_model(tmp_path / "chatty").tokenizer
    trained = tokenise_pairs(records, tokenizer)
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert [tokens[: len(asked)] for tokens in trained[0].responses] == [asked, asked]


def test_replies_are_shown_where_the_keys_are(tmp_path):
    """Standard output may go to a file: it gets the summary, the person the replies."""
    write_samples(tmp_path, [REPLIES])
    command = f"{shlex.join(line(tmp_path))} > out.txt"
    person = Person(tmp_path, command=["sh", "-c", command])
    shown = person.see(KEY)
    assert all(text.strip() in shown for text in REPLIES)
    person.child.send("l")
    assert person.end()[0] == 0
    said = (tmp_path / "out.txt").read_text()
    assert said.splitlines()[0].endswith("1 labels (1 choices, 0 ties, 0 skipped), 1 new")
