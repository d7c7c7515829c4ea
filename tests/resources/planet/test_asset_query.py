"""The query language of listAssets: filters and field masks."""

from datetime import UTC, datetime

import pytest
import shapely

from resources.planet.asset_query import QueryError, apply_mask, parse_filter, parse_mask


def test_a_filter_as_the_client_writes_it() -> None:
    parsed = parse_filter(
        'startTime >= "2015-01-01T00:00:00Z" AND endTime < "2016-01-01T00:00:00.000Z" AND '
        "intersects(\"{'type': 'Point', 'coordinates': [-90, 38]}\") AND properties.CLOUDY_PIXEL_PERCENTAGE<1"
    )
    assert parsed.region.equals(shapely.Point(-90, 38))
    assert parsed.comparisons == (
        ("startTime", ">=", datetime(2015, 1, 1, tzinfo=UTC)),
        ("endTime", "<", datetime(2016, 1, 1, tzinfo=UTC)),
        ("properties.CLOUDY_PIXEL_PERCENTAGE", "<", 1.0),
    )


@pytest.mark.parametrize(
    "text",
    [
        'intersects("POLYGON((0 0,1 0,1 1,0 1,0 0))")',
        "intersects(\"{'type': 'Polygon', 'coordinates': [[[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]]}\")",
        "intersects(\"{'type': 'Polygon', 'coordinates': (((0, 0), (1, 0), (1, 1), (0, 1), (0, 0)),)}\")",
        'intersects("{\\"type\\": \\"Polygon\\", \\"coordinates\\": [[[0,0],[1,0],[1,1],[0,1],[0,0]]]}")',
    ],
)
def test_regions_in_every_spelling(text: str) -> None:
    assert parse_filter(text).region.equals(shapely.box(0, 0, 1, 1))


def test_nothing_is_filtered_by_nothing() -> None:
    assert parse_filter("").region is None
    assert parse_filter("  ").comparisons == ()


@pytest.mark.parametrize(
    "text",
    [
        "startTime > 5",
        'startTime >= "yesterday"',
        "cloud < 1",
        'startTime >= "2015-01-01T00:00:00Z" OR endTime < "2016-01-01T00:00:00Z"',
        'startTime >= "2015-01-01T00:00:00Z" AND ',
        "intersects(\"{'type': 'Point'}\")",
        'intersects("POINT EMPTY")',
        'intersects("here")',
        "intersects(5)",
        'intersects("POINT (inf 42)")',
        "intersects(\"{'type': 'Point', 'coordinates': [1e400, 42]}\")",
    ],
)
def test_what_earth_engine_would_refuse_is_refused(text: str) -> None:
    with pytest.raises(QueryError, match="Invalid"):
        parse_filter(text)


def test_masks_keep_what_they_name() -> None:
    answer = {
        "assets": [
            {
                "id": "a",
                "geometry": {"type": "x"},
                "properties": {"C": 1, "D": 2},
                "bands": [{"id": 1, "grid": 2}],
            }
        ],
        "nextPageToken": "t",
        "other": 1,
    }
    mask = parse_mask("assets(id,properties/C,bands/grid),nextPageToken")
    assert apply_mask(answer, mask) == {
        "assets": [{"id": "a", "properties": {"C": 1}, "bands": [{"grid": 2}]}],
        "nextPageToken": "t",
    }
    assert apply_mask(answer, parse_mask("")) == answer
    assert apply_mask(answer, parse_mask("*")) == answer
    assert apply_mask(answer, parse_mask("assets/id")) == {"assets": [{"id": "a"}]}


@pytest.mark.parametrize("text", ["assets(id", "assets)", "a//b", "a/", "a(" * 2000])
def test_broken_masks_are_refused(text: str) -> None:
    with pytest.raises(QueryError, match="Invalid"):
        parse_mask(text)
