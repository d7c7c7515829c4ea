import gzip
import logging
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import pytest
import tenacity

from graft_pipeline.errors import ServiceError
from resources.http import (
    BodyTooLargeError,
    Breaker,
    BrokenBodyError,
    HttpPool,
    Pace,
    Redaction,
    Retries,
    TransientError,
    UnreachableError,
    host_of,
    parse_retry_after,
)


@pytest.fixture
def pool():
    pool = HttpPool(connections=4, timeout_s=20)
    yield pool
    pool.close()


@pytest.fixture
def hasty_pool():
    pool = HttpPool(connections=4, timeout_s=0.3, deadline_s=0.6)
    yield pool
    pool.close()


def test_answer_is_whole_and_decoded(pool, scripted, reply):
    body = bytes(range(256)) * 4000
    server = scripted(
        lambda request: reply(gzip.compress(body), headers={"Content-Encoding": "gzip", "X-Name": "v"})
    )
    answer = pool.request("POST", server.url + "/path?q=1", body=b"sent", headers={"accept-encoding": "gzip"})
    assert (answer.status, answer.body, answer.headers["x-name"]) == (200, body, "v")
    assert (server.requests[0].path, server.requests[0].query, server.requests[0].body) == (
        "/path",
        {"q": "1"},
        b"sent",
    )
    assert answer.is_delimited


def test_redirects_and_errors_are_answers(pool, scripted, reply):
    server = scripted(lambda request: reply(b"moved", 302, headers={"Location": "http://elsewhere.invalid/"}))
    assert pool.request("GET", server.url).headers["location"] == "http://elsewhere.invalid/"
    server = scripted(lambda request: reply(b"no", 503, "Busy", headers={"Retry-After": "7"}))
    answer = pool.request("GET", server.url)
    assert (answer.status, answer.reason, answer.retry_after_s) == (503, "Busy", 7.0)


def test_short_body_is_broken(pool, scripted, reply):
    server = scripted(lambda request: reply(b"x" * 100, announced=200))
    with pytest.raises(BrokenBodyError):
        pool.request("GET", server.url)


def test_body_without_length_is_marked(pool, scripted, reply):
    server = scripted(lambda request: reply(b"x" * 100, announced=-1))
    assert not pool.request("GET", server.url).is_delimited


def test_wrong_encoding_is_broken(pool, scripted, reply):
    server = scripted(lambda request: reply(b"no gzip", headers={"Content-Encoding": "gzip"}))
    with pytest.raises(BrokenBodyError):
        pool.request("GET", server.url, headers={"accept-encoding": "gzip"})


@pytest.mark.parametrize("announced", [None, -1])
def test_too_large_body_is_not_read(pool, scripted, reply, announced):
    server = scripted(lambda request: reply(b"x" * 5_000_000, announced=announced))
    with pytest.raises(BodyTooLargeError):
        pool.request("GET", server.url, max_bytes=100_000)


def test_decompression_bomb_is_not_inflated(pool, scripted, reply):
    server = scripted(
        lambda request: reply(gzip.compress(bytes(50_000_000)), headers={"Content-Encoding": "gzip"})
    )
    with pytest.raises(BodyTooLargeError):
        pool.request("GET", server.url, max_bytes=1_000_000)


def test_silent_server_times_out(hasty_pool, scripted, reply):
    server = scripted(lambda request: reply(hangs=True))
    with pytest.raises(TimeoutError):
        hasty_pool.request("GET", server.url)


def test_dripping_server_meets_the_deadline(hasty_pool, scripted, reply):
    server = scripted(lambda request: reply(b"x" * 1000, drip_s=0.01))
    with pytest.raises(TimeoutError, match="complete answer"):
        hasty_pool.request("GET", server.url)


@pytest.mark.parametrize(
    "url", ["http://no-such-host.invalid/", "ftp://host/", "http://[broken/", "http://a..b/"]
)
def test_unusable_addresses_are_unreachable(pool, url):
    with pytest.raises((UnreachableError, ValueError)):
        pool.request("GET", url)


def test_refused_connection_is_unreachable_and_names_no_memory_address(pool, free_url):
    with pytest.raises(UnreachableError) as caught:
        pool.request("GET", free_url)
    assert "0x" not in str(caught.value)


def test_private_peer_is_refused_before_anything_is_sent(scripted, reply):
    server = scripted(lambda request: reply(b"inside"))
    with pytest.raises(UnreachableError, match="not a public address"):
        HttpPool(connections=1, timeout_s=20, public_only=True).request("GET", server.url)
    assert not server.requests


