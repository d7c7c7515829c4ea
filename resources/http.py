"""What the clients share: a pooled HTTP transport with hard limits, bounded retries, a breaker, redaction.

What an answer means (a photo that is gone, a chip without pixels) is decided by each client.
"""

import functools
import ipaddress
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import requests.adapters
import requests.certs
import requests.utils
import tenacity
import urllib3
import urllib3.connection
import urllib3.connectionpool
import urllib3.exceptions

from graft_pipeline.errors import ServiceError

logger = logging.getLogger(__name__)

USER_AGENT = "graft-pipeline/0.1"
#: Statuses after which the same request may succeed: timeouts, quotas, and any trouble of the server's own.
TRANSIENT_STATUSES = frozenset({408, 425, 429, *range(500, 600)})
#: Longest wait that a server may ask for with Retry-After, seconds.
MAX_RETRY_AFTER_S = 120.0
#: 1 s, 2 s, 4 s ... with up to 1 s of jitter: seven attempts outlast a minute of a service's trouble. Where one
#: answer in ten fails, one item in ten million fails for that alone: a region comes out the same.
DEFAULT_WAIT: tenacity.wait.wait_base = tenacity.wait_exponential_jitter(initial=1, max=30, jitter=1)
DEFAULT_ATTEMPTS = 7
#: How long a service that does not say it is left alone when it first finds requests too many; then twice as long.
FIRST_PAUSE_S = 1.0
#: Longest wait after an answer that came at once, but was not what was asked for.
QUICK_WAIT_S = 0.25

_CHUNK_BYTES = 1 << 18

Result = TypeVar("Result")


class UnreachableError(ConnectionError):
    """No connection to the server came about: refused, not resolved, no TLS, or not allowed."""


class BrokenBodyError(ConnectionError):
    """The answer broke off after its headers, ended before its announced length, or cannot be decoded."""


class BodyTooLargeError(Exception):
    """The answer is larger than the caller's limit; it was not read to its end."""


class TransientError(Exception):
    """One attempt failed in a way that may pass; `Retries` tries again.

    Attributes:
        reason: snake_case word, as in `ItemError.reason`.
        retry_after_s: least wait that the server asked for, seconds.
        is_unreachable: whether there was no connection at all.
        is_quick: whether the server answered in good order, so that nothing is gained by waiting long.
        is_exhausted: whether it was tried as often as allowed; retries around those retries pass it on.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        is_unreachable: bool = False,
        is_quick: bool = False,
        is_exhausted: bool = False,
    ) -> None:
        super().__init__(message)
        self.is_quick = is_quick
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.is_unreachable = is_unreachable
        self.is_exhausted = is_exhausted


@dataclass(frozen=True)
class Answer:
    """A complete HTTP answer.

    Attributes:
        status: HTTP status code.
        reason: its phrase, as the server worded it.
        headers: case-insensitive.
        body: decoded content.
        is_delimited: whether HTTP itself vouches that the body is complete (length or chunks announced).
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes
    is_delimited: bool

    @property
    def retry_after_s(self) -> float | None:
        """Seconds that the server asks to wait, if it does."""
        return parse_retry_after(self.headers.get("retry-after"))


class _PublicPeer:
    """Mixin of connections: refuses peers in private, loopback or link-local networks.

    The check is made on the connected socket, so a DNS answer that changes between look-up and connection
    cannot pass it. A connection through a configured proxy is the proxy's to judge.
    """

    def _new_conn(self) -> socket.socket:
        # The hook that urllib3's own SOCKS support uses: connected, nothing sent yet, not even a TLS hello.
        connected = super()._new_conn()
        peer = connected.getpeername()[0]
        if self.proxy is None and not ipaddress.ip_address(peer.partition("%")[0]).is_global:
            connected.close()
            raise urllib3.exceptions.NewConnectionError(self, f"{peer} is not a public address")
        return connected


class _PublicHTTPConnection(_PublicPeer, urllib3.connection.HTTPConnection):
    pass


class _PublicHTTPSConnection(_PublicPeer, urllib3.connection.HTTPSConnection):
    pass


class _PublicHTTPPool(urllib3.connectionpool.HTTPConnectionPool):
    ConnectionCls = _PublicHTTPConnection


