"""STAC: a small API and its GeoTIFFs over real HTTP, as Earth Search and the Planetary Computer publish them."""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
import tenacity
import uvicorn
from rasterio.warp import Resampling, reproject, transform_bounds
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from graft_pipeline.errors import InputError, ItemError, ServiceError, SettingsError
from graft_pipeline.geometry import Grid, projection
from graft_pipeline.imagery import SENSORS, Sensor
from graft_pipeline.scenes import scene_rows
from graft_pipeline.settings import Settings
from resources.http import Retries
from resources.imagery import open_imagery
from resources.stac import HEADER_BYTES, Stac

X0, Y0 = 300_000.0, 4_660_020.0
BOX = (-72.0, 41.0, -70.0, 43.0)
CORE = "https://api.stacspec.org/v1.0.0"
NAIP = replace(SENSORS["stac"][0], token_url=None)
SENTINEL2 = replace(SENSORS["stac"][1], token_url=None, chip_px=64, crop_px=32)
#: Earth Search's names of the same collection.
EARTH_SEARCH = replace(SENTINEL2, bands=("red", "green", "blue"), mask_band="scl")


class Api:
    """A static STAC API: `items` by collection, files of a folder; counts what it is asked for.

    Attributes:
        spoil: given a request, may return an answer to send instead.
        conforms: conformance classes beyond the core's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.items: dict[str, dict[str, dict[str, Any]]] = {}
        self.conforms = ["item-search#query", "item-search#fields"]
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.tokens: list[str] = []
        self.spoil: Callable[[Request], Response | None] = lambda request: None
        self.now = self.peak = 0
        self._lock = threading.Lock()
        routes = [
            Route("/", self.landing),
            Route("/search", self.search, methods=["POST"]),
            Route("/collections/{collection}", self.collection),
            Route("/collections/{collection}/items/{item}", self.item),
            Route("/token/{collection}", self.token),
            Route("/files/{path:path}", self.file),
        ]
        guarded = [Route(route.path, self.guarded(route.endpoint), methods=route.methods) for route in routes]
        self.app = Starlette(routes=guarded)
        self.url = ""

    def guarded(self, endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        name = endpoint.__name__

        def respond(request: Request, body: bytes) -> Response:
            with self._lock:
                self.asked[name] += 1
                self.now += 1
                self.peak = max(self.peak, self.now)
            time.sleep(0.002)
            with self._lock:
                self.now -= 1
            request.state.body = body
            return self.spoil(request) or endpoint(request)

        async def handler(request: Request) -> Response:
            from starlette.concurrency import run_in_threadpool

            return await run_in_threadpool(respond, request, await request.body())

        return handler

    def landing(self, request: Request) -> Response:
        return JSONResponse(
            {
                "type": "Catalog", "id": "test", "description": "test", "stac_version": "1.0.0",
                "conformsTo": [f"{CORE}/core", f"{CORE}/item-search", *(f"{CORE}/{name}" for name in self.conforms)],
                "links": [
                    {"rel": "self", "href": self.url},
                    {"rel": "root", "href": self.url},
                    {"rel": "search", "href": f"{self.url}/search", "method": "POST", "type": "application/geo+json"},
                ],
            }
        )  # fmt: skip

    def search(self, request: Request) -> Response:
        wanted = json.loads(request.state.body)
        self.bodies.append(wanted)
        start, end = wanted["datetime"].split("/")
        box = shapely.box(*wanted["bbox"])
        found = []
        for name in wanted["collections"]:
            for item in self.items.get(name, {}).values():
                moment = item["properties"]["datetime"]
                touches = shapely.geometry.shape(item["geometry"]).intersects(box)
                if touches and start <= moment and (end == ".." or moment <= end):
                    found.append(item)
        for field, rule in wanted.get("query", {}).items():
            found = [item for item in found if _below(item["properties"].get(field), rule["lt"])]
        first, links = wanted.get("token", 0), []
        if first + 2 < len(found):
            body = wanted | {"token": first + 2}
            links = [{"rel": "next", "href": f"{self.url}/search", "method": "POST", "body": body}]
        return JSONResponse(
            {"type": "FeatureCollection", "features": found[first : first + 2], "links": links}
        )

    def collection(self, request: Request) -> Response:
        name = request.path_params["collection"]
        return JSONResponse({"id": name}, 200 if name in self.items else 404)

    def item(self, request: Request) -> Response:
        found = self.items.get(request.path_params["collection"], {}).get(request.path_params["item"])
        return JSONResponse(found or {}, 200 if found else 404)

    def token(self, request: Request) -> Response:
        self.tokens.append(f"sig={len(self.tokens)}")
        expiry = datetime.now(UTC) + timedelta(minutes=45)
        return JSONResponse({"msft:expiry": expiry.isoformat(), "token": self.tokens[-1]})

    def file(self, request: Request) -> Response:
        path = self.folder / request.path_params["path"]
        return FileResponse(path) if path.is_file() else Response(status_code=404)

    def add(
        self, collection: str, name: str, assets: dict[str, dict[str, Any]], file: Path, **properties: Any
    ) -> None:
        """Publish an item whose ground is that of a file."""
        with rasterio.open(file) as raster:
            box = shapely.box(*transform_bounds(raster.crs, "EPSG:4326", *raster.bounds))
        self.items.setdefault(collection, {})[name] = {
            "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection, "bbox": box.bounds,
            "geometry": shapely.geometry.mapping(box), "properties": properties,
            "links": [{"rel": "self", "href": f"{self.url}/collections/{collection}/items/{name}"}],
            "assets": assets,
        }  # fmt: skip

    def add_naip(self, name: str, time: str, width: int = 900, **properties: Any) -> Path:
        """One file of four bands, its grid stated as the Planetary Computer does."""
        file = cog(self.folder / f"{name}.tif", count=4, gsd_m=1.0, size=(width, 700), crs="EPSG:26919")
        with rasterio.open(file) as raster:
            grid = {"proj:epsg": 26919, "proj:shape": [700, width], "proj:bbox": list(raster.bounds)}
        href = f"{self.url}/files/{name}.tif"
        self.add("naip", name, {"image": {"href": href}}, file, datetime=time, **grid, **properties)
        return file

    def add_sentinel2(
        self, name: str, time: str, cloud: float, keys: str = "B04 B03 B02 SCL", **more: Any
    ) -> dict[str, Path]:
        """A file for each band, grids stated at the assets, code at the item (projection extension 2)."""
        files, assets = {}, {}
        for key in keys.split():
            gsd_m, dtype = (20.0, "uint8") if key.lower() == "scl" else (10.0, "uint16")
            size = (int(1500 / gsd_m), int(1500 / gsd_m))
            files[key] = cog(self.folder / f"{name}_{key}.tif", gsd_m=gsd_m, dtype=dtype, size=size)
            assets[key] = {
                # Relative links are allowed.
                "href": f"../../../files/{files[key].name}",
                "proj:shape": list(reversed(size)),
                "proj:transform": [gsd_m, 0, X0, 0, -gsd_m, Y0, 0, 0, 1],
            }
        properties = {"datetime": time, "eo:cloud_cover": cloud, "proj:code": "EPSG:32619", **more}
        self.add("sentinel-2-l2a", name, assets, next(iter(files.values())), **properties)
        return files


def _below(value: Any, limit: float) -> bool:
    return isinstance(value, str) or (value is not None and value < limit)


def cog(
    path: Path,
    *,
    count: int = 1,
    gsd_m: float,
    size: tuple[int, int],
    dtype: str = "uint16",
    crs: str = "EPSG:32619",
) -> Path:
    dtype = "uint8" if count == 4 else dtype
    rng = np.random.default_rng([ord(letter) for letter in path.name])
    pixels = rng.integers(1, {"uint8": 250, "uint16": 9000}[dtype], (count, size[1], size[0])).astype(dtype)
    pixels[:, :, :20] = 0
    profile = {"crs": crs, "transform": rasterio.Affine(gsd_m, 0, X0, 0, -gsd_m, Y0), "nodata": 0}
    with rasterio.open(
        path, "w", driver="COG", width=size[0], height=size[1], count=count, dtype=dtype, blocksize=256,
        compress="deflate", **profile,
    ) as file:  # fmt: skip
        file.write(pixels)
    return path


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    made = Api(tmp_path)
    server = uvicorn.Server(uvicorn.Config(made.app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    made.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield made
    server.should_exit = True
    thread.join()


def client(api: Api, attempts: int = 3, **options: Any) -> Stac:
    options = {"requests_per_second": 10**6, "timeout_s": 20.0, "concurrency": 4} | options
    return Stac(url=api.url, retries=Retries(attempts=attempts, wait=tenacity.wait_none()), **options)


def by_rasterio(files: list[tuple[Path, int]], grid: Grid) -> np.ndarray:
    planes = []
    for path, number in files:
        with rasterio.open(path) as file:
            plane = np.zeros((grid.height_px, grid.width_px), file.dtypes[0])
            reproject(
                rasterio.band(file, number),
                plane,
                dst_transform=grid.affine,
                dst_crs=grid.crs,
                resampling=Resampling.nearest,
            )
            planes.append(plane)
    return np.stack(planes, axis=-1)


def rows(stac: Stac, sensor: Sensor, **window: Any) -> dict[str, dict[str, Any]]:
    table = scene_rows(stac.list_scenes(sensor, BOX, **window), sensor)
    return {row["scene_id"]: row for row in table.to_pylist()}


# --- listing ---


def test_items_of_all_pages_become_scenes(api: Api) -> None:
    for day in range(1, 6):
        api.add_naip(f"m_{day}", f"2021-07-0{day}T16:00:00Z", width=64)
    found = rows(client(api), NAIP)
    assert sorted(found) == ["m_1", "m_2", "m_3", "m_4", "m_5"]
    row = found["m_3"]
    assert row["acquired_at_utc"] == datetime(2021, 7, 3, 16, tzinfo=UTC)
    assert (row["crs"], row["cloud_pct"]) == ("EPSG:26919", None)
    corners = (row["x_min_m"], row["y_min_m"], row["x_max_m"], row["y_max_m"])
    assert corners == (X0, Y0 - 700, X0 + 64, Y0)
    assert api.asked["search"] == 3
    window = {"start": datetime(2021, 7, 2, 16, tzinfo=UTC), "end": datetime(2021, 7, 4, 16, tzinfo=UTC)}
    assert sorted(rows(client(api), NAIP, **window)) == ["m_2", "m_3"]


@pytest.mark.parametrize("conforms", [["item-search#query", "item-search#fields"], []])
def test_clouds_and_grids_of_sentinel2(api: Api, conforms: list[str]) -> None:
    api.conforms = conforms
    api.add_sentinel2("clear", "2021-07-01T15:30:00.5Z", 0.25)
    api.add_sentinel2("cloudy", "2021-07-06T15:30:00Z", 1.0)
    api.add_sentinel2("unknown", "2021-07-11T15:30:00Z", 0.0)
    del api.items["sentinel-2-l2a"]["unknown"]["properties"]["eo:cloud_cover"]
    api.add_sentinel2("gridless", "2021-07-16T15:30:00Z", 0.0, **{"proj:code": None})
    api.add_sentinel2("shapeless", "2021-07-16T15:30:00Z", 0.0)
    api.items["sentinel-2-l2a"]["shapeless"]["assets"]["B04"]["proj:shape"] = ["wide", None]
    api.add_sentinel2("timeless", "yesterday", 0.0)
    api.add_sentinel2("wordy", "2021-07-16T15:30:00Z", 0.0)
    api.items["sentinel-2-l2a"]["wordy"]["properties"]["eo:cloud_cover"] = "none at all"
    api.add_sentinel2("colourless", "2021-07-16T15:30:00Z", 0.0, keys="B04 SCL")
    (row,) = rows(client(api), SENTINEL2).values()
    assert (row["scene_id"], row["cloud_pct"], row["crs"]) == ("clear", 0.25, "EPSG:32619")
    assert (row["x_min_m"], row["y_min_m"], row["x_max_m"], row["y_max_m"]) == (X0, Y0 - 1500, X0 + 1500, Y0)
    assert ("query" in api.bodies[0], "fields" in api.bodies[0]) == (bool(conforms), bool(conforms))
    by_chip = replace(SENTINEL2, cloud_rule="chip")
    assert sorted(rows(client(api), by_chip)) == ["clear", "cloudy", "unknown", "wordy"]
    assert sorted(rows(client(api), replace(by_chip, max_scene_cloud_pct=60.0))) == ["clear", "cloudy"]


def test_what_is_no_api_or_no_collection_is_said(api: Api, free_url: str) -> None:
    with pytest.raises(InputError, match=r"naip.*404"):
        client(api).list_scenes(NAIP, BOX)
    with pytest.raises(ServiceError, match=free_url.removeprefix("http://")):
        Stac(url=free_url, retries=Retries(attempts=1)).list_scenes(NAIP, BOX)
    with pytest.raises(InputError, match="no box"):
        client(api).list_scenes(NAIP, (-71, 42, -72, 43))
    with pytest.raises(SettingsError, match="GRAFT_STAC_URL"):
        open_imagery(Settings(imagery="stac", stac_url="planetarycomputer"))
    api.spoil = lambda request: JSONResponse({"type": "Feature"})
    with pytest.raises(SettingsError, match="GRAFT_STAC_URL"):
        client(api).list_scenes(NAIP, BOX)
    api.spoil = lambda request: Response(status_code=401)
    with pytest.raises(SettingsError, match="token_url"):
        client(api).list_scenes(NAIP, BOX)
    api.spoil = lambda request: Response(status_code=503)
    with pytest.raises(ServiceError, match="again later"):
        client(api).list_scenes(NAIP, BOX)


# --- chips ---


@pytest.mark.parametrize(
    ("epsg", "dx", "dy"), [(26919, 200, -100), (32619, 200.4, -100), (32618, 0, 0), (26919, -30, 20)]
)
def test_naip_chips_are_rasterios_own_reprojection(api: Api, epsg: int, dx: float, dy: float) -> None:
    file = api.add_naip("m_1", "2021-07-01T16:00:00Z")
    x, y = X0 + dx, Y0 + dy
    if epsg == 32618:
        lon, lat = projection(32619).inverse(X0 + 300, Y0 - 200)
        x, y = (float(value) for value in projection(epsg).forward(lon, lat))
    grid = Grid(epsg, x, y, 1.0, 128, 96)
    got = client(api).get_chip(NAIP, "m_1", grid)
    assert got.any()
    np.testing.assert_array_equal(got, by_rasterio([(file, 1), (file, 2), (file, 3)], grid))
    if (epsg, dx) == (26919, 200):
        with rasterio.open(file) as raster:
            native = raster.read([1, 2, 3], window=((100, 196), (200, 328)))
        np.testing.assert_array_equal(np.moveaxis(got, -1, 0), native)


def test_only_the_ranges_below_a_chip_are_read(api: Api) -> None:
    file = api.add_naip("m_1", "2021-07-01T16:00:00Z")
    sizes = []
    api.spoil = lambda request: sizes.append(request.headers.get("range"))  # type: ignore[func-returns-value]
    stac = client(api)
    for column in range(4):
        # Four chips of one tile of 256 pixels, the file's first.
        stac.get_chip(NAIP, "m_1", Grid(26919, X0 + 30 + column, Y0 - 30, 1.0, 100, 100))
    ranges = [text.removeprefix("bytes=").split("-") for text in sizes if text]
    read = sum(int(last) + 1 - int(first) for first, last in ranges)
    assert api.asked["item"] == 1
    assert sum(int(first) == 0 for first, _ in ranges) == 1
    assert api.asked["file"] <= 5
    assert HEADER_BYTES < read < file.stat().st_size / 2
    assert stac.requests == sum(api.asked.values())


def test_sentinel2_bands_are_shifted_as_their_baseline_says(api: Api) -> None:
    grid = Grid(32619, X0 + 100, Y0 - 500, 10.0, 64, 64)
    by_chip = replace(
        EARTH_SEARCH, cloud_rule="chip", raw_bands=("nir", "aot"), bands=("red", "green", "blue")
    )
    keys = "red green blue nir aot scl"
    cases = {
        "old": ({"s2:processing_baseline": "02.14"}, False),
        "new": ({"s2:processing_baseline": "05.09"}, True),
        "done": ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True}, False),
        "undone": ({"s2:processing_baseline": "04.00", "earthsearch:boa_offset_applied": False}, True),
        "silent": ({}, False),
    }
    for name, (properties, is_shifted) in cases.items():
        files = api.add_sentinel2(name, "2022-07-01T15:30:00Z", 50.0, keys, **properties)
        got = client(api).get_chip(by_chip, name, grid)
        expected = by_rasterio([(files[key], 1) for key in keys.split()], grid)
        assert got.dtype == np.uint16
        if is_shifted:
            values = expected[..., :4].astype(int)
            expected[..., :4] = np.where(values == 0, 0, np.maximum(values - 1000, 1))
        np.testing.assert_array_equal(got, expected)
        assert (got[:, :10] == 0).all()
        assert got[:, 20:, :4].all()


def test_links_are_signed_with_the_collections_token(api: Api) -> None:
    file = api.add_naip("m_1", "2021-07-01T16:00:00Z")
    signed = replace(NAIP, token_url=f"{api.url}/token")
    api.spoil = lambda request: (
        None
        if "/files/" not in request.url.path or request.url.query in api.tokens
        else Response(status_code=403)
    )
    with pytest.raises(SettingsError, match="token_url"):
        client(api).get_chip(NAIP, "m_1", Grid(26919, X0 + 200, Y0 - 100, 1.0, 64, 64))
    stac = client(api)
    for column in range(5):
        grid = Grid(26919, X0 + 200 + column, Y0 - 100, 1.0, 64, 64)
        expected = by_rasterio([(file, 1), (file, 2), (file, 3)], grid)
        np.testing.assert_array_equal(stac.get_chip(signed, "m_1", grid), expected)
    assert len(api.tokens) == 1
    assert "sig=" not in repr(stac)


def test_a_token_that_is_refused_is_renewed_once(api: Api) -> None:
    """The service's clock may be ahead of ours, and the Planetary Computer has handed out tokens that never held."""
    file = api.add_naip("m_1", "2021-07-01T16:00:00Z")
    signed = replace(NAIP, token_url=f"{api.url}/token")
    stac, grid = client(api), Grid(26919, X0 + 200, Y0 - 100, 1.0, 64, 64)
    revoked = {"sig=0"}
    api.spoil = lambda request: Response(status_code=403) if request.url.query in revoked else None
    expected = by_rasterio([(file, 1), (file, 2), (file, 3)], grid)
    np.testing.assert_array_equal(stac.get_chip(signed, "m_1", grid), expected)
    assert len(api.tokens) == 2
    revoked |= {f"sig={number}" for number in range(100)}
    with pytest.raises(ItemError) as caught:
        stac.get_chip(signed, "m_1", Grid(26919, X0 + 800, Y0 - 600, 1.0, 64, 64))
    assert (caught.value.reason, caught.value.is_permanent, len(api.tokens)) == ("forbidden", False, 3)
    api.items["naip"]["m_1"]["assets"]["image"]["href"] = "s3://bucket/m_1.tif"
    with pytest.raises(ItemError, match=r"'s3://bucket/m_1\.tif' is no http"):
        client(api).get_chip(signed, "m_1", grid)


