"""Everything about one tile or photo is found, told from other items, drawn, and written as a page."""

from collections.abc import Callable
from datetime import UTC, date, datetime
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console
from upath import UPath

from graft_pipeline import (
    chips,
    ground_images,
    manifests,
    pairing,
    purging,
    sampling,
    schemas,
    trace,
    training_sets,
)
from graft_pipeline.errors import DataError, InputError, ServiceError
from graft_pipeline.grid import grid_sensor, grid_tiles
from graft_pipeline.ground_images import FetchedImage
from graft_pipeline.imagery import NAIP
from graft_pipeline.manifests import partition_file, write_bytes_atomic
from graft_pipeline.regions import Region
from graft_pipeline.trace import Check, Step
from resources.storage import Storage

REGION = Region.parse("N42.25W071.75", 0.25)
DAY = date(2024, 3, 1)


def _jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def storage(root: UPath, make_photos: Callable[..., pa.Table]) -> Storage:
    """A region with three photos, two of them on one tile; made by the pipeline's own functions."""
    kept, place = Storage(root), {"sensor": NAIP.name, "region": REGION.key}
    photos = make_photos(
        [
            {"photo_id": "100", "lon_deg": -71.6, "lat_deg": 42.4, "license_id": "4"},
            {"photo_id": "200", "lon_deg": -71.6004, "lat_deg": 42.4003},
            {"photo_id": "300", "lon_deg": -71.65, "lat_deg": 42.3},
        ]
    )
    kept.write(schemas.FLICKR_PHOTOS, photos, region=REGION.key)
    kept.write(
        schemas.SEARCH_LOCATIONS,
        pa.table(
            {
                "location_id": [0, 1],
                "lon_deg": [-71.6, -71.72],
                "lat_deg": [42.4, 42.48],
                "radius_km": [2.0, 2.0],
            }
        ),
        region=REGION.key,
    )

    def fetch(url: str) -> FetchedImage:
        photo_id = int(url.rpartition("/")[2].partition("_")[0])
        return FetchedImage(_jpeg((photo_id % 251, 90, 30)), 64, 48, f"{photo_id * 0x0123456789ABCD:016x}")

    folder = kept.folder(schemas.GROUND_IMAGES, region=REGION.key)
    images, _ = ground_images.update(photos, folder, fetch, concurrency=1, max_attempts=3, today=DAY)
    assert set(images["status"].to_pylist()) == {"ok"}
    tiles = sampling.sample_tiles(photos.slice(0, 2), REGION, NAIP, None)
    kept.write(schemas.TILES, tiles, **place)
    scene = {
        "scene_id": "USDA/NAIP/DOQQ/one",
        "acquired_at_utc": datetime(2021, 7, 1, tzinfo=UTC),
        "crs": "EPSG:26919",
        **dict(zip(("x_min_m", "y_min_m", "x_max_m", "y_max_m"), (0.0, 0.0, 1e6, 1e7), strict=True)),
        "footprint_wkb": REGION.polygon.buffer(0.1).wkb,
    }
    scenes = pa.Table.from_pylist(
        [dict.fromkeys(schemas.SCENES.schema.names) | scene], schema=schemas.SCENES.schema
    )
    kept.write(schemas.SCENES, scenes, **place)
    made, _ = chips.update(
        tiles,
        scenes,
        photos,
        NAIP,
        kept.folder(schemas.CHIPS, **place),
        lambda *_: np.full((448, 448, 3), 120, np.uint8),
        concurrency=1,
        max_attempts=3,
        today=DAY,
    )
    assert made["status"].to_pylist() == ["ok"]
    kept.write(schemas.PAIRS, pairing.make_pairs(tiles, made, photos.slice(0, 2), REGION, NAIP, 25), **place)
    return kept


def test_a_tile_is_told_with_its_photo_scene_chip_and_pairs(storage: Storage) -> None:
    found = trace.trace(storage.root, "naip-100")
    assert (found.kind, found.regions, found.sensors, found.notes) == ("tile", (REGION.key,), ("naip",), ())
    named = {(record.dataset, record.about) for record in found.records}
    assert named == {
        ("tiles", "tile naip-100"),
        ("search_locations", "photo 100"),
        ("flickr_photos", "photo 100"),
        ("ground_images", "photo 100"),
        ("chips", "tile naip-100"),
        ("scenes", "tile naip-100"),
        ("pairs", "pair naip-100 + 100"),
        ("pairs", "pair naip-100 + 200"),
    }
    (location,) = found.of(schemas.SEARCH_LOCATIONS)
    assert location.values["location_id"] == 0
    for record in found.records:
        assert (storage.root / record.file).exists()


def test_a_photo_is_told_with_the_tiles_that_it_is_on(storage: Storage) -> None:
    found = trace.trace(storage.root, "200")
    assert [record.values["tile_id"] for record in found.of(schemas.TILES)] == ["naip-100"]
    assert [record.values["photo_id"] for record in found.of(schemas.PAIRS)] == ["200"]
    alone = trace.trace(storage.root, "300")
    assert alone.notes == (f"on no tile of naip in {REGION.key}",)
    assert not alone.of(schemas.TILES)


def test_what_nobody_knows_is_said(storage: Storage) -> None:
    for item in ("naip-300", "12345", "x' OR 1=1 --"):
        with pytest.raises(InputError, match=r"No tile or photo .* give a photo's id"):
            trace.trace(storage.root, item)


