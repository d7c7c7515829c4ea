"""Every rule passes on good rows and counts exactly the rows that were broken."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft_pipeline import rules, schemas
from graft_pipeline.geometry import Grid, Projection
from graft_pipeline.imagery import NAIP

EPSG = 32619


def tile_rows(xy: np.ndarray, split: str = "train") -> pa.Table:
    """Tiles of the given centres (N, 2), metres."""
    lon, lat = Projection(EPSG).inverse(xy[:, 0], xy[:, 1])
    rows = []
    for number, (x, y) in enumerate(xy):
        grid = Grid.snapped(EPSG, float(x), float(y), NAIP.gsd_m, NAIP.chip_px)
        rows.append(
            {
                "tile_id": f"naip-{number}",
                "tile_index": number,
                "center_photo_id": str(number),
                "center_lon_deg": lon[number],
                "center_lat_deg": lat[number],
                "center_x_m": x,
                "center_y_m": y,
                "epsg": EPSG,
                "x0_m": grid.x0_m,
                "y0_m": grid.y0_m,
                "gsd_m": 1.0,
                "chip_px": 448,
                "sampling": "non_overlapping",
                "split": split,
            }
        )
    return pa.Table.from_pylist(rows, schema=schemas.TILES.schema)


def pair_rows(tiles: pa.Table, dx_m: float = 10.0, dy_m: float = -20.0) -> pa.Table:
    """One photo on each tile, off its centre by the given metres."""
    rows = []
    for tile in tiles.to_pylist():
        x, y = tile["center_x_m"] + dx_m, tile["center_y_m"] + dy_m
        lon, lat = Projection(EPSG).inverse(np.array([x]), np.array([y]))
        rows.append(
            {
                "tile_id": tile["tile_id"],
                "photo_id": f"p{tile['tile_index']}",
                "center_photo_id": "0",
                "scene_id": "s",
                "lon_deg": lon[0],
                "lat_deg": lat[0],
                "col_px": x - tile["x0_m"],
                "row_px": tile["y0_m"] - y,
                "taken_at_utc": None,
                "acquired_at_utc": 0,
                "time_difference_days": None,
                "split": tile["split"],
            }
        )
    return pa.Table.from_pylist(rows, schema=schemas.PAIRS.schema)


CENTERS = np.array([[400_000.0, 4_650_000.0], [400_112.0, 4_650_000.0], [400_500.0, 4_650_500.0]])


def test_schema_accepts_what_the_schema_says_and_names_each_problem() -> None:
    tiles = tile_rows(CENTERS)
    assert rules.schema(schemas.TILES, tiles).passed
    twice = pa.concat_tables([tiles, tiles.slice(0, 1)])
    finding = rules.schema(schemas.TILES, twice)
    assert "not unique" in finding.message
    assert "not sorted" in finding.message
    assert not rules.schema(schemas.TILES, tiles.drop_columns(["split"])).passed
    nulls = tiles.set_column(0, "tile_id", pa.array([None, "a", "b"]))
    assert "1 nulls" in rules.schema(schemas.TILES, nulls).message


def test_a_row_that_is_not_ok_must_give_a_reason() -> None:
    row = {"photo_id": "1", "status": "failed", "reason": None, "attempts": 1}
    table = pa.Table.from_pylist([row], schema=schemas.GROUND_IMAGES.schema)
    assert "give no reason" in rules.schema(schemas.GROUND_IMAGES, table).message
    assert rules.status_counts(table) == {"status/failed": 1}


def test_spacing_allows_exactly_half_a_footprint_and_no_less() -> None:
    assert rules.center_spacing(tile_rows(CENTERS), NAIP).passed
    closer = CENTERS - np.array([[0, 0], [0.5, 0], [0, 0]])
    assert rules.center_spacing(tile_rows(closer), NAIP).violations == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), min_size=2, max_size=25, unique=True))
def test_spacing_counts_what_a_plain_loop_counts(points: list[tuple[int, int]]) -> None:
    xy = np.array(points, float) + np.array([400_000.0, 4_650_000.0])
    plain = sum(
        max(abs(a[0] - b[0]), abs(a[1] - b[1])) < NAIP.spacing_m for n, a in enumerate(xy) for b in xy[:n]
    )
    assert rules.center_spacing(tile_rows(xy), NAIP).violations == plain


def test_membership_recomputes_pixels_from_the_geotag() -> None:
    tiles = tile_rows(CENTERS)
    pairs = pair_rows(tiles)
    finding = rules.footprint_membership(pairs, tiles, NAIP)
    assert finding.passed
    assert finding.evidence["worst_pixel_error_px"] < 0.01
    moved = pairs.set_column(
        pairs.schema.get_field_index("col_px"),
        schemas.PAIRS.schema.field("col_px"),
        pa.array(np.array(pairs["col_px"]) + np.array([0, 0.02, 0])),
    )
    assert rules.footprint_membership(moved, tiles, NAIP).violations == 1
    assert rules.footprint_membership(pair_rows(tiles, dx_m=113.0), tiles, NAIP).violations == 3
    assert rules.footprint_membership(pairs, tiles.slice(1), NAIP).violations == 1


def test_cap_counts_tiles_above_it() -> None:
    pairs = pair_rows(tile_rows(CENTERS))
    many = pa.concat_tables([pairs] * 26)
    assert rules.photo_cap(pairs, 25).passed
    assert rules.photo_cap(many, 25).violations == 3


def test_splits_may_share_no_tile_photo_or_ground() -> None:
    train, far = tile_rows(CENTERS), tile_rows(CENTERS + 10_000.0, "validation")
    far = far.set_column(0, schemas.TILES.schema.field("tile_id"), pa.array(["v0", "v1", "v2"]))
    of_far = pair_rows(far)
    of_far = of_far.set_column(1, schemas.PAIRS.schema.field("photo_id"), pa.array(["q0", "q1", "q2"]))
    good = pa.concat_tables([pair_rows(train), of_far])
    assert rules.split_disjointness([train, far], good).passed
    near = tile_rows(CENTERS + 300.0, "validation")
    assert rules.split_disjointness([train, near], good).violations > 0
    shared = pa.concat_tables([pair_rows(train), pair_rows(far)])
    assert rules.split_disjointness([train, far], shared).violations == 3
    # Split anew, as guard, after their pairs were made.
    guard = far.set_column(
        far.schema.get_field_index("split"), schemas.TILES.schema.field("split"), pa.array(["guard"] * 3)
    )
    assert rules.split_disjointness([train, guard], good).violations == 3
    assert rules.split_disjointness([train, guard], pair_rows(train)).passed


def test_a_benchmark_may_show_no_training_ground() -> None:
    tiles = tile_rows(CENTERS)
    squares = rules.chip_squares(tiles)
    assert rules.no_training_ground([tiles], squares + 1.0).passed
    assert not rules.no_training_ground([tiles], squares).passed
    assert rules.no_training_ground([], squares).passed


def test_every_rule_has_a_description() -> None:
    with pytest.raises(KeyError):
        rules.DESCRIPTIONS["unknown"]
    assert {"schema", "center_spacing", "photo_cap"} <= set(rules.DESCRIPTIONS)


def status_rows(*reasons: str | None) -> pa.Table:
    """Rows that are ok, or failed for a reason."""
    statuses = ["failed" if reason else "ok" for reason in reasons]
    return pa.table({"status": statuses, "reason": pa.array(reasons, pa.string())})


def test_an_unusual_share_of_failures_warns_with_the_commonest_reason() -> None:
    few = status_rows("gone", *[None] * 9)
    assert rules.failure_share(few).passed
    many = rules.failure_share(status_rows("gone", "timeout", "timeout", *[None] * 17))
    assert many.violations == 3
    assert "timeout most often" in many.message
    assert rules.failure_share(status_rows()).passed


def test_missing_pixels_are_counted_apart_from_other_failures() -> None:
    assert rules.nodata_share(status_rows("nodata", *["cloudy"] * 9, *[None] * 10)).passed
    assert rules.nodata_share(status_rows("nodata", "nodata", *[None] * 18)).violations == 2
    assert rules.nodata_share(status_rows()).passed


def test_an_empty_region_says_what_to_do() -> None:
    empty = rules.not_empty(status_rows(), "register an area")
    assert (empty.violations, empty.message) == (1, "register an area")
    assert rules.not_empty(status_rows(None), "register an area").passed


def test_rules_that_warn_are_described_as_such() -> None:
    for name in rules.WARNINGS:
        assert "Warns" in rules.DESCRIPTIONS[name]
