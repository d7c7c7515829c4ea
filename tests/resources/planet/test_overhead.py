from datetime import date

import numpy as np
import pytest

from graft_pipeline.geometry import Grid, Projection
from resources.planet.landcover import CLASSES
from resources.planet.overhead import Clouds, Texture, pack, unpack
from resources.planet.world import World


@pytest.fixture(scope="module")
def world():
    return World(0)


def grid_around(lon_deg, lat_deg, gsd_m, size_px, epsg=32619):
    x, y = Projection(epsg).forward([lon_deg], [lat_deg])
    return Grid.snapped(epsg, float(x[0]), float(y[0]), gsd_m, size_px)


def naip(world, grid):
    return world.render_naip(grid, 2021, 5)


def sentinel2(world, grid):
    return world.render_sentinel2(grid, date(2021, 7, 1), 5, 30.0)


SENSORS = pytest.mark.parametrize(("render", "gsd_m"), [(naip, 1.0), (sentinel2, 10.0)])


def test_packing_is_undone_by_unpacking():
    bands = np.random.default_rng(0).integers(1, 256, (4, 9, 7))
    np.testing.assert_array_equal(unpack(pack(*bands)), bands)


def test_shapes_types_and_no_nodata(world):
    pixels = naip(world, grid_around(-71.6, 42.4, 1.0, 96))
    assert pixels.shape == (4, 96, 96)
    assert pixels.dtype == np.uint8
    assert pixels.min() >= 1
    pixels = sentinel2(world, grid_around(-71.6, 42.4, 10.0, 448))
    assert pixels.shape == (4, 448, 448)
    assert pixels.dtype == np.uint16
    assert pixels.min() >= 1
    assert np.percentile(pixels, 99) < 10_000


@SENSORS
# The first lies amid its zone, the second across the border of zones 18 and 19.
@pytest.mark.parametrize("lon", [-71.62, -72.0])
def test_overlapping_requests_agree_bit_for_bit(world, render, gsd_m, lon):
    whole = grid_around(lon, 42.31, gsd_m, 320)
    part = Grid(whole.epsg, whole.x0_m + 70 * gsd_m, whole.y0_m - 110 * gsd_m, gsd_m, 150, 90)
    expected = render(world, whole)[:, 110:200, 70:220]
    np.testing.assert_array_equal(render(world, part), expected)
    # One pixel alone, from a planet with empty caches.
    pixel = Grid(part.epsg, part.x0_m + 31 * gsd_m, part.y0_m - 17 * gsd_m, gsd_m, 1, 1)
    np.testing.assert_array_equal(render(World(0), pixel)[:, 0, 0], expected[:, 17, 31])


@SENSORS
def test_many_windows_agree_with_a_large_one(world, render, gsd_m):
    whole = grid_around(-71.45, 42.36, gsd_m, 1300)
    expected = render(world, whole)
    rng = np.random.default_rng(1)
    for _ in range(6):
        column, row = rng.integers(0, 1100, 2)
        part = Grid(whole.epsg, whole.x0_m + column * gsd_m, whole.y0_m - row * gsd_m, gsd_m, 200, 180)
        np.testing.assert_array_equal(
            render(world, part), expected[:, row : row + 180, column : column + 200]
        )


@SENSORS
def test_other_grids_take_the_nearest_native_pixels(world, render, gsd_m):
    native = grid_around(-71.6, 42.4, gsd_m, 120)
    pixels = render(world, native)
    coarse = Grid(native.epsg, native.x0_m, native.y0_m, 3 * gsd_m, 40, 40)
    np.testing.assert_array_equal(render(world, coarse), pixels[:, 1::3, 1::3])
    shifted = Grid(native.epsg, native.x0_m + 0.3 * gsd_m, native.y0_m, gsd_m, 60, 60)
    np.testing.assert_array_equal(render(world, shifted), pixels[:, :60, :60])


@SENSORS
def test_a_foreign_zone_shows_the_same_ground(world, render, gsd_m):
    native = grid_around(-71.95, 42.3, gsd_m, 400)
    pixels = render(world, native)
    foreign = grid_around(-71.95, 42.3, gsd_m, 150, 32618)
    got = render(world, foreign)
    rows, columns = np.mgrid[0:150, 0:150]
    x, y = foreign.to_xy(columns.ravel() + 0.5, rows.ravel() + 0.5)
    column, row = native.to_pixel(*Projection(32619).forward(*Projection(32618).inverse(x, y)))
    expected = pixels[:, np.floor(row).astype(int), np.floor(column).astype(int)]
    np.testing.assert_array_equal(got.reshape(4, -1), expected)


