"""judge.py --judge-url: verdicts by log-probabilities or text, and how a service can fail."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from files import ROOT

import judge
from command_line.exits import run_main
from rewards.chat_service import ChatJudge
from rewards.http_client import Client

PAIRS = str(ROOT / "data" / "preference_increasing_mult_2_test.jsonl")


def says(text: str, logprobs: list[tuple[str, float]] | None = None) -> dict:
    choice: dict = {"message": {"role": "assistant", "content": text}}
    if logprobs is not None:
        several = [{"token": token, "logprob": value} for token, value in logprobs]
        choice["logprobs"] = {"content": [several[0] | {"top_logprobs": several}]}
    return {"choices": [choice]}


class Server:
    """A chat service; `answer(body, how often this text has come)` gives a reply or a status."""

    def __init__(self, answer):
        server, self.requests, self.count = self, [], {}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, dict(self.headers), body))
                text = body["messages"][0]["content"]
                server.count[text] = server.count.get(text, 0) + 1
                reply = answer(body, server.count[text])
                if reply == "hang":
                    threading.Event().wait(1.5)  # no sleep, which tests leave out
                    return
                status, data = (reply, b"no") if isinstance(reply, int) else (200, reply)
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("rewards.http_client.time.sleep", lambda seconds: None)


def run(server, *words, status: int = 0) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    line = ["--input", PAIRS, "--judge-url", server.url, *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as end:
            run_main(lambda: judge.main([str(word) for word in line]))
    assert end.value.code == status, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def lines(name="judged.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def even_first(text: str) -> bool:
    """Whether the answer that stands first has more even numbers."""
    first, second = (text.partition(f"Answer {i}:\n")[2].partition("\n\n")[0] for i in (1, 2))
    share = [sum(int(n) % 2 == 0 for n in t.split()) / len(t.split()) for t in (first, second)]
    return share[0] >= share[1]


def asked(body: dict) -> str:
    return body["messages"][0]["content"]


def test_log_probabilities_are_taken_where_they_are_given(caplog):
    def answer(body, _):
        first = [(" 1", math.log(0.6)), ("1", math.log(0.15)), ("2", math.log(0.25)), ("x", -9)]
        second = [("2", math.log(0.9)), ("1", math.log(0.1))]
        return says("whatever", first if even_first(asked(body)) else second)

    with Server(answer) as server:
        run(server, "--judge", "big", "--max-rows", 3)
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    for _, _, body in server.requests:
        assert body["model"] == "big" and body["temperature"] == 0 and body["logprobs"] is True
    for row in lines():
        assert sorted(row["judge"]["first_wins"]) == pytest.approx([0.1, 0.75])
        assert row["judge"]["p"] == pytest.approx((0.75 + 0.9) / 2)
        assert row["judge"]["by"] == f"big at {server.url}/chat/completions"


def test_else_what_it_says_counts():
    def answer(body, _):
        if "logprobs" in body:
            return 400  # knows no such option; asked for once
        return says("Answer 1 is better." if even_first(asked(body)) else " 2\n")

    with Server(answer) as server:
        out, _ = run(server, "--max-rows", 4)
    assert sum("logprobs" in body for _, _, body in server.requests) == 1
    assert "model" not in server.requests[0][2]
    assert all(row["judge"]["p"] == 1 and row["margin"] is None for row in lines())
    assert "orders     agree on 1.000 of 4 pairs" in out


@pytest.mark.parametrize(
    "bad", [500, 429, b"not json", {"choices": []}, says("both"), says("1 or 2"), says(""), "hang"]
)
def test_a_judge_that_fails_costs_the_pair_its_label_and_the_same_command_asks_again(bad):
    """The third pair has no answer at first; nothing else is lost, and nothing asked twice."""
    third = lines(PAIRS)[2]["chosen"].strip()
    healed = False

    def answer(body, _):
        if third in asked(body) and not healed:
            return bad
        return says("1" if even_first(asked(body)) else "2")

    words = ["--max-rows", 4, "--judge-retries", 2, "--judge-timeout", 0.5]
    with Server(answer) as server:
        out, err = run(server, *words)
        assert "4: 3 labelled, 1 left: no answer of the judge" in out
        assert "note: 1 without an answer of the judge; the same command asks for them" in err
        assert [row["judge"]["pair"] for row in lines()] == [0, 1, 3]
        (left,) = lines("judged.unlabelled.jsonl")
        assert left["judge"]["pair"] == 2 and "(3 attempts)" in left["judge"]["why"]
        assert left["responses"][0].strip() == third
        assert max(server.count.values()) == 3
        before, healed = len(server.requests), True
        out, _ = run(server, *words)
        assert len(server.requests) == before + 2 and "4: 4 labelled" in out
    assert [row["judge"]["pair"] for row in lines()] == [0, 1, 3, 2]
    assert lines("judged.unlabelled.jsonl") == []


@pytest.mark.parametrize("bad", [400, 413, 422, b" " * (1 << 26) + b"  "])
def test_a_text_that_the_service_refuses_costs_its_own_pair_alone(bad):
    """One that is too long for it, say: the rest is judged, by log-probabilities as before."""

    def answer(body, _):
        if refused in asked(body):
            return bad
        one = 0.7 if even_first(asked(body)) else 0.3
        return says("1", [("1", math.log(one)), ("2", math.log(1 - one))])

    refused = json.loads(Path(PAIRS).read_text().splitlines()[1])["chosen"].strip()
    with Server(answer) as server:
        out, err = run(server, "--max-rows", 3)
    assert "3: 2 labelled, 1 left: no answer of the judge" in out and "1 without an answer" in err
    assert [row["judge"]["pair"] for row in lines()] == [0, 2]
    for row in lines():
        assert sorted(row["judge"]["first_wins"]) == pytest.approx([0.3, 0.7])


def test_a_passing_failure_costs_nothing():
    def answer(body, times):
        return [503, says("?"), says("1" if even_first(asked(body)) else "2")][min(times, 3) - 1]

    with Server(answer) as server:
        run(server, "--max-rows", 3)
    assert len(lines()) == 3 and not Path("judged.unlabelled.jsonl").exists()


def test_the_key_goes_along_and_into_nothing_that_is_written(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret-1")
    with Server(lambda body, _: 401) as server:
        out, err = run(server, "--max-rows", 2, status=2)
    assert server.requests[0][1]["Authorization"] == "Bearer sk-very-secret-1"
    assert len(server.requests) == 1 and err.count("error:") == 1 and "status 401" in err
    with Server(lambda body, _: says("sk-very-secret-1")) as server:
        more = run(server, "--max-rows", 1, "--judge-retries", 1)
    written = "".join(file.read_text() for file in Path(".").iterdir())
    assert "sk-very-secret-1" not in out + err + "".join(more) + written


def test_nobody_there_is_one_line():
    with Server(lambda body, _: 200) as server:
        pass
    _, err = run(server, "--max-rows", 2, "--judge-retries", 1, status=2)
    assert err.rpartition("error: ")[2].startswith("judge http://127.0.0.1") and "refused" in err
    assert "Traceback" not in err and not Path("judged.jsonl").exists()


def test_several_requests_at_once_make_the_same_file():
    def answer(body, _):
        return says("1" if even_first(asked(body)) else "2")

    with Server(answer) as server:
        run(server, "--max-rows", 6)
        run(server, "--max-rows", 6, "--judge-connections", 4, "--output", "b.jsonl")
    assert Path("judged.jsonl").read_bytes() == Path("b.jsonl").read_bytes()


def test_debate_and_revisions_go_by_the_service_too():
    def answer(body, _):
        return says("1") if "1 or 2" in asked(body) else says("because it is even")

    with Server(answer) as server:
        run(server, "--max-rows", 1, "--debate", 1, "--judge-max-tokens", 33)
        arguments = [body for _, _, body in server.requests if "1 or 2" not in asked(body)]
        assert len(arguments) == 4 and all(body["max_tokens"] == 33 for body in arguments)
        run(server, "--max-rows", 1, "--revise")
    assert [row["completion"] for row in lines("revised.jsonl")] == ["because it is even"] * 2


def test_a_judge_is_a_client_with_one_deadline_for_a_request():
    assert issubclass(ChatJudge, Client)
    assert ChatJudge("http://h/v1/chat/completions?k=secret").shown_url.endswith("/completions")


def test_a_killed_run_loses_no_label():
    """SIGKILL while labels come in; the same command makes the same file."""

    def answer(body, _):
        return says("1" if even_first(asked(body)) else "2")

    with Server(answer) as server:
        line = ["--input", PAIRS, "--judge-url", server.url, "--output"]
        run(server, "--output", "whole.jsonl")
        words = [sys.executable, str(ROOT / "judge.py"), *line, "judged.jsonl"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        before = 0
        for _ in range(3):
            child = subprocess.Popen(words, env=os.environ | {"no_proxy": "127.0.0.1"}, **quiet)
            file = Path("judged.jsonl")
            until = time.monotonic() + 60
            while child.poll() is None and time.monotonic() < until:
                if file.exists() and file.read_bytes().count(b"\n") > before + 2:
                    break
            child.kill()
            child.wait()
            rows = file.read_bytes().count(b"\n")
            assert rows >= before
            before = rows
        assert before > 2
        subprocess.run(words, env=os.environ | {"no_proxy": "127.0.0.1"}, check=True, **quiet)
    assert Path("judged.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
