"""Rewards from a service, and how it can fail."""

import base64
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from errors import UserError
from rewards.reward_set import Reward, RewardSet
from rewards.service import HTTPReward

PROMPTS, RESPONSES = ["one", "two", "three"], ["uno", "dos", "tres"]


class Service:
    """A reward service on this machine; `replies` are used up one by one, then it scores."""

    def __init__(self):
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.requests.append((self.path, dict(self.headers), json.loads(body)))
                reply = service.replies.pop(0) if service.replies else None
                service.answer(self, reply, json.loads(body))

            def log_message(self, *args):
                pass

        self.requests, self.replies, self.key = [], [], "scores"
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_address[1]}"
        self.url = f"http://{self.host}/score"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler, reply, request) -> None:
        if reply == "drop":
            return handler.connection.close()
        status, body, headers, truncated = 200, None, {}, False
        if reply == "sleep":
            time.sleep(1)
        elif reply == "cut":
            truncated = True
        elif isinstance(reply, tuple):
            status, body, headers = (*reply, {})[:3]
        elif reply is not None:
            body = reply
        if body is None:
            body = json.dumps({self.key: [len(r) for r in request["responses"]]})
        data = body.encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2] if truncated else data)
        except OSError:
            pass  # the client has gone


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    service = Service()
    yield service
    service.server.shutdown()
    service.server.server_close()


def test_http_reward_in_batches_with_columns(service):
    reward = HTTPReward(service.url, batch_size=2)
    assert reward(PROMPTS, RESPONSES, target=[1, None, {"a": "ß"}]) == [3, 3, 4]
    assert [body for _, _, body in service.requests] == [
        {"prompts": ["one", "two"], "responses": ["uno", "dos"], "target": [1, None]},
        {"prompts": ["three"], "responses": ["tres"], "target": [{"a": "ß"}]},
    ]
    assert service.requests[0][1]["Content-Type"] == "application/json"
    service.key = "rewards"
    assert reward(PROMPTS, RESPONSES) == [3, 3, 4]


@pytest.mark.parametrize("failure", [(500, "oops"), (503, ""), (429, "slow down"), "drop", "cut"])
def test_http_reward_tries_again(service, failure):
    service.replies = [failure, failure]
    reward = HTTPReward(service.url, retries=2, backoff=0.01)
    assert reward(PROMPTS, RESPONSES) == [3, 3, 4]
    assert len(service.requests) == 3


def test_http_reward_tries_again_after_a_timeout(service):
    service.replies = ["sleep"]
    reward = HTTPReward(service.url, timeout=0.5, backoff=0.01)
    assert reward(PROMPTS, RESPONSES) == [3, 3, 4]
    assert len(service.requests) == 2


def test_http_reward_gives_up(service):
    service.replies = [(500, "out of\nmemory")] * 3
    reward = HTTPReward(service.url, batch_size=2, retries=2, backoff=0.001)
    with pytest.raises(UserError) as caught:
        reward(PROMPTS, RESPONSES)
    assert str(caught.value) == (
        f"reward service {service.url}, rows 0 to 1: status 500 Internal Server Error: "
        "out of memory (3 attempts); row 0: prompt 'one', response 'uno'"
    )
    assert len(service.requests) == 3


def test_http_reward_waits_longer_each_time(service, monkeypatch):
    waits = []
    monkeypatch.setattr("rewards.http_client.time.sleep", waits.append)
    service.replies = [(500, ""), (500, ""), (429, "", {"Retry-After": "7"}), (500, "")]
    service.replies += [(503, "", {"Retry-After": "86400"})]
    HTTPReward(service.url, retries=5, backoff=0.5)(PROMPTS, RESPONSES)
    assert waits == [0.5, 1.0, 7.0, 4.0, 60.0]


