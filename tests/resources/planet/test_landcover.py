import numpy as np
import pytest

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid, Projection
from resources.planet.frames import frame_of, home_zone, is_at_home
from resources.planet.landcover import BEACH, CLASS_NAMES, CLASSES, LAKE, PALETTE
from resources.planet.world import World


@pytest.fixture(scope="module")
def world():
    return World(0)


def grid_around(lon_deg, lat_deg, gsd_m, size_px, epsg=32619):
    x, y = Projection(epsg).forward([lon_deg], [lat_deg])
    return Grid.snapped(epsg, float(x[0]), float(y[0]), gsd_m, size_px)


def test_classes_have_names_and_colours():
    assert len(CLASSES) == len(set(CLASSES)) == len(PALETTE) == 12
    assert tuple(CLASS_NAMES) == CLASSES
    assert len({tuple(colour) for colour in PALETTE.tolist()}) == 12


@pytest.mark.parametrize(
    ("lon", "lat", "epsg"), [(-71.6, 42.4, 32619), (-99.9, 42.1, 32614), (152.1, -33.1, 32756)]
)
def test_a_quarter_degree_has_every_class(world, lon, lat, epsg):
    cover = world.land_cover(grid_around(lon, lat, 20.0, 1000, epsg))
    assert cover.dtype == np.uint8
    shares = np.bincount(cover.ravel(), minlength=12) / cover.size
    assert np.all(shares > 0.001), dict(zip(CLASSES, shares, strict=True))
    assert shares.max() < 0.5


@pytest.mark.parametrize("gsd_m", [1.0, 10.0, 3.5])
def test_overlapping_requests_agree_bit_for_bit(world, gsd_m):
    whole = grid_around(-71.62, 42.31, gsd_m, 300)
    part = Grid(whole.epsg, whole.x0_m + 70 * gsd_m, whole.y0_m - 110 * gsd_m, gsd_m, 150, 90)
    expected = world.land_cover(whole)[110:200, 70:220]
    np.testing.assert_array_equal(world.land_cover(part), expected)
    # A fresh planet has empty caches.
    np.testing.assert_array_equal(World(0).land_cover(part), expected)


def test_points_agree_with_grids_of_any_pixel_size(world):
    rng = np.random.default_rng(3)
    for gsd_m in (2.0, 10.0, 140.0):
        grid = grid_around(-71.5, 42.3, gsd_m, 200)
        cover = world.land_cover(grid)
        rows, columns = rng.integers(0, 200, (2, 800))
        x, y = grid.to_xy(columns + 0.5, rows + 0.5)
        lon, lat = Projection(32619).inverse(x, y)
        points = world.land_cover_at(lon, lat)
        # Projecting to and fro moves a place by nanometres: none of these lies that near a border.
        np.testing.assert_array_equal(points, cover[rows, columns])
        assert len(np.unique(points)) > 4 or gsd_m < 10


def test_seeds_are_different_planets(world):
    grid = grid_around(-71.6, 42.4, 40.0, 300)
    assert (World(1).land_cover(grid) == world.land_cover(grid)).mean() < 0.4


def test_zones_are_different_ground(world):
    x, y = 500_000.0, 4_650_000.0
    first, second = (Grid(epsg, x, y, 40.0, 200, 200) for epsg in (32618, 32619))
    assert (world.land_cover(first) == world.land_cover(second)).mean() < 0.4


@pytest.mark.parametrize("gsd_m", [1.0, 10.0])
def test_two_zones_see_one_world_at_their_border(world, gsd_m):
    # 72 W lies between zones 18 and 19.
    own, other = grid_around(-72.0, 42.3, gsd_m, 160, 32618), grid_around(-72.0, 42.3, gsd_m, 160, 32619)
    assert not is_at_home(own)
    assert not is_at_home(other)
    cover = world.land_cover(other)
    rows, columns = np.mgrid[0:160, 0:160]
    x, y = other.to_xy(columns.ravel() + 0.5, rows.ravel() + 0.5)
    np.testing.assert_array_equal(world.land_cover_at(*Projection(32619).inverse(x, y)), cover.ravel())
    # What zone 18's grid says about the same ground, taken from its nearest pixel.
    x18, y18 = Projection(32618).forward(*Projection(32619).inverse(x, y))
    column, row = (np.floor(axis).astype(int) for axis in own.to_pixel(x18, y18))
    inside = (column >= 0) & (column < 160) & (row >= 0) & (row < 160)
    same = world.land_cover(own)[row[inside], column[inside]] == cover.ravel()[inside]
    assert inside.mean() > 0.7
    assert same.mean() > 0.95


def test_nad83_is_taken_for_wgs84(world):
    wgs, nad = grid_around(-71.6, 42.4, 10.0, 64), grid_around(-71.6, 42.4, 10.0, 64)
    nad = Grid(26919, nad.x0_m, nad.y0_m, 10.0, 64, 64)
    np.testing.assert_array_equal(world.land_cover(wgs), world.land_cover(nad))


def test_land_goes_on_across_the_equator(world):
    x, _ = Projection(32634).forward([20.5], [0.0])
    x0 = np.floor(float(x[0]) / 10) * 10
    north = Grid(32634, x0, 600.0, 10.0, 120, 120)
    south = Grid(32734, x0, 10_000_600.0, 10.0, 120, 120)
    np.testing.assert_array_equal(world.land_cover(north), world.land_cover(south))


def test_lakes_have_beaches(world):
    cover = world.land_cover(grid_around(-71.6, 42.4, 10.0, 2000))
    lake = cover == LAKE
    touching = np.zeros_like(lake)
    for axis in (0, 1):
        for step in (-1, 1):
            touching |= np.roll(lake, step, axis)
    around = cover[touching & ~lake]
    assert (around == BEACH).mean() > 0.85


def test_large_requests_are_made_in_strips(world):
    grid = grid_around(-71.6, 42.4, 10.0, 2300)
    np.testing.assert_array_equal(
        world.land_cover(grid)[1900:1950, :300],
        world.land_cover(Grid(32619, grid.x0_m, grid.y0_m - 19_000, 10.0, 300, 50)),
    )


def test_frames():
    assert frame_of(32619) == (19, 0.0)
    assert frame_of(26919) == (19, 0.0)
    assert frame_of(32756) == (56, 1e7)
    np.testing.assert_array_equal(
        home_zone([-180, -72.0001, -72, 0, 179.9, 180.0, 187.0]), [1, 18, 19, 31, 60, 1, 2]
    )
    for epsg in (4326, 32661, 26924, 3857):
        with pytest.raises(InputError, match="UTM zone"):
            frame_of(epsg)
