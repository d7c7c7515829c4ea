"""What a scene is, and the catalogue of all scenes: found by id, or listed over a region.

Which scenes exist is decided per collection in naip_scenes.py, sentinel2_scenes.py and mounts.py; their
pixels are pixels.py.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from graft_pipeline.imagery import NAIP, SENTINEL2

Bounds = tuple[float, float, float, float]


@dataclass(frozen=True)
class Band:
    """One band of a scene and its own pixel grid, whose upper left corner is the scene's.

    Attributes:
        name: band id, such as `B4`.
        dtype: numpy name of the pixel type.
        gsd_m: side of a pixel, units of the scene's CRS.
        width_px: columns.
        height_px: rows.
    """

    name: str
    dtype: str
    gsd_m: float
    width_px: int
    height_px: int

    @property
    def size_bytes(self) -> int:
        """Size of its pixels, uncompressed."""
        return self.width_px * self.height_px * np.dtype(self.dtype).itemsize


class Footprint:
    """The polygon of valid ground of one or many scenes, with its GeoJSON made once.

    Attributes:
        polygon: shapely geometry, (lon, lat) in EPSG:4326.
        geojson: the same as a GeoJSON dict.
    """

    def __init__(self, polygon: BaseGeometry) -> None:
        self.polygon = polygon
        self.geojson = shapely.geometry.mapping(polygon)
        shapely.prepare(self.polygon)


@dataclass(frozen=True)
class Scene:
    """One image of a collection; a pure function of its id and the planet's seed.

    Attributes:
        scene_id: Earth Engine asset id, without the `projects/` prefix.
        started: acquisition time, UTC.
        ended: end of the acquisition, UTC.
        crs: code of its own CRS, such as `EPSG:26919`.
        x0_m: easting of the upper left corner of its pixel grids.
        y0_m: northing of that corner.
        bands: its bands in order.
        footprint: polygon of valid ground.
        properties: Earth Engine's free properties.
        key: 31 bits that the world draws weather and light from.
        cloud_pct: cloud percentage, None for sensors without.
        swath: `(side, x_m, slope)`: valid pixels have `side * (x - x_m - slope * (y - y0_m)) <= 0`;
            None: all are.
        lost_m: eastings between which the data was lost, inside the footprint all the same; None: nothing.
        path: GeoTIFF that holds the pixels; None: the world draws them.
    """

    scene_id: str
    started: datetime
    ended: datetime
    crs: str
    x0_m: float
    y0_m: float
    bands: tuple[Band, ...]
    footprint: Footprint = field(compare=False)
    properties: dict[str, Any] = field(compare=False)
    key: int = 0
    cloud_pct: float | None = None
    swath: tuple[float, float, float] | None = None
    lost_m: tuple[float, float] | None = None
    path: str | None = None

    def asset(self) -> dict[str, Any]:
        """The scene as an `EarthEngineAsset` (Earth Engine REST reference, `v1.projects.assets`)."""
        return {
            "type": "IMAGE",
            "name": f"projects/earthengine-public/assets/{self.scene_id}",
            "id": self.scene_id,
            "updateTime": rfc3339(self.ended),
            "startTime": rfc3339(self.started),
            "endTime": rfc3339(self.ended),
            "properties": self.properties,
            "geometry": self.footprint.geojson,
            "bands": [_band_json(self.crs, self.x0_m, self.y0_m, band) for band in self.bands],
            "sizeBytes": str(sum(band.size_bytes for band in self.bands)),
        }


@lru_cache(maxsize=65536)
def _band_json(crs: str, x0_m: float, y0_m: float, band: Band) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {
        "uint8": {"precision": "INT", "range": {"max": 255}},
        "uint16": {"precision": "INT", "range": {"max": 65535}},
        "int16": {"precision": "INT", "range": {"min": -32768, "max": 32767}},
        "float32": {"precision": "FLOAT"},
    }
    return {
        "id": band.name,
        "dataType": kinds[band.dtype],
        # Zero shears are left out, as Earth Engine leaves out zero-valued fields.
        "grid": {
            "crsCode": crs,
            "dimensions": {"width": band.width_px, "height": band.height_px},
            "affineTransform": {
                "scaleX": band.gsd_m,
                "translateX": x0_m,
                "scaleY": -band.gsd_m,
                "translateY": y0_m,
            },
        },
    }


def rfc3339(moment: datetime) -> str:
    """A UTC time as Earth Engine writes it, such as `2019-06-16T16:29:34Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Collection(Protocol):
    """A source of scenes of one collection id."""

    def find(self, scene_id: str) -> Scene | None:
        """The scene of this id, or None when there is none."""

    def within(self, bounds: Bounds) -> Iterable[Scene]:
        """Every scene whose footprint may touch `bounds` (west, south, east, north in degrees), any order."""


class Catalog:
    """All collections of a planet, procedural and mounted.

    Args:
        seed: the planet's seed.
        mounted: scenes of mounted files by collection id; they hide the procedural scenes of their
            collection that they touch.
        now: procedural scenes that are acquired later do not exist yet; None: all exist.
    """

    def __init__(
        self, seed: int, mounted: dict[str, Sequence[Scene]] | None = None, now: datetime | None = None
    ) -> None:
        from resources.planet.naip_scenes import NaipScenes
        from resources.planet.sentinel2_scenes import Sentinel2Scenes

        self._procedural: dict[str, Collection] = {
            NAIP.collection: NaipScenes(seed),
            SENTINEL2.collection: Sentinel2Scenes(seed),
        }
        self._mounted = {
            name: {scene.scene_id: scene for scene in scenes} for name, scenes in (mounted or {}).items()
        }
        self._now = now
        self.collections = frozenset(self._procedural) | frozenset(self._mounted)
        # Clients ask for hundreds of chips of one scene, and for a listing page by page.
        self.find: Callable[[str], Scene | None] = lru_cache(maxsize=8192)(self._find)

    def _find(self, scene_id: str) -> Scene | None:
        """The scene of an asset id, or None when there is none."""
        collection, _, _ = scene_id.rpartition("/")
        mounted = self._mounted.get(collection, {}).get(scene_id)
        if mounted is not None or collection not in self._procedural:
            return mounted
        scene = self._procedural[collection].find(scene_id)
        if scene is None or not self._is_acquired(scene) or self._is_hidden(collection, scene):
            return None
        return scene

    def _is_acquired(self, scene: Scene) -> bool:
        return self._now is None or scene.started <= self._now

    def _is_hidden(self, collection: str, scene: Scene) -> bool:
        return any(
            scene.footprint.polygon.intersects(mount.footprint.polygon)
            for mount in self._mounted.get(collection, {}).values()
        )

    def touching(self, collection: str, region: BaseGeometry) -> list[Scene]:
        """The scenes of a collection whose footprint intersects a region.

        Args:
            collection: a member of `collections`.
            region: shapely geometry, (lon, lat) in EPSG:4326.

        Returns:
            The scenes in the order of their ids.
        """
        # The footprint is kept beside its answer: the id of one that is gone may be that of the next.
        answers: dict[int, tuple[Footprint, bool]] = {}

        def touches(scene: Scene) -> bool:
            # Hundreds of scenes share a footprint: ask once for each.
            footprint = scene.footprint
            if id(footprint) not in answers:
                answers[id(footprint)] = footprint, footprint.polygon.intersects(region)
            return answers[id(footprint)][1]

        found = [scene for scene in self._mounted.get(collection, {}).values() if touches(scene)]
        if collection in self._procedural:
            procedural = [
                scene
                for scene in self._procedural[collection].within(region.bounds)
                if self._is_acquired(scene) and touches(scene)
            ]
            if self._mounted.get(collection):
                procedural = [scene for scene in procedural if not self._is_hidden(collection, scene)]
            found += procedural
        return sorted(found, key=lambda scene: scene.scene_id)
