"""JSON over HTTP with the standard library alone: deadlines, attempts, secrets that stay so."""

import base64
import contextlib
import http.client
import logging
import math
import queue
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from errors import UserError
from rewards.user_function import describe, shorten

log = logging.getLogger(__name__)

RETRIED_STATUS = {408, 425, 429}  # and every 5xx
LONGEST_WAIT = 60.0  # seconds, whatever the service's Retry-After says
LARGEST_REPLY = 1 << 26  # bytes
PLAIN_HEADERS = ("Content-Type", "Accept")
SHORTEST_SECRET = 4  # characters; "?v=2" must not blot every 2 out of a message


class Client:
    """Posts JSON to one address.

    A request gets `timeout` seconds by the clock, from the look-up of the name to the last byte of
    the reply, whatever arrives meanwhile; connection errors, timeouts, statuses 5xx, 408, 425 and
    429 are tried `retries` times more, after `backoff`, 2 `backoff`, 4 `backoff`... seconds or what
    Retry-After asks for, if that is longer. Other statuses, redirects included, fail at once.

    ``user:password@`` in the URL becomes a Basic authorization header; `headers` are sent along.
    Messages and logs never show these, nor what stands behind the URL's ``?``.
    """

    what = "service"  # in messages

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 3,
        backoff: float = 1.0,
        headers: Mapping[str, str] | None = None,
    ):
        """Raises UserError for a URL that is not http(s), or a number that makes no sense."""
        if not 0 < timeout < math.inf or retries < 0 or backoff < 0:
            raise UserError(
                f"{self.what}: timeout > 0, retries >= 0 and backoff >= 0 are needed, got "
                f"{timeout}, {retries} and {backoff}"
            )
        parts, host = _split(url, self.what)
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.shown_url = urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))
        self._url = urllib.parse.urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
        self._headers = dict.fromkeys(PLAIN_HEADERS, "application/json")
        self._headers |= _basic_authorization(parts)
        self._headers |= dict(headers or {})
        values = [value for _, value in urllib.parse.parse_qsl(parts.query)]
        password = parts.password or ""
        user = parts.username or ""
        known = [parts.query, *values, user, urllib.parse.unquote(user)]
        known += [password, urllib.parse.unquote(password)]
        for name, value in self._headers.items():
            known += [] if name in PLAIN_HEADERS else [value, value.rpartition(" ")[2]]
        self._secrets = sorted({s for s in known if len(s) >= SHORTEST_SECRET}, key=len)[::-1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shown_url!r})"

    def post(self, body: bytes, read: Callable[[bytes], Any] = bytes) -> Any:
        """What `read` makes of the reply's body; tries again as the class says.

        `read` may raise Passing for a reply after which another attempt may do better. Raises
        Failed in the end.
        """
        for attempt in range(self.retries + 1):
            try:
                return read(self._post_once(body))
            except Passing as error:
                if attempt == self.retries:
                    unreachable = isinstance(error, Unreachable)
                    raise GivenUp(f"{error} ({attempt + 1} attempts)", unreachable) from error
                wait = max(self.backoff * 2**attempt, error.retry_after)
                log.warning(
                    "%s %s: %s; again in %g s (attempt %d of %d)",
                    self.what,
                    self.shown_url,
                    self.without_secrets(str(error)),
                    wait,
                    attempt + 2,
                    self.retries + 1,
                )
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _post_once(self, body: bytes) -> bytes:
        """The reply's body, or what went wrong within `timeout`.

        A thread of its own does it, as a name's look-up cannot be interrupted; at the end of the
        time, or when a signal ends the wait, its connection is shut down and it ends by itself.
        """
        answer: queue.SimpleQueue = queue.SimpleQueue()
        sockets: list[socket.socket] = []
        thread = threading.Thread(target=self._exchange, args=(body, sockets, answer), daemon=True)
        thread.start()
        try:
            found = answer.get(timeout=self.timeout)
        except queue.Empty:
            raise Passing(f"no answer within {self.timeout:g} s") from None
        finally:
            for connection in sockets:
                with connection, contextlib.suppress(OSError):  # the other side has gone already
                    connection.shutdown(socket.SHUT_RDWR)
        if isinstance(found, BaseException):
            raise found
        return found

    def _exchange(self, body: bytes, sockets: list, answer: queue.SimpleQueue) -> None:
        """Put the reply's body into `answer`, or an exception; open sockets into `sockets`."""
        try:
            answer.put(self._request(body, sockets))
        except BaseException as error:
            answer.put(error)

    def _request(self, body: bytes, sockets: list) -> bytes:
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        opener = urllib.request.build_opener(_NoRedirect, _Plain(sockets), _Secure(sockets))
        try:
            with opener.open(request, timeout=self.timeout) as reply:
                return _read(reply)
        except urllib.error.HTTPError as error:
            problem = f"status {error.code} {error.reason}{_error_text(error)}"
            if error.code >= 500 or error.code in RETRIED_STATUS:
                raise Passing(problem, _retry_after(error.headers)) from error
            raise Failed(problem, error.code) from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError: an OSError
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise Passing(f"no connection within {self.timeout:g} s") from error
            problem = describe(reason) if isinstance(reason, Exception) else str(reason)
            raise (Passing if sockets else Unreachable)(problem) from error

    def without_secrets(self, text: str) -> str:
        """For a service that quotes the request in its error page."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class Failed(Exception):
    """The request failed and will go on failing; `status`: of the reply, if there was one."""

    def __init__(self, problem: str, status: int | None = None):
        super().__init__(problem)
        self.status = status


class GivenUp(Failed):
    """Every attempt failed, and a later one may do better; `unreachable`: there was nobody."""

    def __init__(self, problem: str, unreachable: bool):
        super().__init__(problem)
        self.unreachable = unreachable


class Passing(Exception):
    """The request failed and may succeed later."""

    def __init__(self, problem: str, retry_after: float = 0.0):
        super().__init__(problem)
        self.retry_after = retry_after


class Unreachable(Passing):
    """No connection was made."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow with a GET, without the prompts."""

    def redirect_request(self, *args, **kwargs):
        return None


