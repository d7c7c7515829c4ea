"""The satellite sensors, one frozen record each, from which every length in the code derives; what a source does.

Which scene serves which tile is decided in scenes.py; how pixels are fetched, in resources/.
"""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, Protocol

import numpy.typing as npt

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid

#: Where a deployment's imagery comes from; what a sensor's collection and bands mean depends on it.
Source = Literal["earth_engine", "stac", "folder"]


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """What has to be known about a sensor, in metres and pixels of its own grid.

    Attributes:
        name: key of the sensor; prefix of asset keys, `sensor=` in paths, first part of tile ids.
        collection: Earth Engine image collection id; STAC collection id; or folder of GeoTIFFs.
        bands: the three bands shown as red, green, blue. Earth Engine: band ids. STAC: asset keys, `image:2` for
            the second band of an asset's file. Folder: descriptions or numbers of a file's bands.
        gsd_m: ground sampling distance, metres per pixel.
        chip_px: side of a chip as downloaded (paper, section 3.2: 448).
        crop_px: side of a tile's footprint and of a training crop (paper: 224).
        display_range: source values mapped linearly to 0..255; None when the source is uint8 already.
        scene_choice: `newest`, or `closest` in time to the centre photo.
        cloud_property: scene property that holds the cloud percentage, None when the sensor has none.
        max_cloud_pct: a scene serves only below this percentage (paper: 1 for Sentinel-2).
        cloud_rule: what is to be below `max_cloud_pct`: the whole `scene` by its property (paper), or the `chip`
            by its own pixels of `mask_band`.
        mask_band: band of pixel classes, requested with the chip where the rule needs it.
        cloud_classes: values of `mask_band` that are cloud or its shadow. Default: those of Sentinel-2's SCL, 3
            cloud shadow, 8 and 9 cloud of medium and high probability, 10 cirrus.
        max_scene_cloud_pct: under the rule by chip, scenes from this percentage on are not tried; None: all are.
        raw_bands: bands that are kept beside the chip in the source's own type; empty: none.
        listed_from: first acquisition date that is listed, `YYYY-MM-DD`.
        token_url: where STAC assets' links are signed: `{token_url}/{collection}` answers a token that is appended
            to them (Planetary Computer); None: they are open.
        offset: added to values of STAC scenes of Sentinel-2's processing baseline 04.00 and later, unless their
            catalogue did; 0: none. With -1000 all scenes have one scale, as Earth Engine's harmonised have.
    """

    name: str
    collection: str
    bands: tuple[str, str, str]
    gsd_m: float
    chip_px: int = 448
    crop_px: int = 224
    display_range: tuple[float, float] | None = None
    scene_choice: Literal["newest", "closest"] = "newest"
    cloud_property: str | None = None
    max_cloud_pct: float | None = None
    cloud_rule: Literal["scene", "chip"] = "scene"
    mask_band: str | None = None
    cloud_classes: tuple[int, ...] = (3, 8, 9, 10)
    max_scene_cloud_pct: float | None = None
    raw_bands: tuple[str, ...] = ()
    listed_from: str = "2015-01-01"
    token_url: str | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        """Reject records that no chip could be cut with."""
        if not self.name.isidentifier() or self.name.lower() != self.name:
            raise InputError(f"Sensor name {self.name!r}: use a lower-case identifier such as 'naip'.")
        if self.gsd_m <= 0 or self.chip_px <= 0 or not 0 < self.crop_px <= self.chip_px:
            raise InputError(
                f"Sensor {self.name!r}: gsd_m, chip_px and crop_px must be positive, crop <= chip."
            )
        if self.chip_px % 2 or self.crop_px % 4:
            raise InputError(f"Sensor {self.name!r}: chip_px must be even and crop_px divisible by four.")
        if self.cloud_rule == "chip":
            if self.mask_band is None or self.max_cloud_pct is None:
                raise InputError(
                    f"Sensor {self.name!r}: the cloud rule by chip needs mask_band and max_cloud_pct."
                )
            if self.max_scene_cloud_pct is not None and self.cloud_property is None:
                raise InputError(f"Sensor {self.name!r}: max_scene_cloud_pct needs cloud_property.")
        elif (self.cloud_property is None) != (self.max_cloud_pct is None):
            raise InputError(
                f"Sensor {self.name!r}: set cloud_property and max_cloud_pct together, or neither."
            )
        if len(set(self.raw_bands)) < len(self.raw_bands):
            raise InputError(f"Sensor {self.name!r}: raw_bands names a band twice.")

    @property
    def chip_m(self) -> float:
        """Side of a chip on the ground, metres."""
        return self.chip_px * self.gsd_m

    @property
    def footprint_m(self) -> float:
        """Side of a tile's footprint on the ground, metres."""
        return self.crop_px * self.gsd_m

    @property
    def spacing_m(self) -> float:
        """Least Chebyshev distance of two centres: half a footprint (paper: 112 px), metres."""
        return self.footprint_m / 2

    @property
    def has_mask(self) -> bool:
        """Whether chips are judged by their own mask band."""
        return self.cloud_rule == "chip"

    @property
    def scene_limit_pct(self) -> float | None:
        """A scene is listed and tried only below this cloud percentage; None: whatever its clouds."""
        return self.max_scene_cloud_pct if self.has_mask else self.max_cloud_pct

    @property
    def requested_bands(self) -> tuple[str, ...]:
        """What one request for a chip asks for, each once: `bands` first, then `raw_bands`, then the mask."""
        mask = (self.mask_band,) if self.has_mask and self.mask_band is not None else ()
        return tuple(dict.fromkeys((*self.bands, *self.raw_bands, *mask)))


