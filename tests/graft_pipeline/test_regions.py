import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from graft_pipeline.errors import InputError
from graft_pipeline.regions import GRID_SIDES_DEG, Region, regions_touching

SIDES = st.sampled_from(GRID_SIDES_DEG)
PLACES = st.tuples(st.floats(-180, 180), st.floats(-80, 83.7))


@pytest.mark.parametrize(
    ("key", "side", "bounds"),
    [
        ("N42W072", 1.0, (-72, 42, -71, 43)),
        ("S01E000", 1.0, (0, -1, 1, 0)),
        ("N42.25W071.75", 0.25, (-71.75, 42.25, -71.5, 42.5)),
        ("N42.50W072.00", 0.5, (-72, 42.5, -71.5, 43)),
    ],
)
def test_keys_are_south_west_corners(key: str, side: float, bounds: tuple[float, ...]) -> None:
    region = Region.parse(key, side)
    assert region.bounds == bounds
    assert region.key == key


@pytest.mark.parametrize(
    ("key", "side"),
    [
        ("", 1.0),
        ("n42w072", 1.0),
        ("N42W72", 1.0),
        ("N42,W072", 1.0),
        ("N42.25W071.75", 1.0),  # not of this grid
        ("N42W072", 0.25),
        ("N42.20W071.75", 0.25),
        ("N90W072", 1.0),
        ("N42E180", 1.0),
        ("S00E000", 1.0),  # N00E000 is how it is written
        ("N42W072/..", 1.0),
    ],
)
def test_other_keys_are_refused_with_an_example(key: str, side: float) -> None:
    with pytest.raises(InputError, match=r"write|use"):
        Region.parse(key, side)


@given(place=PLACES, side=SIDES)
def test_every_place_is_in_exactly_one_region(place: tuple[float, float], side: float) -> None:
    region = Region.at(*place, side)
    assert region.contains(*place)
    assert Region.parse(region.key, side) == region
    west, south, east, north = region.bounds
    neighbours = [
        Region(lat, lon, side)
        for lat in (south - side, south, north)
        for lon in (west - side, west, east)
        if (lat, lon) != (south, west) and -180 <= lon <= 180 - side and -90 <= lat <= 90 - side
    ]
    assert not any(other.contains(*place) for other in neighbours)


@given(place=PLACES, side=SIDES)
def test_a_region_lies_in_one_zone(place: tuple[float, float], side: float) -> None:
    region = Region.at(*place, side)
    if region.bounds[3] > 84:
        return
    west, south, east, north = region.bounds
    inner = Region.at(west + 1e-9, south + 1e-9, side), Region.at(east - 1e-9, north - 1e-9, side)
    assert {other.epsg for other in inner} == {region.epsg}


def test_a_region_beyond_utm_has_no_zone() -> None:
    with pytest.raises(InputError, match="UTM"):
        _ = Region.parse("N84E000").epsg


@given(
    place=st.tuples(st.floats(-77.999, -66.001), st.floats(-70, 75)),
    half=st.sampled_from([56.28, 562.8]),
    seed=st.integers(0, 2**31),
)
def test_squares_are_held_as_the_polygon_says(place: tuple[float, float], half: float, seed: int) -> None:
    region = Region.at(*place, 0.25)
    west, south, east, north = region.bounds
    generator = np.random.default_rng(seed)
    # Most points near the border, where it matters.
    reach = np.array([0.01, 0.01 / np.cos(np.radians(region.south_deg))])
    lat = np.where(generator.random(40) < 0.5, south, north) + generator.normal(size=40) * reach[0]
    lon = np.where(generator.random(40) < 0.5, west, east) + generator.normal(size=40) * reach[1]
    held = region.holds_squares(lon, lat, half)
    border = shapely.segmentize(region.polygon, 0.002).exterior
    outline = shapely.Polygon(np.column_stack(region.projection.forward(*np.array(border.coords).T)))
    x, y = region.projection.forward(lon, lat)
    inner, outer = half - 0.1, half + 0.1
    surely = shapely.contains(outline, shapely.box(x - outer, y - outer, x + outer, y + outer))
    possibly = shapely.contains(outline, shapely.box(x - inner, y - inner, x + inner, y + inner))
    assert (~surely | held).all()
    assert (~held | possibly).all()


def test_regions_touching_leaves_out_mere_neighbours() -> None:
    keys = [region.key for region in regions_touching(shapely.box(-72, 42, -70.5, 43))]
    assert keys == ["N42W072", "N42W071"]
    globe = regions_touching(shapely.box(179.5, -0.5, 180, 0.5))
    assert [region.key for region in globe] == ["S01E179", "N00E179"]
    with pytest.raises(InputError, match="empty"):
        regions_touching(shapely.Polygon())
