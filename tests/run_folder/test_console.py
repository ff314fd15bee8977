"""What a person sees: lines above a bar in a terminal, lines alone in a log."""

import io
import re
import time

import pytest

import waiting
from run_folder import console
from run_folder.console import Progress, Wait, pace
from run_folder.output import Output, bars
from waiting import Unseen, busy, watched


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_aligned_line_per_report():
    stream = io.StringIO()
    with Progress(120, name="sft", stream=stream) as progress:
        for step in (1, 20, 120):
            progress.advance()
            progress.report(step, {"loss": step / 7, "lr": 1e-5 * step, "note": "x"})
        progress.line("saved")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4 and lines[-1] == "saved"
    assert lines[0].startswith("sft   1/120  loss 0.1429") and "lr 1.000e-05" in lines[0]
    assert len({line.index("lr ") for line in lines[:3]}) == 1
    assert not re.search(r"[\r\x1b]", stream.getvalue())


def test_a_terminal_gets_lines_above_a_bar_that_fits_80_columns():
    stream = Terminal()
    with Progress(10, done=4, name="ppo", stream=stream) as progress:
        for step in range(5, 11):
            progress.doing("rollout")
            progress.advance()
            progress.report(step, {"score": step / 8})
        progress.line("saved")
    text = stream.getvalue()
    assert "\r" in text and "10/10" in text
    lines = re.findall(r"\r *\r(?:\x1b\[A)*(ppo +\d+/10  score [\d.]+ .*)\n", text)  # bar cleared
    assert len(lines) == 6 and lines[-1].startswith("ppo 10/10  score 1.25")
    bars = [part for part in re.split(r"[\r\n]", text) if "|" in part]
    assert len(bars) > 6 and max(map(len, bars)) < 80 and "rollout" in bars[1]
    assert "rollout" not in bars[-1]


@pytest.mark.parametrize("what, shown", [("rollout", r", rollout \d+ s"), ("", r" left, \d+ s")])
def test_a_long_step_says_how_long_it_has_been_at_it(monkeypatch, what, shown):
    monkeypatch.setattr(console, "TICK", 0.01)
    monkeypatch.setattr(console, "PATIENCE", 0.05)
    stream = Terminal()
    with Progress(10, name="ppo", stream=stream) as progress:
        progress.advance()
        if what:
            progress.doing(what)
        deadline = time.monotonic() + 10
        while not re.search(shown, stream.getvalue()) and time.monotonic() < deadline:
            time.sleep(0.01)
        progress.report(1, {"score": 0.5})
        progress.advance()
    assert re.search(shown, stream.getvalue()), stream.getvalue()
    assert not progress.ticking.is_alive()
    assert " s" not in stream.getvalue().split("\r")[-1].split(" left")[1]


def test_a_slow_run_has_seconds_per_step():
    stream = Terminal()
    with Progress(10, name="ppo", stream=stream) as progress:
        progress.moved = time.monotonic() - 100
        progress.bar.start_t = progress.bar._time() - 100
        progress.advance(4)
        progress.bar.refresh()
        progress.report(4, {})
    assert "ppo  4/10  25 s/step" in stream.getvalue()
    assert "25.00s/step" in stream.getvalue().split("\r")[-1]
    assert [pace(rate) for rate in (0.25, 2, 0)] == ["4 s/step", "2.00 steps/s", "0.00 steps/s"]


def test_the_pace_is_that_of_the_steps_since_the_last_line(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    stream = io.StringIO()
    with Progress(20, done=5, stream=stream) as progress:
        wait(1000)  # the evaluation of the first weights
        progress.report(5, {"held-out": 0.1}, timed=False)
        for step in range(6, 13):
            wait(40 if step < 8 else 4)
            progress.advance()
            if step == 9:
                wait(500)  # in the middle of what a line is about
                progress.report(step, {"held-out": 0.2}, timed=False)
            if step in (7, 10, 12):
                progress.report(step, {})
    lines = [line for line in stream.getvalue().splitlines() if "held-out" not in line]
    assert lines == ["7/20  40 s/step", "10/20  4 s/step", "12/20  4 s/step"]


def test_a_wait_shows_after_two_seconds_and_goes_again(monkeypatch):
    for patience, shown in ((60.0, False), (0.0, True)):
        stream = Terminal()
        with Wait("validation", 3, stream=stream, patience=patience) as wait:
            for _ in range(3):
                wait.bar.last_print_t -= 1
                wait.advance()
        assert ("validation 2/3" in stream.getvalue()) == shown
        assert not stream.getvalue().rstrip("\r").strip() or shown
        log = io.StringIO()
        with Wait("validation", 3, stream=log, patience=patience) as wait:
            wait.advance(3)
        assert bool(re.fullmatch(r"validation: 3 in 0\.\d s\n", log.getvalue())) == shown


def test_a_long_wait_in_a_log_says_how_long_it_will_be():
    log = io.StringIO()
    wait = Wait("sampling", 40, stream=log)
    wait.started = wait.said = time.monotonic() - 31
    wait.advance(10)
    assert re.fullmatch(r"sampling: 10 of 40 in 31\.\d s, 93 s left\n", log.getvalue())


def test_a_wait_in_which_nothing_is_done_yet_has_no_time_left():
    said = io.StringIO()
    wait = Wait("sampling", 40, stream=said, live=False, patience=0)
    wait.said = wait.started = time.monotonic() - 60
    wait.advance(0)
    assert said.getvalue() == "sampling: 0 of 40 in 60.0 s\n"


def test_a_wait_shows_while_its_first_thing_is_not_done(monkeypatch):
    monkeypatch.setattr(console, "TICK", 0.01)
    for total, shown in ((3, r"\rsampling 0/3 \|"), (None, r"\rsampling 00:00")):
        stream = Terminal()
        with Wait("sampling", total, stream=stream, patience=0.02) as wait:
            deadline = time.monotonic() + 10
            while "sampling" not in stream.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)
        assert re.search(shown, stream.getvalue()), stream.getvalue()
        assert not wait.ticking.is_alive()
        assert not stream.getvalue().rstrip("\r").split("\r")[-1].strip()  # gone again