@pytest.mark.parametrize(
    "reply, message",
    [
        ((404, "no such model"), "status 404 Not Found: no such model"),
        ((302, "", {"Location": "http://127.0.0.1:1/"}), "status 302"),
        ("<html>", "the reply is not JSON: '<html>'"),
        ("[1, 2, 3]", "is needed"),
        ('{"score": [1, 2, 3]}', "is needed"),
        ('{"scores": 1}', "is needed"),
        ('{"scores": [1, 2]}', "2 scores came back for 3 responses"),
    ],
)
def test_http_reward_fails_at_once(service, reply, message):
    service.replies = [reply]
    with pytest.raises(UserError) as caught:
        HTTPReward(service.url)(PROMPTS, RESPONSES)
    assert message in str(caught.value) and "rows 0 to 2" in str(caught.value)
    assert len(service.requests) == 1


@pytest.mark.parametrize("score", ["NaN", "null", '"1"', "[1]"])
def test_http_scores_are_checked_with_the_row(service, score):
    service.replies = [f'{{"scores": [1, {score}, 3]}}']
    rewards = RewardSet([Reward("remote", HTTPReward(service.url))])
    with pytest.raises(UserError, match="'remote', row 1: .* prompt 'two', response 'dos'"):
        rewards(PROMPTS, RESPONSES)


def test_http_failure_names_the_reward(service):
    service.replies = [(400, "bad")]
    rewards = RewardSet([Reward("remote", HTTPReward(service.url))])
    with pytest.raises(UserError, match="^reward 'remote': reward service .* status 400"):
        rewards(PROMPTS, RESPONSES)


def test_http_reward_without_a_service():
    reward = HTTPReward("http://127.0.0.1:9/score", retries=1, backoff=0.001)
    with pytest.raises(UserError, match=r"Connection refused \(2 attempts\)"):
        reward(PROMPTS, RESPONSES)


def test_a_service_that_drips_is_cut_off(service):
    def drip(handler, reply, request):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            try:
                handler.wfile.write(b" ")
            except OSError:
                return
            time.sleep(0.05)

    service.answer = drip
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer within 0.2 s"):
        HTTPReward(service.url, timeout=0.2, retries=0)(PROMPTS, RESPONSES)
    assert time.monotonic() - start < 2


def test_columns_that_json_cannot_hold(service):
    for value in (object(), float("nan")):
        with pytest.raises(UserError, match="column 'extra' cannot be sent as JSON"):
            HTTPReward(service.url)(["p"], ["r"], extra=[value])
    assert not service.requests


def test_http_reward_shows_no_secret(service, caplog):
    url = f"http://user:pass%40word@{service.host}/score?key=hidden-key&v=1"
    headers = {"X-Token": "hidden-token"}
    reward = HTTPReward(url, retries=1, backoff=0.001, headers=headers)
    said = "key=hidden-key hidden-key hidden-token pass%40word pass@word status 1"
    service.replies = [(500, said), (500, said)]
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as caught:
        reward(PROMPTS, RESPONSES)

    path, sent, _ = service.requests[0]
    assert path == "/score?key=hidden-key&v=1"
    assert sent["Authorization"] == "Basic " + base64.b64encode(b"user:pass@word").decode()
    assert sent["X-Token"] == "hidden-token"

    assert len(caplog.records) == 1 and "again in 0.001 s" in caplog.text
    assert reward.shown_url == service.url
    shown = [str(caught.value), caplog.text, repr(reward)]
    for secret in ("hidden", "pass", "word"):
        assert not any(secret in text for text in shown)
    assert "status 1" in str(caught.value)  # too short to be a secret
    assert caught.value.__cause__ is None  # a traceback would show the URL


@pytest.mark.parametrize(
    "url",
    ["", "localhost:80", "ftp://a/b", "http://", "http://u:secret@h:x/", "http://h/secret \n"],
)
def test_http_reward_refuses_a_url(url):
    with pytest.raises(UserError, match="a URL like http") as caught:
        HTTPReward(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"timeout": 0}, {"retries": -1}, {"backoff": -0.1}]
)
def test_http_reward_refuses_options(options):
    with pytest.raises(UserError, match="reward service"):
        HTTPReward("http://127.0.0.1/", **options)
