"""The planet's catalogue: scenes decoded from ids, listed over regions, with footprints that hold."""

from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from graft_pipeline.geometry import projection
from graft_pipeline.imagery import NAIP, SENTINEL2
from resources.planet.catalog import Catalog, Scene
from resources.planet.naip_scenes import BUFFER_M, years_flown
from resources.planet.sentinel2_scenes import LAST_DAY, TILE_M

BOX = shapely.box(-71.9, 42.1, -71.65, 42.35)
BOTH = (NAIP.collection, SENTINEL2.collection)


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog(0)


def rectangle(scene: Scene) -> shapely.Geometry:
    band = scene.bands[0]
    return shapely.box(
        scene.x0_m,
        scene.y0_m - band.height_px * band.gsd_m,
        scene.x0_m + band.width_px * band.gsd_m,
        scene.y0_m,
    )


@pytest.mark.parametrize("collection", BOTH)
def test_a_scene_is_decoded_from_its_id_alone(catalog: Catalog, collection: str) -> None:
    listed = catalog.touching(collection, BOX)
    assert len(listed) > 50
    fresh = Catalog(0)
    for scene in listed[::7]:
        found = fresh.find(scene.scene_id)
        assert found == scene
        assert found.asset() == scene.asset()


@pytest.mark.parametrize("collection", BOTH)
def test_a_listing_is_sorted_unique_and_touches_the_region(catalog: Catalog, collection: str) -> None:
    listed = catalog.touching(collection, BOX)
    ids = [scene.scene_id for scene in listed]
    assert ids == sorted(set(ids))
    assert all(scene.footprint.polygon.intersects(BOX) for scene in listed)
    wider = {scene.scene_id for scene in catalog.touching(collection, BOX.buffer(0.5))}
    assert set(ids) < wider


@pytest.mark.parametrize("collection", BOTH)
def test_another_seed_is_another_catalogue(catalog: Catalog, collection: str) -> None:
    ids = {scene.scene_id for scene in catalog.touching(collection, BOX)}
    other = {scene.scene_id for scene in Catalog(1).touching(collection, BOX)}
    assert ids != other


@pytest.mark.parametrize(
    "scene_id",
    [
        f"{NAIP.collection}/m_4207101_ne_19_1_20160230",
        f"{NAIP.collection}/m_4207199_ne_19_1_20160817",
        f"{NAIP.collection}/m_4207101_ne_18_1_20160817",
        f"{NAIP.collection}/m_5100001_ne_31_1_20160817",
        f"{NAIP.collection}/nothing",
        f"{SENTINEL2.collection}/20190616T162934_20190616T162934_T19TZZ",
        f"{SENTINEL2.collection}/20190616T162934_20190616T162934_T99TCG",
        f"{SENTINEL2.collection}/20190616T162934_20190617T162934_T19TCG",
        "MODIS/061/MOD13A1/2020_01_01",
        "",
    ],
)
def test_ids_that_name_no_scene_find_none(catalog: Catalog, scene_id: str) -> None:
    assert catalog.find(scene_id) is None


def test_a_wrong_day_or_zone_finds_none(catalog: Catalog) -> None:
    scene = catalog.touching(NAIP.collection, BOX)[0]
    stem, day = scene.scene_id[:-8], int(scene.scene_id[-8:])
    assert catalog.find(f"{stem}{day + 1}") is None
    passed = catalog.touching(SENTINEL2.collection, BOX)[0]
    assert catalog.find(passed.scene_id.replace("T19", "T20").replace("T18", "T21")) is None


def test_quarter_quads_are_named_as_the_usda_names_them(catalog: Catalog) -> None:
    # Quad 31 of block 38N 090W lies in row 4 from the north, column 7 from the west.
    west, south = -91 + 6 / 8, 39 - 4 / 8
    centre = shapely.Point(west + 1 / 32, south + 3 / 32)
    names = {scene.scene_id.split("/")[-1][:-9] for scene in catalog.touching(NAIP.collection, centre)}
    assert names == {"m_3809031_nw_15_1"}


