"""Concept maps: each tile is counted once, wherever on the globe; contrasts and shares are what they say."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
import shapely
from hypothesis import example, given
from hypothesis import strategies as st

from graft_pipeline.concept_maps import (
    THRESHOLD,
    Background,
    Cells,
    ConceptMaps,
    Hexagons,
    Squares,
    map_concepts,
    to_table,
)
from graft_pipeline.errors import DataError, InputError
from graft_pipeline.manifests import conform
from graft_pipeline.schemas import CONCEPT_MAPS, SEARCH_RESULTS

GRIDS = st.one_of(st.integers(3, 10).map(Hexagons), st.sampled_from([0.2, 1.0, 2.0, 7.3, 40.0]).map(Squares))
#: Where tiles can be: the whole of UTM, antimeridian and high latitudes included.
PLACES = st.lists(
    st.tuples(
        st.one_of(st.floats(-180, 180), st.floats(179.9, 180), st.floats(-180, -179.9)),
        st.one_of(st.floats(-80, 84), st.floats(83, 84), st.floats(42, 42.1)),
        st.floats(-1, 1, width=32),
    ),
    min_size=1,
    max_size=40,
)


def results(places: list[tuple[float, float, float]]) -> pa.Table:
    """SEARCH_RESULTS rows of (lon, lat, score)."""
    rows = [
        {
            "tile_id": f"naip-{number:04d}",
            "region": "N42W072",
            "center_lon_deg": lon,
            "center_lat_deg": lat,
            "acquired_at_utc": datetime(2021, 7, 1, tzinfo=UTC),
            "scene_id": "scene",
            "score": score,
        }
        for number, (lon, lat, score) in enumerate(places)
    ]
    return pa.Table.from_pylist(rows, schema=SEARCH_RESULTS.schema)


def mapped(
    places: list[tuple[float, float, float]], cells: Cells, threshold: float = THRESHOLD
) -> ConceptMaps:
    table = results(places)
    scores = table["score"].to_numpy()
    return map_concepts(table, {"farmland": scores}, {"farmland": Background.of(scores)}, cells, threshold)


@given(PLACES, GRIDS)
@example([(180.0, 66.0, 0.1), (-180.0, 66.0, 0.2), (179.9999, 83.9, 0.3)], Hexagons(3))
@example([(180.0, 66.0, 0.1), (-180.0, -80.0, 0.2), (179.9999, 84.0, 0.3)], Squares(40.0))
def test_every_tile_is_counted_once_and_sums_are_kept(
    places: list[tuple[float, float, float]], cells: Cells
) -> None:
    maps = mapped(places, cells)
    scores = np.array([score for *_, score in places])
    contrast = maps.backgrounds[0].contrast(scores)
    assert maps.tiles.sum() == len(places)
    assert (maps.tiles > 0).all()
    for number, threshold in enumerate(maps.thresholds):
        assert maps.counts[0, :, number].sum() == (contrast >= threshold).sum()
    assert (maps.mean_score[0] * maps.tiles).sum() == pytest.approx(scores.sum(), abs=1e-5)
    assert (maps.mean_contrast[0] * maps.tiles).sum() == pytest.approx(contrast.sum(), abs=1e-4)


@given(PLACES, GRIDS)
def test_a_tile_lies_in_the_outline_of_its_cell(
    places: list[tuple[float, float, float]], cells: Cells
) -> None:
    lon, lat = (np.array(values) for values in list(zip(*places, strict=True))[:2])
    keys = cells.keys(lon, lat)
    outlines = cells.outlines(keys)
    assert shapely.is_valid(outlines).all()
    west, south, east, north = shapely.bounds(outlines).T
    assert (west >= -180).all()
    assert (east <= 180).all()
    assert (south >= -90).all()
    assert (north <= 90).all()
    # Edges of hexagons are great circles, which bulge from the straight ones of a polygon in degrees, the more so
    # the larger and the farther north; places on an edge belong to one of two.
    bulge = 0.02 * np.sqrt(shapely.area(outlines)) / np.cos(np.radians(lat)) + 1e-9
    assert (shapely.distance(outlines, shapely.points(lon, lat)) <= bulge).all()
    if isinstance(cells, Squares):
        center_lon, center_lat = cells.centers(keys)
        assert (shapely.distance(outlines, shapely.points(center_lon, center_lat)) == 0).all()


@given(PLACES, GRIDS)
def test_maps_are_rows_that_obey_their_schema(places: list[tuple[float, float, float]], cells: Cells) -> None:
    maps = mapped(places, cells)
    rows = conform(to_table(maps), CONCEPT_MAPS).to_pylist()
    assert len({row["cell_id"] for row in rows}) == len(rows) == len(maps.keys)
    scores = dict(zip(maps.rows["tile_id"].to_pylist(), maps.scores[0].tolist(), strict=True))
    for row in rows:
        assert row["share"] == row["hits"] / row["tiles"]
        assert row["best_score"] == scores[row["best_tile_id"]]
    assert max(row["best_score"] for row in rows) == max(scores.values())


def test_squares_cover_the_same_ground_at_every_latitude() -> None:
    from pyproj import Geod

    cells = Squares(2.0)
    outlines = cells.outlines(cells.keys([-71.0, 10.0, 100.0], [0.5, 42.0, -75.0]))
    areas_m2 = [abs(Geod(ellps="WGS84").geometry_area_perimeter(outline)[0]) for outline in outlines]
    assert areas_m2 == pytest.approx([4e6] * 3, rel=2e-3)


def test_contrast_is_told_from_every_tile_of_the_sensor_not_from_those_that_are_mapped() -> None:
    everywhere = results([(-70.0, 42.0, score) for score in (0.1, 0.2, 0.3, 0.4)])
    background = Background.of(everywhere["score"].to_numpy())
    last = everywhere.slice(3)
    maps = map_concepts(last, {"lake": last["score"].to_numpy()}, {"lake": background}, Hexagons())
    assert maps.mean_contrast[0, 0] == pytest.approx(0.15 / np.std([0.1, 0.2, 0.3, 0.4]), abs=1e-6)
    assert maps.share.tolist() == [[1.0]]
    assert maps.best_tiles(0, 5) == [(0, pytest.approx(maps.mean_contrast[0, 0]))]


def test_tiles_that_all_look_alike_are_no_hits() -> None:
    maps = mapped([(-70.0, 42.0, 0.3)] * 5, Squares(2.0))
    assert maps.hits.sum() == 0
    assert maps.mean_contrast.tolist() == [[0.0]]


def test_what_cannot_be_mapped_is_refused_with_a_remedy() -> None:
    table = results([(-70.0, 42.0, 0.3)])
    scores = {"lake": table["score"].to_numpy()}
    backgrounds = {"lake": Background.of([0.1, 0.3])}
    for given_scores, threshold in (({}, 1.0), (scores, float("nan"))):
        with pytest.raises(InputError):
            map_concepts(table, given_scores, backgrounds, Hexagons(), threshold)
    with pytest.raises(DataError, match="score them again"):
        map_concepts(table.slice(1), scores, backgrounds, Hexagons())
    with pytest.raises(InputError, match="index a region"):
        Background.of([])
    for make in (lambda: Hexagons(2), lambda: Hexagons(11), lambda: Squares(0.0)):
        with pytest.raises(InputError, match="give"):
            make()
