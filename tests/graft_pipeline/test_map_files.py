"""Maps as files, read back as their users do: geopandas, GDAL, a browser that has no network."""

import io
import json
import re
import shutil
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

import geopandas
import numpy as np
import pyarrow as pa
import pytest
import rasterio
from rasterio.io import MemoryFile
from upath import UPath

from graft_pipeline import map_files
from graft_pipeline.chips import encode
from graft_pipeline.concept_maps import Background, Cells, ConceptMaps, Hexagons, Squares, map_concepts
from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid, transformer
from graft_pipeline.map_files import TooManyCellsError, write_maps
from graft_pipeline.schemas import CHIPS, SEARCH_RESULTS
from graft_pipeline.shards import ShardWriter
from graft_pipeline.sheets import ReadRows

#: In words, and the mean of their scores.
CONCEPTS = {"farmland": 0.2, "</script><b>a &amp; b</b>": 0.25}
TILES = 300


def made(cells: Cells, count: int = TILES) -> ConceptMaps:
    """Maps of tiles around Boston whose scores are random."""
    random = np.random.default_rng(0)
    lon, lat = -71 + 0.3 * random.random(count), 42 + 0.3 * random.random(count)
    tiles = pa.table(
        {
            "tile_id": [f"naip-{number:04d}" for number in range(count)],
            "region": ["N42W071"] * count,
            "center_lon_deg": lon,
            "center_lat_deg": lat,
            "acquired_at_utc": [datetime(2021, 7, 1, tzinfo=UTC)] * count,
            "scene_id": ["scene"] * count,
            "score": np.zeros(count, np.float32),
        }
    ).cast(SEARCH_RESULTS.schema)
    scores = {name: random.normal(mean, 0.1, count).astype(np.float32) for name, mean in CONCEPTS.items()}
    backgrounds = {name: Background(0.2, 0.1, 1000) for name in CONCEPTS}
    return map_concepts(tiles, scores, backgrounds, cells)


@pytest.fixture(scope="module")
def read_chips(tmp_path_factory: pytest.TempPathFactory) -> ReadRows:
    """Chips of all tiles but the first hundred, each with a red middle."""
    folder = UPath(tmp_path_factory.mktemp("chips"))
    image = np.full((64, 64, 3), 90, np.uint8)
    image[16:48, 16:48] = (200, 30, 30)
    rows = []
    with ShardWriter(folder, "chips-00000.tar") as shard:
        for number in range(100, TILES):
            place = shard.add(f"{number}.tif", encode(image, Grid(32619, 0.0, 0.0, 1.0, 64, 64)))
            row = {name: None for name in CHIPS.schema.names} | {
                "tile_id": f"naip-{number:04d}",
                "status": "ok",
                "shard": "chips-00000.tar",
                "offset": place.offset,
                "size_bytes": place.size_bytes,
            }
            rows.append(row)
    table = pa.Table.from_pylist(
        rows, schema=pa.schema([field.with_nullable(True) for field in CHIPS.schema])
    )
    return lambda region: (table, folder)


def test_geopandas_reads_the_cells_and_their_numbers(tmp_path: Path) -> None:
    maps = made(Hexagons(7))
    file = tmp_path / "maps.parquet"
    file.write_bytes(map_files.geoparquet(maps))
    frame = geopandas.read_parquet(file)
    assert frame.crs == "OGC:CRS84"
    assert frame.geometry.is_valid.all()
    assert len(frame) == len(CONCEPTS) * len(maps.keys)
    of_one = frame[frame["concept"] == "farmland"]
    assert of_one["tiles"].sum() == TILES
    assert of_one["hits"].sum() == maps.hits[0].sum()
    places = geopandas.points_from_xy(maps.rows["center_lon_deg"], maps.rows["center_lat_deg"], crs=frame.crs)
    held = of_one.sjoin(geopandas.GeoDataFrame(geometry=places)).groupby(level=0).size()
    # Edges of hexagons are great circles; in a polygon of degrees they are straight.
    assert np.abs(held - of_one.loc[held.index, "tiles"]).sum() <= 2


@pytest.mark.parametrize("cells", [Squares(3.0), Hexagons(7), Hexagons(9)], ids=["squares", "7", "9"])
def test_gdal_finds_a_cloud_optimised_tiff_whose_pixels_are_the_cells(cells: Cells) -> None:
    maps = made(cells)
    with MemoryFile(map_files.geotiff(maps)) as memory, memory.open() as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.profile["tiled"]
        assert file.descriptions == (*CONCEPTS, "tiles")
        assert max(file.shape) <= 512 or file.overviews(1)
        bands = file.read()
        lon, lat = maps.cells.centers(maps.keys)
        x, y = transformer("EPSG:4326", file.crs.to_string()).transform(lon, lat)
        rows, columns = rasterio.transform.rowcol(file.transform, x, y)
    at_cells = bands[:, rows, columns]
    assert at_cells[:-1] == pytest.approx(maps.share, abs=1e-6)
    assert at_cells[-1] == pytest.approx(maps.tiles)
    assert np.isnan(bands[-1]).sum() + (bands[-1] > 0).sum() == bands[-1].size
    if isinstance(cells, Squares):
        assert np.nansum(bands[-1]) == TILES


