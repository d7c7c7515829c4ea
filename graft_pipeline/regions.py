"""Regions: the cells of a fixed lon/lat grid, their keys, borders, UTM zones, and which an area touches.

How areas are read and registered is in areas.py; that regions are Dagster partitions, in partitions.py.
"""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Projection, projection, utm_epsg

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

#: Sides that a region may have, degrees. All divide a UTM zone, so a region has one.
GRID_SIDES_DEG = (1.0, 0.5, 0.25)

_KEY = re.compile(r"([NS])(\d{2}(?:\.\d{2})?)([EW])(\d{3}(?:\.\d{2})?)")


@dataclass(frozen=True, order=True)
class Region:
    """One cell of the lon/lat grid, EPSG:4326. Half-open: its southern and western borders belong to it.

    Attributes:
        south_deg: latitude of the southern border, a multiple of grid_deg.
        west_deg: longitude of the western border, a multiple of grid_deg.
        grid_deg: side, degrees: 1, 0.5 or 0.25.
    """

    south_deg: float
    west_deg: float
    grid_deg: float = 1.0

    def __post_init__(self) -> None:
        """Reject cells that are not on the grid."""
        if self.grid_deg not in GRID_SIDES_DEG:
            raise InputError(
                f"A region's side is 1, 0.5 or 0.25 degrees, not {self.grid_deg}: correct grid_deg."
            )
        for value, limit in ((self.south_deg, 90.0), (self.west_deg, 180.0)):
            on_grid = math.isfinite(value) and (value / self.grid_deg).is_integer()
            if not on_grid or not -limit <= value <= limit - self.grid_deg:
                raise InputError(
                    f"No region of {self.grid_deg} degrees has its south-west corner at latitude "
                    f"{self.south_deg}, longitude {self.west_deg}: use multiples of {self.grid_deg}."
                )

    @classmethod
    def parse(cls, key: str, grid_deg: float = 1.0) -> "Region":
        """The region of a key.

        Args:
            key: south-west corner, SRTM style: `N42W072`, on sub-degree grids `N42.25W071.75`.
            grid_deg: side of the grid's cells, degrees.

        Returns:
            The region; its `key` is the argument.

        Raises:
            InputError: if the key is not one of that grid.
        """
        example = "N42W072" if grid_deg == 1.0 else "N42.25W071.75"
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{key!r} is no region key: write its south-west corner like {example}.")
        ns, lat, ew, lon = match.groups()
        region = cls(float(lat) * (1 if ns == "N" else -1), float(lon) * (1 if ew == "E" else -1), grid_deg)
        if region.key != key:
            raise InputError(
                f"{key!r} is no key of a grid of {grid_deg} degrees: write {region.key!r} or set grid_deg."
            )
        return region

    @classmethod
    def at(cls, lon_deg: float, lat_deg: float, grid_deg: float = 1.0) -> "Region":
        """The region that holds a place.

        Args:
            lon_deg: longitude, EPSG:4326, -180 to 180.
            lat_deg: latitude, EPSG:4326, -90 to 90.
            grid_deg: side of the grid's cells, degrees.

        Returns:
            The region; a place on the eastern or northern end of the globe belongs to its last region.

        Raises:
            InputError: if the place is not on the globe.
        """
        if not (-180.0 <= lon_deg <= 180.0 and -90.0 <= lat_deg <= 90.0):
            raise InputError(
                f"({lon_deg}, {lat_deg}) is no (longitude, latitude) in degrees: swap or correct them."
            )
        south = min(math.floor(lat_deg / grid_deg) * grid_deg, 90.0 - grid_deg)
        west = min(math.floor(lon_deg / grid_deg) * grid_deg, 180.0 - grid_deg)
        return cls(south, west, grid_deg)

    @property
    def key(self) -> str:
        """South-west corner, SRTM style; no comma, pipe or slash, which Dagster's partition keys forbid."""
        lat, lon = abs(self.south_deg), abs(self.west_deg)
        ns, ew = "S" if self.south_deg < 0 else "N", "W" if self.west_deg < 0 else "E"
        if self.grid_deg == 1.0:
            return f"{ns}{lat:02.0f}{ew}{lon:03.0f}"
        return f"{ns}{lat:05.2f}{ew}{lon:06.2f}"

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(west, south, east, north), degrees."""
        return (self.west_deg, self.south_deg, self.west_deg + self.grid_deg, self.south_deg + self.grid_deg)

    @property
    def epsg(self) -> int:
        """EPSG code of the region's one UTM zone.

        Raises:
            InputError: if the region reaches beyond UTM's latitudes.
        """
        west, south, _, north = self.bounds
        utm_epsg(west, north - 1e-9)
        return utm_epsg(west + self.grid_deg / 2, south + self.grid_deg / 2)

    @property
    def projection(self) -> Projection:
        """Projection of the region's UTM zone."""
        return projection(self.epsg)

    @property
    def polygon(self) -> "BaseGeometry":
        """The region as a shapely polygon, EPSG:4326."""
        import shapely

        return shapely.box(*self.bounds)

    def contains(self, lon_deg: npt.ArrayLike, lat_deg: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which places the region holds, half-open, so that each place is in one region.

        Args:
            lon_deg: (N,) longitudes, EPSG:4326.
            lat_deg: (N,) latitudes.

        Returns:
            (N,) bool.
        """
        west, south, east, north = self.bounds
        lon, lat = np.asarray(lon_deg, dtype=np.float64), np.asarray(lat_deg, dtype=np.float64)
        # On the globe's own ends there is no next region to hold the border.
        east_ok = lon <= east if east == 180.0 else lon < east
        north_ok = lat <= north if north == 90.0 else lat < north
        return np.asarray((lon >= west) & east_ok & (lat >= south) & north_ok, dtype=np.bool_)

    def holds_squares(
        self, lon_deg: npt.ArrayLike, lat_deg: npt.ArrayLike, half_side_m: float
    ) -> npt.NDArray[np.bool_]:
        """Around which places a square of the UTM grid lies inside the region: Chebyshev border distance.

        A square, not a circle: where grid north and true north differ, two places on either side of a border
        can be apart by d in metres and by less than d in x and in y.

        Args:
            lon_deg: (N,) longitudes of the squares' centres, EPSG:4326.
            lat_deg: (N,) latitudes.
            half_side_m: half of the squares' side, metres of the region's UTM grid.

        Returns:
            (N,) bool.
        """
        west, south, east, north = self.bounds
        lon = np.asarray(lon_deg, dtype=np.float64)
        lat = np.asarray(lat_deg, dtype=np.float64)
        inside = self.contains(lon, lat)
        # Only places near the border need their squares unprojected; half again as far covers convergence.
        lat_reach = 1.5 * half_side_m / 110_000.0
        worst_lat = min(max(abs(south), abs(north)) + lat_reach, 89.0)
        lon_reach = lat_reach / math.cos(math.radians(worst_lat))
        near = inside & (
            (np.minimum(lon - west, east - lon) < lon_reach)
            | (np.minimum(lat - south, north - lat) < lat_reach)
        )
        rows = np.flatnonzero(near)
        if rows.size:
            x, y = self.projection.forward(lon[rows], lat[rows])
            corner_x = np.concatenate([x - half_side_m, x + half_side_m, x - half_side_m, x + half_side_m])
            corner_y = np.concatenate([y - half_side_m, y - half_side_m, y + half_side_m, y + half_side_m])
            corner_lon, corner_lat = self.projection.inverse(corner_x, corner_y)
            # Not `contains`: across the antimeridian longitudes jump, and a jump is outside as well.
            held = (corner_lon >= west) & (corner_lon <= east) & (corner_lat >= south) & (corner_lat <= north)
            inside[rows] = held.reshape(4, -1).all(axis=0)
        return inside


def regions_touching(geometry: "BaseGeometry", grid_deg: float = 1.0) -> list[Region]:
    """The regions whose inside a geometry touches, in order of their corners.

    Args:
        geometry: shapely (multi)polygon, EPSG:4326.
        grid_deg: side of the grid's cells, degrees.

    Returns:
        Regions by latitude, then longitude; those that share only a border with the geometry are left out.

    Raises:
        InputError: if the geometry is empty or leaves the globe.
    """
    import shapely

    if geometry.is_empty:
        raise InputError("An empty geometry touches no region: register an area with a polygon.")
    west, south, east, north = geometry.bounds
    if not (-180.0 <= west <= east <= 180.0 and -90.0 <= south <= north <= 90.0):
        raise InputError(
            f"Bounds {geometry.bounds} leave the globe: give longitudes and latitudes in degrees."
        )
    first, last = Region.at(west, south, grid_deg), Region.at(east, north, grid_deg)
    souths = np.arange(first.south_deg, last.south_deg + grid_deg / 2, grid_deg)
    wests = np.arange(first.west_deg, last.west_deg + grid_deg / 2, grid_deg)
    lat, lon = (values.ravel() for values in np.meshgrid(souths, wests, indexing="ij"))
    cells = shapely.box(lon, lat, lon + grid_deg, lat + grid_deg)
    shapely.prepare(geometry)
    touched = shapely.intersects(geometry, cells) & ~shapely.touches(geometry, cells)
    return [Region(float(lat[i]), float(lon[i]), grid_deg) for i in np.flatnonzero(touched)]
