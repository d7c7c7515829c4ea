import io
import json
import logging
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tenacity
from google.oauth2.credentials import Credentials
from rasterio.io import MemoryFile

from graft_pipeline.errors import InputError, ItemError, ServiceError, SettingsError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import NAIP, SENTINEL2
from graft_pipeline.settings import Settings
from resources.earth_engine import EarthEngine, decode_chip
from resources.http import Retries, TransientError

SCENE = "USDA/NAIP/DOQQ/m_4207101_ne_19_1_20210715"
GRID = Grid(epsg=32619, x0_m=300_000.0, y0_m=4_680_000.0, gsd_m=1.0, width_px=32, height_px=24)
BOX = (-72.0, 42.0, -71.0, 43.0)


def discovery():
    """The least description from which the ee library builds the methods that production uses."""

    def method(verb, path, *names, **more):
        path_name = path.partition("{+")[2].partition("}")[0]
        parameters = {name: {"type": "string", "location": "query"} for name in names}
        parameters[path_name] = {"type": "string", "location": "path", "required": True, "pattern": "^.*$"}
        return {"id": path, "httpMethod": verb, "path": path, "parameters": parameters, **more}

    anything, page = {"response": {"$ref": "Any"}}, {"response": {"$ref": "Page"}}
    assets = {
        "get": method("GET", "v1/{+name}", **anything),
        "listAssets": method(
            "GET", "v1/{+parent}:listAssets", "pageSize", "pageToken", "filter", "view", **page
        ),
        "getPixels": method("POST", "v1/{+name}:getPixels", **anything, request={"$ref": "Any"}),
    }
    algorithms = {"list": method("GET", "v1/{+parent}/algorithms", **anything)}
    token = {"nextPageToken": {"type": "string"}}
    return {
        "kind": "discovery#restDescription", "name": "earthengine", "version": "v1", "servicePath": "",
        "rootUrl": "http://ignored.invalid/",
        "parameters": {name: {"type": "string", "location": "query"} for name in ("alt", "fields")}
        | {"prettyPrint": {"type": "boolean", "location": "query"}},
        "schemas": {
            "Any": {"id": "Any", "type": "object", "properties": {}},
            "Page": {"id": "Page", "type": "object", "properties": token},
        },
        "resources": {
            "projects": {"resources": {"algorithms": {"methods": algorithms}, "assets": {"methods": assets}}}
        },
    }  # fmt: skip


def pixels(grid=GRID, dtype="uint8", bands=3):
    ramp = np.arange(grid.width_px * grid.height_px * bands).reshape(bands, grid.height_px, grid.width_px)
    return (ramp % 251 + 1).astype(dtype)


def geotiff(grid=GRID, dtype="uint8", bands=3, **changes):
    profile = {
        "driver": "GTiff", "width": grid.width_px, "height": grid.height_px, "count": bands, "dtype": dtype,
        "crs": grid.crs, "transform": grid.affine, **changes,
    }  # fmt: skip
    with MemoryFile() as memory:
        with memory.open(**profile) as file:
            file.write(pixels(grid, dtype, bands))
        return bytes(memory.getbuffer())


class Script:
    """Speaks Earth Engine's protocol; `on(kind)` replaces answers of one kind: the next ones, then always."""

    def __init__(self, reply):
        self.reply = reply
        self.answers = {
            "discovery": [reply(json.dumps(discovery()).encode())],
            "algorithms": [reply(b'{"algorithms": [{"name": "algorithms/Noop", "returnType": "Object"}]}')],
            "list": [reply(b"{}")],
            "pixels": [reply(geotiff())],
        }  # fmt: skip
        self.seen = []

    def on(self, kind, *answers):
        self.answers[kind] = [*answers, *self.answers[kind]]
        return self

    def always(self, kind, answer):
        self.answers[kind] = [answer]
        return self

    def __call__(self, request):
        parts = {"$discovery": "discovery", "/algorithms": "algorithms", ":listAssets": "list"}
        kind = next((kind for part, kind in parts.items() if part in request.path), "pixels")
        self.seen.append(kind)
        answers = self.answers[kind]
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
def script(reply):
    return Script(reply)