@pytest.mark.parametrize("status", [400, 404])
def test_a_wrong_token_url_condemns_no_chip(api: Api, status: int) -> None:
    api.add_naip("m_1", "2021-07-01T16:00:00Z")
    api.spoil = lambda request: Response(status_code=status) if "/token/" in request.url.path else None
    with pytest.raises(SettingsError, match=f"HTTP {status}.*token_url"):
        client(api).get_chip(
            replace(NAIP, token_url=f"{api.url}/token"), "m_1", Grid(26919, X0 + 200, Y0 - 100, 1.0, 64, 64)
        )


def test_one_forbidden_file_is_an_error_of_its_chip(api: Api) -> None:
    """S3 says 403 of a file that is not there, to whom may not list the bucket."""
    for name in ("m_1", "m_2"):
        api.add_naip(name, "2021-07-01T16:00:00Z")
    stac, grid = client(api), Grid(26919, X0 + 200, Y0 - 100, 1.0, 64, 64)
    api.spoil = lambda request: Response(status_code=403) if "/files/m_2" in request.url.path else None
    with pytest.raises(SettingsError, match="token_url"):
        stac.get_chip(NAIP, "m_2", grid)
    stac.get_chip(NAIP, "m_1", grid)
    with pytest.raises(ItemError, match=r"m_2.*HTTP 403") as caught:
        stac.get_chip(NAIP, "m_2", grid)
    assert (caught.value.reason, caught.value.is_permanent) == ("forbidden", False)