def test_proxy_of_the_environment_is_used(scripted, reply, monkeypatch, pool):
    proxy = scripted(lambda request: reply(b"by proxy"))
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert pool.request("GET", "http://proxied.invalid/file").body == b"by proxy"


@pytest.mark.parametrize(("prefix", "sent"), [("http://user:p%40ss@", "Basic dXNlcjpwQHNz"), ("", None)])
def test_a_proxy_gets_the_credentials_of_its_url(scripted, reply, monkeypatch, pool, prefix, sent):
    proxy = scripted(lambda request: reply(b"by proxy"))
    monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("http://", prefix))
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert pool.request("GET", f"http://proxied-{len(prefix)}.invalid/file").body == b"by proxy"
    assert [request.headers.get("proxy-authorization") for request in proxy.requests] == [sent]


def test_an_unusable_proxy_is_said_without_its_password(monkeypatch, pool):
    monkeypatch.setenv("HTTP_PROXY", "http://user:pass/word@proxy.invalid:3128")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(UnreachableError, match="proxy") as caught:
        pool.request("GET", "http://unproxied.invalid/file")
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("9999", 120.0), ("-4", 0.0), ("", None), ("soon", None), ("nan", None)],
)
def test_retry_after(value, seconds):
    assert parse_retry_after(value) == seconds


def test_retry_after_as_a_date():
    assert parse_retry_after(formatdate(0)) == 0.0
    assert parse_retry_after(formatdate(4e9)) == 120.0


def test_retries_are_bounded_and_only_for_transient_errors():
    tries = []

    def fails(error):
        tries.append(1)
        raise error

    retries = Retries(attempts=3, wait=tenacity.wait_none())
    with pytest.raises(TransientError, match="again"):
        retries.call(lambda: fails(TransientError("timeout", "again")))
    assert len(tries) == 3
    with pytest.raises(MemoryError):
        retries.call(lambda: fails(MemoryError()))
    assert len(tries) == 4


def test_retry_after_prolongs_the_wait(caplog):
    outcomes = iter(
        [
            TransientError("busy", "wait", retry_after_s=0.2),
            TransientError("busy", "wait"),
            TransientError("odd", "wait", is_quick=True, retry_after_s=0.2),
            None,
        ]
    )

    def attempt():
        if error := next(outcomes):
            raise error
        return "done"

    with caplog.at_level(logging.INFO, logger="resources.http"):
        assert Retries(attempts=4, wait=tenacity.wait_none()).call(attempt) == "done"
    assert [message.rpartition("next in ")[2] for message in caplog.messages] == ["0.2 s", "0.0 s", "0.0 s"]


def test_breaker_counts_failures_in_a_row():
    breaker = Breaker("Earth Engine", "https://ee.example/", limit=3)
    breaker.failed("a")
    breaker.failed("b")
    breaker.succeeded()
    breaker.failed("c")
    breaker.failed("d")
    with pytest.raises(ServiceError, match=r"ee\.example.*3 items.*run again"):
        breaker.failed("e")


def test_redaction_finds_secrets_in_messages_and_arguments(caplog):
    redaction = Redaction(["se/cret key", ""])
    log = logging.getLogger("tests.redaction")
    log.addFilter(redaction)
    with caplog.at_level(logging.DEBUG):
        log.debug("a %s b %s c", "se/cret key", "se%2Fcret%20key")
        log.debug("nothing %s", 1)
    assert [record.getMessage() for record in caplog.records] == ["a *** b *** c", "nothing 1"]
    assert caplog.records[0].args == ()


def test_host_of_drops_credentials():
    assert host_of("https://user:pass@host:8443/path") == "host:8443"


def test_nobody_waits_for_ever_while_others_get_turn_after_turn() -> None:
    pace = Pace("service", concurrency=20, requests_per_second=1000)
    turns, lock = Counter[int](), threading.Lock()

    def keep_asking(number: int) -> None:
        while True:
            with lock:
                if turns.total() >= 1000:
                    return
            with pace.slot(), lock:
                turns[number] += 1

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(keep_asking, range(20)))
    assert min(turns[number] for number in range(20)) >= 10


def test_pauses_that_a_service_does_not_measure_double(monkeypatch) -> None:
    monkeypatch.setattr("resources.http.FIRST_PAUSE_S", 0.1)
    slept, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (slept.append(seconds), sleep(seconds)))
    pace = Pace("service", concurrency=1, requests_per_second=None)

    def pause() -> float:
        slept.clear()
        for _ in range(10):
            # Ten requests were under way.
            pace.pause(None)
        with pace.slot():
            return sum(slept)

    assert 0.1 < pause() + pause() + pause() <= 0.1 + 0.2 + 0.4
    pace.ease()
    assert pause() <= 0.1