def engine(url, attempts=3, **options):
    options = {
        "project": "test-project",
        "is_anonymous": True,
        "concurrency": 4,
        "requests_per_second": 10**6,
        "timeout_s": 20.0,
        "retries": Retries(attempts=attempts, wait=tenacity.wait_none()),
        **options,
    }
    return EarthEngine(url=url, **options)


def api_error(reply, status, message="text", reason=None, **more):
    error = {"code": status, "message": message, "status": "X"}
    if reason:
        error["errors"] = [{"reason": reason, "message": message}]
    return reply(
        json.dumps({"error": error}).encode(), status, headers={"Content-Type": "application/json"}, **more
    )


# --- chips ---


def test_chip_is_what_was_served(scripted, script):
    server = scripted(script)
    earth_engine = engine(server.url)
    chip = earth_engine.get_chip(NAIP, SCENE, GRID)
    assert chip.dtype == np.uint8
    assert np.array_equal(chip, np.moveaxis(pixels(), 0, -1))
    request = server.requests[-1]
    assert request.path == f"/v1/projects/earthengine-public/assets/{SCENE}:getPixels"
    assert json.loads(request.body) == {
        "fileFormat": "GEO_TIFF",
        "bandIds": ["R", "G", "B"],
        "grid": {
            "dimensions": {"width": 32, "height": 24},
            "affineTransform": {
                "scaleX": 1.0, "shearX": 0, "translateX": 300000.0,
                "shearY": 0, "scaleY": -1.0, "translateY": 4680000.0,
            },
            "crsCode": "EPSG:32619",
        },
    }  # fmt: skip
    assert request.headers["x-goog-user-project"] == "test-project"
    assert "authorization" not in request.headers


def test_one_request_per_chip_after_one_initialisation(scripted, script):
    server = scripted(script)
    earth_engine = engine(server.url)
    for _ in range(5):
        earth_engine.get_chip(NAIP, SCENE, GRID)
    assert script.seen == ["discovery", "discovery", "algorithms", *["pixels"] * 5]
    assert earth_engine.requests == 8


def test_source_type_is_kept(scripted, script, reply):
    grid = Grid(epsg=32719, x0_m=500_000.0, y0_m=7_000_000.0, gsd_m=10.0, width_px=8, height_px=8)
    script.always("pixels", reply(geotiff(grid, "uint16")))
    chip = engine(scripted(script).url).get_chip(SENTINEL2, "COPERNICUS/S2_SR_HARMONIZED/x", grid)
    assert (chip.dtype, chip.shape) == (np.uint16, (8, 8, 3))


GOOD = geotiff()
MOVED = Grid(32619, 300_001.0, 4_680_000.0, 1.0, 32, 24)


@pytest.mark.parametrize(
    "bad",
    [
        {"body": b"<html>busy</html>"},
        {"body": b""},
        {"body": b"II*\0"},
        {"body": GOOD[:-40]},
        {"body": GOOD[:-40], "announced": -1},
        {"body": GOOD[:700], "announced": len(GOOD)},
        {"body": geotiff(MOVED)},
        {"body": geotiff(Grid(32618, 300_000.0, 4_680_000.0, 1.0, 32, 24))},
        {"body": geotiff(Grid(32619, 300_000.0, 4_680_000.0, 1.0, 24, 32))},
        {"body": geotiff(bands=4)},
        {"body": geotiff(dtype="uint16")},
        {"body": geotiff(crs=None)},
        {"body": b"oops", "status": 500},
        {"body": b"<html>Bad Gateway</html>", "status": 502},
        {"body": b"", "status": 503, "headers": {"Retry-After": "0"}},
        {"body": b"", "status": 429},
    ],
)
def test_passing_trouble_is_retried(scripted, script, reply, bad):
    script.on("pixels", reply(**bad))
    chip = engine(scripted(script).url).get_chip(NAIP, SCENE, GRID)
    assert np.array_equal(chip, np.moveaxis(pixels(), 0, -1))
    assert script.seen.count("pixels") == 2


BY_CHIP = replace(SENTINEL2, cloud_rule="chip", raw_bands=("B8",))


def npy(names=("B4", "B3", "B2", "B8", "SCL"), grid=GRID, dtypes=("u2", "u2", "u2", "u2", "u1")):
    table = np.empty((grid.height_px, grid.width_px), list(zip(names, dtypes, strict=True)))
    for number, name in enumerate(names):
        table[name] = np.arange(table.size).reshape(table.shape) % 200 + number
    buffer = io.BytesIO()
    np.save(buffer, table)
    return buffer.getvalue()