def test_a_purged_photo_says_when_and_why(storage: Storage) -> None:
    purging.purge(storage, ["100"], reason="its owner asked", now=datetime(2024, 5, 1, tzinfo=UTC))
    for item in ("100", "naip-100"):
        found = trace.trace(storage.root, item)
        assert found.notes[0] == "photo 100 was purged on 2024-05-01: its owner asked"
        assert not found.records
        assert not trace.pictures(storage.root, found, {})


def test_pictures_show_the_tile_or_else_the_photo(storage: Storage) -> None:
    drawn = trace.pictures(storage.root, trace.trace(storage.root, "naip-100"), {"naip": 224})
    with Image.open(BytesIO(drawn["naip-100"])) as picture:
        assert picture.width > 448 + 2 * 132
        colour = np.array(picture.convert("RGB").getpixel((500, 30)))
    assert np.abs(colour - (100, 90, 30)).max() < 20, "the centre photo comes first"
    assert list(trace.pictures(storage.root, trace.trace(storage.root, "300"), {})) == ["300"]


STEP = Step(
    asset="naip/tiles",
    partition=REGION.key,
    at=datetime(2024, 5, 1, tzinfo=UTC),
    run_id="0123456789",
    code_version="c0de",
    data_version="da7a",
    seconds=1.5,
    checks=(Check("schema", "passed", "fine"), Check("not_empty", "warns", "[nothing]")),
)


def test_pages_hold_rows_steps_and_pictures(storage: Storage, tmp_path: Path) -> None:
    found = trace.trace(storage.root, "naip-100")
    drawn = trace.pictures(storage.root, found, {})
    for name in ("page.html", "page.md"):
        trace.write_page(tmp_path / name, found, [STEP], drawn)
        text = (tmp_path / name).read_text()
        for expected in (
            "USDA/NAIP/DOQQ/one",
            "CC BY 2.0",
            "naip/tiles",
            "c0de",
            "not_empty warns",
            "chips-00000.tar",
        ):
            assert expected in text, (name, expected)
    assert "data:image/jpeg" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "page-naip-100.jpg").read_bytes() == drawn["naip-100"]
    console = Console(width=200, record=True, file=StringIO())
    console.print(trace.tree(found, [STEP]))
    assert "warns not_empty: [nothing]" in console.export_text()
    with pytest.raises(InputError, match=r"\.html or \.md"):
        trace.write_page(tmp_path / "page.pdf", found, [STEP], drawn)


def test_markup_in_a_title_is_shown_not_obeyed(storage: Storage, tmp_path: Path) -> None:
    place = {"region": REGION.key}
    photos = storage.read(schemas.FLICKR_PHOTOS, **place)
    title = pa.array(["<script>alert(1)</script> [red]"] * photos.num_rows)
    field = schemas.FLICKR_PHOTOS.schema.get_field_index("title")
    storage.write(schemas.FLICKR_PHOTOS, photos.set_column(field, "title", title), **place)
    found = trace.trace(storage.root, "200")
    assert "<script>" not in trace.to_html(found, [], {})
    console = Console(width=400, record=True, file=StringIO())
    console.print(trace.tree(found, []))
    assert "[red]" in console.export_text()


def test_a_tile_of_the_grid_has_no_photo_and_says_so(storage: Storage) -> None:
    sensor = grid_sensor(NAIP)
    tiles = grid_tiles(REGION, REGION.polygon, sensor, 9000.0).slice(0, 1)
    storage.write(schemas.TILES, tiles, sensor=sensor.name, region=REGION.key)
    tile_id = tiles["tile_id"][0].as_py()
    found = trace.trace(storage.root, tile_id)
    assert found.sensors == ("naip_grid",)
    assert [record.dataset for record in found.records] == ["tiles"]
    assert found.notes == (f"{tile_id} lies on the regular grid: no photo is paired with it",)


def test_training_sets_that_hold_it_are_named(storage: Storage) -> None:
    vectors = [{"photo_id": name, "embedding": [0.6, 0.8], "model_id": "m"} for name in ("100", "200")]
    storage.write(
        schemas.GROUND_EMBEDDINGS,
        pa.Table.from_pylist(vectors, schema=schemas.GROUND_EMBEDDINGS.schema),
        region=REGION.key,
    )
    made = training_sets.build_training_set(storage.root, NAIP)
    for item, photos in (("naip-100", ["100", "200"]), ("200", ["200"])):
        found = trace.trace(storage.root, item).of(schemas.TRAINING_PAIRS)
        assert [record.values["photo_id"] for record in found] == photos
        assert {record.about for record in found} == {f"training set {made.fingerprint} of naip"}
    assert "2 numbers, length 1.000" in trace.to_html(trace.trace(storage.root, "100"), [], {})


def test_a_file_that_is_damaged_or_cannot_be_opened_is_named_and_only_the_first_to_be_deleted(
    root: UPath,
) -> None:
    file = partition_file(root, schemas.PAIRS, sensor=NAIP.name, region=REGION.key)
    write_bytes_atomic(file, b"PAR1 no it is not")
    with manifests.connect(root, ()) as database:
        with pytest.raises(DataError, match=r"(?s)pairs.parquet is damaged.*delete it"):
            trace.select(database, file, "photo_id", ["100"])
        with pytest.raises(DataError, match=r"(?s)pairs.*delete it"):
            manifests.connect(root, [schemas.PAIRS])
        # As what is there and not permitted, which root is never told.
        file.unlink()
        file.mkdir()
        for read in (
            lambda: trace.select(database, file, "photo_id", ["100"]),
            lambda: manifests.connect(root, [schemas.PAIRS]),
        ):
            with pytest.raises(ServiceError, match=r"(?s)pairs.*cannot be read") as caught:
                read()
            assert "delete" not in str(caught.value)
