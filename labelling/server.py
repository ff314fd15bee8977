"""The page of label.py: on 127.0.0.1 alone, behind a random token, with nothing from elsewhere.

Every request needs the token in its path and a Host header of this server, so that no other page in
the browser, nor a name that somebody points at this machine, reaches it. One thread answers: a
label is synced before its answer goes out, and two pages never write at once.
"""

import hmac
import json
import math
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from errors import UserError
from labelling.desk import Desk
from labelling.items import LONGEST_SECONDS, Choice, Item, said
from labelling.markdown import to_html
from labelling.progress import time_left

HOST = "127.0.0.1"
TOKEN_BYTES = 24
MOST_BYTES = 1 << 16  # of a request: a note and a few numbers
FILES = {"": "page.html", "page.css": "page.css", "page.js": "page.js"}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    # Nothing is loaded but the page's own two files, nothing runs but the one script.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def open_socket(port: int) -> socket.socket:
    """A socket on this machine alone; UserError where the port is taken."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((HOST, port))
        opened.listen()
    except OSError as wrong:
        opened.close()
        raise UserError(
            f"--port {port}: {wrong.strerror}; give another, or none for any free one"
        ) from None
    return opened


def serve(desk: Desk, opened: socket.socket, screen: Any) -> None:
    """Serve the page until it is told to stop, or Ctrl-C, which raises KeyboardInterrupt."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    page = Page(desk, token, opened.getsockname()[1])
    config = uvicorn.Config(
        page.app, log_level="warning", access_log=False, server_header=False, lifespan="off"
    )
    config.timeout_graceful_shutdown = 1

    def announce() -> None:
        screen.note(f"label at {page.address}")
        screen.note(
            "for this machine alone; Ctrl-C, or q on the page, ends it, and nothing is lost"
        )

    server = Announced(config, announce)
    page.stop = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[opened])
    opened.close()
    if page.bug is not None:
        raise page.bug


