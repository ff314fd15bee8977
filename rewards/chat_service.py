"""A judge behind a chat completions address: a hosted one, llama.cpp's server, vLLM, Ollama.

Where the reply has log-probabilities, P is the softmax over those of 1 and 2; else what it says.
"""

import json
import queue
import re
import threading
from collections.abc import Callable, Sequence
from math import exp
from typing import Any

from errors import UserError
from rewards.http_client import Client, Failed, GivenUp, Passing
from rewards.judge import Unanswered
from rewards.user_function import shorten

VERDICT_TOKENS = 8  # room for "Answer 1."
ALTERNATIVES = 5  # log-probabilities asked for at each token
REFUSED_TEXT = {400, 413, 422}  # of a service that answers others: too long, or a filter
CHOICE = re.compile(r"(?<![0-9])[12](?![0-9])")


class ChatJudge(Client):
    """A judge that is asked by HTTP, `connections` requests at a time.

    Deadline, attempts and secrets are `Client`'s; a reply that is no answer counts as a failed
    attempt. `key` goes along as a bearer token. What still has no answer is Unanswered; an address
    that refuses (a wrong key, say), or where there never was anybody, is a UserError.
    """

    what = "judge"

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: str | None = None,
        connections: int = 1,
        max_new_tokens: int = 128,
        **options: Any,
    ):
        parts = url.partition("?")
        if not parts[0].rstrip("/").endswith("/chat/completions"):
            url = parts[0].rstrip("/") + "/chat/completions" + parts[1] + parts[2]
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        super().__init__(url, headers=headers, **options)
        self.model, self.connections, self.max_new_tokens = model, connections, max_new_tokens
        self.logprobs, self.heard = True, False
        self.name = f"{model or 'a model'} at {self.shown_url}"

    def first_wins(self, texts: Sequence[str]) -> list[float | Unanswered]:
        return in_parallel(lambda text: self._ask(text, verdict_of, True), texts, self.connections)

    def write(self, texts: Sequence[str]) -> list[str | Unanswered]:
        return in_parallel(lambda text: self._ask(text, text_of, False), texts, self.connections)

    def _ask(self, text: str, read: Callable[[dict], Any], verdict: bool) -> Any:
        try:
            if verdict and self.logprobs:
                try:
                    return self._post(text, read, logprobs=True, top_logprobs=ALTERNATIVES)
                except Failed as wrong:
                    if wrong.status not in (400, 422):
                        raise
                    found = self._post(text, read)
                    self.logprobs = False  # a service that knows no such option
                    return found
            return self._post(text, read)
        except Failed as wrong:
            if self._of_this_text(wrong):
                return Unanswered(self.without_secrets(str(wrong)))
            raise UserError(
                f"judge {self.shown_url}: {self.without_secrets(str(wrong))}"
            ) from None  # the cause may show the whole URL

    def _of_this_text(self, wrong: Failed) -> bool:
        """Whether the next text may fare better."""
        if isinstance(wrong, GivenUp):
            return self.heard or not wrong.unreachable
        return wrong.status is None or self.heard and wrong.status in REFUSED_TEXT

    def _post(self, text: str, read: Callable[[dict], Any], **more: Any) -> Any:
        length = VERDICT_TOKENS if read is verdict_of else self.max_new_tokens
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0}
        body |= {"max_tokens": length} | more
        if self.model is not None:
            body["model"] = self.model

        def read_reply(reply: bytes) -> Any:
            self.heard = True
            return read(choice_of(reply))

        return self.post(json.dumps(body).encode(), read_reply)


def in_parallel(function: Callable[[Any], Any], items: Sequence[Any], count: int) -> list:
    """``[function(item) ...]``, `count` at a time; the first exception ends it.

    By threads that a stop of the program does not wait for.
    """
    if count == 1 or len(items) < 2:
        return [function(item) for item in items]
    todo: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    for i in range(len(items)):
        todo.put(i)

    def work() -> None:
        while True:
            try:
                i = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((i, function(items[i]), None))
            except BaseException as wrong:
                done.put((i, None, wrong))

    for _ in range(min(count, len(items))):
        threading.Thread(target=work, daemon=True).start()
    found = [None] * len(items)
    for _ in items:
        i, found[i], wrong = done.get()
        if wrong is not None:
            while not todo.empty():
                todo.get_nowait()
            raise wrong
    return found


# ---- replies -----------------------------------------------------------------------------------


def choice_of(reply: bytes) -> dict:
    """The first choice of a chat completion; Passing for anything else."""
    try:
        choice = json.loads(reply)["choices"][0]
        if isinstance(choice["message"], dict):
            return choice
    except (ValueError, RecursionError, LookupError, TypeError):
        pass
    start = shorten(repr(reply[:200].decode(errors="replace")))
    raise Passing(f"the reply is no chat completion: {start}")


def text_of(choice: dict) -> str:
    """What it says; Passing where that is nothing."""
    content = choice["message"].get("content")
    if isinstance(content, str) and content.strip():
        return content.strip()
    raise Passing("the reply says nothing")


def verdict_of(choice: dict) -> float:
    """The probability of 1; Passing where the reply is neither 1 nor 2."""
    found = _by_logprobs(choice.get("logprobs"))
    if found is not None:
        return found
    said = set(CHOICE.findall(text := text_of(choice)))
    if len(said) != 1:
        raise Passing(f"the reply is {shorten(repr(text))}, 1 or 2 is needed")
    return float(said == {"1"})


def _by_logprobs(logprobs: Any) -> float | None:
    """P of 1 at the first token that is 1 or 2; None where the log-probabilities do not say.

    One of the two that is not among the alternatives counts as the least likely of them.
    """
    try:
        for token in logprobs["content"]:
            if token["token"].strip() not in ("1", "2"):
                continue
            several = [*token["top_logprobs"], token]
            weights = {(t["token"]): exp(min(t["logprob"], 0.0)) for t in several}
            one, two = (
                sum(w for t, w in weights.items() if t.strip() == digit) for digit in ("1", "2")
            )
            if len(weights) < 2:
                return None
            least = min(weights.values())
            one, two = one or least, two or least
            return one / (one + two) if one + two > 0 else None
    except (LookupError, TypeError, AttributeError):
        pass
    return None
