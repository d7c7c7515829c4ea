"""The planet's frames: which UTM plane a piece of ground belongs to, and the axes of a grid in that plane.

What lies on the ground is in landcover.py; projections themselves are graft_pipeline.geometry's.

Every place has one home: the UTM zone of its longitude, northing counted from the equator (negative southwards).
All fields of the planet are functions of (zone, x, y) in that plane, so neighbouring zones are different ground
cut along the meridian between them, as neighbouring map sheets are.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid, projection

_FALSE_NORTHING_M = 1e7


def frame_of(epsg: int) -> tuple[int, float]:
    """The UTM zone of a CRS and what its northings exceed ours by.

    Args:
        epsg: 326zz or 327zz (WGS 84) or 269zz (NAD 83, which the planet takes for WGS 84).

    Returns:
        (zone 1..60, false northing in metres).

    Raises:
        InputError: if it is none of these.
    """
    series, zone = divmod(epsg, 100)
    if 1 <= zone <= 60 and series in (326, 327):
        return zone, _FALSE_NORTHING_M if series == 327 else 0.0
    if 1 <= zone <= 23 and series == 269:
        return zone, 0.0
    raise InputError(f"EPSG:{epsg} is no UTM zone of the planet: ask in EPSG:326zz, 327zz or 269zz.")


def home_zone(lon_deg: ArrayLike) -> NDArray[np.int64]:
    """UTM zones of longitudes.

    Args:
        lon_deg: longitudes, EPSG:4326; those beyond 180 degrees are wrapped.

    Returns:
        Same shape, 1..60.
    """
    wrapped = np.mod(np.asarray(lon_deg, np.float64) + 180.0, 360.0)
    return np.minimum(wrapped // 6.0, 59.0).astype(np.int64) + 1


def to_plane(
    zone: int, lon_deg: ArrayLike, lat_deg: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Project EPSG:4326 to a zone's plane.

    Args:
        zone: UTM zone.
        lon_deg: (N,) longitudes.
        lat_deg: (N,) latitudes.

    Returns:
        (x, y) float64, metres; y counts from the equator.
    """
    return projection(32600 + zone).forward(lon_deg, lat_deg)


def from_plane(zone: int, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unproject a zone's plane to EPSG:4326: the inverse of `to_plane`."""
    return projection(32600 + zone).inverse(x, y)


@dataclass(frozen=True, eq=False)
class Axes:
    """Pixel middles of an axis-aligned grid in a zone's plane.

    Attributes:
        x: (W,) float64, metres, of the columns.
        y: (H,) float64, metres from the equator, of the rows.
        gsd_m: size of the pixels that are painted there.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    gsd_m: float

    @classmethod
    def of_cells(cls, columns: NDArray[np.int64], rows: NDArray[np.int64], gsd_m: float) -> "Axes":
        """Axes through the middles of native pixels; rows count southwards from the equator."""
        return cls((columns + 0.5) * gsd_m, (rows + 0.5) * -gsd_m, gsd_m)

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """(W,) native column of each pixel."""
        return np.floor(self.x / self.gsd_m).astype(np.int64)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """(H,) native row of each pixel, counted southwards."""
        return np.floor(-self.y / self.gsd_m).astype(np.int64)

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether neighbours in the arrays are neighbours on the ground."""
        return bool(np.all(np.diff(self.columns) == 1) and np.all(np.diff(self.rows) == 1))

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return len(self.y), len(self.x)

    def window(self, x_min: float, y_min: float, x_max: float, y_max: float) -> tuple[slice, slice] | None:
        """Rows and columns whose middles may lie in a rectangle; None if none does.

        Args:
            x_min: western side, metres.
            y_min: southern side.
            x_max: eastern side.
            y_max: northern side.

        Returns:
            (rows, columns) with explicit bounds, or None.
        """
        c0, c1 = np.searchsorted(self.x, (x_min, x_max))
        r0, r1 = np.searchsorted(-self.y, (-y_max, -y_min))
        if c0 >= c1 or r0 >= r1:
            return None
        return slice(int(r0), int(r1)), slice(int(c0), int(c1))


def middles(grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pixel middles of a grid in its own zone's plane.

    Args:
        grid: any grid in a UTM zone.

    Returns:
        x (W,) and y (H,), float64, metres; y counts from the equator.
    """
    _, false_northing = frame_of(grid.epsg)
    x = grid.x0_m + (np.arange(grid.width_px) + 0.5) * grid.gsd_m
    y = grid.y0_m - false_northing - (np.arange(grid.height_px) + 0.5) * grid.gsd_m
    return x, y


def is_at_home(grid: Grid) -> bool:
    """Whether all ground of a grid has the grid's zone as its home.

    A zone is convex in its own plane (its sides bend towards the central meridian away from the equator), so the
    four corners decide.
    """
    zone, false_northing = frame_of(grid.epsg)
    x_min, y_min, x_max, y_max = grid.bounds_m
    y_min, y_max = y_min - false_northing, y_max - false_northing
    lon, lat = from_plane(zone, [x_min, x_max, x_min, x_max], [y_min, y_min, y_max, y_max])
    return bool(
        np.all(np.isfinite(lat)) and np.all(home_zone(lon) == zone) and np.all(np.abs(x_max - 5e5) < 1e6)
    )