class Announced(uvicorn.Server):
    """Calls `announce` once it answers and Ctrl-C ends it in order, which takes a moment."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]):
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()


class Page:
    """The application: a page, its state, labels and undo."""

    def __init__(self, desk: Desk, token: str, port: int):
        self.desk, self.token = desk, token
        self.hosts = {f"{HOST}:{port}", f"localhost:{port}"}
        self.address = f"http://{HOST}:{port}/{token}/"
        self.stop = lambda: None
        self.bug: BaseException | None = None  # of the program itself, raised once serving ends
        folder = Path(__file__).parent
        self._files = {path: (folder / name).read_bytes() for path, name in FILES.items()}
        self.app = Starlette(
            routes=[
                Route("/{token}/", self._file),
                Route("/{token}/state", self._state),
                Route("/{token}/{name}", self._file),
                Route("/{token}/label", self._label, methods=["POST"]),
                Route("/{token}/undo", self._undo, methods=["POST"]),
                Route("/{token}/stop", self._stop, methods=["POST"]),
            ],
            exception_handlers={404: not_found, 405: not_found},
        )
        self.app.router.redirect_slashes = False

    # ----------------------------------------------------------------- who may ask

    def _refused(self, request: Request) -> Response | None:
        """Why a request is not answered; None for one that is."""
        if request.headers.get("host", "").lower() not in self.hosts:
            return answer(PlainTextResponse("this server has another name\n", 421))
        given = request.path_params["token"].encode()
        if not hmac.compare_digest(given, self.token.encode()):
            return answer(PlainTextResponse("not found\n", 404))
        if request.method == "POST":
            origin = request.headers.get("origin")
            own = origin is None or origin.removeprefix("http://").lower() in self.hosts
            kind = request.headers.get("content-type", "").partition(";")[0]
            if not own or kind != "application/json":
                return answer(PlainTextResponse("only the page itself may ask that\n", 403))
        return None

    # ----------------------------------------------------------------- answers

    async def _file(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        name = request.path_params.get("name", "")
        if name not in self._files:
            return await not_found(request, HTTPException(404))
        kind = TYPES[Path(FILES[name]).suffix]
        return answer(Response(self._files[name], media_type=f"{kind}; charset=utf-8"))

    async def _state(self, request: Request) -> Response:
        return self._refused(request) or self._answered()

    async def _label(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        try:
            fields = await read_fields(request)
            id, item, choice = read_label(fields)
            mine = self.desk.label(item, choice, id)
        except UserError as wrong:
            return answer(JSONResponse({"problem": str(wrong)}, 400))
        return self._answered("" if mine else "that pair has been labelled in another window")

    async def _undo(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        try:
            fields = await read_fields(request)
            if not isinstance(fields.get("id"), str):
                raise UserError("id: the label to take back is needed")
            self.desk.undo(fields["id"])
        except UserError as wrong:
            return answer(JSONResponse({"problem": str(wrong)}, 400))
        return self._answered()

    async def _stop(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        self.stop()
        return answer(JSONResponse({"stopped": True}))

    def _answered(self, problem: str = "") -> Response:
        """Where labelling stands, with the item to label next."""
        try:
            self.desk.poll()
        except UserError as wrong:
            problem = problem or str(wrong)
        except RuntimeError as bug:
            self.bug = bug
            self.stop()
            problem = "the process that samples has failed; the terminal says more"
        item, sampler = self.desk.current(), self.desk.sampler
        if item is None and not self.desk.finished and sampler is not None and sampler.problem:
            problem = problem or sampler.problem
        state = {
            "done": self.desk.done,
            "total": self.desk.total,
            "left": time_left(self.desk.seconds_left()),
            "last": self.desk.last_label(),
            "aspects": self.desk.aspects,
            "finished": self.desk.finished,
            "file": str(self.desk.labels.path),
            "problem": problem,
            "item": shown(item) if item is not None else None,
        }
        return answer(JSONResponse(state))


def shown(item: Item) -> dict[str, Any]:
    """What the page is told of an item: nothing that says which model wrote what."""
    return {
        "pair": item.id,
        "prompt": [{"who": who, "html": to_html(what)} for who, what in said(item.prompt)],
        "replies": [to_html(text) for text in item.shown],
    }


async def not_found(request: Request, wrong: Exception) -> Response:
    """The answer to what is no path of the page."""
    return answer(PlainTextResponse("not found\n", wrong.status_code))


def answer(response: Response) -> Response:
    response.headers.update(HEADERS)
    return response


# ------------------------------------------------------------------------------ what is sent


async def read_fields(request: Request) -> dict[str, Any]:
    """The object that a request brings; UserError for anything else."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise UserError(f"the request has more than {MOST_BYTES} bytes")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise UserError("the request is no JSON object")
    return fields


def read_label(fields: dict[str, Any]) -> tuple[str, str, Choice]:
    """(id of the label, id of the item, choice) of a request; UserError for what is no label."""
    id, pair = fields.get("id"), fields.get("pair")
    if not isinstance(id, str) or not 8 <= len(id) <= 64 or not (id.isascii() and id.isprintable()):
        raise UserError("id: 8 to 64 letters and digits are needed")
    if not isinstance(pair, str):
        raise UserError("pair: the item is needed")
    ranks, aspects = fields.get("ranks"), fields.get("aspects") or {}
    note, seconds = fields.get("note") or "", fields.get("seconds")
    if ranks is not None and not isinstance(ranks, list):
        raise UserError("ranks: a list, or null to skip, is needed")
    if not isinstance(aspects, dict) or not all(
        place is None or isinstance(place, int) for place in aspects.values()
    ):
        raise UserError("aspects: an object of places is needed")
    if not isinstance(note, str):
        raise UserError("note: a text is needed")
    known = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    known = known and math.isfinite(seconds)
    seconds = min(max(float(seconds), 0.0), LONGEST_SECONDS) if known else None
    return id, pair, Choice(ranks, aspects, note.strip(), seconds)