class _Plain(urllib.request.HTTPHandler):
    """Notes the sockets it opens."""

    def __init__(self, sockets: list[socket.socket]):
        super().__init__()
        self.sockets = sockets

    def http_open(self, request):
        return self.do_open(_noting(http.client.HTTPConnection, self.sockets), request)


class _Secure(urllib.request.HTTPSHandler):
    """Notes the sockets it opens."""

    def __init__(self, sockets: list[socket.socket]):
        super().__init__()
        self.sockets = sockets

    def https_open(self, request):
        return self.do_open(_noting(http.client.HTTPSConnection, self.sockets), request)


def _noting(kind: type[http.client.HTTPConnection], sockets: list[socket.socket]) -> type:
    def create(*words: Any, **options: Any) -> socket.socket:
        connection = socket.create_connection(*words, **options)
        # A second handle: the first is TLS's from the handshake on, which may drip too.
        sockets.append(connection.dup())
        return connection

    class Noting(kind):
        def connect(self) -> None:
            self._create_connection = create
            super().connect()

    return Noting


def _split(url: str, what: str) -> tuple[urllib.parse.SplitResult, str]:
    """The URL's parts, and host:port without user and password."""
    needed = f"{what}: a URL like http://host:port/path is needed"
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, an unclosed bracket
        fits = False
    if not fits or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise UserError(needed)  # without the URL, which may hold a password
    return parts, parts.netloc.rpartition("@")[2]


def _basic_authorization(parts: urllib.parse.SplitResult) -> dict[str, str]:
    if parts.username is None:
        return {}
    user, password = (urllib.parse.unquote(p or "") for p in (parts.username, parts.password))
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def _read(reply: http.client.HTTPResponse) -> bytes:
    body = bytearray()
    while piece := reply.read1(1 << 16):
        body += piece
        if len(body) > LARGEST_REPLY:
            raise Failed(f"the reply is longer than {LARGEST_REPLY} bytes")
    if reply.length:  # announced by Content-Length and never sent
        raise http.client.IncompleteRead(bytes(body), reply.length)
    return bytes(body)


def _error_text(error: urllib.error.HTTPError) -> str:
    """``: what the service says`` on one line, or nothing."""
    try:
        with error:
            said = " ".join(error.read(2000).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        return ""
    return f": {shorten(said)}" if said else ""


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds from a Retry-After header; 0 without one, or where it is a date."""
    value = headers.get("Retry-After", "").strip()
    return min(float(value), LONGEST_WAIT) if value.isdigit() else 0.0
