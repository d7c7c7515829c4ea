from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from graft_pipeline import sampling, scenes
from graft_pipeline.errors import DataError
from graft_pipeline.geometry import Grid, projection, transformer
from graft_pipeline.imagery import NAIP, SENTINEL2
from graft_pipeline.manifests import conform
from graft_pipeline.regions import Region
from graft_pipeline.schemas import SCENES

TIME = datetime(2019, 6, 1, tzinfo=UTC)
GRID = Grid.snapped(32619, 300_000.0, 4_700_000.0, 1.0, 448)


def scene(scene_id: str = "S", **changes: Any) -> dict[str, Any]:
    """A scene of five kilometres around the chip, own CRS as the chip's."""
    row: dict[str, Any] = {
        "scene_id": scene_id,
        "acquired_at_utc": TIME,
        "cloud_pct": 0.0,
        "crs": "EPSG:32619",
        "x_min_m": 297_500.0,
        "y_min_m": 4_697_500.0,
        "x_max_m": 302_500.0,
        "y_max_m": 4_702_500.0,
    }
    row |= changes
    if "footprint_wkb" not in row:
        outline = shapely.segmentize(
            shapely.box(row["x_min_m"], row["y_min_m"], row["x_max_m"], row["y_max_m"]), 300
        )
        points = shapely.get_coordinates(outline).T
        lon, lat = transformer(row["crs"], "EPSG:4326").transform(*points)
        row["footprint_wkb"] = shapely.to_wkb(shapely.Polygon(np.column_stack([lon, lat])))
    return row


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCENES.schema)


def ids(
    *rows: dict[str, Any], time: datetime | None = TIME, sensor: Any = SENTINEL2, grid: Grid = GRID
) -> list[str]:
    found = scenes.candidates(grid, time, table(*rows), sensor)
    return list(found["scene_id"].to_pylist())


def at(days: float) -> datetime:
    return TIME + timedelta(days=days)


def test_newest_first_or_closest_first_ties_by_id() -> None:
    listed = [
        scene("b", acquired_at_utc=at(-1)),
        scene("c", acquired_at_utc=at(9)),
        scene("a", acquired_at_utc=at(1)),
    ]
    assert ids(*listed, sensor=NAIP) == ["c", "a", "b"]
    assert ids(*listed) == ["a", "b", "c"]
    assert ids(*listed, time=at(8)) == ["c", "a", "b"]
    assert ids(*listed, time=None) == ["c", "a", "b"], "without a time the newest"


@pytest.mark.parametrize(("cloud", "serves"), [(0.0, True), (0.99, True), (1.0, False), (None, False)])
def test_clouds_are_below_the_limit_where_there_is_one(cloud: float | None, serves: bool) -> None:
    assert bool(ids(scene(cloud_pct=cloud))) == serves
    assert ids(scene(cloud_pct=cloud), sensor=NAIP) == ["S"]


@pytest.mark.parametrize(
    ("changes", "serves"),
    [
        ({}, True),
        ({"x_min_m": 299_776.0}, True),  # the chip's own edge
        ({"x_min_m": 299_777.0}, False),  # a pixel less
        ({"y_min_m": 4_699_776.0}, True),
        ({"y_min_m": 4_699_777.0}, False),
        ({"x_max_m": 300_100.0}, False),  # intersects
        ({"y_max_m": 4_699_000.0}, False),
    ],
)
def test_a_scene_serves_what_its_rectangle_contains(changes: dict[str, float], serves: bool) -> None:
    wide = scene()["footprint_wkb"]
    assert bool(ids(scene(**changes, footprint_wkb=wide))) == serves


def test_a_scene_serves_what_its_footprint_contains() -> None:
    lon, lat = projection(32619).inverse(300_000.0, 4_700_000.0)
    half = shapely.box(float(lon), float(lat) - 0.1, float(lon) + 0.1, float(lat) + 0.1)
    whole = half.union(shapely.box(float(lon) - 0.1, float(lat) - 0.1, float(lon), float(lat) + 0.1))
    assert ids(scene("half", footprint_wkb=half.wkb), scene("whole", footprint_wkb=whole.wkb)) == ["whole"]


@given(dx=st.floats(-6000, 6000), dy=st.floats(-6000, 6000))
def test_scenes_of_another_zone_are_compared_in_their_own_crs(dx: float, dy: float) -> None:
    """A DOQQ in NAD83 / UTM 18N, a chip in 19N: compared with shapely on densified outlines."""
    grid = Grid.snapped(32619, 260_000.0, 4_700_000.0, 1.0, 448)
    center = transformer("EPSG:32619", "EPSG:26918").transform(260_000.0 + dx, 4_700_000.0 + dy)
    box = dict(
        zip(
            ("x_min_m", "y_min_m", "x_max_m", "y_max_m"),
            shapely.Point(center).buffer(3000).bounds,
            strict=True,
        )
    )
    x, y = grid.outline_m(50)
    chip = shapely.Polygon(np.column_stack(transformer("EPSG:32619", "EPSG:26918").transform(x, y)))
    rectangle = shapely.box(*box.values())
    margin = shapely.distance(chip, rectangle.exterior)
    if margin < 1.0:
        return
    assert bool(ids(scene(crs="EPSG:26918", **box), sensor=NAIP, grid=grid)) == rectangle.contains(chip)


