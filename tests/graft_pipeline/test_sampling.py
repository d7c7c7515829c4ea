from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from graft_pipeline import sampling
from graft_pipeline.errors import DataError, InputError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import NAIP, SENTINEL2, Sensor
from graft_pipeline.manifests import conform
from graft_pipeline.regions import Region
from graft_pipeline.schemas import SEARCH_LOCATIONS, TILES

REGION = Region.parse("N42.25W071.75", 0.25)
SENSORS = st.sampled_from([NAIP, SENTINEL2])
MODES = st.sampled_from(["non_overlapping", "random", "per_quarter"])
#: Of each kind that a grid has: small, at the equator, the farthest north and south, on the antimeridian.
REGIONS = st.sampled_from(
    [REGION, *map(Region.parse, ["N00E005", "N83E015", "S80W061", "S17E179", "S17W180", "N66W180"])]
)

# Coordinates on a coarse lattice, so that points at exactly the spacing are common.
LATTICE = st.lists(st.tuples(st.integers(-40, 40), st.integers(-40, 40)), max_size=120)


def brute_force(x: Any, y: Any, spacing: float, known: list[tuple[float, float]]) -> list[int]:
    centers, chosen = list(known), []
    for row, (a, b) in enumerate(zip(x, y, strict=True)):
        if not any(abs(a - c) < spacing and abs(b - d) < spacing for c, d in centers):
            centers.append((a, b))
            chosen.append(row)
    return chosen


@given(points=LATTICE, known=LATTICE, unit=st.sampled_from([28.0, 56.0, 37.3, 0.1]))
def test_greedy_choice_equals_brute_force(points: Any, known: Any, unit: float) -> None:
    x = np.array([300_000 + unit * a for a, _ in points])
    y = np.array([4_700_000 + unit * b for _, b in points])
    known = [(300_000 + unit * a, 4_700_000 + unit * b) for a, b in known[:20]]
    known_x, known_y = np.array([a for a, _ in known]), np.array([b for _, b in known])
    chosen = sampling.choose_centers(x, y, 112.0, known_x, known_y)
    assert chosen.tolist() == brute_force(x, y, 112.0, known)


@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([50, 500, 5000]),
    spacing=st.sampled_from([112.0, 1120.0]),
)
def test_greedy_choice_equals_brute_force_on_floats(seed: int, spread: float, spacing: float) -> None:
    generator = np.random.default_rng(seed)
    x, y = generator.normal(scale=spread, size=(2, 150)) + np.array([[300_000], [4_700_000]])
    assert sampling.choose_centers(x, y, spacing).tolist() == brute_force(x, y, spacing, [])


def test_exactly_the_spacing_is_allowed_a_hair_less_is_not() -> None:
    x = np.array([500_000.0, 500_112.0, 500_223.99])
    assert sampling.choose_centers(x, np.full(3, 4.7e6), 112.0).tolist() == [0, 1]
    assert sampling.choose_centers(np.array([0.0, 111.9]), np.array([0.0, -112.0]), 112.0).tolist() == [0, 1]


def crowd(seed: int, count: int, region: Region = REGION, spread_deg: float = 0.02) -> list[dict[str, Any]]:
    """Photos around a few spots of a region, some beyond its border left out, in a random upload order."""
    generator = np.random.default_rng(seed)
    west, south, east, north = region.bounds
    spots = generator.uniform([west, south], [east, north], size=(3, 2))
    places = spots[generator.integers(0, 3, count)] + generator.normal(scale=spread_deg, size=(count, 2))
    places = places[region.contains(places[:, 0], places[:, 1])]
    # Some right on the borders, and bursts on one spot.
    places[::9] = np.clip(np.round(places[::9], 1), [west, south], np.nextafter([east, north], 0))
    places[1::7] = places[: len(places[1::7])]
    hours = generator.permutation(len(places))
    start = datetime(2018, 1, 1, tzinfo=UTC)
    return [
        {
            "photo_id": f"{seed % 1000}{number:05d}",
            "lon_deg": lon,
            "lat_deg": lat,
            "uploaded_at_utc": start + timedelta(hours=int(hours[number])),
            "taken_at_local": datetime(2018, 1, 1) + timedelta(days=int(hours[number]) * 7),
        }
        for number, (lon, lat) in enumerate(places.tolist())
    ]