class ImagerySource(Protocol):
    """Who lists scenes and cuts chips: Earth Engine, a STAC API or a folder (resources/).

    Attributes:
        concurrency: requests at the same time; for the caller's thread pool.
    """

    concurrency: int

    @property
    def requests(self) -> int:
        """HTTP requests, or reads of files, so far."""
        ...

    @property
    def downloaded_bytes(self) -> int:
        """Bytes of their answers."""
        ...

    def list_scenes(
        self,
        sensor: Sensor,
        bounds: tuple[float, float, float, float],
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> list[dict[str, Any]]:
        """Every scene of a sensor that touches a box, was acquired in a time window and is clear enough.

        Args:
            sensor: names the collection and its cloud rule.
            bounds: (west, south, east, north), degrees of EPSG:4326; scenes a little outside may be listed too.
            start: first acquisition time; the sensor's `listed_from` unless given.
            end: acquired before this time; unlimited unless given.

        Returns:
            Scenes as `scenes.scene_rows` takes them, unique by id.
        """
        ...

    def get_chip(self, sensor: Sensor, scene_id: str, grid: Grid) -> npt.NDArray[Any]:
        """The pixels of one scene on a grid, verified; nearest neighbours where the scene's grid is another.

        Args:
            sensor: names the bands.
            scene_id: of a listed scene.
            grid: where; its CRS must be projected, metres.

        Returns:
            (grid.height_px, grid.width_px, bands) array of `sensor.requested_bands` in the source's own dtype,
            the widest of them if they differ; 0 where the scene has no data.

        Raises:
            ItemError: if this chip cannot be had. Permanent: `scene_missing`, `bad_request`. To be tried
                again: `invalid_pixels`, `truncated`, `timeout`, `connection`, `unavailable`, `rate_limited`,
                `forbidden`.
            SettingsError: if credentials are refused.
            ServiceError: if the source cannot be reached, or chip after chip fails.
        """
        ...


NAIP = Sensor(
    name="naip", collection="USDA/NAIP/DOQQ", bands=("R", "G", "B"), gsd_m=1.0, listed_from="2010-01-01"
)

SENTINEL2 = Sensor(
    name="sentinel2",
    collection="COPERNICUS/S2_SR_HARMONIZED",
    bands=("B4", "B3", "B2"),
    gsd_m=10.0,
    # Surface reflectance x 10,000; 0..3000 is the display range Earth Engine's own catalogue page uses.
    display_range=(0.0, 3000.0),
    scene_choice="closest",
    cloud_property="CLOUDY_PIXEL_PERCENTAGE",
    max_cloud_pct=1.0,
    mask_band="SCL",
    # Before 2017 the collection has no global surface reflectance.
    listed_from="2017-03-28",
)

_PLANETARY_COMPUTER_TOKENS = "https://planetarycomputer.microsoft.com/api/sas/v1/token"

#: The standard sensors of each source. STAC's are the Planetary Computer's: both collections, no account.
SENSORS: dict[Source, tuple[Sensor, ...]] = {
    "earth_engine": (NAIP, SENTINEL2),
    "stac": (
        replace(
            NAIP,
            collection="naip",
            bands=("image:1", "image:2", "image:3"),
            token_url=_PLANETARY_COMPUTER_TOKENS,
        ),
        replace(
            SENTINEL2,
            collection="sentinel-2-l2a",
            bands=("B04", "B03", "B02"),
            cloud_property="eo:cloud_cover",
            token_url=_PLANETARY_COMPUTER_TOKENS,
            offset=-1000,
        ),
    ),
    "folder": (replace(NAIP, collection="naip"), replace(SENTINEL2, collection="sentinel2")),
}