def test_coarse_requests_of_a_foreign_zone_are_made_in_parts(world):
    grid = grid_around(-72.0, 42.3, 120.0, 40)
    got = sentinel2(world, grid)
    part = Grid(grid.epsg, grid.x0_m + 1200.0, grid.y0_m - 2400.0, 120.0, 8, 5)
    np.testing.assert_array_equal(sentinel2(world, part), got[:, 20:25, 10:18])


def test_seeds_scenes_years_and_seasons_differ(world):
    grid = grid_around(-71.6, 42.4, 1.0, 64)
    reference = naip(world, grid).astype(int)
    assert not np.array_equal(naip(World(1), grid), reference)
    for year, key in ((2019, 5), (2021, 6)):
        other = world.render_naip(grid, year, key).astype(int)
        assert 0 < np.abs(other - reference).max() < 40
    grid = grid_around(-71.6, 42.4, 10.0, 64)
    summer = world.render_sentinel2(grid, date(2021, 7, 10), 5, 0.0)
    winter = world.render_sentinel2(grid, date(2021, 1, 10), 5, 0.0)
    # Vegetation is greener in summer: B8 over B4.
    ratio = [pixels[3].sum(dtype=float) / pixels[2].sum(dtype=float) for pixels in (summer, winter)]
    assert ratio[0] > 1.1 * ratio[1]


def test_sentinel2_sees_the_mean_of_what_naip_sees(world):
    x, y = 330_000.0, 4_690_000.0
    fine = world.render_naip(Grid(32619, x, y, 1.0, 800, 800), 2021, 5).astype(float)
    coarse = world.render_sentinel2(Grid(32619, x, y, 10.0, 80, 80), date(2021, 7, 1), 5, 0.0).astype(float)
    means = fine.reshape(4, 80, 10, 80, 10).mean(axis=(2, 4))
    for band, other in ((0, 2), (1, 1), (2, 0)):
        assert np.corrcoef(means[band].ravel(), coarse[other].ravel())[0, 1] > 0.85


@pytest.mark.parametrize("name", CLASSES)
def test_textures_at_ten_metres_are_means_of_those_at_one(name):
    texture = Texture(0, name)
    assert texture.tens.shape == (384, 384)
    fine = unpack(np.block([[texture._turned[turn] for turn in row] for row in texture._turn[:1]]))
    rows = fine.shape[1] // 10
    means = fine.reshape(4, rows, 10, 384, 10).mean(axis=(2, 4))
    assert np.abs(unpack(texture.tens[:rows]).astype(float) - means).max() <= 0.5


@pytest.mark.parametrize("cloud_pct", [0.0, 0.4, 7.0, 55.0, 98.0])
def test_clouds_cover_their_percentage_of_a_scene(world, cloud_pct):
    # A Sentinel-2 scene: 10980 pixels of 10 m, here every tenth; it lies amid its zone.
    share = []
    for key in (3, 4):
        scene = Grid(32619, 399_960.0, 4_700_040.0, 100.0, 1098, 1098)
        mask = world.cloud_mask(scene, key, cloud_pct)
        assert mask.dtype == bool
        share.append(100 * mask.mean())
    assert np.allclose(share, cloud_pct, atol=0.5)
    if cloud_pct == 0.0:
        assert share == [0.0, 0.0]


def test_clouds_are_white_and_where_the_mask_says(world):
    grid = Grid(32619, 330_000.0, 4_700_000.0, 40.0, 700, 700)
    clear = world.render_sentinel2(grid, date(2021, 7, 1), 9, 0.0).astype(int)
    cloudy = world.render_sentinel2(grid, date(2021, 7, 1), 9, 40.0).astype(int)
    mask = world.cloud_mask(grid, 9, 40.0)
    assert 0 < mask.mean() < 1
    assert cloudy[0][mask].mean() > clear[0][mask].mean() + 1500
    changed = np.any(cloudy != clear, axis=0)
    assert changed[mask].all()
    # What else changed lies in shadow.
    assert np.all(cloudy[:, ~mask] <= clear[:, ~mask])
    shadow = world.shadow_mask(grid, 9, 40.0)
    assert np.array_equal(changed, mask | shadow)
    assert not world.shadow_mask(grid, 9, 0.0).any()


def test_cloud_thresholds_rise_with_less_cloud():
    clouds = Clouds(0)
    levels = [clouds._threshold(pct) for pct in (1, 10, 50, 90)]
    assert levels == sorted(levels, reverse=True)
