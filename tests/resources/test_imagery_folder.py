"""A folder of GeoTIFFs as imagery: its index, and chips that are the files' own pixels."""

import errno
import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import rasterio.transform
import shapely
from rasterio.warp import Resampling, reproject

from graft_pipeline.chips import quality
from graft_pipeline.errors import InputError, ItemError, SettingsError
from graft_pipeline.geometry import Grid, Projection, projection
from graft_pipeline.imagery import Sensor
from graft_pipeline.scenes import scene_rows
from graft_pipeline.settings import Settings
from resources.imagery import open_imagery
from resources.imagery_folder import ImageryFolder, scan

SENSOR = Sensor(name="air", collection="air", bands=("R", "G", "B"), gsd_m=2.0, chip_px=64, crop_px=32)
X0, Y0 = 482_003.0, 4_660_007.0
BOX = (-70.0, 41.0, -67.0, 43.0)


def write(path: Path, *, tags: dict[str, str] | None = None, names: Any = None, **changes: Any) -> Path:
    profile = {
        "driver": "GTiff", "width": 300, "height": 200, "count": 4, "dtype": "uint8", "crs": "EPSG:26919",
        "transform": rasterio.Affine(2, 0, X0, 0, -2, Y0), "nodata": 0, **changes,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (profile["count"], profile["height"], profile["width"])
    pixels = np.random.default_rng(len(path.name)).integers(1, 250, shape).astype(profile["dtype"])
    pixels[:, :7] = 0
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels)
        file.update_tags(**(tags or {}))
        if names:
            file.descriptions = names
    return path


def listed(root: Path, sensor: Sensor = SENSOR, **window: Any) -> dict[str, dict[str, Any]]:
    """Rows that a fresh client's listing becomes, by scene."""
    table = scene_rows(ImageryFolder(root).list_scenes(sensor, BOX, **window), sensor)
    return {row["scene_id"]: row for row in table.to_pylist()}


@pytest.mark.parametrize(
    ("epsg", "moved"),
    [(26919, (100, -60)), (32619, (100, -60)), (32619, (101.3, -60)), (32619, (-40, 30)), (32618, None)],
)
def test_chips_are_rasterios_own_reprojection(
    tmp_path: Path, epsg: int, moved: tuple[float, float] | None
) -> None:
    path = write(tmp_path / "air" / "town_20190603.tif")
    folder = ImageryFolder(tmp_path)
    if moved is None:
        lon, lat = projection(32619).inverse(X0 + 200, Y0 - 150)
        x, y = Projection(epsg).forward(lon, lat)
    else:
        x, y = X0 + moved[0], Y0 + moved[1]
    grid = Grid(epsg, float(x), float(y), 2.0, 64, 64)
    got = folder.get_chip(SENSOR, "air/town_20190603", grid)
    expected = np.zeros((3, 64, 64), np.uint8)
    with rasterio.open(path) as file:
        reproject(
            rasterio.band(file, [1, 2, 3]),
            expected,
            dst_transform=grid.affine,
            dst_crs=grid.crs,
            resampling=Resampling.nearest,
        )
        if (epsg, moved) == (26919, (100, -60)):
            native = file.read([1, 2, 3], window=((30, 94), (50, 114)))
            np.testing.assert_array_equal(np.moveaxis(got, -1, 0), native)
    np.testing.assert_array_equal(np.moveaxis(got, -1, 0), expected)
    assert got.any()
    assert folder.requests == 1