def test_one_link_that_leads_nowhere_is_an_error_of_its_chip(api: Api, free_url: str) -> None:
    for name in ("m_1", "m_2"):
        api.add_naip(name, "2021-07-01T16:00:00Z")
    api.items["naip"]["m_2"]["assets"]["image"]["href"] = f"{free_url}/m_2.tif"
    stac, grid = client(api), Grid(26919, X0 + 200, Y0 - 100, 1.0, 64, 64)
    stac.get_chip(NAIP, "m_1", grid)
    with pytest.raises(ItemError, match=free_url.removeprefix("http://")) as caught:
        stac.get_chip(NAIP, "m_2", grid)
    assert (caught.value.reason, caught.value.is_permanent) == ("connection", False)


def test_redirects_are_followed(api: Api) -> None:
    """Of a landing page without its slash, of a search, of files that lie elsewhere."""
    file = api.add_naip("m_1", "2021-07-01T16:00:00Z")

    def moved(request: Request) -> Response | None:
        if "moved" in request.url.query:
            return None
        return Response(status_code=307, headers={"location": f"{request.url.path}?moved"})

    api.spoil = moved
    stac, grid = client(api), Grid(26919, X0 + 200, Y0 - 100, 1.0, 64, 64)
    assert sorted(rows(stac, NAIP)) == ["m_1"]
    expected = by_rasterio([(file, 1), (file, 2), (file, 3)], grid)
    np.testing.assert_array_equal(stac.get_chip(NAIP, "m_1", grid), expected)
    api.spoil = lambda request: Response(status_code=302, headers={"location": request.url.path})
    with pytest.raises(InputError, match="redirected for ever"):
        client(api).list_scenes(NAIP, BOX)


