from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft_pipeline import pairing, sampling
from graft_pipeline.errors import DataError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import NAIP, SENTINEL2, Sensor
from graft_pipeline.manifests import conform
from graft_pipeline.regions import Region
from graft_pipeline.schemas import CHIPS, PAIRS

REGION = Region.parse("N42.25W071.75", 0.25)
ACQUIRED = datetime(2019, 7, 1, tzinfo=UTC)
SENSORS = st.sampled_from([NAIP, SENTINEL2])


def chips_of(tiles: pa.Table, **changes: Any) -> pa.Table:
    rows = [
        dict.fromkeys(CHIPS.schema.names)
        | {name: tile[name] for name in ("tile_id", "epsg", "x0_m", "y0_m", "gsd_m", "chip_px")}
        | {"status": "ok", "attempts": 1, "scenes_tried": 1, "scene_id": "S", "acquired_at_utc": ACQUIRED}
        | changes
        for tile in tiles.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=CHIPS.schema)


def crowd(make_photos: Callable[..., pa.Table], seed: int, count: int, spread_m: float) -> pa.Table:
    generator = np.random.default_rng(seed)
    center = REGION.projection.forward([-71.62], [42.37])
    # Whole metres, so that photos on the edge of a footprint occur.
    offsets = np.round(generator.normal(scale=spread_m, size=(2, count)))
    lon, lat = REGION.projection.inverse(*(np.round(center) + offsets))
    places = zip(lon.tolist(), lat.tolist(), strict=True)
    return make_photos([{"lon_deg": a, "lat_deg": b, "photo_id": f"{n}"} for n, (a, b) in enumerate(places)])


