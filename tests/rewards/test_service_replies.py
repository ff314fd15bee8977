"""A reward service that answers anything at all, as slowly as it likes: scores, or one clean error.

Forty generated replies in `make test`, two hundred in `make test-long`.
"""

import contextlib
import json
import re
import signal
import socket
import threading
import time
from itertools import cycle

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from reliable_runs import NOW, RUNS, shared_server

from errors import UserError
from rewards.service import HTTPReward
from run_folder.checkpoint_folder import latest_checkpoint
from training.checkpoints import load_checkpoint

PROMPTS, RESPONSES = ["one", "two"], ["uno", "dos"]
GOOD = b'{"scores": [1, 2]}'
HEAD = b"HTTP/1.1 200 OK\r\n"
PAUSE = 0.02  # seconds between the bytes of a service that drips


class Service:
    """Accepts connections, reads a request, sends `pieces` one by one, then `drip` for ever."""

    def __init__(self, pieces: list[bytes], drip: bytes = b"", reads: bool = True):
        self.pieces, self.drip, self.reads = pieces, drip, reads
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/score"
        self.open = True
        self.threads = [threading.Thread(target=self.accept, daemon=True)]
        self.threads[0].start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.threads.append(threading.Thread(target=self.answer, args=(connection,)))
                self.threads[-1].start()

    def answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self.reads:
                connection.recv(1 << 16)
            for piece in self.pieces:
                connection.sendall(piece)
            for byte in cycle(self.drip):
                if not self.open:
                    return
                connection.sendall(bytes([byte]))
                time.sleep(PAUSE)

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_) -> None:
        self.open = False
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


def ask(service: Service, timeout: float = 0.3) -> list | str:
    """Its scores, or what the error says; no other exception, no hang, no thread left behind."""
    before = threading.active_count()
    try:
        return HTTPReward(service.url, timeout=timeout, retries=0)(PROMPTS, RESPONSES)
    except UserError as wrong:
        assert "\n" not in str(wrong) and len(str(wrong)) < 1500
        return str(wrong)
    finally:
        service.open = False
        until = time.monotonic() + 30
        while threading.active_count() > before and time.monotonic() < until:
            time.sleep(0.001)
        assert threading.active_count() <= before + len(service.threads)


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
# What has been sent, and what then drips for ever.
DRIPS = {
    "status line": ([], b"H"),
    "after a status line": ([HEAD[:-2]], b"K"),
    "interim responses": ([], b"HTTP/1.1 100 Continue\r\n\r\n"),
    "header name": ([HEAD], b"X"),
    "headers": ([HEAD], b"X-A: b\r\n"),
    "body": ([HEAD + b"\r\n"], b" "),
    "a body with a length": ([HEAD + b"Content-Length: 999999\r\n\r\n"], b" "),
    "chunk size": ([CHUNKED], b"0"),
    "chunk extension": ([CHUNKED + b"1;"], b"a"),
    "chunks": ([CHUNKED], b"1\r\n \r\n"),
    "trailers": ([CHUNKED + b"0\r\n"], b"X-A: b\r\n"),
    "error body": ([b"HTTP/1.1 400 Bad\r\n\r\n"], b"no"),
    "error headers": ([b"HTTP/1.1 503 Bad\r\n"], b"X-A: b\r\n"),
    "redirect": ([b"HTTP/1.1 302 Found\r\nLocation: /\r\n"], b"X-A: b\r\n"),
    "nothing": ([], b""),
}


@pytest.mark.parametrize("where", DRIPS)
def test_a_service_that_drips_gets_its_time_and_no_more(where):
    pieces, drip = DRIPS[where]
    with Service(pieces, drip) as service:
        if not drip:
            service.answer = lambda connection: (time.sleep(0.4), connection.close())
        # A busy machine may not even connect in that time.
        assert re.search("no (answer|connection) within 0.3 s", ask(service))


TLS = {
    "a record of the handshake": ([b"\x16\x03\x03\x3f\x00"], b"\0"),
    "records of the handshake": ([], b"\x16\x03\x03\x00\x01\x02"),
    "a proxy's headers": ([HEAD], b"X-A: b\r\n"),
}


@pytest.mark.parametrize("where", TLS)
def test_a_connection_that_drips_before_it_is_secure_leaves_no_thread(monkeypatch, where):
    with Service(*TLS[where]) as service:
        if "proxy" in where:
            monkeypatch.setenv("https_proxy", service.url)
            monkeypatch.setenv("no_proxy", "")
        before = threading.active_count()
        reward = HTTPReward(service.url.replace("http:", "https:"), timeout=0.3, retries=0)
        with pytest.raises(UserError):
            reward(PROMPTS, RESPONSES)
        until = time.monotonic() + 30
        while threading.active_count() > before + 1 and time.monotonic() < until:
            time.sleep(0.01)  # the service's own goes when the connection does
        assert threading.active_count() <= before + 1


def test_a_service_that_does_not_take_the_request_gets_no_more_either():
    """What is sent counts as well: 40 MB do not fit into the buffers between the two."""
    with Service([], b"H", reads=False) as service:
        reward = HTTPReward(service.url, timeout=0.3, retries=0)
        with pytest.raises(UserError, match="no (answer|connection) within 0.3 s"):
            reward(["p"], ["x" * 40_000_000])