class _PublicHTTPSPool(urllib3.connectionpool.HTTPSConnectionPool):
    ConnectionCls = _PublicHTTPSConnection


class HttpPool:
    """Pooled HTTP for many threads: no redirects, no retries, and no answer larger or slower than allowed.

    urllib3 directly, not requests: the same request costs half the CPU time, which decides how many chips per
    second one process can fetch. Proxies and certificates are taken from the environment, as requests does.

    Args:
        connections: connections kept open to each host; more are opened under load.
        timeout_s: limit of one connect, and of each wait for bytes.
        deadline_s: limit of a whole answer; three timeouts unless given.
        public_only: refuse hosts that resolve to private addresses.

    Attributes:
        requests: requests sent so far.
        downloaded_bytes: decoded bytes of the answers that were read.
    """

    def __init__(
        self,
        *,
        connections: int,
        timeout_s: float,
        deadline_s: float | None = None,
        public_only: bool = False,
    ) -> None:
        self._connections = connections
        self._timeout = urllib3.Timeout(connect=min(timeout_s, 10.0), read=timeout_s)
        self._deadline_s = deadline_s if deadline_s is not None else 3 * timeout_s
        self._public_only = public_only
        self._lock = threading.Lock()
        self._managers: dict[str | None, urllib3.PoolManager] = {}
        self.requests = 0
        self.downloaded_bytes = 0

    def request(
        self,
        method: str,
        url: str,
        *,
        body: bytes | str | None = None,
        headers: Mapping[str, str] | None = None,
        max_bytes: int = 1 << 26,
    ) -> Answer:
        """Send one request and read its answer whole.

        Args:
            method: HTTP method.
            url: absolute http or https URL.
            body: content to send.
            headers: headers to send.
            max_bytes: largest decoded body that is accepted.

        Returns:
            The answer, whatever its status; redirects are not followed.

        Raises:
            UnreachableError: if no connection came about.
            TimeoutError: if the server stays silent, or needs longer than the deadline.
            ConnectionError: if the connection broke; a `BrokenBodyError` if headers had come.
            BodyTooLargeError: if the body exceeds `max_bytes`.
        """
        started = time.monotonic()
        try:
            response = self._manager(url).request(
                method,
                url,
                body=body,
                headers=headers,
                timeout=self._timeout,
                retries=False,
                redirect=False,
                preload_content=False,
            )
        except urllib3.exceptions.HTTPError as error:
            raise _as_builtin(error, ConnectionError) from error
        content = read_body(response, max_bytes, self._deadline_s, started)
        response.release_conn()
        with self._lock:
            self.downloaded_bytes += len(content)
        is_chunked = "chunked" in response.headers.get("transfer-encoding", "").lower()
        is_announced = response.headers.get("content-length", "").isdigit()
        return Answer(
            response.status, response.reason or "", response.headers, content, is_announced or is_chunked
        )

    def close(self) -> None:
        """Close every idle connection."""
        with self._lock:
            for manager in self._managers.values():
                manager.clear()
            self._managers.clear()

    def _manager(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = _proxy_of(parts.scheme, parts.netloc)
        with self._lock:
            self.requests += 1
            manager = self._managers.get(proxy)
            if manager is None:
                options = {"num_pools": 32, "maxsize": self._connections, **_certificates()}
                if proxy is None:
                    manager = urllib3.PoolManager(**options)
                    if self._public_only:
                        manager.pool_classes_by_scheme = {"http": _PublicHTTPPool, "https": _PublicHTTPSPool}
                else:
                    manager = _proxy_manager(proxy, options)
                self._managers[proxy] = manager
            return manager


def read_body(response: urllib3.BaseHTTPResponse, max_bytes: int, deadline_s: float, started: float) -> bytes:
    """Read an answer's body to its end, within limits; a body beyond them is not read on.

    Args:
        response: of urllib3, its headers read.
        max_bytes: largest decoded body that is accepted.
        deadline_s: limit of the whole answer.
        started: when the request was sent, on the clock of `time.monotonic`.

    Returns:
        The decoded body.

    Raises:
        TimeoutError: if the server stays silent, or needs longer than the deadline.
        BrokenBodyError: if the body broke off or cannot be decoded.
        BodyTooLargeError: if it exceeds `max_bytes`.
    """
    try:
        announced = response.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > max_bytes:
            raise BodyTooLargeError(f"{announced} bytes announced, {max_bytes} accepted")
        content = bytearray()
        # read1 returns after each packet: a server that drips bytes cannot outlast the deadline.
        while chunk := response.read1(_CHUNK_BYTES, decode_content=True):
            content += chunk
            if len(content) > max_bytes:
                raise BodyTooLargeError(f"more than the accepted {max_bytes} bytes")
            if time.monotonic() - started > deadline_s:
                raise TimeoutError(f"no complete answer within {deadline_s:g} s")
    except urllib3.exceptions.HTTPError as error:
        response.close()
        raise _as_builtin(error, BrokenBodyError) from error
    except (BodyTooLargeError, TimeoutError):
        response.close()
        raise
    return bytes(content)


@functools.lru_cache(maxsize=1024)
def _proxy_of(scheme: str, netloc: str) -> str | None:
    """The proxy that the environment (HTTPS_PROXY, NO_PROXY ...) names for a host, or None."""
    url = f"{scheme}://{netloc}/"
    return requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)) or None