def test_when_a_file_was_acquired_is_said_in_many_ways(tmp_path: Path) -> None:
    air = tmp_path / "air"
    tag = {"TIFFTAG_DATETIME": "2011:02:03 04:05:06", "CLOUD": "12.5"}
    write(air / "named_20190603.tif", tags=tag)
    write(air / "deep" / "S2A_20200102T030405_x.tif")
    write(air / "year_2018.tif")
    write(air / "tagged.tif", tags=tag)
    write(air / "beside_20190603.tif")
    item = {"properties": {"datetime": "2017-05-06T07:08:09Z", "eo:cloud_cover": 3}}
    (air / "beside_20190603.json").write_text(json.dumps(item))
    sensor = Sensor(
        name="air", collection="air", bands=("R", "G", "B"), gsd_m=2.0, cloud_property="CLOUD", max_cloud_pct=99.0,
        cloud_rule="chip", mask_band="N", listed_from="2000-01-01",
    )  # fmt: skip
    found = listed(tmp_path, sensor)
    times = {name.removeprefix("air/"): row["acquired_at_utc"] for name, row in found.items()}
    assert times == {
        "named_20190603": datetime(2019, 6, 3, tzinfo=UTC),
        "deep/S2A_20200102T030405_x": datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC),
        "year_2018": datetime(2018, 7, 1, tzinfo=UTC),
        "tagged": datetime(2011, 2, 3, 4, 5, 6, tzinfo=UTC),
        "beside_20190603": datetime(2017, 5, 6, 7, 8, 9, tzinfo=UTC),
    }
    assert (found["air/tagged"]["cloud_pct"], found["air/beside_20190603"]["cloud_pct"]) == (12.5, 3.0)
    start, end = datetime(2017, 5, 6, 7, 8, 9, tzinfo=UTC), datetime(2019, 6, 3, tzinfo=UTC)
    assert set(listed(tmp_path, sensor, start=start, end=end)) == {"air/year_2018", "air/beside_20190603"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_index_of_ones_own_says_it_first(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "air" / "a_20190603.tif")
    write(tmp_path / "air" / "b_20190603.tif")
    if kind == "csv":
        (tmp_path / "air" / "index.csv").write_text(
            "file,acquired_at_utc,cloud_pct\na_20190603.tif,2016-01-02T03:04:05Z,0.5\n"
        )
    else:
        geopandas.GeoDataFrame(
            {"file": ["a_20190603.tif"], "acquired_at_utc": ["2016-01-02T03:04:05Z"], "cloud_pct": [0.5]},
            geometry=[shapely.box(-69.2, 42.08, -69.19, 42.1)],
            crs="EPSG:4326",
        ).to_parquet(tmp_path / "air" / "index.parquet")
    found = listed(tmp_path)
    assert found["air/a_20190603"]["acquired_at_utc"] == datetime(2016, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert found["air/b_20190603"]["acquired_at_utc"] == datetime(2019, 6, 3, tzinfo=UTC)
    area = shapely.from_wkb(found["air/a_20190603"]["footprint_wkb"]).area
    assert area == pytest.approx(0.01 * 0.02) if kind == "parquet" else area < 1e-4


def test_scenes_are_those_that_touch_the_box_and_are_clear(tmp_path: Path) -> None:
    write(tmp_path / "air" / "here_2019.tif", tags={"CLOUD": "0.5"})
    write(tmp_path / "air" / "cloudy_2019.tif", tags={"CLOUD": "1"})
    write(tmp_path / "air" / "silent_2019.tif")
    far = rasterio.Affine(2, 0, X0, 0, -2, Y0 + 500_000)
    write(tmp_path / "air" / "far_2019.tif", tags={"CLOUD": "0"}, transform=far)
    sensor = Sensor(
        name="air",
        collection="air",
        bands=("R", "G", "B"),
        gsd_m=2.0,
        cloud_property="CLOUD",
        max_cloud_pct=1.0,
    )
    assert set(listed(tmp_path, sensor)) == {"air/here_2019"}
    row = listed(tmp_path)["air/here_2019"]
    assert (row["crs"], row["x_min_m"], row["y_max_m"]) == ("EPSG:26919", X0, Y0)
    assert (row["x_max_m"], row["y_min_m"]) == (X0 + 600, Y0 - 400)


def test_the_index_is_kept_and_only_news_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    air = tmp_path / "air"
    first = write(air / "a_2018.tif")
    write(air / "b_2019.tif")
    (air / "text_2019.tif").write_text("no raster")
    write(air / "flat_2019.tif", crs=None)
    write(air / "whenever.tif")
    write(air / "b_2019.tiff")
    assert set(listed(tmp_path)) == {"air/a_2018", "air/b_2019"}
    index = air / "imagery_files.parquet"
    rows = {row["file"]: row for row in pq.read_table(index).to_pylist()}
    assert {name: row["status"] for name, row in rows.items()} == {
        "a_2018.tif": "ok", "b_2019.tif": "ok", "b_2019.tiff": "rejected", "text_2019.tif": "rejected",
        "flat_2019.tif": "rejected", "whenever.tif": "rejected",
    }  # fmt: skip
    assert "raster" in rows["text_2019.tif"]["reason"]
    assert "EPSG" in rows["flat_2019.tif"]["reason"]
    assert "_YYYYMMDD" in rows["whenever.tif"]["reason"]
    content = index.read_bytes()
    # A file whose size and time stay is not opened again: that this one is broken by now is not seen.
    stat = first.stat()
    first.write_bytes(bytes(stat.st_size))
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert set(listed(tmp_path)) == {"air/a_2018", "air/b_2019"}
    assert index.read_bytes() == content
    os.utime(first, ns=(0, 0))
    (air / "b_2019.tif").unlink()
    assert set(listed(tmp_path)) == {"air/b_2019"}


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path: Path) -> None:
    write(tmp_path / "air" / "a_2018.tif")
    # A folder in the index's place: no one, root included, can put a file there.
    (tmp_path / "air" / "imagery_files.parquet").mkdir()
    (tmp_path / "air" / "imagery_files.parquet" / "x").touch()
    assert set(listed(tmp_path)) == {"air/a_2018"}


def test_a_full_disk_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path / "air" / "a_2018.tif")
    monkeypatch.setattr(os, "fsync", full)
    assert set(listed(tmp_path)) == {"air/a_2018"}
    assert not list((tmp_path / "air").glob("*.parquet"))