def test_passing_trouble_changes_no_pixel(api: Api) -> None:
    file = api.add_naip("m_1", "2021-07-01T16:00:00Z")
    turns = itertools.count()

    def spoil(request: Request) -> Response | None:
        turn = next(turns)
        if turn % 3 == 0:
            return None
        if turn % 3 == 1 and "range" in request.headers:
            first, last = request.headers["range"].removeprefix("bytes=").split("-")
            size, short = file.stat().st_size, int(last) - int(first) - 5
            whole = {"content-range": f"bytes {first}-{min(int(last), size - 1)}/{size}"}
            moved = {"content-range": f"bytes {int(first) + 1}-{int(last) + 1}/{size}"}
            return [
                Response(status_code=429, headers={"Retry-After": "0"}),
                Response(b"<html>busy</html>", media_type="text/html"),
                Response(bytes(max(short, 0)), 206, whole),
                Response(bytes(short + 6), 206, moved),
                Response(status_code=500),
            ][turn // 3 % 5]
        return Response(status_code=503) if turn % 6 == 2 else None

    stac = client(api, attempts=40)
    grids = [Grid(26919, X0 + 40 * column, Y0 - 100, 1.0, 64, 64) for column in range(20)]
    wanted = [by_rasterio([(file, 1), (file, 2), (file, 3)], grid) for grid in grids]
    api.spoil = spoil
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda grid: stac.get_chip(NAIP, "m_1", grid), grids))
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert next(turns) > 40
    assert api.peak <= 4


