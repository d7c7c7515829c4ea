"""An analyst's walk through the search page on the demo's planet, in a headless Chromium: `make test-browser`."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.browser
#: Where screenshots go for people to look at; nowhere unless set.
SHOTS = os.environ.get("GRAFT_SCREENSHOTS")
#: Loading the encoder on two busy cores.
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def url(demo_folder: Path) -> Iterator[str]:
    """Where `graft serve` answers, on the demo's data."""
    command = [sys.executable, "-m", "graft_pipeline.cli", "serve", "--port", "0"]
    variables = os.environ | {"GRAFT_ENV_FILE": str(demo_folder / "settings.env"), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, line
            yield found[0]
        finally:
            # As Ctrl-C would.
            server.send_signal(2)
            assert server.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def seen(chromium: Any, url: str) -> Iterator[SimpleNamespace]:
    """The page, what it asked for and what its console said; checked when all is done."""
    page = chromium.new_page(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    page.set_default_timeout(PATIENCE_MS)
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    yield SimpleNamespace(page=page, requests=requests, complaints=complaints)
    page.close()


@pytest.fixture
def page(seen: SimpleNamespace) -> Any:
    return seen.page


def shot(page: Any, name: str) -> None:
    """Keep a screenshot if somebody wants to look."""
    if SHOTS:
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(700)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def until(page: Any, expression: str) -> None:
    """Wait until an expression is true; Playwright's own waiting evaluates strings, which the page's policy forbids."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def hits(page: Any) -> int:
    return int(page.locator("#hits").inner_text().split()[0].replace(",", ""))


def saved(page: Any) -> dict[str, Any]:
    """The file that the button saves."""
    with page.expect_download() as download:
        page.locator("#save").click()
    return json.loads(Path(download.value.path()).read_text())


def test_words_bring_a_map_and_the_best_tiles_with_their_photos(page: Any) -> None:
    page.locator("#scope").get_by_text(
        re.compile("[1-9].* satellite tiles of naip in [2-5] regions")
    ).wait_for()
    shot(page, "serve_start")
    page.locator("#words").fill("a lake")
    page.keyboard.press("Enter")
    page.locator("#status").get_by_text(re.compile("The best of .* for “a lake”")).wait_for()
    assert page.locator(".card").count() == 24
    # The planet's own ground is the base map, and each of the first tiles shows its chip and its photos.
    until(page, "[...document.querySelectorAll('.leaflet-tile')].some(i => i.naturalWidth === 256)")
    until(page, "document.querySelector('.card img.crop').naturalWidth === 224")
    until(page, "document.querySelector('.card .photos img')?.naturalWidth > 100")
    contrasts = page.eval_on_selector_all(".card", "cards => cards.map(card => card.contrast)")
    assert contrasts == sorted(contrasts, reverse=True)
    shot(page, "serve")


def test_the_slider_moves_the_threshold_without_a_request(page: Any, seen: SimpleNamespace) -> None:
    before, asked = hits(page), len([u for u in seen.requests if "/api/" in u])
    page.locator("#contrast").focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert float(page.locator("#contrast").input_value()) == pytest.approx(1.5)
    after = hits(page)
    assert 0 < after < before
    assert len([u for u in seen.requests if "/api/" in u]) == asked
    content = saved(page)
    assert content["hits"] == len(content["features"]) == after
    assert min(feature["properties"]["contrast"] for feature in content["features"]) >= 1.5


def test_a_drawn_box_narrows_map_list_and_file(page: Any) -> None:
    everywhere = hits(page)
    page.locator("#draw").click()
    around = page.locator("#map").bounding_box()
    x, y = around["x"] + around["width"] / 2, around["y"] + around["height"] / 2
    page.mouse.move(x - 180, y - 150)
    page.mouse.down()
    page.mouse.move(x, y, steps=4)
    page.mouse.move(x + 160, y + 170, steps=4)
    page.mouse.up()
    page.locator("#status").get_by_text(re.compile("The best of .* in the box")).wait_for()
    page.locator("#box-size").get_by_text("km").wait_for()
    assert 0 < hits(page) < everywhere
    content = saved(page)
    west, south, east, north = content["query"]["box"]
    assert len(content["features"]) == hits(page)
    for feature in content["features"]:
        lon, lat = (feature["properties"][f"center_{name}_deg"] for name in ("lon", "lat"))
        assert west <= lon <= east
        assert south <= lat <= north
    shot(page, "serve_box")
    # What the address holds is the whole query: a colleague who opens it sees the same.
    told = page.locator("#hits").inner_text()
    page.reload()
    page.locator("#status").get_by_text(re.compile("The best of .* in the box")).wait_for()
    assert page.locator("#hits").inner_text() == told
    # One without a box is searched everywhere, not in the box before.
    page.evaluate("location.hash = '#words=a+lake&contrast=1.5'")
    until(page, f"parseInt(document.querySelector('#hits').textContent.replaceAll(',', '')) === {everywhere}")
    assert page.locator("#box").is_hidden()
    page.go_back()
    page.locator("#status").get_by_text(re.compile("The best of .* in the box")).wait_for()
    page.locator("#clear-box").click()
    # The status says at once what is asked for; the answer comes a moment later.
    until(page, f"parseInt(document.querySelector('#hits').textContent.replaceAll(',', '')) === {everywhere}")


def test_dates_and_a_place_without_tiles_are_answered_in_words(page: Any) -> None:
    page.locator("#since").fill("2200-01-01")
    page.locator("#status").get_by_text("No tile lies within the dates").wait_for()
    assert page.locator("#threshold").is_hidden()
    page.locator("#since").fill("")
    page.locator("#status").get_by_text("The best of").wait_for()
    page.locator("#words").fill("   ")
    page.keyboard.press("Enter")
    page.locator("#status").get_by_text("Say in words").wait_for()


def test_a_tile_of_the_map_opens_with_its_photos(page: Any) -> None:
    page.keyboard.press("Escape")
    spot = page.evaluate(
        """() => {
          const d = state.density, k = d.contrast.indexOf(Math.max(...d.contrast));
          const point = map.latLngToContainerPoint([d.lat[k], d.lon[k]]);
          return { x: point.x, y: point.y, tile: d.tile_id[k] };
        }"""
    )
    around = page.locator("#map").bounding_box()
    page.mouse.click(around["x"] + spot["x"], around["y"] + spot["y"])
    page.locator("#detail").get_by_text("ground photo").first.wait_for()
    assert page.locator("#detail").get_by_text("Licence:").count() >= 1
    assert page.locator("#detail .dot").count() == page.locator("#detail article.photo").count()
    until(page, "document.querySelector('.chipframe img').naturalWidth === 448")
    until(page, "document.querySelector('article.photo img').naturalWidth > 100")
    # The planet's photos have no page on the real site.
    assert page.locator("#detail a[href*='flickr.com']").count() == 0
    shot(page, "serve_tile")
    page.keyboard.press("Escape")
    page.locator("#list .card").first.wait_for()


def test_while_it_searches_the_map_answers_nothing(page: Any) -> None:
    page.evaluate(
        """() => {
          const d = state.density, k = d.contrast.indexOf(Math.max(...d.contrast));
          const latlng = L.latLng(d.lat[k], d.lon[k]);
          const event = { latlng, containerPoint: map.latLngToContainerPoint(latlng) };
          run();
          for (const name of ["mousemove", "click", "moveend"]) map.fire(name, event);
        }"""
    )
    page.locator("#status").get_by_text("The best of").wait_for()
    assert page.locator("#detail").is_hidden()


def test_the_keyboard_is_enough(page: Any) -> None:
    page.locator("#list .chip-button").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Tile 2: open"
    page.keyboard.press("Enter")
    page.locator("#detail h2").first.wait_for()
    assert page.evaluate("document.activeElement.id") == "back"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "words"
    page.keyboard.type("farmland")
    page.keyboard.press("Enter")
    page.locator("#status").get_by_text(re.compile("The best of .* for “farmland”")).wait_for()


def test_a_telephone_shows_map_and_list(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 840})
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 400
    assert page.locator("#map").bounding_box()["height"] > 300
    shot(page, "serve_phone")


def test_nothing_left_this_machine_and_nothing_was_complained_of(seen: SimpleNamespace, url: str) -> None:
    assert seen.requests
    outside = [asked for asked in seen.requests if not asked.startswith((f"{url}/", "data:", "blob:"))]
    assert not outside
    assert not seen.complaints