def test_bands_are_found_by_description_number_or_order(tmp_path: Path) -> None:
    path = write(tmp_path / "air" / "a_2019.tif", names=("nir", "red", "green", "blue"))
    grid = Grid(26919, X0 + 40, Y0 - 40, 2.0, 16, 16)
    with rasterio.open(path) as file:
        native = np.moveaxis(file.read(window=((20, 36), (20, 36))), 0, -1)
    for bands, order in ((("red", "green", "blue"), [1, 2, 3]), (("4", "1", "2"), [3, 0, 1])):
        sensor = Sensor(name="air", collection="air", bands=bands, gsd_m=2.0)
        chip = ImageryFolder(tmp_path).get_chip(sensor, "air/a_2019", grid)
        np.testing.assert_array_equal(chip, native[..., order])
    assert not listed(tmp_path), "R is none of its bands: it can serve no chip"


def missing_px(root: Path, path: Path, change: Any, sensor: Sensor = SENSOR, **profile: Any) -> int:
    """Pixels without data of a chip of 16 x 16, from a file whose array was changed; nothing else may change."""
    write(path, nodata=None, **profile)
    with rasterio.open(path, "r+") as file:
        pixels = file.read()
        change(pixels)
        file.write(pixels)
    chip = ImageryFolder(root).get_chip(sensor, "air/a_2019", Grid(26919, X0 + 40, Y0 - 40, 2.0, 16, 16))
    found = quality(chip, sensor)
    native = np.moveaxis(pixels[:3, 20:36, 20:36], 0, -1)
    has_data = (chip[..., :3] != 0).any(axis=-1)
    np.testing.assert_array_equal(chip[has_data][..., :3], native[has_data])
    return found.nodata_px


def test_transparent_pixels_are_missing_whatever_their_colour(tmp_path: Path) -> None:
    def white_and_transparent(pixels: Any) -> None:
        pixels[:3, 22:24, 25] = 255
        pixels[3] = 255
        pixels[3, 22:24, 25] = 0
        pixels[3, 30, 20:36] = 1

    path = tmp_path / "air" / "a_2019.tif"
    assert missing_px(tmp_path, path, white_and_transparent, alpha="yes") == 2


def test_near_infrared_that_is_taken_for_alpha_hides_nothing(tmp_path: Path) -> None:
    def dark(pixels: Any) -> None:
        pixels[3, 22:24, 25] = 0

    path, said = tmp_path / "air" / "a_2019.tif", ("R", "G", "B", "N")
    assert missing_px(tmp_path, path, dark, alpha="yes", names=said) == 0
    # Without a name it is none only where it is asked for.
    asked = Sensor(name="air", collection="air", bands=("R", "G", "B"), gsd_m=2.0, raw_bands=("N",))
    assert missing_px(tmp_path, path, dark, asked, alpha="yes") == 0
    assert missing_px(tmp_path, path, dark, alpha="yes") == 2


def test_a_files_own_nodata_value_is_missing(tmp_path: Path) -> None:
    def white(pixels: Any) -> None:
        pixels[:, 22:24, 25] = 255
        pixels[0, 30] = 255

    path = tmp_path / "air" / "a_2019.tif"
    assert missing_px(tmp_path, path, white) == 0
    with rasterio.open(path, "r+") as file:
        file.nodata = 255
    grid = Grid(26919, X0 + 40, Y0 - 40, 2.0, 16, 16)
    assert quality(ImageryFolder(tmp_path).get_chip(SENSOR, "air/a_2019", grid), SENSOR).nodata_px == 2


def test_values_that_are_not_finite_are_missing(tmp_path: Path) -> None:
    deep = Sensor(name="air", collection="air", bands=("R", "G", "B"), gsd_m=2.0, display_range=(0.0, 250.0))
    path = write(tmp_path / "air" / "a_2019.tif", nodata=None, dtype="float32")
    with rasterio.open(path, "r+") as file:
        pixels = file.read()
        pixels[:3, 22, 25], pixels[1, 23, 25] = np.nan, np.inf
        file.write(pixels)
    grid = Grid(26919, X0 + 40, Y0 - 40, 2.0, 16, 16)
    assert quality(ImageryFolder(tmp_path).get_chip(deep, "air/a_2019", grid), deep).nodata_px == 2