def test_a_slow_answer_within_the_time_counts():
    def slowly(connection):
        while not connection.recv(1 << 16).endswith(b"}"):
            pass
        for byte in HEAD + b"\r\n" + GOOD:
            connection.sendall(bytes([byte]))
            time.sleep(0.002)
        connection.close()

    with Service([]) as service:
        service.answer = slowly
        assert ask(service, timeout=60) == [1, 2]


# Generated replies ------------------------------------------------------------------------------

BYTES = st.binary(max_size=20)
STATUS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.0 200 OK",
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 204 No",
        b"HTTP/9 x y",
        b"HTTP/1.1 100 Continue",
        b"HTTP/1.1 304 N",
        b"HTTP/1.1 500 \x1b[2J",
        b"HTTP/1.1 999 Odd",
        b"HTTP/1.1 -1 Odd",
        b"HTTP/1.1 301 Moved",
        b"ICY 200 OK",
        b"\x16\x03\x01",
    ]
)
HEADERS = st.lists(
    st.sampled_from(
        [
            b"Content-Type: application/json",
            b"Content-Length: 18",
            b"Content-Length: 1",
            b"Content-Length: -5",
            b"Content-Length: 99999999999999999999",
            b"Content-Length: x",
            b"Transfer-Encoding: chunked",
            b"Content-Encoding: gzip",
            b"Retry-After: 0",
            b"Retry-After: \xc2\xb2",
            b"Location: http://[",
            b"Set-Cookie: \xff\xfe",
            b": empty",
            b" folded",
            b"no colon",
            b"X: " + b"y" * 70_000,
            b"WWW-Authenticate: Basic",
            b"Content-Type: text/plain; charset=nonsense",
        ]
    ),
    max_size=3,
)
BODY = st.sampled_from(
    [
        GOOD,
        GOOD,
        GOOD,
        b'{"rewards": [0.5, -1e3]}',
        b'{"scores": [1]}',
        b'{"scores": [1e999, 2]}',
        b'{"scores": [' + b"9" * 5000 + b", 1]}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b'{"scores": "\\u001b[31m"}',
        b"12\r\n" + GOOD + b"\r\n0\r\n\r\n",
        b"zz\r\n",
        b"-1\r\nx",
        b'{"scores": [1, 2], "rewards": [1, 2]}',
        b"null",
        b"",
        b"<html>" * 1000,
        b'{"scores": {"0": 1}}',
        b'{"scores": [null, "x"]}',
    ]
)


@st.composite
def replies(draw) -> tuple[list[bytes], bytes]:
    """What is sent at once, and what then drips."""
    pieces = [draw(STATUS) + b"\r\n", *(h + b"\r\n" for h in draw(HEADERS)), b"\r\n", draw(BODY)]
    whole = b"".join(pieces)
    match draw(st.integers(0, 5)):
        case 0:
            whole = whole[: draw(st.integers(0, min(len(whole), 400)))]
        case 1:
            at = draw(st.integers(0, min(len(whole), 400)))
            whole = whole[:at] + draw(BYTES) + whole[at:]
    return [whole], draw(st.sampled_from([b"", b"", b"", b" ", b"X: y\r\n"]))


def check_reply(reply: tuple[list[bytes], bytes]) -> None:
    with Service(*reply) as service:
        found = ask(service, timeout=0.2)
    event("scores" if isinstance(found, list) else "an error")
    if isinstance(found, list):
        assert len(found) == 2
        json.dumps(found)
    else:
        assert found.startswith("reward service http://127.0.0.1:")


def some(count: int):
    checks = list(HealthCheck)
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=checks
    )


@some(40)
@given(reply=replies())
def test_any_reply_is_scores_or_one_clean_error(reply):
    check_reply(reply)


@pytest.mark.long
@some(200)
@given(reply=replies())
def test_two_hundred_replies(reply):
    check_reply(reply)


# A run that waits -------------------------------------------------------------------------------


WAITING = {
    "ppo": ["headers", "status line", "trailers"],
    "group": ["interim responses", "chunk size", "error body"],
    "rest": ["body", "error headers", "chunk extension"],
}
QUICK = ("headers", "interim responses", "body")


@pytest.mark.parametrize(
    "name, where",
    [
        pytest.param(name, where, marks=[] if where in QUICK else pytest.mark.long)
        for name, places in WAITING.items()
        for where in places
    ],
)
def test_a_signal_ends_the_wait_for_a_service_that_drips(tmp_path, name, where):
    """SIGTERM did not, and the run hung for good."""
    script, line = RUNS[name]
    line = [word for word in line if word != "--ground_truth_reward"]
    prelude = f"""
import sys, rewards.http_client
inner = rewards.http_client.Client.post
def said(self, body):
    sys.stderr.write("{NOW}\\n")
    return inner(self, body)
rewards.http_client.Client.post = said
"""
    with Service(*DRIPS[where]) as service:
        line = [*line, "--reward-url", service.url, "--reward-timeout", "600"]
        running = shared_server().start(script, line, tmp_path, prelude=prelude)
        running.wait_for(NOW)
        running.signal(signal.SIGTERM)
        ended = running.wait()
        service.open = False
    assert ended.code == 143 and "is given up" in ended.err, ended.err
    assert load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints")).step == 0