def test_mask_and_raw_bands_come_with_the_chip_in_one_request(scripted, script, reply):
    script.always("pixels", reply(npy()))
    server = scripted(script)
    chip = engine(server.url).get_chip(BY_CHIP, SCENE, GRID)
    request = json.loads(server.requests[-1].body)
    assert (request["fileFormat"], request["bandIds"]) == ("NPY", ["B4", "B3", "B2", "B8", "SCL"])
    assert script.seen.count("pixels") == 1
    assert (chip.dtype, chip.shape) == (np.uint16, (24, 32, 5))
    assert np.array_equal(chip[0, 0], [0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"<html>busy</html>", "invalid_pixels"),
        (npy()[:-1], "truncated"),
        (npy()[:20], "truncated"),
        (npy().replace(b"(24, 32)", b"(24, 32 "), "truncated"),
        (npy().replace(b"(24, 32)", b"(24, 03)"), "truncated"),
        (npy(("B4", "B3", "B2", "B8", "QA60")), "invalid_pixels"),
        (npy(grid=Grid(32619, 0, 0, 1, 24, 32)), "invalid_pixels"),
        (geotiff(bands=5), "invalid_pixels"),
    ],
)
def test_other_bands_than_those_asked_for_are_retried(scripted, script, reply, bad, reason):
    script.on("pixels", reply(bad), reply(npy()))
    assert engine(scripted(script).url).get_chip(BY_CHIP, SCENE, GRID).shape == (24, 32, 5)
    script.always("pixels", reply(bad))
    with pytest.raises(ItemError) as caught:
        engine(scripted(script).url).get_chip(BY_CHIP, SCENE, GRID)
    assert (caught.value.reason, caught.value.is_permanent) == (reason, False)


def test_silent_service_is_asked_again(scripted, script, reply):
    script.on("pixels", reply(hangs=True))
    chip = engine(scripted(script).url, attempts=20, timeout_s=0.3).get_chip(NAIP, SCENE, GRID)
    assert np.array_equal(chip, np.moveaxis(pixels(), 0, -1))
    assert script.seen.count("pixels") > 1


@pytest.mark.parametrize(
    ("status", "why", "reason", "is_permanent", "requests"),
    [
        (404, None, "scene_missing", True, 1),
        (400, None, "bad_request", True, 1),
        (429, None, "rate_limited", False, 3),
        (403, "rateLimitExceeded", "rate_limited", False, 3),
        (403, "userRateLimitExceeded", "rate_limited", False, 3),
        (500, None, "unavailable", False, 3),
    ],
)
def test_refusals_of_one_chip(scripted, script, reply, status, why, reason, is_permanent, requests):
    script.always("pixels", api_error(reply, status, "the server's words", why))
    with pytest.raises(ItemError, match=f"{SCENE}.*HTTP {status}.*the server's words") as caught:
        engine(scripted(script).url).get_chip(NAIP, SCENE, GRID)
    assert (caught.value.reason, caught.value.is_permanent) == (reason, is_permanent)
    assert script.seen.count("pixels") == requests


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"body": b"<html></html>"}, "invalid_pixels"),
        ({"body": geotiff(MOVED)}, "invalid_pixels"),
        ({"body": GOOD[:-40]}, "truncated"),
        ({"body": GOOD[:700], "announced": len(GOOD)}, "truncated"),
        ({"hangs": True}, "timeout"),
    ],
)
def test_lasting_trouble_is_an_error_of_the_chip(scripted, script, reply, bad, reason):
    script.always("pixels", reply(**bad))
    with pytest.raises(ItemError) as caught:
        engine(scripted(script).url, timeout_s=0.3 if "hangs" in bad else 20.0).get_chip(NAIP, SCENE, GRID)
    assert (caught.value.reason, caught.value.is_permanent) == (reason, False)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_no_cut_geotiff_passes():
    for options in ({}, {"compress": "deflate"}, {"tiled": True, "blockxsize": 16, "blockysize": 16}):
        content = geotiff(**options)
        decode_chip(content, NAIP, GRID)
        for length in range(0, len(content) - 1, 13):
            with pytest.raises(TransientError):
                decode_chip(content[:length], NAIP, GRID)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("kind", ["discovery", "algorithms", "list", "pixels"])