def _proxy_manager(proxy: str, options: Mapping[str, Any]) -> urllib3.ProxyManager:
    """Connections through a proxy, with the name and password of its URL, if there are any.

    Raises:
        UnreachableError: if it is no usable URL; the text does not repeat it.
    """
    try:
        proxy = requests.utils.prepend_scheme_if_needed(proxy, "http")
        headers = requests.adapters.HTTPAdapter().proxy_headers(proxy)
        return urllib3.ProxyManager(proxy, proxy_headers=headers, **options)
    except (urllib3.exceptions.LocationValueError, ValueError):
        raise UnreachableError("the proxy of the environment is no http(s) URL") from None


def _certificates() -> dict[str, str]:
    """Whose certificates are trusted, as urllib3 takes it: a file, or a folder of them."""
    given = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    trusted = given or requests.certs.where()
    return {"ca_cert_dir" if Path(trusted).is_dir() else "ca_certs": trusted}


def _as_builtin(error: urllib3.exceptions.HTTPError, broken: type[ConnectionError]) -> Exception:
    """Translate to errors that googleapiclient and our own clients classify; the text names no header."""
    cause = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason else error
    if isinstance(cause, urllib3.exceptions.ReadTimeoutError):
        return TimeoutError("the server stopped answering")
    unreachable = (
        urllib3.exceptions.NewConnectionError,
        urllib3.exceptions.ConnectTimeoutError,
        urllib3.exceptions.ProxyError,
        urllib3.exceptions.SSLError,
        urllib3.exceptions.LocationValueError,
    )
    if isinstance(cause, unreachable):
        # "<HTTPSConnection at 0x...>: Failed to ..." without its address in memory.
        return UnreachableError(re.sub(r"^\S*\(.*?\): ", "", str(cause)) or type(cause).__name__)
    return broken(f"{type(cause).__name__}: {cause}")


def parse_retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or a date), at most `MAX_RETRY_AFTER_S`; None if unusable."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S) if seconds == seconds else None


def host_of(url: str) -> str:
    """Host and port of a URL, for messages."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2] or url
    except ValueError:
        return url


def is_private_host(url: str) -> bool:
    """Whether the host of a URL resolves, here and now, to an address that is not public; False without a host."""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return False
    return any(not ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_global for entry in found)


def is_http_url(url: str) -> bool:
    """Whether a string is an absolute http or https URL with a host."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


class Retries:
    """Bounded retries of `TransientError`, and of nothing else.

    Args:
        attempts: attempts in all.
        wait: tenacity's wait strategy between them; a server's Retry-After prolongs it.
    """

    def __init__(
        self, attempts: int = DEFAULT_ATTEMPTS, wait: tenacity.wait.wait_base = DEFAULT_WAIT
    ) -> None:
        self._attempts = attempts
        self._wait = wait

    def call(self, function: Callable[[], Result]) -> Result:
        """Call `function` until it returns.

        Raises:
            TransientError: the last one, when the attempts are used up.
        """
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=self._wait_s,
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, TransientError) and not error.is_exhausted
            ),
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            return retrying(function)
        except TransientError as error:
            # A new one: threads may share the instance that was raised.
            raise TransientError(
                error.reason, str(error), is_unreachable=error.is_unreachable, is_exhausted=True
            ) from error

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        wait_s = self._wait(state)
        if not isinstance(error, TransientError):
            return wait_s
        if error.is_quick:
            return min(wait_s, QUICK_WAIT_S)
        return max(wait_s, error.retry_after_s or 0.0)