def test_what_others_print_stands_on_lines_above_the_bars(monkeypatch):
    terminal = Terminal()
    out, err = (Output(terminal, lambda text: text) for _ in range(2))
    with Progress(4, name="ppo", stream=err) as progress:
        progress.advance()
        print("from a reward", 1, file=out)  # in several writes
        err.write("warning: one\n")
        with Wait("evaluation", 2, stream=err, patience=60):  # not shown yet
            print("a note", file=err)
        progress.report(1, {"score": 0.5})
    assert not bars
    shown, screen = [""], terminal.getvalue()
    for part in re.findall(r"\r|\n|\x1b\[A|[^\r\n\x1b]+", screen):  # as a terminal has it
        if part == "\n":
            shown.append("")
        elif part != "\r" and part != "\x1b[A":
            shown[-1] = part + shown[-1][len(part) :]
    lines = [line.rstrip() for line in shown if line.strip()]
    assert lines[:3] == ["from a reward 1", "warning: one", "a note"]
    assert lines[3].startswith("ppo 1/4  score 0.5") and "|" in lines[4] and len(lines) == 5
    assert "evaluation" not in screen


def test_an_evaluation_is_none_of_the_bar_s_time():
    stream = Terminal()
    with Progress(10, name="ppo", stream=stream) as progress:
        for _ in range(2):
            progress.bar.start_t -= 2
            progress.bar.last_print_t -= 2
            progress.advance()
        progress.bar.start_t -= 100  # an evaluation
        progress.bar.last_print_t -= 100
        progress.moved -= 100
        progress.report(2, {"held-out": 1.0}, timed=False)
    assert re.search(r"\| +2\.\d+s/step", stream.getvalue().split("\r")[-1])


def test_where_nobody_knows_how_much_there_is_no_time_is_left():
    stream, log = Terminal(), io.StringIO()
    with Wait("reading", stream=stream, patience=0.0) as wait:
        wait.bar.last_print_t -= 1
        wait.advance(5)
    assert "reading 5 in 00:00" in stream.getvalue() and "left" not in stream.getvalue()
    with Wait("loading", stream=log, patience=0.0):
        pass
    assert re.fullmatch(r"loading: 0\.\d s\n", log.getvalue())


def test_what_was_before_the_first_step_is_none_of_its_time():
    stream = Terminal()
    with Progress(10, name="sft", stream=stream) as progress:
        progress.moved = time.monotonic() - 100
        progress.bar.start_t = progress.bar.last_print_t = progress.bar._time() - 100
        progress.begin()
        progress.moved -= 2
        progress.bar.start_t -= 2
        progress.advance()
        progress.report(1, {})
    assert "sft  1/10  2 s/step" in stream.getvalue()
    assert re.search(r"\| +2\.\d+s/step", stream.getvalue().split("\r")[-1])


def test_what_is_watched_tells_whoever_asked(monkeypatch):
    assert list(watched(range(3), "tokenising")) == [0, 1, 2]
    with busy("loading"):
        pass
    told = []

    class Told(Unseen):
        def __init__(self, name, total=None):
            told.append((name, total))

        def advance(self, count=1):
            told.append(count)

    monkeypatch.setattr(waiting, "_wait", Told)
    assert list(watched(range(2), "tokenising")) == [0, 1]
    with busy("loading"):
        pass
    assert told == [("tokenising", 2), 1, 1, ("loading", None)]