@pytest.mark.parametrize(
    ("status", "reason", "is_permanent"),
    [
        (404, "scene_missing", True),
        (400, "bad_request", True),
        (429, "rate_limited", False),
        (503, "unavailable", False),
    ],
)
@pytest.mark.parametrize("part", ["/items/", "/files/"])
def test_refusals_of_one_chip(api: Api, part: str, status: int, reason: str, is_permanent: bool) -> None:
    api.add_naip("m_1", "2021-07-01T16:00:00Z")
    api.spoil = lambda request: Response(status_code=status) if part in request.url.path else None
    with pytest.raises(ItemError, match=f"m_1.*HTTP {status}") as caught:
        client(api).get_chip(NAIP, "m_1", Grid(26919, X0 + 200, Y0 - 100, 1.0, 64, 64))
    assert (caught.value.reason, caught.value.is_permanent) == (reason, is_permanent)
    assert api.asked["item" if part == "/items/" else "file"] == (1 if is_permanent else 3)


def test_what_a_file_lacks_is_an_error_of_the_chip(api: Api) -> None:
    file = api.add_naip("m_1", "2021-07-01T16:00:00Z")
    grid = Grid(26919, X0 + 200, Y0 - 100, 1.0, 64, 64)

    def failure(sensor: Sensor, scene_id: str = "m_1") -> tuple[str, bool]:
        with pytest.raises(ItemError) as caught:
            client(api).get_chip(sensor, scene_id, grid)
        return caught.value.reason, caught.value.is_permanent

    assert failure(NAIP, "m_2") == ("scene_missing", True)
    assert failure(replace(NAIP, bands=("image:1", "image:2", "image:7"))) == ("bad_request", True)
    assert failure(replace(NAIP, bands=("red", "green", "blue"))) == ("bad_request", True)
    content = file.read_bytes()
    file.write_bytes(content[:30_000] + bytes(len(content) - 30_000))
    assert failure(NAIP) == ("truncated", False)
    # A projection of its own, named in Latin-1.
    cog(
        file, count=4, gsd_m=1.0, size=(900, 700), crs="+proj=aea +lat_1=29 +lat_2=45 +lon_0=-96 +datum=NAD83"
    )
    file.write_bytes(file.read_bytes().replace(b"unknown", b"pr\xe9cise"))
    assert failure(NAIP) == ("truncated", False)
    file.write_bytes(content)
    api.items["naip"]["m_1"]["assets"]["image"]["href"] = "file:///etc/hosts"
    assert failure(NAIP) == ("bad_request", True)


def test_a_service_that_fails_for_every_chip_ends_the_run(api: Api, free_url: str) -> None:
    api.add_naip("m_1", "2021-07-01T16:00:00Z")
    grid = Grid(26919, X0 + 200, Y0 - 100, 1.0, 64, 64)
    stac = client(api, attempts=1)
    api.spoil = lambda request: Response(status_code=503)
    for _ in range(19):
        with pytest.raises(ItemError):
            stac.get_chip(NAIP, "m_1", grid)
    with pytest.raises(ServiceError, match="20 items in a row"):
        stac.get_chip(NAIP, "m_1", grid)
    api.spoil = lambda request: None
    api.items["naip"]["m_1"]["assets"]["image"]["href"] = f"{free_url}/m_1.tif"
    with pytest.raises(ServiceError, match="cannot be reached"):
        client(api).get_chip(NAIP, "m_1", grid)
