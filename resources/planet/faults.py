"""What a network and a busy service do to requests: latency, quotas, faults; and counters of what was asked.

One ASGI layer around the APIs, which know nothing of it; what a right answer is, the API modules decide.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import HTMLResponse, PlainTextResponse, Response

from resources.planet.earth_engine_api import error_response
from resources.planet.noise import salt, uniforms

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

#: Kinds of requests that are counted; `/stats` has all of them, always.
KINDS = (
    "search",
    "echo",
    "flickr_other",
    "image",
    "discovery",
    "algorithms",
    "list_assets",
    "get_asset",
    "get_pixels",
    "earth_engine_other",
    "truth",
)
#: Kinds that meet no fault: a client connects once per process, and a planet is not there to test that.
_CONNECTING = {"discovery", "algorithms"}
#: What happens to a request that meets a fault: an answer 503, 500 or 429, half a body, a page of HTML with status
#: 200, a connection that is cut, or an answer that comes late.
FAULTS = ("unavailable", "server_error", "over_quota", "short_body", "html", "dropped", "stalled")
#: How late a stalled answer is, seconds.
STALL_S = 5.0
#: Earth Engine's limit of a request's payload.
MAX_BODY_BYTES = 10_485_760
#: Key of the ASGI state under which the server puts the function that cuts the connection.
DROP_CONNECTION = "drop_connection"

_HTML = (
    "<!DOCTYPE html><html><head><title>Error</title></head><body><h1>Something went wrong</h1></body></html>"
)


class Stats:
    """Counters of requests by kind, and of what was done to them. Any thread may use them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._in_flight = 0
        self._peak = 0

    def add(self, name: str) -> None:
        """Count one more."""
        with self._lock:
            self._counts[name] += 1

    def enter(self) -> None:
        """One more request is being answered."""
        with self._lock:
            self._in_flight += 1
            self._peak = max(self._peak, self._in_flight)

    def leave(self) -> None:
        """One request less is being answered."""
        with self._lock:
            self._in_flight -= 1

    def reset(self) -> None:
        """Set every counter to zero."""
        with self._lock:
            self._counts.clear()
            self._peak = self._in_flight

    def as_dict(self) -> dict[str, int]:
        """Every kind and fault with its count, `throttled` (429 answers) and `max_in_flight`."""
        with self._lock:
            counts = {name: self._counts[name] for name in (*KINDS, *(f"fault_{fault}" for fault in FAULTS))}
            return {**counts, "throttled": self._counts["throttled"], "max_in_flight": self._peak}