def test_many_chips_at_once_are_as_each_alone() -> None:
    generator = np.random.default_rng(0)
    listed = [
        scene(f"s{n:02d}", acquired_at_utc=at(float(generator.uniform(-99, 99))), x_min_m=297_500.0 + 70 * n)
        for n in range(40)
    ]
    grids = [Grid.snapped(32619, 299_000.0 + 100 * n, 4_700_000.0, 1.0, 448) for n in range(20)]
    times = [at(n) if n % 3 else None for n in range(20)]
    together = scenes.candidates_for_grids(grids, times, table(*listed), SENTINEL2, limit=5)
    alone = [ids(*listed, time=time, grid=grid)[:5] for grid, time in zip(grids, times, strict=True)]
    assert together == alone
    assert max(map(len, together)) == 5
    assert scenes.candidates_for_grids(grids, times, SCENES.empty(), SENTINEL2) == [[]] * 20
    with pytest.raises(DataError, match="region by region"):
        scenes.candidates_for_grids(
            [GRID, Grid(32618, 0, 0, 1, 448, 448)], [None, None], table(*listed), NAIP
        )


def test_tiles_are_served_at_the_time_of_their_centre_photo(make_photos: Callable[..., pa.Table]) -> None:
    region = Region.parse("N42.25W071.75", 0.25)
    photos = make_photos([{"lon_deg": -71.7}, {"lon_deg": -71.65, "taken_at_local": None}])
    tiles = sampling.sample_tiles(photos, region, NAIP, None)
    wide = {"x_min_m": 2e5, "x_max_m": 4e5, "y_min_m": 4.6e6, "y_max_m": 4.8e6}
    taken = photos["taken_at_utc"][0].as_py()
    listed = table(
        scene("near", acquired_at_utc=taken, **wide),
        scene("new", acquired_at_utc=taken + timedelta(days=900), **wide),
    )
    found = scenes.chip_candidates(tiles, photos, listed, SENTINEL2, ["naip-1001", "naip-1000", "naip-9"])
    assert found == {"naip-1000": ["near", "new"], "naip-1001": ["new", "near"], "naip-9": []}


# --- listings ------------------------------------------------------------------------------------------------------

ASSET: dict[str, Any] = {
    "type": "IMAGE",
    "name": "projects/earthengine-public/assets/COPERNICUS/S2_SR_HARMONIZED/A",
    "id": "COPERNICUS/S2_SR_HARMONIZED/A",
    "startTime": "2019-06-16T16:29:34.123Z",
    "properties": {"CLOUDY_PIXEL_PERCENTAGE": 0.5},
    "geometry": {"type": "Polygon", "coordinates": [[[-72, 42], [-71, 42], [-71, 43], [-72, 43], [-72, 42]]]},
    "bands": [
        {
            "id": band,
            "grid": {
                "crsCode": "EPSG:32619",
                "dimensions": {"width": 10980, "height": 10980},
                "affineTransform": {"scaleX": 10, "scaleY": -10, "translateX": 300000, "translateY": 4700040},
            },
        }
        for band in ("B2", "B3", "B4")
    ],
}


def test_an_asset_becomes_a_row() -> None:
    rows = scenes.scene_rows([ASSET, ASSET], SENTINEL2)
    assert conform(rows, SCENES).equals(rows)
    (row,) = rows.to_pylist()
    footprint = shapely.from_wkb(row.pop("footprint_wkb"))
    assert footprint.equals(shapely.box(-72, 42, -71, 43))
    assert row == {
        "scene_id": "COPERNICUS/S2_SR_HARMONIZED/A",
        "acquired_at_utc": datetime(2019, 6, 16, 16, 29, 34, 123000, tzinfo=UTC),
        "cloud_pct": 0.5,
        "crs": "EPSG:32619",
        "x_min_m": 300_000.0,
        "y_min_m": 4_590_240.0,
        "x_max_m": 409_800.0,
        "y_max_m": 4_700_040.0,
    }


def test_zero_values_and_ids_may_be_absent() -> None:
    asset = ASSET | {"id": None, "properties": {}, "startTime": "2019-06-16T16:29:34Z"}
    (row,) = scenes.scene_rows([asset], SENTINEL2).to_pylist()
    assert row["scene_id"] == "COPERNICUS/S2_SR_HARMONIZED/A"
    assert row["cloud_pct"] is None