@settings(max_examples=40, deadline=None)
@given(lon=st.floats(-124.9, -66.1), lat=st.floats(24.1, 49.9))
def test_a_chip_around_any_place_lies_in_one_naip_scene(lon: float, lat: float) -> None:
    catalog = Catalog(0)
    place = shapely.Point(lon, lat)
    scenes = [
        s
        for s in catalog.touching(NAIP.collection, place)
        if s.crs[-2:] == f"{int((lon + 180) // 6) + 1:02d}"
    ]
    frame = projection(32600 + int((lon + 180) // 6) + 1)
    x, y = (float(value) for value in frame.forward(lon, lat))
    chip = shapely.box(x - 224.5, y - 224.5, x + 224.5, y + 224.5)
    outline = shapely.get_coordinates(chip)
    degrees = shapely.Polygon(np.column_stack(frame.inverse(outline[:, 0], outline[:, 1])))
    serving = [s for s in scenes if rectangle(s).contains(chip) and s.footprint.polygon.contains(degrees)]
    assert serving
    for scene in serving:
        assert float(scene.x0_m).is_integer()
        assert float(scene.y0_m).is_integer()
        assert shapely.box(*scene.footprint.polygon.bounds).equals(scene.footprint.polygon)


def test_naip_is_flown_every_second_or_third_year_and_only_over_its_country(catalog: Catalog) -> None:
    for lon in range(-100, -80):
        years = years_flown(0, lon, 40)
        assert 2012 <= years[0] <= 2013
        assert years[-1] <= 2022
        assert set(np.diff(years)) <= {2, 3}
    assert len({years_flown(0, lon, 40) for lon in range(-100, -80)}) > 3
    assert catalog.touching(NAIP.collection, shapely.box(9, 47, 9.2, 47.2)) == []
    assert catalog.touching(SENTINEL2.collection, shapely.box(9, 47, 9.2, 47.2))
    assert BUFFER_M == 300


def test_an_asset_has_the_fields_of_the_reference(catalog: Catalog) -> None:
    asset = catalog.touching(SENTINEL2.collection, BOX)[0].asset()
    assert asset["type"] == "IMAGE"
    assert asset["name"] == f"projects/earthengine-public/assets/{asset['id']}"
    assert datetime.fromisoformat(asset["startTime"]).tzinfo is not None
    assert isinstance(asset["sizeBytes"], str)
    assert 0 <= asset["properties"]["CLOUDY_PIXEL_PERCENTAGE"] <= 100
    bands = {band["id"]: band["grid"] for band in asset["bands"]}
    assert set(bands) == {"B2", "B3", "B4", "B8", "SCL"}
    assert bands["B4"]["dimensions"] == {"width": 10980, "height": 10980}
    assert bands["SCL"]["affineTransform"]["scaleX"] == 20
    assert bands["B4"]["affineTransform"]["translateX"] == bands["SCL"]["affineTransform"]["translateX"]
    assert shapely.geometry.shape(asset["geometry"]).is_valid


def test_sentinel2_returns_every_fifth_day(catalog: Catalog) -> None:
    scenes = [
        s for s in catalog.touching(SENTINEL2.collection, shapely.Point(-71.8, 42.2)) if s.swath is None
    ]
    tile = scenes[0].scene_id[-6:]
    days = sorted(
        s.started.date() for s in catalog.touching(SENTINEL2.collection, BOX) if s.scene_id.endswith(tile)
    )
    steps = {(b - a).days for a, b in pairwise(days)}
    assert steps <= {5, 10, 15, 20}  # more than 5 where the swath's edge left the region out
    assert days[0] >= datetime(2017, 3, 28, tzinfo=UTC).date()
    assert days[-1] <= LAST_DAY


def test_clouds_are_distributed_as_over_the_real_earth(catalog: Catalog) -> None:
    clouds = np.array(
        [s.cloud_pct for s in catalog.touching(SENTINEL2.collection, shapely.box(-72, 42, -70, 44))]
    )
    assert 0.33 < np.mean(clouds < 1) < 0.43
    assert 0.1 < np.mean(clouds == 0) < 0.2
    assert clouds.max() > 99


def test_sentinel2_tiles_cover_every_place_and_name_themselves_as_the_military_grid(catalog: Catalog) -> None:
    rng = np.random.default_rng(5)
    # Two of them where tiles cross the antimeridian: a scene's polygon goes on beyond 180 degrees there.
    edge = [(179.95, -17.3), (-179.95, -17.3)]
    for lon, lat in [*edge, *((rng.uniform(-179, 179), rng.uniform(-79, 79)) for _ in range(25))]:
        zone = int((lon + 180) // 6) + 1
        x, y = (float(v) for v in projection((32600 if lat >= 0 else 32700) + zone).forward(lon, lat))
        scenes = catalog.touching(SENTINEL2.collection, shapely.Point(lon, lat))
        whole = [s for s in scenes if s.swath is None and rectangle(s).contains(shapely.Point(x, y))]
        assert whole, (lon, lat)
    # Nashua, New Hampshire lies in 19T BH / CH, as everyone who looks for its tiles knows.
    names = {s.scene_id[-6:] for s in catalog.touching(SENTINEL2.collection, shapely.Point(-71.47, 42.76))}
    assert "T19TBH" in names


def test_a_cut_footprint_promises_only_valid_pixels(catalog: Catalog) -> None:
    cut = [s for s in catalog.touching(SENTINEL2.collection, shapely.box(-72, 42, -70, 44)) if s.swath]
    assert len({s.swath[0] for s in cut}) == 2
    for scene in {s.swath: s for s in cut}.values():
        side, edge, slope = scene.swath
        points = shapely.get_coordinates(shapely.segmentize(scene.footprint.polygon, 0.01))
        x, y = projection(int(scene.crs[5:])).forward(points[:, 0], points[:, 1])
        assert np.all(side * (x - edge - slope * (y - scene.y0_m)) <= 0)
        area = shapely.Polygon(np.column_stack([x, y])).area / TILE_M**2
        assert 0.15 < area < 0.9