class _Bucket:
    """A token bucket that holds one second's worth."""

    def __init__(self, per_second: float) -> None:
        self._rate = per_second
        self._tokens = self._size = max(1.0, per_second)
        self._filled_at = time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._tokens = min(self._size, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Gate:
    """ASGI layer that counts, delays, throttles and spoils requests.

    `/healthz`, `/stats` and `/truth` pass untouched. Requests are read whole before anything is decided, so
    that the handlers, which run in threads, find the body in `request.state.body`.

    Args:
        app: the APIs.
        stats: counters.
        seed: decides, with the number of the request, which of them meet which fault.
        latency_ms: added to every answer.
        quota: requests per second and service (Flickr, its images, Earth Engine); over it the answer is 429.
        fault_rate: share of requests answered with a fault.
        stall_s: how late a stalled answer is.
    """

    def __init__(
        self,
        app: App,
        stats: Stats,
        *,
        seed: int,
        latency_ms: float,
        quota: float | None,
        fault_rate: float,
        stall_s: float = STALL_S,
    ) -> None:
        self._app = app
        self._stats = stats
        self._salts = salt("fault", seed), salt("kind of fault", seed)
        self._latency_s = latency_ms / 1000
        self._buckets = {name: _Bucket(quota) for name in ("flickr", "image", "ee")} if quota else {}
        self._fault_rate = fault_rate
        self._stall_s = stall_s
        self._number = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path in ("/healthz", "/stats", "/stats/reset"):
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        kind = _kind(path, scope, body or b"")
        self._stats.add(kind)
        self._stats.enter()
        try:
            await self._answer(kind, body, scope, receive, send)
        finally:
            self._stats.leave()

    async def _answer(
        self, kind: str, body: bytes | None, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:
        if body is None:
            message = f"Request payload size exceeds the limit: {MAX_BODY_BYTES} bytes."
            await error_response(HTTPStatus.BAD_REQUEST, message)(scope, receive, send)
            return
        scope.setdefault("state", {})["body"] = body
        if kind == "truth":
            await self._app(scope, receive, send)
            return
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        service = _service(kind)
        if self._buckets and not self._buckets[service].take():
            self._stats.add("throttled")
            await _error(service, *_OVER_QUOTA)(scope, receive, send)
            return
        fault = None if kind in _CONNECTING else self._next_fault()
        if fault is None:
            await self._app(scope, receive, send)
            return
        self._stats.add(f"fault_{fault}")
        if fault in _ERRORS:
            await _error(service, *_ERRORS[fault])(scope, receive, send)
        elif fault == "stalled":
            await asyncio.sleep(self._stall_s)
            await self._app(scope, receive, send)
        elif fault == "html":
            await HTMLResponse(_HTML)(scope, receive, send)
        elif fault == "dropped":
            scope["state"][DROP_CONNECTION]()
            # The server notices at its next turn, and then expects no answer any more.
            await asyncio.sleep(0.01)
        else:
            await self._app(scope, receive, _Half(send))

    def _next_fault(self) -> str | None:
        number, self._number = self._number, self._number + 1
        if not self._fault_rate or uniforms(self._salts[0], number)[0] >= self._fault_rate:
            return None
        return FAULTS[int(uniforms(self._salts[1], number)[0] * len(FAULTS))]


class _Half:
    """Sends the head of an answer and half of its body; the server then closes the connection."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            body = message.get("body", b"")
            message = {"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True}
        await self._send(message)


async def _read(receive: Receive) -> bytes | None:
    """The request's body, or None when it is longer than the limit."""
    chunks, size = [], 0
    while True:
        message = await receive()
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks) if size <= MAX_BODY_BYTES else None


def _kind(path: str, scope: MutableMapping[str, Any], body: bytes) -> str:
    if path.startswith("/services/rest"):
        query = parse_qs(scope["query_string"].decode("latin-1")) | parse_qs(body.decode("latin-1"))
        names = {"flickr.photos.search": "search", "flickr.test.echo": "echo"}
        return names.get(query.get("method", [""])[-1], "flickr_other")
    if path.startswith("/static/"):
        return "image"
    if path.startswith("/truth"):
        return "truth"
    if path.startswith("/$discovery"):
        return "discovery"
    if path.endswith("/algorithms"):
        return "algorithms"
    if path.endswith(":listAssets"):
        return "list_assets"
    if path.endswith(":getPixels"):
        return "get_pixels"
    return "get_asset" if "/assets/" in path and ":" not in path else "earth_engine_other"


def _service(kind: str) -> str:
    if kind == "image":
        return "image"
    return "flickr" if kind in ("search", "echo", "flickr_other") else "ee"


_OVER_QUOTA = (
    HTTPStatus.TOO_MANY_REQUESTS,
    "Quota exceeded for quota metric 'API requests' of service 'earthengine.googleapis.com'.",
)
#: Faults that are answers with an error status: the status, and Earth Engine's message.
_ERRORS = {
    "unavailable": (HTTPStatus.SERVICE_UNAVAILABLE, "The service is currently unavailable."),
    "server_error": (HTTPStatus.INTERNAL_SERVER_ERROR, "An internal error has occurred."),
    "over_quota": _OVER_QUOTA,
}


def _error(service: str, status: HTTPStatus, message: str) -> Response:
    """An error as the service words it."""
    headers = {"Retry-After": "1"} if status is HTTPStatus.TOO_MANY_REQUESTS else None
    if service == "ee":
        return error_response(status, message, headers)
    return PlainTextResponse(status.phrase, status, headers=headers)