def test_failures_are_those_of_every_source(tmp_path: Path) -> None:
    path = write(tmp_path / "air" / "a_2019.tif", compress="deflate")
    write(tmp_path / "air" / "deep_2019.tif", dtype="uint16")
    grid = Grid(26919, X0 + 40, Y0 - 40, 2.0, 16, 16)

    def failure(scene_id: str, sensor: Sensor = SENSOR) -> tuple[str, bool]:
        with pytest.raises(ItemError, match=scene_id) as caught:
            folder.get_chip(sensor, scene_id, grid)
        return caught.value.reason, caught.value.is_permanent

    folder = ImageryFolder(tmp_path)
    assert failure("air/b_2019") == ("scene_missing", True)
    assert failure("air/deep_2019") == ("bad_request", True)
    other = Sensor(name="air", collection="air", bands=("R", "G", "B8"), gsd_m=2.0)
    assert failure("air/a_2019", other) == ("bad_request", True)
    path.write_bytes(path.read_bytes()[:4000])
    assert failure("air/a_2019") == ("truncated", False)
    path.unlink()
    assert failure("air/a_2019") == ("scene_missing", True)


def test_what_is_not_usable_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="GRAFT_IMAGERY_FOLDER"):
        open_imagery(Settings(imagery="folder"))
    with pytest.raises(SettingsError, match="GRAFT_IMAGERY_FOLDER"):
        open_imagery(Settings(imagery="folder", imagery_folder=tmp_path / "nowhere"))
    with pytest.raises(InputError, match="air"):
        ImageryFolder(tmp_path).list_scenes(SENSOR, BOX)
    outside = Sensor(name="air", collection="../..", bands=("R", "G", "B"), gsd_m=2.0)
    with pytest.raises(InputError, match="no folder"):
        ImageryFolder(tmp_path).list_scenes(outside, BOX)
    write(tmp_path / "air" / "a_2019.tif")
    (tmp_path / "air" / "index.csv").write_text("file,acquired_at_utc\na_2019.tif,yesterday\n")
    with pytest.raises(InputError, match=r"index\.csv.*yesterday"):
        ImageryFolder(tmp_path).list_scenes(SENSOR, BOX)
    (tmp_path / "air" / "index.csv").unlink()
    (tmp_path / "air" / "a_2019.json").write_text("{}")
    with pytest.raises(InputError, match=r"a_2019\.json"):
        ImageryFolder(tmp_path).list_scenes(SENSOR, BOX)


def test_links_lead_to_other_disks_or_nowhere(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "town_2019.tif")
    root = tmp_path / "root"
    root.mkdir()
    (root / "air").symlink_to(tmp_path / "disk")
    (root / "air" / "gone_2019.tif").symlink_to(tmp_path / "unmounted" / "gone_2019.tif")
    assert set(listed(root)) == {"air/town_2019"}
    table = scan(root / "air", SENSOR).to_pydict()
    assert dict(zip(table["file"], table["status"], strict=True)) == {
        "town_2019.tif": "ok", "gone_2019.tif": "rejected",
    }  # fmt: skip
    with pytest.raises(InputError, match="no folder"):
        listed(root, replace(SENSOR, collection="../disk"))


def test_a_pixel_is_square_but_for_rounding(tmp_path: Path) -> None:
    west, north = 482_001.6, 4_660_006.8
    fitted = rasterio.transform.from_bounds(west, north - 0.6 * 200, west + 0.6 * 301, north, 301, 200)
    assert fitted.a != -fitted.e
    write(tmp_path / "air" / "fitted_2019.tif", transform=fitted, width=301)
    write(tmp_path / "air" / "oblong_2019.tif", transform=rasterio.Affine(2, 0, X0, 0, -2.001, Y0))
    assert set(listed(tmp_path)) == {"air/fitted_2019"}


def test_texts_that_are_no_utf8_stop_no_listing(tmp_path: Path) -> None:
    """Older software writes names of bands and projections in Latin-1."""
    names = ("rouge", "vert", "bleu", "prXche")
    bands = write(tmp_path / "air" / "bands_2019.tif", names=names)
    bands.write_bytes(bands.read_bytes().replace(b"prXche", b"pr\xeache"))
    own = "+proj=aea +lat_1=29.5 +lat_2=45.5 +lat_0=23 +lon_0=-96 +datum=NAD83"
    crs = write(tmp_path / "air" / "crs_2019.tif", crs=own)
    crs.write_bytes(crs.read_bytes().replace(b"unknown", b"pr\xe9cise"))
    (row,) = listed(tmp_path).values()
    assert "utf-8" in scan(tmp_path / "air", SENSOR).to_pydict()["reason"][1]
    grid = Grid(26919, row["x_min_m"] + 100, row["y_max_m"] - 60, 2.0, 64, 64)
    assert ImageryFolder(tmp_path).get_chip(SENSOR, "air/bands_2019", grid).all()