def smallest_distance(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    distance = np.maximum(np.abs(x[:, None] - x), np.abs(y[:, None] - y))
    np.fill_diagonal(distance, np.inf)
    return float(distance.min(initial=np.inf))


def xy(tiles: pa.Table) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    return tiles["center_x_m"].to_numpy(), tiles["center_y_m"].to_numpy()


def uncovered(photos: pa.Table, tiles: pa.Table, region: Region, sensor: Sensor) -> int:
    """Photos far enough from the border to be centres that no centre covers."""
    lon, lat = photos["lon_deg"].to_numpy(), photos["lat_deg"].to_numpy()
    inner = region.holds_squares(lon, lat, sensor.spacing_m / 2 * (1 + sampling.BORDER_HAIR))
    px, py = region.projection.forward(lon[inner], lat[inner])
    x, y = xy(tiles)
    near = (np.abs(px[:, None] - x) < sensor.spacing_m) & (np.abs(py[:, None] - y) < sensor.spacing_m)
    return int((~near.any(axis=1)).sum())


@given(seed=st.integers(0, 2**31), sensor=SENSORS, region=REGIONS)
def test_tiles_keep_their_distance_and_cover_every_inner_photo(
    make_photos: Callable[..., pa.Table], seed: int, sensor: Sensor, region: Region
) -> None:
    photos = make_photos(crowd(seed, 80, region))
    tiles = sampling.sample_tiles(photos, region, sensor, None)
    assert conform(tiles, TILES).equals(tiles)
    assert smallest_distance(*xy(tiles)) >= sensor.spacing_m
    assert uncovered(photos, tiles, region, sensor) == 0
    for tile in tiles.to_pylist():
        grid = Grid.snapped(region.epsg, tile["center_x_m"], tile["center_y_m"], sensor.gsd_m, sensor.chip_px)
        assert (grid.x0_m, grid.y0_m) == (tile["x0_m"], tile["y0_m"])
        assert tile["tile_id"] == f"{sensor.name}-{tile['center_photo_id']}"


@given(seed=st.integers(0, 2**31), mode=MODES)
def test_sampling_ignores_row_order_and_repeats_itself(
    make_photos: Callable[..., pa.Table], seed: int, mode: Any
) -> None:
    rows = crowd(seed, 60)
    tiles = sampling.sample_tiles(make_photos(rows), REGION, NAIP, None, mode, seed=3)
    assert sampling.sample_tiles(make_photos(rows[::-1]), REGION, NAIP, None, mode, seed=3).equals(tiles)
    assert sampling.sample_tiles(make_photos(rows), REGION, NAIP, tiles, mode, seed=3).equals(tiles)


@given(
    seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
    mode=MODES,
)
def test_whatever_arrives_later_moves_no_tile(
    make_photos: Callable[..., pa.Table], seed: int, share: float, mode: Any
) -> None:
    rows = crowd(seed, 60)
    # Any subset may come first, not only the earlier uploads.
    first = [row for row in rows if np.random.default_rng([seed, int(row["photo_id"])]).random() < share]
    before = sampling.sample_tiles(make_photos(first), REGION, SENTINEL2, None, mode)
    after = sampling.sample_tiles(make_photos(rows), REGION, SENTINEL2, before, mode)
    assert after.slice(0, before.num_rows).equals(before)
    assert after["tile_index"].to_pylist() == list(range(after.num_rows))
    if mode == "non_overlapping":
        assert smallest_distance(*xy(after)) >= SENTINEL2.spacing_m


@given(seed=st.integers(0, 2**31), visits=st.integers(1, 6), mode=MODES, region=REGIONS)
def test_photos_that_trickle_in_by_any_order_are_covered_in_the_end(
    make_photos: Callable[..., pa.Table], seed: int, visits: int, mode: Any, region: Region
) -> None:
    rows = crowd(seed, 60, region)
    arrival = np.random.default_rng([seed, 1]).integers(0, visits, len(rows)).tolist()
    tiles = None
    for visit in range(visits):
        here = make_photos([row for row, at in zip(rows, arrival, strict=True) if at <= visit])
        grown = sampling.sample_tiles(here, region, NAIP, tiles, mode, seed=seed)
        assert tiles is None or grown.slice(0, tiles.num_rows).equals(tiles)
        assert len(set(grown["tile_id"].to_pylist())) == grown.num_rows
        tiles = grown
    assert tiles is not None
    if mode != "random":
        assert uncovered(make_photos(rows), tiles, region, NAIP) == 0
    if mode == "non_overlapping":
        assert smallest_distance(*xy(tiles)) >= NAIP.spacing_m


@given(seed=st.integers(0, 2**31), sensor=SENSORS, region=REGIONS)
def test_each_quarter_is_a_sampling_of_its_own(
    make_photos: Callable[..., pa.Table], seed: int, sensor: Sensor, region: Region
) -> None:
    rows = crowd(seed, 60, region)

    def quarter(row: dict[str, Any]) -> tuple[int, int]:
        return row["taken_at_local"].year, (row["taken_at_local"].month - 1) // 3

    together = sampling.sample_tiles(make_photos(rows), region, sensor, None, "per_quarter")
    apart = [
        sampling.sample_tiles(make_photos([row for row in rows if quarter(row) == one]), region, sensor, None)
        for one in sorted({quarter(row) for row in rows})
    ]
    assert set(together["tile_id"].to_pylist()) == {
        i for tiles in apart for i in tiles["tile_id"].to_pylist()
    }
    assert together.num_rows == sum(tiles.num_rows for tiles in apart)


@given(seed=st.integers(0, 2**31), region=REGIONS)
def test_random_centers_are_as_many_and_keep_off_the_border(
    make_photos: Callable[..., pa.Table], seed: int, region: Region
) -> None:
    photos = make_photos(crowd(seed, 60, region))
    drawn = sampling.sample_tiles(photos, region, SENTINEL2, None, "random", seed=seed)
    assert drawn.num_rows == sampling.sample_tiles(photos, region, SENTINEL2, None).num_rows
    assert region.holds_squares(
        drawn["center_lon_deg"], drawn["center_lat_deg"], SENTINEL2.spacing_m / 2
    ).all()


@given(seed=st.integers(0, 2**31), mode=MODES)
def test_what_lies_in_other_regions_does_not_matter(
    make_photos: Callable[..., pa.Table], seed: int, mode: Any
) -> None:
    one, other = Region.parse("N42W073"), Region.parse("N42W072")
    own, foreign = crowd(seed, 40, one), crowd(seed + 1, 40, other)
    alone = sampling.sample_tiles(make_photos(own), one, NAIP, None, mode)
    assert sampling.sample_tiles(make_photos([*foreign, *own]), one, NAIP, None, mode).equals(alone)


#: Regions that meet at a meridian within a zone, between zones, at a parallel, at the equator, at a corner, at the
#: antimeridian.
NEIGHBOURS = [
    ("N42W072", "N42W071"),
    ("N42W073", "N42W072"),
    ("N65W073", "N65W072"),
    ("N78E005", "N78E006"),
    ("N42W072", "N43W072"),
    ("N00E011", "S01E011"),
    ("N00E011", "N00E012"),
    ("N59E011", "N60E012"),
    ("S35E149", "S35E150"),
    ("N42W073", "N42W072", "N43W073", "N43W072"),
    ("S17E179", "S17W180"),
    ("N66E179", "N66W180", "N67E179", "N67W180"),
]


@pytest.mark.parametrize("keys", NEIGHBOURS, ids="-".join)
@given(seed=st.integers(0, 2**31), sensor=SENSORS)
def test_tiles_of_neighbours_keep_their_distance_in_every_grid(
    make_photos: Callable[..., pa.Table], keys: tuple[str, ...], seed: int, sensor: Sensor
) -> None:
    regions = [Region.parse(key) for key in keys]
    generator = np.random.default_rng(seed)
    # On a globe cut elsewhere, regions on the antimeridian touch too.
    boxes = np.array([region.bounds for region in regions])
    if boxes[:, 2].max() == 180.0:
        boxes[boxes[:, 0] < 0] += [360.0, 0.0, 360.0, 0.0]
    west, south, east, north = shapely.intersection_all([shapely.box(*box) for box in boxes]).bounds
    reach = 1.2 * sensor.spacing_m / 111_000
    # A stretch of the common border not longer than a few spacings, photos close to it on either side.
    middle = np.array([generator.uniform(west, east), generator.uniform(south, north)])
    middle = np.where(generator.random() < 0.3, [west, south], middle)
    stretch = np.array([1 / np.cos(np.radians(middle[1])), 1.0]) * reach
    places = middle + generator.uniform(-1, 1, size=(300, 2)) * stretch
    places[:, 0] = (places[:, 0] + 180.0) % 360.0 - 180.0
    centers = []
    for region in regions:
        own = places[region.contains(places[:, 0], places[:, 1])]
        rows = [
            {"lon_deg": lon, "lat_deg": lat, "photo_id": f"{n}"} for n, (lon, lat) in enumerate(own.tolist())
        ]
        tiles = sampling.sample_tiles(make_photos(rows), region, sensor, None)
        centers.append(np.stack([tiles["center_lon_deg"].to_numpy(), tiles["center_lat_deg"].to_numpy()]))
    lon, lat = np.concatenate(centers, axis=1)
    for region in regions:
        # In each grid, also where the other region lies beyond its zone; a micrometre for rounding.
        x, y = region.projection.forward(lon, lat)
        owner = np.repeat(np.arange(len(regions)), [part.shape[1] for part in centers])
        distance = np.maximum(np.abs(x[:, None] - x), np.abs(y[:, None] - y))
        # Centres of one region are apart in its own grid; another zone's differs from it by a hair.
        distance[owner[:, None] == owner] = np.inf
        assert distance.min(initial=np.inf) >= sensor.spacing_m - 1e-6


def test_random_sampling_draws_as_many_and_lets_them_overlap(make_photos: Callable[..., pa.Table]) -> None:
    photos = make_photos(crowd(5, 400, spread_deg=0.01))
    apart = sampling.sample_tiles(photos, REGION, SENTINEL2, None)
    drawn = sampling.sample_tiles(photos, REGION, SENTINEL2, None, "random", seed=1)
    other = sampling.sample_tiles(photos, REGION, SENTINEL2, None, "random", seed=2)
    assert drawn.num_rows == apart.num_rows == other.num_rows
    assert smallest_distance(*xy(drawn)) < SENTINEL2.spacing_m
    assert set(drawn["tile_id"].to_pylist()) != set(other["tile_id"].to_pylist())


def test_each_quarter_is_sampled_apart(make_photos: Callable[..., pa.Table]) -> None:
    taken = [
        datetime(2018, 1, 1),
        datetime(2018, 3, 31, 23),
        datetime(2018, 4, 1),
        None,
        datetime(2019, 1, 5),
        None,
    ]
    tiles = sampling.sample_tiles(
        make_photos([{"taken_at_local": time} for time in taken]), REGION, NAIP, None, "per_quarter"
    )
    assert tiles["center_photo_id"].to_pylist() == ["1000", "1002", "1003", "1004"]


def test_tiles_of_another_rule_are_not_extended(make_photos: Callable[..., pa.Table]) -> None:
    photos = make_photos(crowd(1, 50))
    tiles = sampling.sample_tiles(photos, REGION, NAIP, None)
    with pytest.raises(DataError, match="full_refresh"):
        sampling.sample_tiles(photos, REGION, NAIP, tiles, "random")
    with pytest.raises(DataError, match="full_refresh"):
        sampling.sample_tiles(photos, REGION, SENTINEL2, tiles)
    with pytest.raises(InputError, match="unknown"):
        sampling.sample_tiles(photos, REGION, NAIP, None, "grid")  # type: ignore[arg-type]


def test_no_photos_no_tiles(make_photos: Callable[..., pa.Table]) -> None:
    for mode in ("non_overlapping", "random", "per_quarter"):
        tiles = sampling.sample_tiles(make_photos([]), REGION, NAIP, None, mode)  # type: ignore[arg-type]
        assert conform(tiles, TILES).num_rows == 0


# --- search locations ----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), count=st.integers(1, 200))
def test_locations_lie_on_shared_ground_and_only_append(seed: int, count: int) -> None:
    triangle = shapely.Polygon([(-72.5, 42.0), (-71.2, 42.1), (-71.5, 44.0)])
    region = Region.parse("N42W072")
    table = sampling.sample_locations(region, triangle, count, 2.0, seed)
    assert conform(table, SEARCH_LOCATIONS).equals(table)
    assert table.num_rows == count
    lon, lat = table["lon_deg"].to_numpy(), table["lat_deg"].to_numpy()
    assert shapely.contains_xy(triangle, lon, lat).all()
    assert region.contains(lon, lat).all()
    more = sampling.sample_locations(region, triangle, count + 50, 2.0, seed)
    assert more.slice(0, count).equals(table)


def test_locations_are_uniform_by_area_on_the_sphere() -> None:
    region = Region(60.0, 10.0)
    table = sampling.sample_locations(region, region.polygon, 20_000, 2.0, 0)
    sine = np.sin(np.radians(table["lat_deg"].to_numpy()))
    low, high = np.sin(np.radians([60, 61]))
    for values in ((sine - low) / (high - low), table["lon_deg"].to_numpy() - 10):
        counts, _ = np.histogram(values, bins=10, range=(0, 1))
        assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


def test_locations_differ_between_seeds_and_regions() -> None:
    one, other = Region.parse("N42W072"), Region.parse("N42W071")
    tables = [
        sampling.sample_locations(region, region.polygon, 5, 2.0, seed)
        for region in (one, other)
        for seed in (0, 1)
    ]
    assert len({tuple((table["lat_deg"].to_numpy() % 1).round(9)) for table in tables}) == 4


def test_slivers_and_strangers() -> None:
    region = Region.parse("N42W072")
    sliver = shapely.Polygon([(-72, 42), (-71, 43), (-71, 43 + 1e-9)])
    table = sampling.sample_locations(region, sliver, 100, 2.0, 0)
    assert 1 <= table.num_rows <= 100
    assert sampling.sample_locations(region, shapely.box(0, 0, 1, 1), 100, 2.0, 0).num_rows == 0
    with pytest.raises(InputError):
        sampling.sample_locations(region, region.polygon, 0, 2.0, 0)