def test_refused_project_is_a_settings_error_at_once(scripted, script, reply, status, kind):
    script.always(
        kind, api_error(reply, status, "Caller does not have required permission to use project x.")
    )
    earth_engine = engine(scripted(script).url)
    calls = {"list": lambda: earth_engine.list_scenes(NAIP, BOX)}
    with pytest.raises(SettingsError, match=r"GRAFT_EE_PROJECT.*register"):
        calls.get(kind, lambda: earth_engine.get_chip(NAIP, SCENE, GRID))()
    assert script.seen.count(kind) == 1


def test_refused_token_is_a_settings_error(scripted, script, reply):
    script.always("pixels", api_error(reply, 401))
    earth_engine = engine(scripted(script).url, is_anonymous=False, credentials=Credentials("a-secret-token"))
    with pytest.raises(SettingsError, match="GRAFT_EE_KEY_FILE") as caught:
        earth_engine.get_chip(NAIP, SCENE, GRID)
    assert "a-secret-token" not in "".join(traceback.format_exception(caught.value)) + repr(earth_engine)


def test_service_that_fails_for_every_chip_ends_the_run(scripted, script, reply):
    script.always("pixels", api_error(reply, 503))
    earth_engine = engine(scripted(script).url, attempts=1)
    for _ in range(19):
        with pytest.raises(ItemError):
            earth_engine.get_chip(NAIP, SCENE, GRID)
    with pytest.raises(ServiceError, match="20 items in a row"):
        earth_engine.get_chip(NAIP, SCENE, GRID)


def test_concurrent_chips_stay_within_the_limit(scripted, reply):
    state = {"now": 0, "peak": 0}
    lock, inner = threading.Lock(), Script(reply)

    def respond(request):
        with lock:
            state["now"] += 1
            state["peak"] = max(state["peak"], state["now"])
        answer = inner(request)
        threading.Event().wait(0.005)
        with lock:
            state["now"] -= 1
        return answer

    earth_engine = engine(scripted(respond).url, concurrency=3)
    wrong = []

    def work():
        for _ in range(5):
            if not np.array_equal(earth_engine.get_chip(NAIP, SCENE, GRID), np.moveaxis(pixels(), 0, -1)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert state["peak"] <= 3
    assert inner.seen.count("discovery") == 2
    assert earth_engine.requests == 53


# --- listing ---


def scene(number, **more):
    return {"id": f"USDA/NAIP/DOQQ/m_{number}", "startTime": "2021-07-15T00:00:00Z", **more}


def test_listing_asks_for_a_half_open_window_of_start_times(scripted, script):
    server = scripted(script)
    start, end = datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC)
    assert engine(server.url).list_scenes(SENTINEL2, BOX, start, end) == []
    request = server.requests[-1]
    assert request.path == "/v1/projects/earthengine-public/assets/COPERNICUS/S2_SR_HARMONIZED:listAssets"
    assert request.query["filter"] == (
        'startTime >= "2020-01-01T00:00:00.000000Z" AND startTime < "2021-01-01T00:00:00.000000Z" AND '
        "intersects(\"{'type': 'Polygon', 'coordinates': [[[-72.010000, 41.990000], [-70.990000, 41.990000], "
        '[-70.990000, 43.010000], [-72.010000, 43.010000], [-72.010000, 41.990000]]]}")'
        " AND properties.CLOUDY_PIXEL_PERCENTAGE < 1.0"
    )
    assert request.query["pageSize"] == "1000"
    assert request.query["fields"] == (
        "assets(id,startTime,endTime,geometry,bands(id,grid),properties/CLOUDY_PIXEL_PERCENTAGE),nextPageToken"
    )


@pytest.mark.parametrize(("limit", "term"), [(None, ""), (60.0, "properties.CLOUDY_PIXEL_PERCENTAGE < 60.0")])
def test_under_the_rule_by_chip_cloudy_scenes_are_listed(scripted, script, limit, term):
    server = scripted(script)
    engine(server.url).list_scenes(replace(BY_CHIP, max_scene_cloud_pct=limit), BOX)
    query = server.requests[-1].query
    assert query["filter"].partition(")")[2].removeprefix(" AND ") == term
    assert "properties/CLOUDY_PIXEL_PERCENTAGE" in query["fields"]