def _log_retry(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    sleep = state.next_action.sleep if state.next_action else 0.0
    logger.info("Attempt %d failed (%s); next in %.1f s", state.attempt_number, error, sleep)


class Pace:
    """The limits of one service, shared by all threads that call it.

    Args:
        name: of the service.
        concurrency: requests at the same time.
        requests_per_second: pace; a tenth of a second's worth may go out at once. None: as fast as it goes.
    """

    def __init__(self, name: str, *, concurrency: int, requests_per_second: int | None) -> None:
        from pyrate_limiter import Duration, Limiter, Rate, StateBucket

        self._limiter: Limiter | None = None
        if requests_per_second is not None:
            rate = Rate(requests_per_second, Duration.SECOND, burst=max(1, requests_per_second // 10))
            self._limiter = Limiter(StateBucket([rate]), buffer_ms=1)
            self._step_s = min(0.01, 0.2 / requests_per_second)
        self._name = name
        self._turn = threading.Lock()
        self._slots = threading.BoundedSemaphore(concurrency)
        self._pausing = threading.Lock()
        self._paused_until = 0.0
        self._next_pause_s = FIRST_PAUSE_S

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Wait for the turn of one request; the next may have it when the context closes."""
        with self._slots:
            while (wait_s := self._paused_until - time.monotonic()) > 0:
                time.sleep(wait_s)
            if self._limiter is not None:
                # The limiter's own wait lets newcomers pass those who wait: under load some wait for seconds, and
                # whoever stores results in order waits with them. So one asks, the others queue.
                with self._turn:
                    while not self._limiter.try_acquire(self._name, blocking=False):
                        time.sleep(self._step_s)
            yield

    def pause(self, seconds: float | None) -> None:
        """Let no request begin for a while, of any thread: the service finds them too many.

        Args:
            seconds: from now, as it asked for. None: twice as long as the last time; answers to requests that were
                under way together count once.
        """
        now = time.monotonic()
        with self._pausing:
            if seconds is None:
                if now < self._paused_until:
                    return
                seconds = self._next_pause_s
                self._next_pause_s = min(2 * seconds, MAX_RETRY_AFTER_S)
            self._paused_until = max(self._paused_until, now + seconds)

    def ease(self) -> None:
        """Note that the service takes requests: the next pause is a short one again."""
        self._next_pause_s = FIRST_PAUSE_S


class Breaker:
    """Ends a run whose service fails for everything, instead of failing each item after all its retries.

    Args:
        service: name of the service, for the message.
        url: its address, for the message.
        limit: items in a row that may fail for transient reasons.
    """

    def __init__(self, service: str, url: str, limit: int) -> None:
        self._service = service
        self._host = host_of(url)
        self._limit = limit
        self._failures = 0
        self._lock = threading.Lock()

    def succeeded(self) -> None:
        """Note that the service answered an item."""
        self._failures = 0

    def failed(self, message: str) -> None:
        """Note that an item failed after its retries.

        Raises:
            ServiceError: if that was one too many in a row.
        """
        with self._lock:
            self._failures += 1
            failures = self._failures
        if failures >= self._limit:
            raise ServiceError(
                f"{self._service} ({self._host}) failed for {failures} items in a row, last: {message}. "
                "Check the service's status page and start the run again later: finished work is kept."
            )


class Redaction(logging.Filter):
    """Takes secrets out of log records, before any handler sees them.

    Args:
        secrets: strings to take out; also found percent-encoded.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        found = {
            form
            for secret in secrets
            if secret
            for form in (secret, quote(secret, safe=""), repr(secret)[1:-1])
        }
        self._pattern = re.compile(
            "|".join(re.escape(form) for form in sorted(found, key=len, reverse=True)) or "(?!)"
        )

    def redact(self, text: str) -> str:
        """The text with *** in place of secrets."""
        return self._pattern.sub("***", text)

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the record in place; always lets it pass."""
        message = record.getMessage()
        redacted = self.redact(message)
        if redacted != message:
            record.msg, record.args = redacted, ()
        return True
