"""A scripted HTTP server for answers that no well-behaved server gives; it speaks real HTTP on loopback."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def form(self) -> dict[str, str]:
        return {key: values[0] for key, values in parse_qs(self.body.decode()).items()}


@dataclass
class Reply:
    """What the server answers.

    Attributes:
        announced: Content-Length to send; None: the true one, -1: none at all, the connection just closes.
        drip_s: pause after each byte of the body.
        hangs: whether the server takes the request and never answers.
    """

    body: bytes = b""
    status: int = 200
    phrase: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    announced: int | None = None
    drip_s: float = 0.0
    hangs: bool = False


class ScriptedServer:
    """Answers each request with what `respond(request)` returns; keeps the requests."""

    def __init__(self, respond: Callable[[Request], Reply]) -> None:
        self.requests: list[Request] = []
        self.stopping = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _answer(self) -> None:
                if owner.stopping.is_set():
                    self.close_connection = True
                    return
                parts = urlsplit(self.path)
                request = Request(
                    self.command,
                    parts.path,
                    {key: values[0] for key, values in parse_qs(parts.query).items()},
                    {key.lower(): value for key, value in self.headers.items()},
                    self.rfile.read(int(self.headers.get("content-length", 0))),
                )
                owner.requests.append(request)
                reply = respond(request)
                if reply.hangs:
                    owner.stopping.wait()
                    self.close_connection = True
                    return
                self.send_response(reply.status, reply.phrase)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                announced = len(reply.body) if reply.announced is None else reply.announced
                if announced >= 0:
                    self.send_header("Content-Length", str(announced))
                if announced != len(reply.body):
                    self.send_header("Connection", "close")
                    self.close_connection = True
                self.end_headers()
                if reply.drip_s:
                    for byte in reply.body:
                        if owner.stopping.wait(reply.drip_s):
                            return
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                else:
                    self.wfile.write(reply.body)

            do_GET = do_POST = _answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: Any) -> None:
                """A client that hangs up early is part of the script."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[Request], Reply]], ScriptedServer]]:
    """Starts scripted servers; stops them after the test."""
    with ExitStack() as stack:
        yield lambda respond: stack.enter_context(ScriptedServer(respond))


@pytest.fixture
def reply() -> type[Reply]:
    """The class of answers (tests are no package, so it cannot be imported)."""
    return Reply


@pytest.fixture
def everything_logged() -> Iterator[Callable[[], str]]:
    """Collects the text of every record of every logger, from DEBUG up, tracebacks included."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record) + repr(record.args))

    @contextmanager
    def collecting() -> Iterator[None]:
        root = logging.getLogger()
        handler, level = Collect(), root.level
        root.addHandler(handler)
        root.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            root.setLevel(level)
            root.removeHandler(handler)

    with collecting():
        yield lambda: "\n".join(lines)


@pytest.fixture
def free_url() -> str:
    """An address on which nothing listens."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.server_close()
    return f"http://127.0.0.1:{server.server_address[1]}"
