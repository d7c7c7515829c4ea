"""Latency, quotas, faults and counters, as clients meet them."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flickrapi
import pytest
import requests

ECHO = {"method": "flickr.test.echo", "api_key": "k", "format": "json", "nojsoncallback": "1"}
ASSET = "/v1/projects/earthengine-public/assets/USDA/NAIP/DOQQ"


def echo(planet: Any) -> str:
    """How one echo ends: its status, or what is wrong with it."""
    try:
        answer = requests.post(f"{planet.url}/services/rest/", data=ECHO, timeout=10)
    except requests.exceptions.ChunkedEncodingError:
        return "short"
    except requests.exceptions.ConnectionError:
        return "dropped"
    if answer.headers["content-type"].startswith("text/html"):
        return "html"
    return str(answer.status_code)


def test_requests_are_counted_by_kind(make_planet: Callable[..., Any]) -> None:
    planet = make_planet()
    assert set(planet.stats().values()) == {0}
    for _ in range(3):
        assert echo(planet) == "200"
    requests.get(f"{planet.url}/static/1/2_3_n.jpg", timeout=10)
    requests.get(planet.url + ASSET, timeout=10)
    requests.get(f"{planet.url}{ASSET}:listAssets", timeout=10)
    requests.post(f"{planet.url}{ASSET}/x:getPixels", timeout=10)
    requests.get(f"{planet.url}/services/rest/?method=flickr.photos.search", timeout=10)
    counted = {name: count for name, count in planet.stats().items() if count}
    assert counted == {
        "echo": 3, "image": 1, "get_asset": 1, "list_assets": 1, "get_pixels": 1, "search": 1, "max_in_flight": 1,
    }  # fmt: skip
    planet.reset_stats()
    assert set(planet.stats().values()) == {0}


def test_latency_is_waited_side_by_side(make_planet: Callable[..., Any]) -> None:
    planet = make_planet(latency_ms=300)
    start = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(lambda _: echo(planet), range(20))) == {"200"}
    took = time.monotonic() - start
    assert took >= 0.3
    # One after the other they would take six seconds.
    assert planet.stats()["max_in_flight"] > 10


def test_over_the_quota_each_service_refuses_in_its_own_way(make_planet: Callable[..., Any]) -> None:
    planet = make_planet(quota=0.05)
    answers = [requests.get(planet.url + ASSET, timeout=10) for _ in range(6)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert answers[0].ok
    assert refused
    assert refused[0].json()["error"]["status"] == "RESOURCE_EXHAUSTED"
    assert refused[0].headers["retry-after"] == "1"
    ends = [echo(planet) for _ in range(6)]
    assert ends[0] == "200", "services have quotas of their own"
    assert "429" in ends
    assert planet.stats()["throttled"] == len(refused) + ends.count("429")
    assert requests.get(f"{planet.url}/healthz", timeout=10).ok
    client = flickrapi.FlickrAPI("k", "s", format="parsed-json", store_token=False, timeout=10)
    client.REST_URL = f"{planet.url}/services/rest/"

    def echoes() -> None:
        for _ in range(6):
            client.test.echo()

    with pytest.raises(flickrapi.exceptions.FlickrError, match="Status code 429"):
        echoes()


def test_faults_are_of_seven_kinds_and_the_same_every_time(make_planet: Callable[..., Any]) -> None:
    first, again, other = (make_planet(seed=seed, fault_rate=0.6, stall_s=0.3) for seed in (3, 3, 4))
    began = time.monotonic()
    ends = [echo(first) for _ in range(60)]
    took = time.monotonic() - began
    assert set(ends) == {"200", "429", "500", "503", "html", "short", "dropped"}
    assert [echo(again) for _ in range(60)] == ends
    assert [echo(other) for _ in range(60)] != ends
    stats = first.stats()
    assert stats["echo"] == 60
    assert stats["fault_unavailable"] == ends.count("503")
    assert stats["fault_server_error"] == ends.count("500")
    assert stats["fault_over_quota"] == ends.count("429")
    assert stats["fault_html"] == ends.count("html")
    assert stats["fault_short_body"] == ends.count("short")
    assert stats["fault_dropped"] == ends.count("dropped")
    # A stalled answer is a right one, late.
    assert stats["fault_stalled"] > 0
    assert took > 0.3 * stats["fault_stalled"]
    faults = sum(count for name, count in stats.items() if name.startswith("fault_"))
    assert 20 <= faults <= 52


def test_faults_spare_what_is_not_an_api(make_planet: Callable[..., Any]) -> None:
    planet = make_planet(fault_rate=1, stall_s=0)
    assert {echo(planet) for _ in range(20)} > {"429", "503"}
    for path in ("/healthz", "/stats", "/truth/classes", "/$discovery/rest", "/v1/projects/p/algorithms"):
        assert requests.get(planet.url + path, timeout=10).ok


def test_earth_engines_errors_have_their_bodies(make_planet: Callable[..., Any]) -> None:
    planet = make_planet(fault_rate=1, stall_s=0)
    bodies = set()
    for _ in range(60):
        try:
            answer = requests.get(planet.url + ASSET, timeout=10)
        except requests.exceptions.RequestException:
            continue
        if answer.status_code != 200:
            bodies.add((answer.status_code, answer.json()["error"]["status"]))
    assert bodies == {(429, "RESOURCE_EXHAUSTED"), (500, "INTERNAL"), (503, "UNAVAILABLE")}


def test_a_payload_over_the_limit_is_refused(planet: Any) -> None:
    answer = requests.post(f"{planet.url}{ASSET}/x:getPixels", data=b" " * 10_485_761, timeout=30)
    assert answer.status_code == 400
    assert "10485760 bytes" in answer.json()["error"]["message"]


def test_nonsense_on_the_wire_harms_nobody(planet: Any) -> None:
    host, port = planet.url.removeprefix("http://").split(":")
    for junk in (b"\x00\xff\r\n\r\n", b"GET /healthz HTTP/1.1\r\nContent-Length: 5\r\n\r\nab"):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(junk)
    strange = {
        "method": "flickr.photos.search",
        "api_key": "k",
        "format": "json",
        "page": "\x00",
        "bbox": "NaN," * 4,
    }
    answer = requests.post(
        f"{planet.url}/services/rest/", data={**strange, "nojsoncallback": "1"}, timeout=10
    )
    assert answer.json()["stat"] == "fail"
    assert requests.post(f"{planet.url}/services/rest/", data=b"\xff\xfe", timeout=10).status_code == 200
    assert requests.get(f"{planet.url}/healthz", timeout=10).ok