def test_listing_starts_with_the_sensors_first_date(scripted, script):
    server = scripted(script)
    engine(server.url).list_scenes(NAIP, BOX)
    query = server.requests[-1].query
    assert query["filter"].startswith('startTime >= "2010-01-01T00:00:00.000000Z" AND intersects(')
    assert "properties" not in query["fields"]


def test_pages_are_followed_each_with_its_own_retries(scripted, script, reply):
    def page(numbers, token=None):
        assets = {"assets": [scene(number) for number in numbers]}
        return reply(json.dumps(assets | ({"nextPageToken": token} if token else {})).encode())

    busy = api_error(reply, 503)
    script.on("list", busy, busy, page([1, 2], "a"), busy, busy, page([2, 3], "b"), page([], "c"), page([4]))
    server = scripted(script)
    found = engine(server.url).list_scenes(NAIP, BOX)
    assert [item["id"][-1] for item in found] == ["1", "2", "3", "4"]
    tokens = [request.query.get("pageToken") for request in server.requests if "listAssets" in request.path]
    assert tokens == [None, None, None, "a", "a", "a", "b", "c"]


@pytest.mark.parametrize(
    "bad",
    [
        {"body": b"<html></html>"},
        {"body": b'{"assets": [{"name": "no id"}]}'},
        {"body": b'{"assets": ["x"]}'},
    ],
)
def test_bad_listing_is_retried_then_a_service_error(scripted, script, reply, bad):
    script.on("list", reply(**bad), reply(json.dumps({"assets": [scene(1)]}).encode()))
    url = scripted(script).url
    assert len(engine(url).list_scenes(NAIP, BOX)) == 1
    script.always("list", reply(**bad))
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1.*USDA/NAIP/DOQQ.*again later"):
        engine(url).list_scenes(NAIP, BOX)


@pytest.mark.parametrize("status", [400, 404])
def test_refused_listing_is_an_input_error(scripted, script, reply, status):
    script.always("list", api_error(reply, status, "ImageCollection asset not found"))
    with pytest.raises(InputError, match=r"USDA/NAIP/DOQQ.*not found"):
        engine(scripted(script).url).list_scenes(NAIP, BOX)


@pytest.mark.parametrize(
    "box", [(-71, 42, -72, 43), (179, 0, 181, 1), (0, 89, 1, 91), (0, 0, 0, 0), (float("nan"), 0, 1, 1)]
)
def test_senseless_boxes(free_url, box):
    with pytest.raises(InputError, match="no box"):
        engine(free_url).list_scenes(NAIP, box)


def test_times_need_a_zone(free_url):
    with pytest.raises(InputError, match="time zone"):
        engine(free_url).list_scenes(NAIP, BOX, datetime(2020, 1, 1))


# --- initialisation ---


def test_unreachable_service_is_named(free_url):
    with pytest.raises(ServiceError, match=free_url.removeprefix("http://") + ".*GRAFT_EE_URL") as caught:
        engine(free_url).get_chip(NAIP, SCENE, GRID)
    assert "0x" not in str(caught.value)


def test_service_that_stops_is_unreachable(scripted, script):
    server = scripted(script)
    earth_engine = engine(server.url)
    earth_engine.get_chip(NAIP, SCENE, GRID)
    server.__exit__()
    with pytest.raises((ServiceError, ItemError)):
        earth_engine.get_chip(NAIP, SCENE, GRID)


def test_waiting_threads_share_a_failed_initialisation(scripted, script, reply):
    script.always("discovery", reply(hangs=True))
    server = scripted(script)
    earth_engine = engine(server.url, attempts=2, concurrency=8, timeout_s=0.5)
    errors = []

    def work():
        try:
            earth_engine.get_chip(NAIP, SCENE, GRID)
        except ItemError as error:
            errors.append(error.reason)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == ["timeout"] * 8
    assert len(server.requests) < 8


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("discovery", {"status": 503}),
        ("discovery", {"body": b"<html></html>"}),
        ("discovery", {"body": b"{}"}),
        ("algorithms", {"status": 429}),
        ("algorithms", {"body": b"<html></html>"}),
        ("algorithms", {"body": b'{"algorithms": 1}'}),
    ],
)
def test_initialisation_is_retried(scripted, script, reply, kind, bad):
    script.on(kind, reply(**bad))
    assert engine(scripted(script).url).get_chip(NAIP, SCENE, GRID).shape == (24, 32, 3)


