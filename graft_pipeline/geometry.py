"""Projected ground geometry: UTM zones, projections and north-up pixel grids.

What a region, a tile or a chip is, is defined in its own module; no file and no service is touched here.
"""

import math
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graft_pipeline.errors import InputError

if TYPE_CHECKING:
    from affine import Affine

FloatArray = npt.NDArray[np.float64]

#: Southern and northern end of UTM, degrees.
UTM_LATITUDES_DEG = (-80.0, 84.0)

_thread = threading.local()


def utm_epsg(lon_deg: float, lat_deg: float) -> int:
    """EPSG code of the WGS 84 / UTM zone of a place, by the plain six-degree rule.

    The exceptions around Norway and Svalbard are left out: zones must follow meridians that are multiples of
    six degrees everywhere, so that no region lies in two.

    Args:
        lon_deg: longitude, EPSG:4326, -180 to 180 (180 counts as zone 60).
        lat_deg: latitude, EPSG:4326, -80 to 84.

    Returns:
        326zz on the northern hemisphere (equator included), 327zz on the southern.

    Raises:
        InputError: if the place is outside of UTM's range or not finite.
    """
    if not (-180.0 <= lon_deg <= 180.0 and UTM_LATITUDES_DEG[0] <= lat_deg <= UTM_LATITUDES_DEG[1]):
        raise InputError(
            f"({lon_deg}, {lat_deg}) lies outside of UTM (longitude -180 to 180, latitude -80 to 84): "
            "cut the area to that range."
        )
    zone = min(int((lon_deg + 180.0) // 6.0) + 1, 60)
    return (32600 if lat_deg >= 0 else 32700) + zone


def transformer(source: str, target: str) -> Any:
    """The calling thread's own pyproj transformer between two CRS; coordinates as (x or lon, y or lat).

    pyproj's transformers must not be shared by threads, and building one costs milliseconds.

    Args:
        source: CRS that pyproj understands, e.g. `EPSG:4326`.
        target: the same.

    Returns:
        A `pyproj.Transformer` with `always_xy`.
    """
    cache: dict[tuple[str, str], Any] | None = getattr(_thread, "transformers", None)
    if cache is None:
        cache = _thread.transformers = {}
    key = (source, target)
    if key not in cache:
        from pyproj import Transformer

        cache[key] = Transformer.from_crs(source, target, always_xy=True)
    return cache[key]


@dataclass(frozen=True)
class Projection:
    """EPSG:4326 to one projected CRS and back. A hashable value, usable from any thread.

    Attributes:
        epsg: EPSG code of the projected CRS, metres.
    """

    epsg: int

    @property
    def crs(self) -> str:
        """The projected CRS, such as `EPSG:32619`."""
        return f"EPSG:{self.epsg}"

    def forward(self, lon_deg: npt.ArrayLike, lat_deg: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Project places.

        Args:
            lon_deg: (N,) or scalar longitudes, EPSG:4326.
            lat_deg: latitudes, same shape.

        Returns:
            Easting and northing in metres, float64, same shape; infinite where the projection is not defined.
        """
        return self._transform("EPSG:4326", self.crs, lon_deg, lat_deg)

    def inverse(self, x_m: npt.ArrayLike, y_m: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Unproject places.

        Args:
            x_m: (N,) or scalar eastings, metres.
            y_m: northings, same shape.

        Returns:
            Longitude and latitude in EPSG:4326, float64, same shape.
        """
        return self._transform(self.crs, "EPSG:4326", x_m, y_m)

    @staticmethod
    def _transform(
        source: str, target: str, first: npt.ArrayLike, second: npt.ArrayLike
    ) -> tuple[FloatArray, FloatArray]:
        # Copies: pyproj works in place on arrays that own their memory.
        a = np.array(first, dtype=np.float64)
        b = np.array(second, dtype=np.float64)
        x, y = transformer(source, target).transform(a, b)
        return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)


@lru_cache(maxsize=256)
def projection(epsg: int) -> Projection:
    """The projection of an EPSG code; same code, same object."""
    return Projection(epsg)


@dataclass(frozen=True)
class Grid:
    """A north-up grid of square pixels in a projected CRS.

    Attributes:
        epsg: EPSG code of the CRS, metres.
        x0_m: easting of the upper left corner (of the pixel, not its middle).
        y0_m: northing of the upper left corner.
        gsd_m: side of a pixel, metres.
        width_px: columns.
        height_px: rows.
    """

    epsg: int
    x0_m: float
    y0_m: float
    gsd_m: float
    width_px: int
    height_px: int

    @classmethod
    def snapped(cls, epsg: int, x_m: float, y_m: float, gsd_m: float, size_px: int) -> "Grid":
        """The square grid on multiples of the pixel size that is centred as near as possible on a place.

        Args:
            epsg: EPSG code of the CRS.
            x_m: easting of the place.
            y_m: northing of the place.
            gsd_m: metres per pixel.
            size_px: pixels per side.

        Returns:
            A grid whose origin is a multiple of gsd_m and whose centre is within half a pixel of the place.
        """
        half = size_px / 2
        # floor(v + 0.5), not round(): halves go one way, so neighbouring places never swap order.
        x0_m = math.floor(x_m / gsd_m - half + 0.5) * gsd_m
        y0_m = math.floor(y_m / gsd_m + half + 0.5) * gsd_m
        return cls(epsg, float(x0_m), float(y0_m), float(gsd_m), size_px, size_px)

    @property
    def crs(self) -> str:
        """The CRS, such as `EPSG:32619`."""
        return f"EPSG:{self.epsg}"

    @property
    def affine(self) -> "Affine":
        """Transform from (col, row) of pixel corners to (x_m, y_m)."""
        from affine import Affine

        return Affine(self.gsd_m, 0.0, self.x0_m, 0.0, -self.gsd_m, self.y0_m)

    @property
    def bounds_m(self) -> tuple[float, float, float, float]:
        """(x_min, y_min, x_max, y_max), metres."""
        return (
            self.x0_m,
            self.y0_m - self.height_px * self.gsd_m,
            self.x0_m + self.width_px * self.gsd_m,
            self.y0_m,
        )

    def to_pixel(self, x_m: npt.ArrayLike, y_m: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Pixel coordinates of places.

        Args:
            x_m: (N,) or scalar eastings.
            y_m: northings, same shape.

        Returns:
            (col, row), float64; 0 is the left (upper) edge of the first pixel, not its middle.
        """
        col = (np.asarray(x_m, dtype=np.float64) - self.x0_m) / self.gsd_m
        row = (self.y0_m - np.asarray(y_m, dtype=np.float64)) / self.gsd_m
        return col, row

    def to_xy(self, col_px: npt.ArrayLike, row_px: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Places of pixel coordinates: the inverse of `to_pixel`.

        Args:
            col_px: (N,) or scalar columns.
            row_px: rows, same shape.

        Returns:
            (x_m, y_m), float64.
        """
        x_m = self.x0_m + np.asarray(col_px, dtype=np.float64) * self.gsd_m
        y_m = self.y0_m - np.asarray(row_px, dtype=np.float64) * self.gsd_m
        return x_m, y_m

    def outline_m(self, points_per_side: int = 5) -> tuple[FloatArray, FloatArray]:
        """Points along the border, for tests of containment in another CRS.

        Args:
            points_per_side: points on each side, its first corner included.

        Returns:
            (x_m, y_m), each (4 * points_per_side,) float64, clockwise from the upper left corner.
        """
        x_min, y_min, x_max, y_max = self.bounds_m
        t = np.arange(points_per_side, dtype=np.float64) / points_per_side
        across = x_min + t * (x_max - x_min)
        down = y_max - t * (y_max - y_min)
        x = np.concatenate([across, np.full_like(t, x_max), x_max - (across - x_min), np.full_like(t, x_min)])
        y = np.concatenate([np.full_like(t, y_max), down, np.full_like(t, y_min), y_min + (y_max - down)])
        return x, y
