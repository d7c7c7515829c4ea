"""The planet from above as map tiles: what pages with maps lie on where no network is.

The pixels are world.py's; which page shows the tiles is decided elsewhere.
"""

import io
import math
import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graft_pipeline.errors import InputError
from resources.planet.frames import Axes, home_zone, to_plane
from resources.planet.world import NAIP_GSD_M, SENTINEL2_GSD_M, World

TILE_PX = 256
#: Zoom levels that there are tiles of; below the first one holds so much ground that drawing it takes seconds.
ZOOMS = (9, 18)
#: Up to here a pixel is large beside fields and houses: it gets the mean colour of its land cover.
_COARSE_ZOOM = 10
#: Finer than this, metres, pixels are taken from NAIP's 1 m ground, else from Sentinel-2's 10 m.
_FINE_M = 6.0
_EARTH_M = 2 * math.pi * 6_378_137.0
#: Tiles kept in memory, about 130 kB each.
_KEPT = 512


class TilePainter:
    """Draws XYZ tiles (Web Mercator, EPSG:3857) of a planet. Safe to share between threads.

    Args:
        world: the planet.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._tiles: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()
        # One tile is painted at a time: whoever serves them has other work that should not wait.
        self._painting = threading.Lock()

    def tile(self, z: int, x: int, y: int) -> bytes:
        """One tile.

        Args:
            z: zoom level.
            x: column, from the antimeridian eastwards.
            y: row, from the north southwards.

        Returns:
            PNG of 256 x 256 pixels; same tile, same bytes.

        Raises:
            InputError: if there is no such tile.
        """
        if not ZOOMS[0] <= z <= ZOOMS[1] or not (0 <= x < 2**z and 0 <= y < 2**z):
            raise InputError(f"No tile {z}/{x}/{y}: ask for zoom levels {ZOOMS[0]} to {ZOOMS[1]}.")
        key = (z, x, y)
        kept = self._kept(key)
        if kept is not None:
            return kept
        with self._painting:
            kept = self._kept(key)
            if kept is not None:
                return kept
            buffer = io.BytesIO()
            Image.fromarray(self._pixels(z, x, y)).save(buffer, "PNG", compress_level=3)
            made = buffer.getvalue()
        with self._lock:
            self._tiles[key] = made
            while len(self._tiles) > _KEPT:
                self._tiles.popitem(last=False)
        return made

    def _kept(self, key: tuple[int, int, int]) -> bytes | None:
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
            return self._tiles.get(key)

    def _pixels(self, z: int, x: int, y: int) -> NDArray[np.uint8]:
        """(256, 256, 3) RGB."""
        side = TILE_PX * 2**z
        # Pixels' middles, as shares of the world's width from its upper left corner.
        across = (x * TILE_PX + np.arange(TILE_PX) + 0.5) / side
        down = (y * TILE_PX + np.arange(TILE_PX) + 0.5) / side
        lon = np.tile(across * 360.0 - 180.0, TILE_PX)
        lat_of_rows = np.degrees(np.arctan(np.sinh(np.pi * (1.0 - 2.0 * down))))
        lat = np.repeat(lat_of_rows, TILE_PX)
        if z <= _COARSE_ZOOM:
            colours = self._world.mean_colours[self._world.land_cover_at(lon, lat)]
            return colours.reshape(TILE_PX, TILE_PX, 3)
        out = np.empty((TILE_PX * TILE_PX, 3), np.uint8)
        pixel_m = _EARTH_M / side * math.cos(math.radians(float(lat_of_rows[TILE_PX // 2])))
        zones = home_zone(lon)
        for zone in np.unique(zones):
            here = np.flatnonzero(zones == zone)
            out[here] = self._painted(int(zone), lon[here], lat[here], pixel_m)
        return out.reshape(TILE_PX, TILE_PX, 3)

    def _painted(
        self, zone: int, lon: NDArray[np.float64], lat: NDArray[np.float64], pixel_m: float
    ) -> NDArray[np.uint8]:
        """(N, 3) RGB of places: the ground around each, a pixel wide."""
        native_m = NAIP_GSD_M if pixel_m < _FINE_M else SENTINEL2_GSD_M
        # Two samples a pixel each way, averaged below, or the textures would flicker from tile to tile.
        stride = max(1, math.floor(pixel_m / 2 / native_m))
        x, y = to_plane(zone, lon, lat)
        columns = np.floor(x / native_m).astype(np.int64) // stride
        rows = np.floor(-y / native_m).astype(np.int64) // stride
        c0, r0 = int(columns.min()), int(rows.min())
        # On multiples of the stride, counted from the zone's origin: neighbouring tiles take the same samples.
        axes = Axes.of_cells(
            np.arange(c0, columns.max() + 2) * stride, np.arange(r0, rows.max() + 2) * stride, native_m
        )
        painted = self._world.natural_colours(zone, axes).astype(np.uint16)
        if stride > 1:
            painted = (
                painted[:, :-1, :-1] + painted[:, 1:, :-1] + painted[:, :-1, 1:] + painted[:, 1:, 1:]
            ) // 4
        return painted[:, rows - r0, columns - c0].T.astype(np.uint8)