def test_another_service_at_the_address_is_a_settings_error(scripted, reply):
    server = scripted(lambda request: reply(b"nothing here", 404))
    with pytest.raises(SettingsError, match="GRAFT_EE_URL"):
        engine(server.url).get_chip(NAIP, SCENE, GRID)


def test_objects_of_two_services_take_turns(scripted, reply):
    first, second = Script(reply), Script(reply)
    second.always("pixels", reply(geotiff(dtype="uint8", compress="deflate")))
    engines = [
        engine(scripted(script).url, project=name) for script, name in ((first, "one-x"), (second, "two-x"))
    ]
    errors = []

    def work(number):
        for turn in range(3):
            try:
                engines[(number + turn) % 2].get_chip(NAIP, SCENE, GRID)
            except ItemError as error:  # pragma: no cover - shown by the assertion below
                errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert first.seen.count("pixels") == second.seen.count("pixels") == 6


def test_equal_objects_share_one_initialisation(scripted, script):
    url = scripted(script).url
    counts = []
    for _ in range(3):
        earth_engine = engine(url)
        earth_engine.get_chip(NAIP, SCENE, GRID)
        counts.append(earth_engine.requests)
    assert counts == [4, 1, 1]


def test_no_other_host_is_asked(scripted, script, everything_logged):
    server = scripted(script)
    engine(server.url).get_chip(NAIP, SCENE, GRID)
    assert "storage.googleapis.com" not in everything_logged()
    assert all(
        f"127.0.0.1:{server.url.rpartition(':')[2]}" in request.headers["host"] for request in server.requests
    )


# --- settings and credentials ---


def service_account(folder: Path, token_uri: str) -> tuple[Path, str]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "key.json"
    file.write_text(
        json.dumps(
            {
                "type": "service_account", "project_id": "test-project", "private_key_id": "0",
                "private_key": key.decode(), "client_email": "graft@test-project.iam.gserviceaccount.com",
                "client_id": "1", "token_uri": token_uri,
            }
        )
    )  # fmt: skip
    return file, key.decode().splitlines()[5]


def test_key_file_is_used_and_never_shown(scripted, reply, tmp_path, everything_logged):
    inner = Script(reply)
    inner.on("pixels", api_error(reply, 503))

    def respond(request):
        if request.path == "/token":
            answer = {"access_token": "secret-access-token", "expires_in": 3600, "token_type": "Bearer"}
            return reply(json.dumps(answer).encode(), headers={"Content-Type": "application/json"})
        return inner(request)

    server = scripted(respond)
    file, line = service_account(tmp_path, server.url + "/token")
    settings = Settings(
        world="production", flickr_key="k", flickr_secret="s", ee_project="test-project", ee_key_file=file,
        ee_url=server.url, ee_concurrency=2,
    )  # fmt: skip
    earth_engine = EarthEngine.from_settings(settings, retries=Retries(2, tenacity.wait_none()))
    earth_engine.get_chip(NAIP, SCENE, GRID)
    assert earth_engine.concurrency == 2
    assert server.requests[-1].headers["authorization"] == "Bearer secret-access-token"
    shown = everything_logged() + repr(earth_engine) + repr(vars(earth_engine))
    assert "Earth Engine answers" in shown
    assert line not in shown
    assert "secret-access-token" not in shown


@pytest.mark.parametrize(
    "content", [None, b"", b"no json", b"{}", b'{"type": "service_account", "private_key": "PRIVATE"}']
)
def test_unusable_key_file_is_explained(free_url, tmp_path, content):
    file = tmp_path / "key.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"key\.json.*GRAFT_EE_KEY_FILE") as caught:
        engine(free_url, is_anonymous=False, key_file=file).get_chip(NAIP, SCENE, GRID)
    assert "PRIVATE" not in str(caught.value)


