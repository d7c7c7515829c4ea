"""The search page's API, asked over HTTP on loopback: answers, refusals, limits, headers, what it never gives out."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pytest
import requests
import shapely
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from upath import UPath

from graft_pipeline import search_index
from graft_pipeline.chips import encode
from graft_pipeline.concept_maps import Background
from graft_pipeline.embeddings import to_column
from graft_pipeline.errors import ServiceError, SettingsError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import NAIP
from graft_pipeline.manifests import partition_file, partition_folder, read_table, write_table
from graft_pipeline.purging import purge
from graft_pipeline.regions import Region
from graft_pipeline.schemas import CHIP_EMBEDDINGS, CHIPS, FLICKR_PHOTOS, GROUND_IMAGES, PAIRS, SEARCH_RESULTS
from graft_pipeline.search import SearchIndex
from graft_pipeline.settings import load_settings
from graft_pipeline.shards import ShardWriter
from graft_pipeline.web import current
from graft_pipeline.web.app import Basemap, create_app
from graft_pipeline.web.parameters import Query
from graft_pipeline.web.scoring import Scored, density, hits_geojson
from graft_pipeline.web.server import run
from resources.storage import Storage

REGIONS = ("N42W071", "N42W072")
TILES = 60
#: Each word is an axis of the space; what is none of them is the last.
WORDS = ("lake", "farmland", "forest", "city", "road", "river", "nothing")
EVIL = '<img src=x onerror="alert(1)"> & </script>'
FIRST_DAY = datetime(2021, 7, 1, 15, tzinfo=UTC)


def encode_text(words: str) -> np.ndarray:
    """A text tower of eight dimensions."""
    vector = np.zeros(8, np.float32)
    for word in words.lower().split():
        vector[WORDS.index(word) if word in WORDS else 7] += 1
    return vector / np.linalg.norm(vector)


def vectors_of(number: int) -> np.ndarray:
    """The embeddings of a region's tiles."""
    vectors = np.random.default_rng(number).normal(0, 1, (TILES, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def chip_row(tile_id: str, grid: Grid, day: int) -> dict[str, Any]:
    """What a CHIPS row holds beside its scene and its place in a shard."""
    return {
        **dict.fromkeys(CHIPS.schema.names),
        "tile_id": tile_id,
        "status": "ok",
        "attempts": 1,
        "acquired_at_utc": FIRST_DAY + timedelta(days=day),
        "scenes_tried": 1,
        **{name: getattr(grid, name) for name in ("epsg", "x0_m", "y0_m", "gsd_m")},
        "chip_px": NAIP.chip_px,
    }


def build_region(root: UPath, number: int) -> list[dict[str, Any]]:
    """One region with chips, embeddings, images and pairs; gives what its photos' rows hold."""
    region = Region.parse(REGIONS[number])
    place = {"sensor": "naip", "region": region.key}
    lon = region.west_deg + 0.1 + 0.8 * np.arange(TILES) / TILES
    lat = region.south_deg + 0.5 + 0.3 * np.sin(np.arange(TILES))
    x, y = region.projection.forward(lon, lat)
    ids = [f"naip-{1000 * number + k}" for k in range(TILES)]
    folder = partition_folder(root, CHIPS, **place)
    photo_folder = partition_folder(root, GROUND_IMAGES, region=region.key)
    chip_rows, photo_rows, image_rows, pair_rows = [], [], [], []
    with (
        ShardWriter(folder, "chips-00000.tar") as chips,
        ShardWriter(photo_folder, "images-00000.tar") as images,
    ):
        for k, tile_id in enumerate(ids):
            grid = Grid.snapped(region.epsg, float(x[k]), float(y[k]), NAIP.gsd_m, NAIP.chip_px)
            pixels = np.full((NAIP.chip_px, NAIP.chip_px, 3), (30, 90, 160), np.uint8)
            pixels[112:336, 112:336] = (200, 60, 30)
            stored = chips.add(f"{tile_id}.tif", encode(pixels, grid))
            chip_rows.append(chip_row(tile_id, grid, k) | {"scene_id": f"scene-{number}", **vars(stored)})
            for p in range(2):
                photo_id = f"{tile_id.removeprefix('naip-')}{p}"
                picture = io.BytesIO()
                Image.new("RGB", (640, 480), (20 * p, 120, 40)).save(picture, "JPEG")
                stored = images.add(f"{photo_id}.jpg", picture.getvalue())
                image_rows.append(
                    {
                        **dict.fromkeys(GROUND_IMAGES.schema.names),
                        "photo_id": photo_id,
                        "status": "ok",
                        "attempts": 1,
                        **vars(stored),
                    }
                )
                photo_rows.append({"photo_id": photo_id, "lon_deg": lon[k], "lat_deg": lat[k], "title": EVIL})
                photo_rows[-1] |= {"tags": "lake <b>bold</b>", "license_id": "5" if p else "0"}
                pair_rows.append(
                    {
                        "tile_id": tile_id,
                        "photo_id": photo_id,
                        "center_photo_id": f"{tile_id.removeprefix('naip-')}0",
                        "scene_id": f"scene-{number}",
                        "lon_deg": lon[k],
                        "lat_deg": lat[k],
                        "col_px": 224.0 + 60 * p,
                        "row_px": 224.0 - 20 * p,
                        "taken_at_utc": FIRST_DAY - timedelta(days=100),
                        "acquired_at_utc": FIRST_DAY + timedelta(days=k),
                        "time_difference_days": 100.0 + k,
                        "split": "train",
                    }
                )
    for dataset, rows, where in (
        (CHIPS, chip_rows, place),
        (GROUND_IMAGES, image_rows, {"region": region.key}),
        (PAIRS, pair_rows, place),
    ):
        table = pa.Table.from_pylist(rows, schema=dataset.schema)
        write_table(partition_file(root, dataset, **where), table, dataset)
    embedded = {"tile_id": ids, "center_lon_deg": lon, "center_lat_deg": lat, "chip_sha256": ids}
    table = pa.table(embedded | {"embedding": to_column(vectors_of(number)), "model_id": ["a"] * TILES})
    write_table(partition_file(root, CHIP_EMBEDDINGS, **place), table, CHIP_EMBEDDINGS)
    return photo_rows


def add_tile(
    root: UPath, sensor: str, region: Region, tile_id: str, lon: float, lat: float, model_id: str = "a"
) -> None:
    """One more tile, the only one of its partition; it is a road."""
    place = {"sensor": sensor, "region": region.key}
    x, y = region.projection.forward(lon, lat)
    grid = Grid.snapped(region.epsg, float(x), float(y), NAIP.gsd_m, NAIP.chip_px)
    with ShardWriter(partition_folder(root, CHIPS, **place), "chips-00000.tar") as shard:
        stored = shard.add(f"{tile_id}.tif", encode(np.full((448, 448, 3), 77, np.uint8), grid))
    row = chip_row(tile_id, grid, 0) | {"scene_id": "scene", **vars(stored)}
    write_table(partition_file(root, CHIPS, **place), pa.Table.from_pylist([row], schema=CHIPS.schema), CHIPS)
    embedded = {
        "tile_id": [tile_id],
        "center_lon_deg": [lon],
        "center_lat_deg": [lat],
        "model_id": [model_id],
    }
    embedded |= {"chip_sha256": [tile_id]}
    table = pa.table(embedded | {"embedding": to_column(encode_text("road")[None])})
    write_table(partition_file(root, CHIP_EMBEDDINGS, **place), table, CHIP_EMBEDDINGS)
    search_index.update(root, "naip", model_id=model_id)


def build_root(root: UPath, make_photos: Any) -> UPath:
    for number, region in enumerate(REGIONS):
        rows = build_region(root, number)
        write_table(partition_file(root, FLICKR_PHOTOS, region=region), make_photos(rows), FLICKR_PHOTOS)
    search_index.update(root, "naip")
    return root


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An application on a free port of loopback."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def app_of(root: UPath, **options: Any) -> Any:
    index = SearchIndex.open(root, "naip")
    return create_app(root=root, index=index, sensor=NAIP, encode_text=encode_text, grid_deg=1.0, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_photos: Any) -> Iterator[SimpleNamespace]:
    """A root, and two deployments of it: `planet` shows copies of photos, `real` links to them."""
    root = build_root(UPath(tmp_path_factory.mktemp("web")), make_photos)
    base = Basemap("https://maps.example.org/{z}/{x}/{y}.png", "Somebody & <co>")
    copies = app_of(root, shows_copies=True, max_points=50)
    with serving(copies) as planet, serving(app_of(root, basemap=base)) as real:
        yield SimpleNamespace(root=root, planet=planet, real=real)


def get(url: str, status: int = 200, **parameters: Any) -> Any:
    answer = requests.get(url, params=parameters, timeout=30)
    assert answer.status_code == status, answer.text
    return answer.json()


def all_scores(words: str) -> np.ndarray:
    return np.concatenate([vectors_of(number) @ encode_text(words) for number in range(2)])


def all_ids() -> list[str]:
    return [f"naip-{1000 * number + k}" for number in range(2) for k in range(TILES)]


def test_a_search_lists_the_nearest_tiles_best_first(made: SimpleNamespace) -> None:
    found = get(f"{made.real}/api/search", words="  lake ", top=5)["results"]
    order = np.argsort(-all_scores("lake"))[:5]
    assert [row["tile_id"] for row in found] == [all_ids()[k] for k in order]
    assert [row["score"] for row in found] == pytest.approx(all_scores("lake")[order], abs=1e-4)
    assert len(get(f"{made.real}/api/search", words="lake")["results"]) == 24


def test_a_box_and_dates_narrow_it_and_the_last_day_belongs_to_it(made: SimpleNamespace) -> None:
    box = "-71,42,-70.5,43"
    rows = get(f"{made.real}/api/search", words="lake", top=500, box=box)["results"]
    assert len(rows) == sum(-71 <= -71 + 0.1 + 0.8 * k / TILES <= -70.5 for k in range(TILES))
    assert {row["region"] for row in rows} == {"N42W071"}
    dated = get(f"{made.real}/api/search", words="lake", top=500, since="2021-07-02", until="2021-07-03")[
        "results"
    ]
    assert sorted(row["acquired_on"] for row in dated) == ["2021-07-02"] * 2 + ["2021-07-03"] * 2
    narrow = get(f"{made.real}/api/density", words="lake", box=box)
    # The measure compares with every tile, whatever is looked at.
    assert narrow["background"] == get(f"{made.real}/api/density", words="lake")["background"]
    assert narrow["admitted"] == len(rows)
    nowhere = get(f"{made.real}/api/density", words="lake", box="0,0,1,1")
    assert (nowhere["admitted"], nowhere["days"], nowhere["tile_id"]) == (0, None, [])


def test_density_tells_every_tiles_contrast(made: SimpleNamespace) -> None:
    told = get(f"{made.real}/api/density", words="forest river")
    scores = all_scores("forest river")
    expected = (scores - scores.mean()) / scores.std()
    assert told["kind"] == "tiles"
    by_id = dict(zip(told["tile_id"], told["contrast"], strict=True))
    assert [by_id[tile_id] for tile_id in all_ids()] == pytest.approx(expected, abs=2e-3)
    assert [told["regions"][number] for number in told["region"]] == [
        *[REGIONS[0]] * TILES,
        *[REGIONS[1]] * TILES,
    ]
    assert sum(told["histogram"]["counts"]) == (expected >= 0).sum()
    assert told["days"] == ["2021-07-01", "2021-08-29"]


def test_too_many_tiles_are_counted_in_cells_until_the_view_holds_few(made: SimpleNamespace) -> None:
    told = get(f"{made.planet}/api/density", words="lake")
    assert (told["kind"], told["shown"]) == ("cells", 2 * TILES)
    assert sum(told["tiles"]) == 2 * TILES
    scores = all_scores("lake")
    contrast = (scores - scores.mean()) / scores.std()
    hits = np.sum(told["hits"], axis=0)
    assert hits.tolist() == [(contrast >= level).sum() for level in told["thresholds"]]
    near = get(f"{made.planet}/api/density", words="lake", view="-71,42,-70.8,43")
    assert near["kind"] == "tiles"
    assert 0 < near["shown"] == len(near["tile_id"]) < 50
    assert near["admitted"] == 2 * TILES


def test_hits_are_saved_as_footprints(made: SimpleNamespace, tmp_path: Path) -> None:
    answer = requests.get(f"{made.real}/api/hits.geojson", {"words": "city", "contrast": 1.5}, timeout=30)
    assert answer.headers["content-disposition"] == 'attachment; filename="naip-city.geojson"'
    assert answer.headers["content-type"] == "application/geo+json"
    (tmp_path / "hits.geojson").write_bytes(answer.content)
    frame = geopandas.read_file(tmp_path / "hits.geojson")
    scores = all_scores("city")
    contrast = np.sort((scores - scores.mean()) / scores.std())[::-1]
    assert frame["contrast"].tolist() == pytest.approx(contrast[contrast >= 1.5], abs=2e-3)
    assert frame["rank"].tolist() == list(range(1, len(frame) + 1))
    assert set(frame["region"]) == set(REGIONS)
    assert frame.to_crs(32619).area.to_numpy() == pytest.approx(224.0**2, rel=1e-4)
    middle = (frame.bounds["minx"] + frame.bounds["maxx"]) / 2
    assert (middle - frame["center_lon_deg"]).abs().max() < 1e-6
    assert json.loads(answer.content)["query"]["words"] == "city"
    assert json.loads(answer.content)["hits"] == len(frame)


def test_a_tile_shows_its_chip_and_its_photos_where_they_were_taken(made: SimpleNamespace) -> None:
    tile = get(f"{made.real}/api/tile/N42W071/naip-7")
    assert [(photo["col_px"], photo["row_px"]) for photo in tile["photos"]] == [
        (224.0, 224.0),
        (284.0, 204.0),
    ]
    assert (tile["acquired_on"], tile["scene_id"], tile["footprint_px"]) == ("2021-07-08", "scene-0", 224)
    first, second = tile["photos"]
    # Text from outside comes as it is, in JSON; that the page shows it as text is the browser test's.
    assert first["title"] == EVIL
    assert first["licence"] == {"name": "All rights reserved", "url": None}
    assert second["licence"]["url"] == "https://creativecommons.org/licenses/by-sa/2.0/"
    lat, lon = np.mean(tile["footprint_ring"], axis=0)
    listed = get(f"{made.real}/api/search", words="lake", top=500)["results"]
    [row] = [row for row in listed if row["tile_id"] == "naip-7"]
    assert (lat, lon) == (pytest.approx(row["lat"], abs=1e-5), pytest.approx(row["lon"], abs=1e-5))
    for name, side, colour in (("chip", 448, (30, 90, 160)), ("crop", 224, (200, 60, 30))):
        answer = requests.get(f"{made.real}/api/tile/N42W071/naip-7/{name}.jpg", timeout=30)
        picture = Image.open(io.BytesIO(answer.content))
        assert picture.size == (side, side)
        assert np.abs(np.subtract(picture.getpixel((4, 4)), colour)).max() < 8


def test_a_tile_of_the_grid_has_a_chip_and_no_photo(tmp_path: Path, make_photos: Any) -> None:
    root, tile_id = build_root(UPath(tmp_path), make_photos), "naip_grid-32619-448--7-10500"
    add_tile(root, "naip_grid", Region.parse(REGIONS[0]), tile_id, -70.5, 42.5)
    with serving(app_of(root)) as url:
        [found] = get(f"{url}/api/search", words="road", top=1)["results"]
        assert found["tile_id"] == tile_id
        path = f"{url}/api/tile/{found['region']}/{tile_id}"
        assert get(path)["photos"] == []
        picture = Image.open(io.BytesIO(requests.get(f"{path}/crop.jpg", timeout=30).content))
        assert picture.getpixel((100, 100)) == (77, 77, 77)
        assert get(f"{url}/api/tile/{found['region']}/sentinel2-1", 404)["error"]


def test_photos_of_people_are_linked_to_and_never_copied(made: SimpleNamespace) -> None:
    real = get(f"{made.real}/api/tile/N42W071/naip-7")["photos"][0]
    assert real["page_url"] == "https://www.flickr.com/photos/someone@N00/70/"
    assert real["copy_url"] is None
    refused = get(f"{made.real}/api/photo/N42W071/70.jpg", status=404)
    assert "link" in refused["error"]
    fictional = get(f"{made.planet}/api/tile/N42W071/naip-7")["photos"][0]
    assert fictional["page_url"] is None
    answer = requests.get(f"{made.planet}/{fictional['copy_url']}", timeout=30)
    assert Image.open(io.BytesIO(answer.content)).size == (320, 240)
    assert answer.headers["cache-control"] == "no-store"


def test_a_purged_photo_is_gone_at_once(tmp_path: Path, make_photos: Any) -> None:
    root = build_root(UPath(tmp_path), make_photos)
    with serving(app_of(root, shows_copies=True)) as url:
        before = get(f"{url}/api/tile/N42W071/naip-3")["photos"]
        assert requests.get(f"{url}/{before[1]['copy_url']}", timeout=30).ok
        purge(Storage(root), [before[1]["photo_id"]], [], reason="requested", now=datetime.now(UTC))
        after = get(f"{url}/api/tile/N42W071/naip-3")["photos"]
        assert [photo["photo_id"] for photo in after] == [before[0]["photo_id"]]
        assert requests.get(f"{url}/{before[1]['copy_url']}", timeout=30).status_code == 404
        # A tile has its centre photo's id, and goes with it: from what is loaded, too.
        assert "naip-3" in shown(url)
        purge(Storage(root), ["3"], [], reason="requested", now=datetime.now(UTC))
        assert get(f"{url}/api/tile/N42W071/naip-3", 404)["error"]
        left = set(all_ids()) - {"naip-3", f"naip-{before[1]['photo_id']}"}
        eventually(lambda: get(f"{url}/health")["tiles"] == len(left))
        listed = get(f"{url}/api/search", words="lake", top=500)["results"]
        saved = get(f"{url}/api/hits.geojson", words="lake", contrast=-10)["features"]
        assert (
            {row["tile_id"] for row in listed} == {feature["id"] for feature in saved} == shown(url) == left
        )
        assert sum(region["tiles"] for region in get(f"{url}/api/regions")) == len(left)


def drop_chips(root: UPath, region: str) -> None:
    write_table(partition_file(root, CHIPS, sensor="naip", region=region), CHIPS.empty(), CHIPS)
    search_index.update(root, "naip", model_id="a")


def shown(url: str) -> set[str]:
    """Tiles that the map draws."""
    return set(get(f"{url}/api/density", words="lake")["tile_id"])


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait for what a server does soon."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_follows_its_index(
    tmp_path: Path, make_photos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOOK_S", "RETRY_S", "STALE_S"):
        monkeypatch.setattr(current, name, 0.0)
    root, region = build_root(UPath(tmp_path), make_photos), Region.parse("N43W071")
    manifest = search_index.index_folder(root, "naip") / "index.json"
    with serving(app_of(root)) as url:
        before = manifest.read_bytes()
        add_tile(root, "naip", region, "naip-5000", -70.5, 43.5)
        assert get(f"{url}/api/search", words="road", top=1)["results"][0]["tile_id"] == "naip-5000"
        assert [told["region"] for told in get(f"{url}/api/regions")] == [*REGIONS, "N43W071"]
        assert get(f"{url}/api/about")["stale"] == 0
        # What an index says that cannot be read, or whose files are gone, is answered from the one that is open.
        after = manifest.read_bytes()
        for content in (b"no manifest", before.replace(b".arrow", b".gone")):
            manifest.write_bytes(content)
            assert get(f"{url}/health")["tiles"] == 2 * TILES + 1
        manifest.write_bytes(after)
        file = partition_file(root, CHIP_EMBEDDINGS, sensor="naip", region=REGIONS[0])
        table = read_table(file, CHIP_EMBEDDINGS)
        write_table(file, table.slice(1), CHIP_EMBEDDINGS)
        assert get(f"{url}/api/about")["stale"] == 1
        assert get(f"{url}/health")["tiles"] == 2 * TILES + 1
        # Words and tiles of two encoders have nothing to do with each other.
        add_tile(root, "naip", region, "naip-5000", -70.5, 43.5, model_id="b")
        for path in ("health", "api/about", "api/regions", "api/search?words=road", "api/density?words=road"):
            assert "restart" in get(f"{url}/{path}", 503)["error"]
        search_index.update(root, "naip", model_id="a")
        assert get(f"{url}/health")["tiles"] == 2 * TILES - 1
        # A region whose last tile went lies nowhere; an index without any tile answers nothing.
        drop_chips(root, REGIONS[0])
        assert [region["tile_bounds"] is None for region in get(f"{url}/api/regions")] == [True, False]
        drop_chips(root, REGIONS[1])
        assert "materialise" in get(f"{url}/api/search", 503, words="road")["error"]


@pytest.mark.parametrize(("lon", "key"), [(179.9995, "N42E179"), (-179.9995, "N42W180")])
def test_a_footprint_on_the_antimeridian_is_no_belt_around_the_globe(
    tmp_path: Path, lon: float, key: str
) -> None:
    root = UPath(tmp_path)
    add_tile(root, "naip", Region.parse(key), "naip-1", lon, 42.5)
    with serving(app_of(root)) as url:
        tile = get(f"{url}/api/tile/{key}/naip-1")
        for name, side_m in (("chip_ring", 448), ("footprint_ring", 224)):
            ring = np.array(tile[name])
            assert ring.mean(axis=0) == pytest.approx([42.5, lon], abs=2e-5)
            assert np.ptp(ring[:, 1]) * 111_320 * np.cos(np.radians(42.5)) == pytest.approx(side_m, rel=0.05)
        [feature] = get(f"{url}/api/hits.geojson", words="road", contrast=-1)["features"]
        assert feature["geometry"]["type"] == "MultiPolygon"
        outline = shapely.geometry.shape(feature["geometry"])
        assert outline.is_valid
        assert all(part.exterior.is_ccw for part in outline.geoms)
        west, east = sorted(outline.geoms, key=lambda part: -part.bounds[0])
        assert (west.bounds[2], east.bounds[0]) == (180, -180)
        area_m2 = outline.area * 111_320**2 * np.cos(np.radians(42.5))
        assert area_m2 == pytest.approx(224.0**2, rel=0.01)


def test_cells_and_the_file_count_the_same_hits() -> None:
    # By its cosine each lies below a threshold, rounded to three decimals on it.
    contrast = np.array([0.99951, 0.9994, 1.99951])
    rows = {
        "tile_id": ["a", "b", "c"],
        "region": [REGIONS[0]] * 3,
        "center_lon_deg": [-70.5] * 3,
        "center_lat_deg": [42.5] * 3,
        "acquired_at_utc": [FIRST_DAY] * 3,
        "scene_id": ["scene"] * 3,
        "score": contrast.astype(np.float32),
    }
    table = pa.table(rows).select(SEARCH_RESULTS.schema.names).cast(SEARCH_RESULTS.schema)
    scored = Scored(table, Background(0.0, 1.0, 3), np.round(contrast, 3))
    told = density(scored, None, max_points=1)
    hits = dict(zip(told["thresholds"], np.sum(told["hits"], axis=0).tolist(), strict=True))
    assert (hits[0.75], hits[1.0], hits[2.0]) == (3, 2, 1)
    for threshold, count in hits.items():
        assert hits_geojson(Query("lake"), scored, threshold, NAIP)["hits"] == count


REFUSALS = [
    ("search", {}, 400, "words"),
    ("search", {"words": "   "}, 400, "words"),
    ("search", {"words": "x" * 201}, 400, "200"),
    ("search", {"words": "a\0b"}, 400, "printed"),
    ("search", {"words": "lake", "top": "0"}, 400, "500"),
    ("search", {"words": "lake", "top": "501"}, 400, "500"),
    ("search", {"words": "lake", "top": "many"}, 400, "500"),
    ("search", {"words": "lake", "box": "1,2,3"}, 400, "west,south,east,north"),
    ("search", {"words": "lake", "box": "nan,0,1,1"}, 400, "west,south,east,north"),
    ("search", {"words": "lake", "box": "10,0,-10,1"}, 400, "west less than east"),
    ("search", {"words": "lake", "since": "yesterday"}, 400, "YYYY-MM-DD"),
    ("search", {"words": "lake", "until": "0001-01-01"}, 400, "1900"),
    ("search", {"words": "lake", "since": "2022-01-01", "until": "2021-01-01"}, 400, "earlier"),
    ("density", {"words": "lake", "view": "all"}, 400, "view"),
    ("hits.geojson", {"words": "lake", "contrast": "inf"}, 400, "contrast"),
    ("search", {"words": "lake", "padding": "x" * 3000}, 414, "too long"),
    ("tile/N42W071/naip-99999", {}, 404, "naip-99999"),
    ("tile/N10W071/naip-1", {}, 404, "N10W071"),
    ("tile/N42W071/naip-1/raw.jpg", {}, 404, "crop.jpg"),
    ("tile/..%2f..%2f/naip-1", {}, 404, ""),
    ("tile/N42W071/..%5c..", {}, 404, "id"),
    ("photo/N42W071/no-such.jpg", {}, 404, "no-such"),
    ("nothing", {}, 404, ""),
]


@pytest.mark.parametrize(
    ("path", "parameters", "status", "word"), REFUSALS, ids=lambda value: str(value)[:40]
)
def test_refusals_say_what_to_do(
    made: SimpleNamespace, path: str, parameters: dict[str, str], status: int, word: str
) -> None:
    assert word in get(f"{made.planet}/api/{path}", status, **parameters)["error"]


@given(
    parameters=st.dictionaries(
        st.sampled_from(["words", "box", "since", "until", "top", "view", "contrast"]),
        st.one_of(
            st.text(max_size=60), st.sampled_from(["lake", "-71,42,-70,43", "2021-07-05", "3", "1e309", "-0"])
        ),
        max_size=7,
    ),
    route=st.sampled_from(["search", "density", "hits.geojson"]),
)
def test_whatever_is_asked_is_answered_or_refused_in_words(
    made: SimpleNamespace, parameters: dict[str, str], route: str
) -> None:
    try:
        answer = requests.get(f"{made.real}/api/{route}", params=parameters, timeout=30)
    except UnicodeEncodeError:
        return
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or answer.json()["error"]


def test_every_answer_carries_the_policy(made: SimpleNamespace) -> None:
    for url, host in ((made.planet, ""), (made.real, " https://maps.example.org")):
        for path in ("", "health", "static/app.js", "api/about", "api/nothing", "api/search"):
            headers = requests.get(f"{url}/{path}", timeout=30).headers
            policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
            assert policy["img-src"] == f"'self' data:{host}"
            assert policy["script-src"] == policy["connect-src"] == "'self'"
            assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
            assert headers["x-content-type-options"] == "nosniff"
    assert requests.post(f"{made.real}/api/search", timeout=30).status_code == 405


def test_a_failure_of_ours_shows_nothing_of_this_machine(made: SimpleNamespace, tmp_path: Path) -> None:
    def draw(z: int, x: int, y: int) -> bytes:
        raise OSError(f"{tmp_path} is secret")

    with serving(app_of(made.root, basemap=Basemap(draw=draw))) as url:
        answer = requests.get(f"{url}/basemap/10/300/300.png", timeout=30)
        assert answer.status_code == 500
        assert "log" in answer.json()["error"]
        assert "secret" not in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_a_name_that_is_not_loopback_is_not_answered(made: SimpleNamespace) -> None:
    answer = requests.get(f"{made.planet}/api/about", headers={"Host": "evil.example.org"}, timeout=30)
    assert answer.status_code == 400
    assert "sensor" not in answer.text


def test_the_page_is_told_of_its_deployment(made: SimpleNamespace) -> None:
    about = get(f"{made.real}/api/about")
    assert about["basemap"] == {
        "url": "https://maps.example.org/{z}/{x}/{y}.png",
        "attribution": "Somebody & <co>",
        "zooms": [0, 19],
    }
    assert (about["tiles"], about["footprint_m"], about["shows_copies"]) == (2 * TILES, 224.0, False)
    assert get(f"{made.planet}/api/about")["basemap"] is None
    assert get(f"{made.planet}/basemap/10/300/300.png", 404)["error"]
    regions = get(f"{made.real}/api/regions")
    assert [(region["region"], region["tiles"]) for region in regions] == [(key, TILES) for key in REGIONS]
    assert regions[0]["bounds"] == [-71, 42, -70, 43]
    assert get(f"{made.real}/health") == {"status": "ok", "sensor": "naip", "tiles": 2 * TILES}


def test_the_page_and_its_library_name_no_other_host(made: SimpleNamespace) -> None:
    page = requests.get(f"{made.real}/", timeout=30)
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in page.text.replace("<!doctype", "")
    for name in (
        "app.js",
        "app.css",
        "vendor/leaflet/leaflet.js",
        "vendor/leaflet/leaflet.css",
        "vendor/leaflet/LICENSE",
    ):
        assert requests.get(f"{made.real}/static/{name}", timeout=30).ok


@pytest.mark.browser
def test_what_people_write_is_shown_as_text_and_photos_are_links(
    made: SimpleNamespace, chromium: Any
) -> None:
    page = chromium.new_page(viewport={"width": 1200, "height": 800})
    alarms, requests_made = [], []
    page.on("dialog", lambda dialog: (alarms.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: requests_made.append(request.url))
    words = f"lake {EVIL}"
    with serving(app_of(made.root, basemap=Basemap(None, EVIL, lambda z, x, y: b"", (0, 19)))) as url:
        page.goto(url)
        page.locator("#words").fill(words)
        page.keyboard.press("Enter")
        page.locator(".links a").first.wait_for()
        assert words in page.locator("#status").inner_text()
        assert page.locator(".links a").first.inner_text() == EVIL
        page.locator(".chip-button").first.click()
        page.locator("article.photo b").first.wait_for()
        assert page.locator("article.photo b").first.inner_text() == EVIL
        assert page.locator("article.photo").get_by_text("#<b>bold</b>").count() == 2
        link = page.locator("article.photo").get_by_text("Open on Flickr").first
        assert re.fullmatch(r"https://www\.flickr\.com/photos/someone@N00/\d+/", link.get_attribute("href"))
        assert {"noopener", "noreferrer"} <= set(link.get_attribute("rel").split())
        assert page.locator("article.photo img").count() == 0
        assert EVIL in page.locator(".leaflet-control-attribution").inner_text()
        assert page.locator("[onerror], #panel script").count() == 0
        page.close()
        assert not alarms
        assert not [asked for asked in requests_made if not asked.startswith((url, "data:"))]


@pytest.mark.browser
def test_cells_obey_keys_wherever_the_map_is_and_make_way_for_a_tile(
    made: SimpleNamespace, chromium: Any
) -> None:
    page = chromium.new_page(viewport={"width": 1200, "height": 800})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(made.planet)
    page.locator("#words").fill("lake")
    page.keyboard.press("Enter")
    page.locator("#status").get_by_text("The best of").wait_for()
    slider, threshold = page.locator("#contrast"), page.locator("#threshold")
    slider.focus()
    for key, value in (("ArrowRight", 1.25), ("ArrowRight", 1.5), ("ArrowLeft", 1.25)):
        page.keyboard.press(key)
        assert float(slider.input_value()) == value
    # Beyond 180 degrees there is no box of what is shown.
    with page.expect_response(re.compile("/api/density")):
        page.evaluate("map.setView([42.5, 290], 6, { animate: false })")
    assert page.locator("#status").get_attribute("class") != "trouble"
    # Opening a tile moves the map near enough to see tiles one by one, of which the panel is told as well.
    page.locator(".chip-button").first.click()
    eventually(lambda: page.evaluate("state.density.kind") == "tiles")
    assert page.locator("#detail").is_visible()
    assert threshold.is_hidden()
    page.keyboard.press("Escape")
    assert threshold.is_visible()
    page.close()
    assert not complaints


def test_a_base_map_needs_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (
        "https://maps.example.org/tiles.png",
        "ftp://x/{z}/{x}/{y}",
        "https://a b/{z}/{x}/{y}",
        "//x/{z}/{x}/{y}",
    ):
        monkeypatch.setenv("GRAFT_BASEMAP_URL", url)
        with pytest.raises(SettingsError, match=r"(?i)basemap_url"):
            load_settings()
    monkeypatch.setenv("GRAFT_BASEMAP_URL", "https://maps.example.org/v1/{z}/{x}/{y}@2x.png?key=k")
    assert load_settings().basemap_url is not None


def test_without_an_index_the_command_says_what_to_materialise(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "graft_pipeline.cli", "serve", "--port", "0"]
    variables = os.environ | {"GRAFT_ROOT": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert "naip/search_index" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_told(made: SimpleNamespace) -> None:
    port = int(made.real.rpartition(":")[2])
    with pytest.raises(ServiceError, match="--port"):
        run(app_of(made.root), "127.0.0.1", port, on_ready=pytest.fail)
