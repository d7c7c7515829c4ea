"""The planet's map tiles: the ground where it lies, one picture across tiles, nothing where there is none."""

import io

import numpy as np
import pytest
from PIL import Image

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid, projection
from resources.planet.basemap import ZOOMS, TilePainter
from resources.planet.world import World

LON, LAT = -70.2, 42.3


@pytest.fixture(scope="module")
def painter() -> TilePainter:
    return TilePainter(World(0))


def numbers(z: int, lon: float = LON, lat: float = LAT) -> tuple[float, float]:
    """Where a place lies among the tiles of a zoom level."""
    down = 0.5 - np.arcsinh(np.tan(np.radians(lat))) / (2 * np.pi)
    return (lon + 180) / 360 * 2**z, float(down) * 2**z


def pixels(painter: TilePainter, z: int, x: int, y: int) -> np.ndarray:
    picture = Image.open(io.BytesIO(painter.tile(z, x, y)))
    assert (picture.format, picture.size, picture.mode) == ("PNG", (256, 256), "RGB")
    return np.asarray(picture)


def test_a_tile_shows_the_ground_that_scenes_show(painter: TilePainter) -> None:
    z = 17
    x, y = (int(number) for number in numbers(z))
    tile = pixels(painter, z, x, y)
    rows, columns = np.mgrid[8:256:16, 8:256:16]
    lon = (x + (columns + 0.5) / 256) / 2**z * 360 - 180
    lat = np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * (y + (rows + 0.5) / 256) / 2**z))))
    east, north = projection(32619).forward(lon.ravel(), lat.ravel())
    world = World(0)
    for k in range(0, len(east), 16):
        grid = Grid(32619, float(np.floor(east[k])), float(np.ceil(north[k])), 1.0, 1, 1)
        truth = world.render_naip(grid, world.now.year, 0)[:3, 0, 0]
        assert tile[rows.ravel()[k], columns.ravel()[k]].tolist() == truth.tolist()


@pytest.mark.parametrize("z", [10, 12, 15])
def test_neighbours_make_one_picture(painter: TilePainter, z: int) -> None:
    x, y = (int(number) for number in numbers(z))
    left, right = pixels(painter, z, x, y).astype(int), pixels(painter, z, x + 1, y).astype(int)
    inside = np.abs(np.diff(left, axis=1)).mean()
    seam = np.abs(right[:, 0] - left[:, -1]).mean()
    assert seam < 2 * inside + 4


def test_tiles_across_zones_are_whole(painter: TilePainter) -> None:
    # The meridian of 72 degrees W lies between two UTM zones; 72 = 360 / 5 is inside of a tile of every level.
    x, y = (int(number) for number in numbers(12, -72.0))
    tile = pixels(painter, 12, x, y)
    assert tile.min() > 0
    assert tile.std() > 5


def test_a_tile_is_the_same_each_time_and_there_are_only_so_many(painter: TilePainter) -> None:
    x, y = (int(number) for number in numbers(14))
    assert painter.tile(14, x, y) == TilePainter(World(0)).tile(14, x, y)
    for z, column, row in ((ZOOMS[0] - 1, 0, 0), (ZOOMS[1] + 1, 0, 0), (10, 1024, 0), (10, 0, -1)):
        with pytest.raises(InputError, match="zoom levels"):
            painter.tile(z, column, row)