def test_refused_service_account_is_a_settings_error(scripted, reply, tmp_path):
    inner = Script(reply)

    def respond(request):
        if request.path == "/token":
            return reply(b'{"error": "invalid_grant", "error_description": "Invalid JWT Signature."}', 400)
        return inner(request)

    server = scripted(respond)
    file, _ = service_account(tmp_path, server.url + "/token")
    with pytest.raises(SettingsError, match=r"invalid_grant.*GRAFT_EE_KEY_FILE"):
        engine(server.url, is_anonymous=False, key_file=file).get_chip(NAIP, SCENE, GRID)


def test_missing_credentials_are_explained(free_url, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    with pytest.raises(SettingsError, match=r"no credentials.*GRAFT_EE_KEY_FILE"):
        engine(free_url, is_anonymous=False).get_chip(NAIP, SCENE, GRID)


def test_missing_project_is_explained():
    with pytest.raises(SettingsError, match="GRAFT_EE_PROJECT"):
        EarthEngine.from_settings(Settings(world="planet"))


@pytest.mark.parametrize("url", ["", "earthengine.googleapis.com", "file:///etc", "http://[broken"])
def test_unusable_address_is_a_settings_error(url):
    with pytest.raises(SettingsError, match="GRAFT_EE_URL"):
        engine(url)


def test_importing_the_client_loads_no_ee():
    code = (
        "import sys, resources.earth_engine, resources.images, resources.storage;"
        "heavy = {'ee', 'googleapiclient', 'google.auth', 'rasterio', 'torch', 'PIL', 'dagster'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_librarys_own_retries_never_sleep(scripted, script, reply, caplog):
    script.on("pixels", api_error(reply, 503))
    with caplog.at_level(logging.WARNING):
        engine(scripted(script).url).get_chip(NAIP, SCENE, GRID)
    assert not [message for message in caplog.messages if "Sleeping" in message]


def test_rasterio_environment_is_untouched():
    decode_chip(geotiff(), NAIP, GRID)
    assert not rasterio.env.hasenv()


# --- the planet ---

PLANET_BOX = (-71.40, 42.30, -71.36, 42.33)


def planet_engine(url, **options):
    return engine(url, project="local-planet", **{"concurrency": 8, **options})


def grid_inside(found, gsd_m, size_px=64):
    """A grid well inside a scene, in WGS84 UTM, on the scene's own pixels."""
    first = found["bands"][0]["grid"]
    affine = first["affineTransform"]
    epsg = int(first["crsCode"].removeprefix("EPSG:"))
    epsg = epsg if epsg > 32600 else epsg - 26900 + 32600
    return Grid(epsg, affine["translateX"] + 2000.0, affine["translateY"] - 2000.0, gsd_m, size_px, size_px)


@pytest.mark.parametrize("sensor", [NAIP, SENTINEL2], ids=lambda sensor: sensor.name)
def test_planet_lists_scenes_of_a_window(planet, sensor):
    earth_engine = planet_engine(planet.url)
    found = earth_engine.list_scenes(sensor, PLANET_BOX)
    times = sorted(item["startTime"] for item in found)
    assert len(found) > 3
    assert times[0] >= sensor.listed_from
    middle = datetime.fromisoformat(times[len(times) // 2])
    before = earth_engine.list_scenes(sensor, PLANET_BOX, end=middle)
    after = earth_engine.list_scenes(sensor, PLANET_BOX, start=middle)
    assert {item["id"] for item in before} | {item["id"] for item in after} == {item["id"] for item in found}
    assert not {item["id"] for item in before} & {item["id"] for item in after}
    for item in found:
        assert {"id", "grid"} <= set(item["bands"][0])
        if sensor.cloud_property:
            assert item["properties"][sensor.cloud_property] < sensor.max_cloud_pct


@pytest.mark.parametrize("sensor", [NAIP, SENTINEL2], ids=lambda sensor: sensor.name)
def test_planet_serves_chips_whose_overlap_agrees(planet, sensor):
    earth_engine = planet_engine(planet.url)
    item = earth_engine.list_scenes(sensor, PLANET_BOX)[0]
    grid = grid_inside(item, sensor.gsd_m)
    moved = Grid(grid.epsg, grid.x0_m + 16 * grid.gsd_m, grid.y0_m - 8 * grid.gsd_m, grid.gsd_m, 64, 64)
    chip, other = (earth_engine.get_chip(sensor, item["id"], place) for place in (grid, moved))
    assert chip.shape == (64, 64, 3)
    assert chip.dtype == (np.uint8 if sensor is NAIP else np.uint16)
    assert np.array_equal(chip[8:, 16:], other[:-8, :-16])
    assert np.ptp(chip) > 0


def test_planet_has_nothing_outside_a_scene(planet):
    earth_engine = planet_engine(planet.url)
    item = earth_engine.list_scenes(NAIP, PLANET_BOX)[0]
    grid = grid_inside(item, 1.0)
    away = Grid(grid.epsg, grid.x0_m + 100_000, grid.y0_m, 1.0, 32, 32)
    assert not earth_engine.get_chip(NAIP, item["id"], away).any()


def test_planet_refuses_as_google_does(planet):
    earth_engine = planet_engine(planet.url)
    with pytest.raises(ItemError, match="not found") as caught:
        earth_engine.get_chip(NAIP, "USDA/NAIP/DOQQ/m_0000000_no_19_1_20210101", GRID)
    assert caught.value.reason == "scene_missing"
    with pytest.raises(SettingsError, match=r"serviceusage.*GRAFT_EE_PROJECT"):
        engine(planet.url, project="forbidden").list_scenes(NAIP, PLANET_BOX)


def test_planet_full_of_faults_yields_the_same_chips(planet, make_planet):
    calm = planet_engine(planet.url)
    items = calm.list_scenes(NAIP, PLANET_BOX)[:8]
    wanted = [calm.get_chip(NAIP, item["id"], grid_inside(item, 1.0)) for item in items]
    rough_planet = make_planet(seed=0, fault_rate=0.4, stall_s=0.5)
    rough = planet_engine(rough_planet.url, attempts=12)
    found = [rough.get_chip(NAIP, item["id"], grid_inside(item, 1.0)) for item in items]
    assert all(np.array_equal(one, other) for one, other in zip(wanted, found, strict=True))
    stats = rough_planet.stats()
    assert sum(count for name, count in stats.items() if name.startswith("fault_")) > 0
    assert stats["get_pixels"] > len(items)


def test_calm_planet_is_asked_once_per_chip(make_planet):
    planet = make_planet(seed=0)
    earth_engine = planet_engine(planet.url)
    item = earth_engine.list_scenes(NAIP, PLANET_BOX)[0]
    for number in range(20):
        grid = grid_inside(item, 1.0, 32)
        earth_engine.get_chip(NAIP, item["id"], Grid(grid.epsg, grid.x0_m + number, grid.y0_m, 1.0, 32, 32))
    stats = planet.stats()
    assert stats["get_pixels"] == 20
    assert stats["discovery"] + stats["algorithms"] + stats["list_assets"] == 4
    assert earth_engine.requests == 24


def chips_at_once(earth_engine, count, threads=40):
    """Ask for chips from many more threads than may be in flight."""
    item = earth_engine.list_scenes(NAIP, PLANET_BOX)[0]
    grid = grid_inside(item, 1.0, 16)
    with ThreadPoolExecutor(threads) as pool:
        grids = [Grid(grid.epsg, grid.x0_m + number, grid.y0_m, 1.0, 16, 16) for number in range(count)]
        return list(pool.map(lambda where: earth_engine.get_chip(NAIP, item["id"], where), grids))


def test_never_more_requests_are_in_flight_than_allowed(make_planet):
    planet = make_planet(seed=0, latency_ms=50)
    chips_at_once(planet_engine(planet.url, concurrency=6), 60)
    assert 4 <= planet.stats()["max_in_flight"] <= 6


@pytest.mark.parametrize(("pace", "is_throttled"), [(15, False), (10**6, True)])
def test_never_more_requests_a_second_are_made_than_allowed(make_planet, pace, is_throttled):
    planet = make_planet(seed=0, quota=20)
    earth_engine = planet_engine(planet.url, concurrency=40, requests_per_second=pace, attempts=100)
    assert len(chips_at_once(earth_engine, 45)) == 45
    assert (planet.stats()["throttled"] > 0) == is_throttled


def test_the_limits_are_earth_engines_own_unless_set():
    settings = Settings(world="planet", ee_project="test-project")
    assert (settings.ee_concurrency, settings.ee_requests_per_second) == (40, 100)
    assert EarthEngine.from_settings(settings).concurrency == 40