def test_a_page_asks_nobody_for_anything_and_runs_no_words(read_chips: ReadRows) -> None:
    maps = made(Squares(5.0))
    page = map_files.page(maps, "Farms <i>", read_chips).decode()
    vendored = resources.files("graft_pipeline") / "web" / "static" / "vendor" / "leaflet"
    for name in ("leaflet.js", "leaflet.css"):
        text = (vendored / name).read_text(encoding="utf-8")
        assert text in page
        page = page.replace(text, "")
    assert not re.search(r"https?:|//[a-z]|\b(src|href)=\"(?!data:)|url\(|@import|fetch\(", page)
    assert "<b>a" not in page
    assert "<i>" not in page
    assert page.count("</script>") == 3
    content = json.loads(re.findall(r'id="content">(.*?)</script>', page)[0])
    assert [concept["name"] for concept in content["concepts"]] == list(CONCEPTS)
    hits = np.array([concept["hits"] for concept in content["concepts"]])
    assert (hits == maps.counts).all()
    assert sum(cell["tiles"] for cell in content["cells"]) == TILES


def test_pictures_are_the_middles_of_the_best_tiles_chips(read_chips: ReadRows) -> None:
    from base64 import b64decode

    from PIL import Image

    maps = made(Squares(5.0))
    page = map_files.page(maps, "Farms", read_chips).decode()
    content = json.loads(re.findall(r'id="content">(.*?)</script>', page)[0])
    best = [row for row, _ in content["concepts"][0]["best"]]
    assert best == np.argsort(-maps.scores[0], kind="stable")[: map_files.BEST_TILES].tolist()
    with_chip = [content["tiles"][str(row)]["picture"] for row in best if row >= 100]
    assert all(content["tiles"][str(row)]["picture"] is None for row in best if row < 100)
    assert 0 < len(with_chip) < len(best)
    picture = Image.open(io.BytesIO(b64decode(with_chip[0].partition(",")[2])))
    assert picture.size == (map_files.PICTURE_PX, map_files.PICTURE_PX)
    assert np.abs(np.asarray(picture).astype(int) - (200, 30, 30)).max() < 12


def test_a_name_says_what_is_written(read_chips: ReadRows, tmp_path: Path) -> None:
    maps = made(Squares(5.0))
    assert list(write_maps(tmp_path / "one.tif", maps, "Farms", read_chips).files) == [tmp_path / "one.tif"]
    first = write_maps(tmp_path / "all", maps, "Farms", read_chips)
    assert [file.suffix for file in first.files] == [".parquet", ".tif", ".html"]
    assert all(first.files.values())
    assert not any(write_maps(tmp_path / "all", maps, "Farms", read_chips).files.values())
    with pytest.raises(InputError, match=r"\.html"):
        write_maps(tmp_path / "map.png", maps, "Farms", read_chips)
    with pytest.raises(InputError, match="--area"):
        write_maps(tmp_path / "none.tif", made(Squares(5.0), 0), "Farms", read_chips)


def test_a_form_that_cannot_hold_the_cells_is_left_out_and_its_old_file_removed(
    read_chips: ReadRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = made(Squares(5.0))
    write_maps(tmp_path / "maps", maps, "Farms", read_chips)
    monkeypatch.setattr(map_files, "MAX_PAGE_CELLS", len(maps.keys) - 1)
    monkeypatch.setattr(map_files, "MAX_VALUES", 10)
    with pytest.raises(TooManyCellsError, match="larger cells"):
        write_maps(tmp_path / "maps.html", maps, "Farms", read_chips)
    written = write_maps(tmp_path / "maps", maps, "Farms", read_chips)
    assert list(written.left_out) == [".tif", ".html"]
    assert [file.name for file in (tmp_path / "maps").iterdir()] == ["concept_maps.parquet"]


@pytest.mark.browser
def test_a_browser_without_network_switches_concepts_and_moves_the_threshold(
    read_chips: ReadRows, tmp_path: Path
) -> None:
    from playwright.sync_api import sync_playwright

    file = tmp_path / "map.html"
    maps = made(Hexagons(7))
    file.write_bytes(map_files.page(maps, "Farms", read_chips))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        context = browser.new_context(offline=True)
        page = context.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: problems.append(request.url) if "file:" not in request.url[:5] else None,
        )
        page.goto(file.as_uri())
        before = page.inner_text("#summary")
        page.click(f"#concepts button >> nth={len(CONCEPTS) - 1}")
        other = page.inner_text("#summary")
        page.fill("#threshold", "0")
        lower = page.inner_text("#summary")
        page.click("#best button >> nth=0")
        page.wait_for_selector(".leaflet-popup-content")
        browser.close()
    numbers = [int(text.split()[0]) for text in (before, other, lower)]
    assert numbers == [maps.hits[0].sum(), maps.hits[1].sum(), maps.counts[1, :, 0].sum()]
    assert len(set(numbers)) == 3
    assert [problem for problem in problems if not problem.startswith("data:")] == []