@given(seed=st.integers(0, 2**31), sensor=SENSORS, mode=st.sampled_from(["non_overlapping", "random"]))
def test_every_photo_of_a_footprint_is_assigned_and_no_other(
    make_photos: Callable[..., pa.Table], seed: int, sensor: Sensor, mode: Any
) -> None:
    photos = crowd(make_photos, seed, 120, sensor.footprint_m)
    tiles = sampling.sample_tiles(photos, REGION, sensor, None, mode)
    found = pairing.assign(tiles, photos, sensor, REGION.epsg)
    x, y = REGION.projection.forward(photos["lon_deg"].to_numpy(), photos["lat_deg"].to_numpy())
    half = sensor.footprint_m / 2
    expected = set()
    for tile in tiles.to_pylist():
        dx, dy = x - tile["center_x_m"], y - tile["center_y_m"]
        inside = (dx >= -half) & (dx < half) & (dy >= -half) & (dy < half)
        expected |= {
            (tile["tile_id"], photos["photo_id"][int(row)].as_py()) for row in np.flatnonzero(inside)
        }
    pairs = list(zip(found["tile_id"].to_pylist(), found["photo_id"].to_pylist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) == expected


def test_footprints_are_half_open() -> None:
    half = NAIP.footprint_m / 2
    center = np.array([300_000.0]), np.array([4_700_000.0])
    x = center[0] + np.array([-half, half, -half - 1e-6, 0.0, 0.0])
    y = center[1] + np.array([0.0, 0.0, 0.0, -half, half])
    _, photos = pairing._all_matches(*center, x, y, NAIP.footprint_m)
    assert photos.tolist() == [0, 3]


@given(seed=st.integers(0, 2**31), sensor=SENSORS, cap=st.integers(1, 30))
def test_pairs_lie_where_the_affine_says(
    make_photos: Callable[..., pa.Table], seed: int, sensor: Sensor, cap: int
) -> None:
    photos = crowd(make_photos, seed, 100, sensor.footprint_m / 2)
    tiles = sampling.sample_tiles(photos, REGION, sensor, None)
    pairs = pairing.make_pairs(tiles, chips_of(tiles), photos, REGION, sensor, cap)
    assert conform(pairs, PAIRS).equals(pairs)
    assert max(Counter(pairs["tile_id"].to_pylist()).values()) <= cap
    by_id = {tile["tile_id"]: tile for tile in tiles.to_pylist()}
    places = {row["photo_id"]: (row["lon_deg"], row["lat_deg"]) for row in photos.to_pylist()}
    for pair in pairs.to_pylist():
        tile = by_id[pair["tile_id"]]
        side = sensor.chip_px
        grid = Grid(tile["epsg"], tile["x0_m"], tile["y0_m"], tile["gsd_m"], side, side)
        assert (pair["lon_deg"], pair["lat_deg"]) == places[pair["photo_id"]]
        col, row = grid.to_pixel(*REGION.projection.forward(pair["lon_deg"], pair["lat_deg"]))
        assert (pair["col_px"], pair["row_px"]) == (col, row)
        assert 0 <= col < side
        assert 0 <= row < side
        assert pair["split"] == tile["split"]
        days = (ACQUIRED - pair["taken_at_utc"]).total_seconds() / 86_400
        assert pair["time_difference_days"] == pytest.approx(days)


@given(seed=st.integers(0, 2**31))
def test_the_cap_keeps_the_same_few_whatever_else_there_is(
    make_photos: Callable[..., pa.Table], seed: int
) -> None:
    photos = crowd(make_photos, seed, 150, 80)
    tiles = sampling.sample_tiles(photos, REGION, NAIP, None)
    every = pairing.assign(tiles, photos, NAIP, REGION.epsg)
    capped = pairing.make_pairs(tiles, chips_of(tiles), photos, REGION, NAIP, 10)
    members, kept = defaultdict(set), defaultdict(set)
    for table, sets in ((every, members), (capped, kept)):
        for tile_id, photo_id in zip(
            table["tile_id"].to_pylist(), table["photo_id"].to_pylist(), strict=True
        ):
            sets[tile_id].add(photo_id)
    assigned = pairing.assign(tiles, photos, NAIP, REGION.epsg, 10).sort_by(
        [("tile_id", "ascending"), ("photo_id", "ascending")]
    )
    assert assigned["photo_id"].equals(capped["photo_id"])
    for tile_id, photo_ids in members.items():
        assert kept[tile_id] <= photo_ids
        assert len(kept[tile_id]) == min(10, len(photo_ids))
    # Whoever is dropped leaves the others in place: order by hash, not by position.
    fewer = photos.filter(pa.array([i not in kept[next(iter(kept))] for i in photos["photo_id"].to_pylist()]))
    order = pairing.make_pairs(
        tiles, chips_of(tiles), photos.take(pa.array(range(photos.num_rows - 1, -1, -1))), REGION, NAIP, 10
    )
    assert order.equals(capped)
    again = pairing.make_pairs(tiles, chips_of(tiles), fewer, REGION, NAIP, 1000)
    assert not set(again["photo_id"].to_pylist()) & kept[next(iter(kept))]


def test_batches_do_not_change_the_result(
    make_photos: Callable[..., pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = crowd(make_photos, 1, 300, 200)
    tiles = sampling.sample_tiles(photos, REGION, NAIP, None)
    whole = pairing.make_pairs(tiles, chips_of(tiles), photos, REGION, NAIP, 5)
    monkeypatch.setattr(pairing, "_CANDIDATES_PER_BATCH", 50)
    assert pairing.make_pairs(tiles, chips_of(tiles), photos, REGION, NAIP, 5).equals(whole)


def test_only_stored_chips_make_pairs(make_photos: Callable[..., pa.Table]) -> None:
    photos = crowd(make_photos, 2, 50, 200)
    tiles = sampling.sample_tiles(photos, REGION, NAIP, None)
    chips = chips_of(tiles)
    some = pa.concat_tables([chips.slice(0, 2), chips_of(tiles, status="failed", reason="nodata").slice(2)])
    pairs = pairing.make_pairs(tiles, some, photos, REGION, NAIP, 25)
    assert set(pairs["tile_id"].to_pylist()) == set(tiles["tile_id"].to_pylist()[:2])
    assert pairing.chips_with_pairs(chips, pairs)["tile_id"].to_pylist() == tiles["tile_id"].to_pylist()[:2]
    assert sum(pairing.split_counts(pairs).values()) == pairs.num_rows
    assert pairing.make_pairs(tiles, CHIPS.empty(), photos, REGION, NAIP, 25).num_rows == 0
    assert pairing.make_pairs(tiles, chips, photos.slice(0, 0), REGION, NAIP, 25).num_rows == 0


def test_chips_of_another_grid_are_refused(make_photos: Callable[..., pa.Table]) -> None:
    photos = crowd(make_photos, 3, 20, 200)
    tiles = sampling.sample_tiles(photos, REGION, NAIP, None)
    with pytest.raises(DataError, match="another grid"):
        pairing.make_pairs(tiles, chips_of(tiles, x0_m=0.0), photos, REGION, NAIP, 25)


def test_photos_without_a_time_pair_without_a_difference(make_photos: Callable[..., pa.Table]) -> None:
    photos = make_photos([{"taken_at_local": None}])
    tiles = sampling.sample_tiles(photos, REGION, NAIP, None)
    (pair,) = pairing.make_pairs(tiles, chips_of(tiles), photos, REGION, NAIP, 25).to_pylist()
    assert pair["time_difference_days"] is None
    assert pair["taken_at_utc"] is None


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 400),
    cap=st.integers(1, 12),
    spread=st.sampled_from([5, 60, 400]),
)
def test_the_first_of_each_square_are_those_of_all(seed: int, count: int, cap: int, spread: float) -> None:
    """The short cut for crowds gives what looking at everyone gives, also where crowds lie beside squares."""
    generator = np.random.default_rng(seed)
    x, y = generator.normal(scale=spread, size=(2, count)) + generator.choice([0.0, 150.0], size=(2, count))
    center_x, center_y = generator.normal(scale=150, size=(2, 20))
    squares, photos = pairing._all_matches(center_x, center_y, x, y, 224.0)
    expected = {(s, p) for s in range(20) for p in photos[squares == s][:cap].tolist()}
    found = pairing._first_matches(center_x, center_y, x, y, 224.0, cap)
    assert len(found[0]) == len(expected)
    assert set(zip(found[0].tolist(), found[1].tolist(), strict=True)) == expected
