"""The satellite sensors: one frozen record each, from which every length in the code derives.

Which scene serves which tile is decided in scenes.py; how pixels are fetched, in resources/earth_engine.py.
"""

from dataclasses import dataclass
from typing import Literal

from graft_pipeline.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """What has to be known about a sensor, in metres and pixels of its own grid.

    Attributes:
        name: key of the sensor; prefix of asset keys, `sensor=` in paths, first part of tile ids.
        collection: Earth Engine image collection id.
        bands: the three bands shown as red, green, blue.
        gsd_m: ground sampling distance, metres per pixel.
        chip_px: side of a chip as downloaded (paper, section 3.2: 448).
        crop_px: side of a tile's footprint and of a training crop (paper: 224).
        display_range: source values mapped linearly to 0..255; None when the source is uint8 already.
        scene_choice: `newest`, or `closest` in time to the centre photo.
        cloud_property: scene property that holds the cloud percentage, None when the sensor has none.
        max_cloud_pct: a scene serves only below this percentage (paper: 1 for Sentinel-2).
        listed_from: first acquisition date that is listed, `YYYY-MM-DD`.
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
    listed_from: str = "2015-01-01"

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
        if (self.cloud_property is None) != (self.max_cloud_pct is None):
            raise InputError(
                f"Sensor {self.name!r}: set cloud_property and max_cloud_pct together, or neither."
            )

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
    def has_cloud_rule(self) -> bool:
        """Whether scenes are filtered by cloud percentage."""
        return self.max_cloud_pct is not None


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
    # Before 2017 the collection has no global surface reflectance.
    listed_from="2017-03-28",
)
