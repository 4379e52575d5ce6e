"""A read-only server of pages on this machine's loopback address, for those who know the token."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from launcher.errors import one_line
from launcher.redaction import redact

HOST = "127.0.0.1"
_OWN_NAMES = (HOST, "localhost")
"""Names by which a browser may address this machine. Under any other name, whose owner can redirect it
here at any time (DNS rebinding), another site's pages would count as ours."""
_MOST_REQUESTS = 32
"""The most requests at a time. Further connections wait in the kernel's queue, and are closed there."""
_SECONDS_TO_ASK = 20.0
_MOST_VALUES = 1000
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'self' 'unsafe-inline' data: blob:; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'; object-src 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Headers of every answer. A page's own policy is stricter: it names its scripts."""


@dataclass(frozen=True)
class Question:
    """A request, below the token: `page` without slashes around it, the query's values by name, and the
    tag of the browser's copy."""

    page: str
    query: dict[str, list[str]]
    tag: str = ""


@dataclass(frozen=True)
class Answer:
    """An answer. `to`: the address of a redirect; `tag`: changes whenever the content does."""

    content: str = ""
    kind: str = "text/html"
    status: HTTPStatus = HTTPStatus.OK
    tag: str = ""
    to: str = ""


class Server(ThreadingHTTPServer):
    """A server on a port of this machine; 0: any free port. Raises OSError if it cannot be opened."""

    daemon_threads = True

    def __init__(self, port: int, answer: Callable[[Question], Answer]) -> None:
        self.answer, self.token = answer, secrets.token_hex(24)
        self._room = threading.BoundedSemaphore(_MOST_REQUESTS)
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """Return the address for a browser, with the token."""
        return f"http://{HOST}:{self.server_address[1]}/{self.token}/"

    def server_bind(self) -> None:
        # HTTPServer's own method asks the name service for this machine's name, which can take long.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a new thread once the limit allows it; close the connection if that takes too long."""
        if self._room.acquire(timeout=_SECONDS_TO_ASK):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore browsers that disconnected, and incomplete requests."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "launcher", ""
    timeout = _SECONDS_TO_ASK

    def do_GET(self) -> None:
        self._send(self._answer())

    do_HEAD = do_GET

    def _refuse_method(self) -> None:
        refused = self._refused() or _message(
            HTTPStatus.METHOD_NOT_ALLOWED, "The board is for reading: GET and HEAD."
        )
        self._send(refused)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse_method

    def _refused(self) -> Answer | None:
        """Return the answer to a request under a name that is not this machine's; None for a right name."""
        named = self.headers.get_all("Host") or []
        with contextlib.suppress(ValueError):
            if len(named) == 1 and urlsplit(f"//{named[0]}").hostname in _OWN_NAMES:
                return None
        text = f"The board answers to {' and '.join(_OWN_NAMES)} alone, not to another name of this machine."
        return _message(HTTPStatus.MISDIRECTED_REQUEST, text)

    def _answer(self) -> Answer:
        if refused := self._refused():
            return refused
        path, _, query = self.path.partition("?")
        _, _, below = path.partition("/")
        token, slash, page = below.partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            text = "This address lacks the board's token: take the whole address that launcher board printed."
            return _message(HTTPStatus.FORBIDDEN, text)
        if not slash:
            return Answer(status=HTTPStatus.MOVED_PERMANENTLY, to=f"/{token}/")
        try:
            values = parse_qs(query, keep_blank_values=True, max_num_fields=_MOST_VALUES)
        except ValueError:
            return _message(HTTPStatus.BAD_REQUEST, f"The address has more than {_MOST_VALUES} values.")
        try:
            return self.server.answer(Question(page, values, self.headers.get("If-None-Match", "")))
        except Exception as error:  # an error in one page: the others are still served
            return _message(
                HTTPStatus.INTERNAL_SERVER_ERROR, redact(f"It cannot be shown: {one_line(error)}")
            )

    def _send(self, answer: Answer) -> None:
        content = answer.content.encode("utf-8", errors="replace")
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.send_response(answer.status)
            optional = {"ETag": answer.tag, "Location": answer.to}
            optional["Allow"] = "GET, HEAD" if answer.status == HTTPStatus.METHOD_NOT_ALLOWED else ""
            for name, value in (_HEADERS | optional).items():
                if value:
                    self.send_header(name, value)
            if answer.status != HTTPStatus.NOT_MODIFIED:
                self.send_header("Content-Type", f"{answer.kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a malformed HTTP request with one line, and with the usual headers."""
        self._send(_message(HTTPStatus(code), message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: addresses contain the token."""


def _message(status: HTTPStatus, text: str) -> Answer:
    return Answer(f"{text}\n", "text/plain", status)


def not_there(text: str) -> Answer:
    """Return the answer for a page that does not exist."""
    return _message(HTTPStatus.NOT_FOUND, text)
