"""The planet as its servers see it: land cover, both sensors' pixels, photos.

How land, pixels and photos are made is in the modules beside this one; protocols and scenes are the servers'.
"""

import math
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid
from resources.planet.frames import Axes, frame_of, from_plane, home_zone, is_at_home, middles, to_plane
from resources.planet.ground import not_a_jpeg, photo_jpeg
from resources.planet.landcover import CLASSES, PALETTE, Land
from resources.planet.noise import salt
from resources.planet.overhead import Painter
from resources.planet.photographers import SIZES_PX, Photographers

NAIP_GSD_M = 1.0
SENTINEL2_GSD_M = 10.0
#: Day of the Sentinel-2 pixels on maps.
_SUMMER = date(2022, 7, 15)

#: The planet's present unless it is asked for an earlier one: its last photos and scenes are a day old.
NOW = datetime(2024, 1, 1, tzinfo=UTC)
#: Native pixels that a resampled request may touch at once.
_MAX_WINDOW_PX = 4_000_000


class World:
    """One planet: a pure function of its seed. Safe to share between threads.

    A pixel's value depends on its place alone, never on the request that it is part of: overlapping requests agree
    bit for bit. Grids that lie in the home zone of their ground (frames.py) are painted directly, others take the
    nearest native pixel of the home zone.

    Attributes:
        seed: the seed.
        classes: names of the land-cover classes, in order of their ids.
        palette: (12, 3) uint8 RGB of the classes on maps.
        now: the planet's present, UTC; photos that are uploaded later do not exist yet.
    """

    def __init__(self, seed: int = 0, now: datetime = NOW) -> None:
        self.seed = int(seed)
        self.classes = CLASSES
        self.palette = PALETTE
        self.now = now
        self._now_s = math.floor(now.timestamp())
        self._painter = Painter(self.seed)
        self._land = lru_cache(maxsize=120)(lambda zone: Land(self.seed, zone))
        self._photographers = Photographers(self.seed, self._land)

    # --- land ---

    def land_cover(self, grid: Grid) -> NDArray[np.uint8]:
        """Land cover of the pixels' middles.

        Args:
            grid: in any UTM zone, any pixel size.

        Returns:
            (H, W) uint8 indices into `classes`.

        Raises:
            InputError: if the grid's CRS is no UTM zone, or a pixel lies beyond the Earth.
        """
        zone, _ = frame_of(grid.epsg)
        x, y = middles(grid)
        if is_at_home(grid):
            land = self._land(zone)
            return _in_strips(lambda axes: land.cover(axes).classes, Axes(x, y, grid.gsd_m))
        lon, lat = _places(zone, x, y)
        return self.land_cover_at(lon, lat).reshape(grid.height_px, grid.width_px)

    def land_cover_at(self, lon_deg: ArrayLike, lat_deg: ArrayLike) -> NDArray[np.uint8]:
        """Land cover of places.

        Args:
            lon_deg: (N,) longitudes, EPSG:4326.
            lat_deg: (N,) latitudes, EPSG:4326.

        Returns:
            (N,) uint8 indices into `classes`.
        """
        lon, lat = (
            np.atleast_1d(np.asarray(lon_deg, np.float64)),
            np.atleast_1d(np.asarray(lat_deg, np.float64)),
        )
        zones = home_zone(lon)
        classes = np.empty(len(lon), np.uint8)
        for zone in np.unique(zones):
            here = np.flatnonzero(zones == zone)
            x, y = to_plane(int(zone), lon[here], lat[here])
            classes[here] = self._land(int(zone)).classes_at(x, y)
        return classes

    # --- pixels ---

    def render_naip(
        self, grid: Grid, year: int, scene_key: int, bands: Sequence[int] = (0, 1, 2, 3)
    ) -> NDArray[np.uint8]:
        """NAIP pixels: native 1 m ones, or for other grids the native pixels nearest to their middles.

        Args:
            grid: in any UTM zone (EPSG:269zz as NAIP's own, 326zz, 327zz).
            year: year of the flight.
            scene_key: number of the scene.
            bands: numbers of R, G, B, near infrared, from 0.

        Returns:
            (bands, H, W) uint8; never 0.

        Raises:
            InputError: if the grid's CRS is no UTM zone.
        """

        def paint(zone: int, axes: Axes) -> NDArray[np.uint8]:
            return self._painter.naip(zone, self._land(zone), axes, year, scene_key, bands)

        out = np.empty((len(bands), grid.height_px, grid.width_px), np.uint8)
        return self._render(grid, NAIP_GSD_M, paint, out)

    def render_sentinel2(self, grid: Grid, day: date, scene_key: int, cloud_pct: float) -> NDArray[np.uint16]:
        """Sentinel-2 surface reflectance: native 10 m pixels, or those nearest to the middles of other grids.

        Args:
            grid: in any UTM zone.
            day: date of the acquisition.
            scene_key: number of the scene.
            cloud_pct: share of clouded pixels of the whole scene, percent.

        Returns:
            (4, H, W) uint16, reflectance times 10,000 of B2, B3, B4, B8; never 0.

        Raises:
            InputError: if the grid's CRS is no UTM zone.
        """

        def paint(zone: int, axes: Axes) -> NDArray[np.uint16]:
            return self._painter.sentinel2(zone, self._land(zone), axes, day, scene_key, cloud_pct)

        return self._render(
            grid, SENTINEL2_GSD_M, paint, np.empty((4, grid.height_px, grid.width_px), np.uint16)
        )

    def cloud_mask(self, grid: Grid, scene_key: int, cloud_pct: float) -> NDArray[np.bool_]:
        """Which pixels the clouds of a Sentinel-2 scene hide.

        Args:
            grid: in any UTM zone.
            scene_key: number of the scene.
            cloud_pct: share of clouded pixels of the whole scene, percent.

        Returns:
            (H, W) bool.
        """
        return self._sky(grid, lambda axes: self._painter.cloud_mask(axes, scene_key, cloud_pct))

    def shadow_mask(self, grid: Grid, scene_key: int, cloud_pct: float) -> NDArray[np.bool_]:
        """Which pixels lie in the shadow of a Sentinel-2 scene's clouds, whether a cloud hides them or not.

        Args:
            grid: in any UTM zone.
            scene_key: number of the scene.
            cloud_pct: share of clouded pixels of the whole scene, percent.

        Returns:
            (H, W) bool.
        """
        return self._sky(grid, lambda axes: self._painter.shadow_mask(axes, scene_key, cloud_pct))

    def _sky(self, grid: Grid, mask: Callable[[Axes], NDArray[np.bool_]]) -> NDArray[np.bool_]:
        out = np.empty((1, grid.height_px, grid.width_px), bool)
        return self._render(grid, SENTINEL2_GSD_M, lambda _, axes: mask(axes)[None], out)[0]

    def _render(
        self, grid: Grid, native_m: float, paint: Callable[[int, Axes], NDArray], out: NDArray
    ) -> NDArray:
        zone, _ = frame_of(grid.epsg)
        if is_at_home(grid):
            x, y = middles(grid)
            columns, rows = np.floor(x / native_m).astype(np.int64), np.floor(-y / native_m).astype(np.int64)
            return _in_strips(lambda axes: paint(zone, axes), Axes.of_cells(columns, rows, native_m))
        self._resample(grid, native_m, paint, out)
        return out

    def _resample(
        self, grid: Grid, native_m: float, paint: Callable[[int, Axes], NDArray], out: NDArray
    ) -> None:
        zone, _ = frame_of(grid.epsg)
        lon, lat = _places(zone, *middles(grid))
        zones = home_zone(lon)
        flat = out.reshape(len(out), -1)
        for home in np.unique(zones):
            pixels = np.flatnonzero(zones == home)
            home_x, home_y = to_plane(int(home), lon[pixels], lat[pixels])
            columns = np.floor(home_x / native_m).astype(np.int64)
            rows = np.floor(-home_y / native_m).astype(np.int64)
            # Requests of coarse pixels touch much ground: in strips that keep each window small.
            for some in self._strips(columns, rows):
                c0, r0 = columns[some].min(), rows[some].min()
                window = Axes.of_cells(
                    np.arange(c0, columns[some].max() + 1), np.arange(r0, rows[some].max() + 1), native_m
                )
                flat[:, pixels[some]] = paint(int(home), window)[:, rows[some] - r0, columns[some] - c0]

    def _strips(self, columns: NDArray[np.int64], rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        waiting, strips = [np.arange(len(columns))], []
        while waiting:
            some = waiting.pop()
            wide, high = np.ptp(columns[some]) + 1, np.ptp(rows[some]) + 1
            if wide * high <= _MAX_WINDOW_PX or len(some) == 1:
                strips.append(some)
                continue
            axis = columns if wide >= high else rows
            middle = (axis[some].min() + axis[some].max()) // 2
            waiting += [some[axis[some] <= middle], some[axis[some] > middle]]
        return strips

    # --- maps ---

    def natural_colours(self, zone: int, axes: Axes) -> NDArray[np.uint8]:
        """The ground as a map shows it: NAIP's colours, or Sentinel-2's of a cloudless summer day made like them.

        Args:
            zone: UTM zone of the plane.
            axes: middles of native 1 m or 10 m pixels, which need not be neighbours.

        Returns:
            (3, H, W) uint8 RGB.
        """
        land = self._land(zone)
        if axes.gsd_m == NAIP_GSD_M:
            return self._painter.naip(zone, land, axes, self.now.year, 0, (0, 1, 2))
        reflectance = self._painter.sentinel2(zone, land, axes, _SUMMER, 0, 0.0)[2::-1]
        # The painter's own slope: 8 bits of paint are about ten times as much reflectance (overhead.py).
        return np.clip(reflectance // 10, 0, 255).astype(np.uint8)

    @cached_property
    def mean_colours(self) -> NDArray[np.uint8]:
        """(12, 3) uint8 RGB: how each class looks from afar."""
        return self._painter.mean_colours()

    # --- photos ---

    def photos_near(self, lon_deg: float, lat_deg: float, radius_km: float) -> NDArray[np.void]:
        """Photos whose geotags lie within a radius.

        Args:
            lon_deg: longitude of the middle, EPSG:4326.
            lat_deg: latitude of the middle.
            radius_km: radius in kilometres, on the sphere.

        Returns:
            (N,) rows of `photographers.PHOTO_DTYPE`, in no particular but always the same order.
        """
        return self._uploaded(self._photographers.near(lon_deg, lat_deg, radius_km))

    def photos_in(self, west: float, south: float, east: float, north: float) -> NDArray[np.void]:
        """Photos whose geotags lie in a rectangle of degrees, its sides included; west > east crosses 180."""
        return self._uploaded(self._photographers.within(west, south, east, north))

    def photo(self, photo_id: str) -> np.void | None:
        """One photo's row of `photographers.PHOTO_DTYPE`; None if there is no such photo."""
        photo = self._photographers.photo(photo_id)
        return photo if photo is not None and photo["uploaded_at"] <= self._now_s else None

    def _uploaded(self, photos: NDArray[np.void]) -> NDArray[np.void]:
        return photos[photos["uploaded_at"] <= self._now_s]

    @staticmethod
    def photo_sizes(photo: np.void) -> dict[str, tuple[int, int]]:
        """Sizes that Flickr offers of a photo.

        Args:
            photo: its row.

        Returns:
            (width, height) in pixels, as stored, by the letter of the `url_*` extra; empty without usable URLs.
        """
        if not photo["has_urls"]:
            return {}
        is_upright = bool(photo["is_portrait"]) ^ (int(photo["exif_orientation"]) in (6, 8))
        sizes = {}
        for letter, long_px in SIZES_PX.items():
            if long_px <= photo["original_px"]:
                short_px = round(long_px * 3 / 4)
                sizes[letter] = (short_px, long_px) if is_upright else (long_px, short_px)
        return sizes

    def render_photo(self, photo_id: str, size: str = "n") -> bytes | None:
        """A photo's JPEG as its owner uploaded it, whatever its host makes of it.

        Args:
            photo_id: Flickr's id of it.
            size: letter of the size, see `photo_sizes`.

        Returns:
            JPEG bytes (CMYK if that is the photo's flaw); None if the photo or the size does not exist.
        """
        photo = self.photo(photo_id)
        if photo is None:
            return None
        extent = self.photo_sizes(photo).get(size)
        if extent is None:
            return None
        return photo_jpeg(
            str(photo["kind"]),
            salt(self.seed, "drawing", str(photo["image_id"])),
            *extent,
            ahead=str(photo["ahead"]),
            frame=int(photo["frame"]),
            exif_orientation=int(photo["exif_orientation"]),
            mode="CMYK" if photo["flaw"] == "cmyk" else "RGB",
        )

    def photo_file(self, photo_id: str, size: str = "n") -> tuple[bytes, str] | None:
        """What the image host answers for a photo: usually its JPEG, for a few photos something broken.

        Args:
            photo_id: Flickr's id of it.
            size: letter of the size.

        Returns:
            (bytes, media type); None if the photo or the size does not exist.
        """
        jpeg = self.render_photo(photo_id, size)
        photo = self.photo(photo_id)
        if jpeg is None or photo is None:
            return None
        return not_a_jpeg(str(photo["flaw"]), jpeg)


def _places(
    zone: int, x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Longitudes and latitudes of a grid's pixels, row by row."""
    lon, lat = from_plane(zone, *(axis.ravel() for axis in np.meshgrid(x, y)))
    if not np.isfinite(lon).all():
        raise InputError("The grid reaches beyond the Earth: ask for pixels near its UTM zone.")
    return lon, lat


def _in_strips(paint: Callable[[Axes], NDArray], axes: Axes) -> NDArray:
    """Paint a grid in strips of rows, so that large requests need little memory."""
    height = max(1, _MAX_WINDOW_PX // len(axes.x))
    if len(axes.y) <= height:
        return paint(axes)
    strips = [
        paint(Axes(axes.x, axes.y[start : start + height], axes.gsd_m))
        for start in range(0, len(axes.y), height)
    ]
    return np.concatenate(strips, axis=-2)
