"""talk_to_model.py at a keyboard (a pseudo-terminal), and what becomes of ratings."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import mlx.core as mx
import pexpect
import pytest
from chat_runs import SCRIPT, run
from files import ROOT
from parsers import parse

from chat.rating import Ratings
from data_utils import read_records, tokenise_preferences, tokenise_scalar
from models.load import DEFAULT_MODEL, load_model

ENTER, CTRL_C, CTRL_D, UP, LEFT = "\r", "\x03", "\x04", "\x1b[A", "\x1b[D"


# ------------------------------------------------------------------------------ at a keyboard


class Keyboard:
    """A person at a terminal of 100 columns."""

    def __init__(self, folder, *words, **variables):
        environment = {**os.environ, "HOME": str(folder), "TERM": "dumb", "NO_COLOR": "1"}
        environment |= variables
        self.child = pexpect.spawn(
            sys.executable,
            [SCRIPT, *map(str, words)],
            cwd=folder,
            env=environment,
            encoding="utf-8",
            timeout=60,
            dimensions=(50, 100),
        )

    def type(self, keys: str) -> None:
        self.child.send(keys)

    def see(self, text: str) -> str:
        """Wait for `text`; what was shown before it."""
        self.child.expect_exact(text)
        return self.child.before

    def line(self, text: str) -> str:
        """Type a line at the prompt; what is shown until the next prompt."""
        self.type(text + ENTER)
        self.see(text + "\r\n")
        return self.see("\n> ").replace("\r\n", "\n")

    def leave(self, keys: str = CTRL_D) -> int:
        self.type(keys)
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


def test_a_conversation_with_commands(files, tmp_path):
    chat = Keyboard(
        tmp_path, "--model", files / "chatty", "--system-prompt", "be kind", "--max-tokens", 8
    )
    chat.see("conversation; /help lists commands")
    chat.see("> ")
    first, second = chat.line("hello"), chat.line("what is the answer")
    assert "8 tokens" in first and "tokens/s" in first
    # The second turn answers the whole conversation, the first reply included.
    assert "saved 2 exchanges" in chat.line("/save talk.json")
    said = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in said] == ["system", "user", "assistant", "user", "assistant"]
    assert said[0]["content"] == "be kind"
    assert said[-1]["content"] == chat_reply(files / "chatty", said[:-1], 8)
    assert "is there already" in chat.line("/save talk.json")
    again = chat.line("/retry")
    assert "/set temp 0.7 samples another" in again
    assert second.splitlines()[0] in again  # the same at temp 0
    assert "taken back: what is the answer" in chat.line("/undo")
    assert "taken back: hello" in chat.line("/undo")
    assert "nothing has been said yet" in chat.line("/undo")
    chat.type("/load talk.json" + ENTER)
    for text in ("> hello", first.splitlines()[0], "> what is the answer", second.splitlines()[0]):
        chat.see(text)
    chat.see("\n> ")
    assert "system prompt: be terse" in chat.line("/system be terse")
    assert "max_tokens 3" in chat.line("/set max-tokens 3")
    assert "3 tokens" in chat.line("hello")
    assert "error: --temp: -1 is not 0 or more" in chat.line("/set temp -1")
    assert "no such setting" in chat.line("/set tmp 1")
    assert "the conversation is empty" in chat.line("/reset")
    assert "/undo" in chat.line("/help")
    assert "error: /nope: no such command" in chat.line("/nope")
    chat.type("//help" + ENTER)  # as text
    chat.see("3 tokens")
    chat.see("> ")
    chat.type("one \\" + ENTER)
    chat.see("… ")
    assert "3 tokens" in chat.line("two")
    assert chat.leave("/quit" + ENTER) == 0
    history = (tmp_path / ".mlx_rlhf_history").read_text(encoding="utf-8")
    assert "what is the answer" in history


PASTED = "def f(x):\n    return x\n/set is no command here\n"


@pytest.mark.parametrize("kind", ["bracketed", "as fast as a paste"])
def test_prompts_of_several_lines(files, tmp_path, kind):
    brackets = kind == "bracketed"
    editor = tmp_path / "editor.sh"
    editor.write_text('#!/bin/sh\nprintf " and\nmore" >> "$1"\n', encoding="utf-8")
    editor.chmod(0o700)
    chat = Keyboard(
        tmp_path,
        *("--model", files / "chatty", "--max-tokens", 3),
        TERM="xterm" if brackets else "dumb",
        EDITOR=str(editor),
        VISUAL="",
    )
    chat.see("> ")
    chat.type(f"\x1b[200~{PASTED}\x1b[201~last" + ENTER if brackets else PASTED + "last" + ENTER)
    chat.see("3 tokens")
    chat.see("> ")
    for line in ('"""/first', "second", 'third"""'):
        chat.type(line + ENTER)
        chat.see(line[-5:])
    chat.see("3 tokens")
    chat.see("> ")
    chat.type("/edit some" + ENTER)
    chat.see("3 tokens")
    chat.see("> ")
    chat.type("/save talk.json" + ENTER)
    chat.see("saved 3 exchanges")
    said = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    prompts = [m["content"] for m in said if m["role"] == "user"]
    assert prompts == [PASTED + "last", "/first\nsecond\nthird", "some and\nmore"]
    chat.see("> ")
    assert chat.leave(("/bye" if brackets else "/exit") + ENTER) == 0


def chat_reply(folder, messages, count):
    """The slow way, for a conversation."""
    loaded = load_model(folder)
    prompt = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    loaded.tokenizer.add_eos_token("<|im_end|>")
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(mx.argmax(loaded.model(mx.array([tokens]))[0, -1])))
        if tokens[-1] in loaded.eos_ids:
            tokens.pop()
            break
    text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    return text[len(loaded.tokenizer.decode(prompt, skip_special_tokens=True)) :].strip()


def test_ctrl_c_stops_the_reply_and_not_the_program(files, tmp_path):
    chat = Keyboard(tmp_path, "--model", files / "chatty", "--max-tokens", 10**6)
    chat.see("> ")
    chat.type("hello" + ENTER)
    chat.see("hello\r\n")
    chat.child.expect("(?s).{40}")
    chat.type(CTRL_C)
    chat.see("tokens/s, stopped")
    chat.see("> ")
    chat.type("half a line" + CTRL_C)  # at the prompt it drops the line
    chat.see("> ")
    assert "max_tokens 2" in chat.line("/set max_tokens 2")
    chat.type(UP + ENTER)  # the last line again, from the history
    chat.see("max_tokens 2")
    chat.see("> ")
    assert "2 tokens" in chat.line("hello")
    assert chat.leave() == 0


def test_rating_replies_makes_unpaired_records(tmp_path):
    chat = Keyboard(tmp_path, "--rate", "--max-tokens", 5)
    chat.see("> ")
    for prompt, key, seen in (("8 20", "g", "good"), ("5 7", "b", "bad"), ("1 2", "s", "not")):
        chat.type(prompt + ENTER)
        chat.see("good (g), bad (b) or skip (s)?")
        chat.type("x" + key)  # x means nothing
        chat.see(seen)
        chat.see("\n> ")
    chat.type("5 6" + ENTER)
    chat.see("skip (s)?")
    chat.type(CTRL_C)  # skips
    chat.see("not rated")
    chat.see("\n> ")
    chat.type("3 4" + ENTER)
    chat.see("skip (s)?")
    chat.type("b")
    chat.see("\n> ")
    assert "taken back: 3 4" in chat.line("/undo")  # and its rating
    chat.type(CTRL_D)
    chat.see("2 ratings added to ratings.jsonl (1 good, 1 bad)")
    records = read_records(tmp_path / "ratings.jsonl")
    assert set(records.kinds) == {"unpaired"}
    assert [(r.prompt, r.label) for r in records] == [("8 20", True), ("5 7", False)]
    tokenizer = load_model().tokenizer
    rows = tokenise_scalar(records, tokenizer).rows
    # What was rated is what is trained on: the same tokens, the leading space among them.
    expected = tokenizer.encode("8 20" + records[0].completion)
    assert rows[0].tokens == [*expected, tokenizer.eos_token_id]
    assert records[0].completion.startswith(" ")
    assert [row.reward for row in rows] == [1.0, 0.0]


def test_rating_a_comparison_makes_preferences(files, tmp_path):
    words = ("--compare", DEFAULT_MODEL, "--temp", 1, "--seed", 1, "--rate")
    chat = Keyboard(tmp_path, *words, "--ratings-file", "pairs.jsonl", "--max-tokens", 6)
    chat.see("> ")
    shown = []
    for prompt, key, seen in (("8 20", LEFT, "left"), ("5 7", "2", "right")):
        chat.type(prompt + ENTER)
        shown.append(chat.see("better: left (l), right (r), or skip (s)?"))
        chat.type(key)
        chat.see(f"rated: {seen}")
        chat.see("> ")
    chat.type(CTRL_D)
    chat.see("2 ratings added to pairs.jsonl")
    assert all("digits_model (1)" in text and "│  digits_model (2)" in text for text in shown)
    records = read_records(tmp_path / "pairs.jsonl")
    assert set(records.kinds) == {"preference"}
    for record, text, left in zip(records, shown, (True, False), strict=True):
        pair = record.responses if left else record.responses[::-1]
        row = next(line for line in text.splitlines() if pair[0].strip() in line and "│" in line)
        assert [cell.strip() for cell in row.split("│")] == [reply.strip() for reply in pair]
    assert len(tokenise_preferences(records, load_model().tokenizer)) == 2


def test_prompts_from_a_pipe_are_rated_at_the_terminal(tmp_path):
    lines = "8 20\\n5 7\\n1 2\\n3 4\\n"
    words = f"printf '{lines}' | {sys.executable} {SCRIPT} --rate --max-tokens 5 > out.txt"
    environment = {**os.environ, "NO_COLOR": "1"}
    child = pexpect.spawn(
        "/bin/sh", ["-c", words], cwd=tmp_path, env=environment, encoding="utf-8", timeout=60
    )
    for prompt, key in (("8 20", "b"), ("5 7", "g")):
        child.expect_exact(f"> {prompt}")
        child.expect_exact("good (g), bad (b) or skip (s)?")
        child.send(key)
    child.expect_exact("> 1 2")
    child.expect_exact("skip (s)?")
    child.send(CTRL_C)  # leaves, and what is rated stays
    child.expect_exact("stopped after 3 replies")
    child.expect_exact("2 ratings added to ratings.jsonl (1 bad, 1 good)")
    child.expect(pexpect.EOF)
    assert "error" not in child.before
    assert [r.label for r in read_records(tmp_path / "ratings.jsonl")] == [False, True]
    assert len((tmp_path / "out.txt").read_text(encoding="utf-8").splitlines()) == 3


def test_retry_keeps_the_rating_that_was_given(tmp_path):
    """It was deleted with the exchange."""
    chat = Keyboard(tmp_path, "--rate", "--max-tokens", 5)
    chat.see("> ")
    for line, key in (("8 20", "b"), ("/retry", "g"), ("5 7", "g")):
        chat.type(line + ENTER)
        chat.see("skip (s)?")
        chat.type(key)
        chat.see("\n> ")
    assert "taken back: 5 7" in chat.line("/undo") and "taken back: 8 20" in chat.line("/undo")
    assert "nothing has been said yet" in chat.line("/undo")
    chat.type(CTRL_D)
    chat.see("1 rating added to ratings.jsonl (1 bad)")
    assert [r.label for r in read_records(tmp_path / "ratings.jsonl")] == [False]


def piped(tmp_path, lines: str, *words) -> pexpect.spawn:
    """Prompts from a pipe, keys from the terminal."""
    shown = " ".join(map(str, words))
    line = f"printf '{lines}' | {sys.executable} {SCRIPT} --rate {shown} > out.txt"
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb"}
    return pexpect.spawn(
        "/bin/sh", ["-c", line], cwd=tmp_path, env=environment, encoding="utf-8", timeout=60
    )


def test_a_key_by_mistake_is_taken_back_where_prompts_come_from_a_file(tmp_path):
    child = piped(tmp_path, "8 20\\n5 7\\n1 2\\n", "--max-tokens", 5)
    steps = [
        # what is asked about, how many are done, the key
        ("8 20", "(0 of 3 done)", "u"),  # nothing there to go back to: no key
        ("", "", "b"),
        ("5 7", "(u: the one before, 1 of 3 done)", "g"),
        ("1 2", "(u: the one before, 2 of 3 done)", "u"),
        ("5 7", "(u: the one before, 1 of 3 done)", "u"),
        ("8 20", "(0 of 3 done)", "g"),
        ("5 7", "(u: the one before, 1 of 3 done)", "s"),
        ("1 2", "(u: the one before, 2 of 3 done)", "b"),
    ]
    for prompt, done, key in steps:
        if prompt:
            child.expect_exact(f"> {prompt}")
            child.expect_exact(f"good (g), bad (b) or skip (s)? {done}")
        child.send(key)
    child.expect_exact("2 ratings added to ratings.jsonl (1 bad, 1 good)")
    child.expect(pexpect.EOF)
    rated = [(r.prompt, r.label) for r in read_records(tmp_path / "ratings.jsonl")]
    assert rated == [("8 20", True), ("1 2", False)]
    # The replies were written once each.
    assert len((tmp_path / "out.txt").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_ctrl_c_stops_a_reply_whatever_was_inherited(files, tmp_path, ignored):
    """A background shell hands it down as ignored."""
    code = (
        f"import os, signal, sys; signal.signal(signal.SIGINT, {int(ignored)}); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "TERM": "dumb", "NO_COLOR": "1"}
    child = pexpect.spawn(
        sys.executable,
        ["-c", code, SCRIPT, "--max-tokens", "3"],
        cwd=tmp_path,
        env=environment,
        encoding="utf-8",
        timeout=60,
    )
    child.expect_exact("\n> ")
    child.send("half a line" + CTRL_C)
    child.expect_exact("\n> ")
    child.send("8 20" + ENTER)
    child.expect_exact("tokens/s")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)


# ------------------------------------------------------------------------------ from ratings on


def test_ratings_train_a_reward_model_that_scores_in_the_chat(tmp_path):
    ratings = Ratings(tmp_path / "pairs.jsonl", "preference")
    for number in range(4):
        ratings.add_preference(f"{number} 20", " 22 24", " 7 5 1", "left")
    words = (
        "--reward-model",
        "--train",
        "--train-file",
        "pairs.jsonl",
        "--iters",
        "3",
        "--save-file",
        "taste.npz",
        "--output-dir",
        "run",
    )
    trained = subprocess.run(
        [sys.executable, str(ROOT / "sft.py"), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert trained.returncode == 0, trained.stderr
    _, err = run("8 20", "--max-tokens", 5, "--reward-model", "taste.npz", cwd=tmp_path)
    assert re.search(r"reward_model -?\d+\.\d{3}", err)


def test_the_commands_of_the_walkthrough_parse():
    text = (ROOT / "docs/feedback.md").read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("python ")
    ]
    for line in lines:
        _, script, *words = shlex.split(line.partition(" < ")[0])
        parse(script.removesuffix(".py"), words)
    assert len(lines) >= 10