@pytest.mark.parametrize(
    "geometry",
    [None, {}, {"type": "Polygon", "coordinates": []}, {"type": "Point", "coordinates": [1, 2]}, "x"],
)
def test_without_a_footprint_the_pixel_grid_is_it(geometry: Any) -> None:
    (row,) = scenes.scene_rows([ASSET | {"geometry": geometry}], SENTINEL2).to_pylist()
    x, y = shapely.get_coordinates(shapely.from_wkb(row["footprint_wkb"])).T
    x, y = projection(32619).forward(x, y)
    assert (x.min(), x.max()) == pytest.approx((300_000, 409_800), abs=1)
    assert (y.min(), y.max()) == pytest.approx((4_590_240, 4_700_040), abs=1)


FIJI = [[179.2, -17.3], [-179.7, -17.3], [-179.7, -16.2], [179.2, -16.2], [179.2, -17.3]]


@pytest.mark.parametrize(
    "geometry",
    [
        {"type": "LinearRing", "coordinates": FIJI},
        {"type": "Polygon", "coordinates": [FIJI[::-1]]},
        {"type": "Polygon", "coordinates": [[[lon % 360, lat] for lon, lat in FIJI]]},
        {"type": "Polygon", "coordinates": [[[lon % 360 - 360, lat] for lon, lat in FIJI]]},
        shapely.geometry.mapping(
            shapely.union(shapely.box(179.2, -17.3, 180, -16.2), shapely.box(-180, -17.3, -179.7, -16.2))
        ),
        None,
    ],
)
def test_a_scene_across_the_antimeridian_serves_both_sides(geometry: Any) -> None:
    to_metres = transformer("EPSG:4326", "EPSG:32760")
    x0, y0 = (float(value) for value in to_metres.transform(179.25, -16.25))
    grid = {
        "crsCode": "EPSG:32760",
        "dimensions": {"width": 10980, "height": 10980},
        "affineTransform": {"scaleX": 10, "scaleY": -10, "translateX": round(x0), "translateY": round(y0)},
    }
    bands = [{"id": band["id"], "grid": grid} for band in ASSET["bands"]]
    found = scenes.scene_rows([ASSET | {"geometry": geometry, "bands": bands}], SENTINEL2)
    footprint = shapely.from_wkb(found["footprint_wkb"][0].as_py())
    assert footprint.is_valid
    assert footprint.area == pytest.approx(1.1 * 1.1, rel=0.2)
    for epsg, lon in ((32760, 179.9), (32701, -179.9)):
        x, y = projection(epsg).forward(lon, -16.8)
        chip = Grid.snapped(epsg, float(x), float(y), 10.0, 448)
        assert scenes.candidates(chip, TIME, found, SENTINEL2).num_rows == 1


def test_a_footprint_of_the_whole_world_stays_whole() -> None:
    for world in (shapely.box(-180, -90, 180, 90), shapely.segmentize(shapely.box(-180, -60, 180, 60), 10)):
        asset = ASSET | {"geometry": shapely.geometry.mapping(world)}
        (row,) = scenes.scene_rows([asset], SENTINEL2).to_pylist()
        assert shapely.from_wkb(row["footprint_wkb"]).equals(world)


def test_rings_and_crossing_polygons_are_repaired() -> None:
    ring = {"type": "LinearRing", "coordinates": ASSET["geometry"]["coordinates"][0]}
    tie = {"type": "Polygon", "coordinates": [[[0, 0], [2, 2], [2, 0], [0, 2], [0, 0]]]}
    spiked = {"type": "Polygon", "coordinates": [[[0, 0], [2, 2], [2, 0], [0, 2], [0, 0], [-1, 0], [0, 0]]]}
    square = {"type": "MultiPolygon", "coordinates": [ASSET["geometry"]["coordinates"]]}
    nested = {"type": "GeometryCollection", "geometries": [square, {"type": "Point", "coordinates": [0, 0]}]}
    for geometry, area in ((ring, 1), (tie, 2), (spiked, 2), (nested, 1)):
        (row,) = scenes.scene_rows([ASSET | {"geometry": geometry}], SENTINEL2).to_pylist()
        footprint = shapely.from_wkb(row["footprint_wkb"])
        assert footprint.is_valid
        assert footprint.area == pytest.approx(area)


@pytest.mark.parametrize(
    "changes",
    [
        {"startTime": None},
        {"startTime": "yesterday"},
        {"startTime": "2019-06-16T16:29:34"},
        {"bands": []},
        {"bands": None},
        {"bands": ASSET["bands"][:2]},
        {"bands": [band | {"grid": {"crsCode": "SR-ORG:6974"}} for band in ASSET["bands"]]},
        {"bands": [band | {"grid": {}} for band in ASSET["bands"]]},
        {"id": "", "name": ""},
    ],
)
def test_assets_that_can_serve_nothing_are_left_out(
    changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert scenes.scene_rows([ASSET | changes], SENTINEL2).num_rows == 0
    assert "1 assets" in caplog.text
