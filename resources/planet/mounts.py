"""Real GeoTIFFs served as scenes of a collection: their catalogue entries and their pixels.

Everything procedural is elsewhere; over mounted ground the catalogue hides it.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from graft_pipeline.errors import InputError
from graft_pipeline.imagery import NAIP, SENTINEL2
from resources.planet.catalog import Band, Footprint, Scene
from resources.planet.pixels import PixelGrid
from resources.rasters import acquired_at, read_header, warp

_COLLECTIONS = {sensor.name: sensor.collection for sensor in (NAIP, SENTINEL2)}
#: Names of bands without a description, in the order in which RGB files hold them.
_BANDS = {NAIP.collection: ("R", "G", "B", "N"), SENTINEL2.collection: ("B4", "B3", "B2", "B8")}


def mounted_scenes(mounts: Mapping[str, Sequence[str]]) -> dict[str, list[Scene]]:
    """Read the headers of the files to mount.

    Args:
        mounts: paths of GeoTIFFs by sensor name (`naip`, `sentinel2`) or by collection id. A file's date is
            the `_YYYY` or `_YYYYMMDD` of its name, else its TIFFTAG_DATETIME, else the middle of 2020.

    Returns:
        Scenes by collection id; `{collection}/{file stem}` is their id.

    Raises:
        InputError: if a key is neither sensor nor collection, or a file is no usable raster.
    """
    scenes: dict[str, list[Scene]] = {}
    for name, paths in mounts.items():
        collection = _COLLECTIONS.get(name, name)
        if "/" not in collection:
            raise InputError(
                f"Cannot mount on {name!r}: use {', '.join(_COLLECTIONS)}, or the id of a collection such as "
                f"{NAIP.collection}."
            )
        for path in paths:
            scene = _scene(collection, Path(path))
            if any(scene.scene_id == other.scene_id for other in scenes.get(collection, ())):
                raise InputError(f"Two files named {Path(path).stem!r} on {name!r}: rename one of them.")
            scenes.setdefault(collection, []).append(scene)
    return scenes


def _scene(collection: str, path: Path) -> Scene:
    header = read_header(path)
    plain = _BANDS.get(collection, ("R", "G", "B", "N"))
    names = [
        description or (plain[index] if index < len(plain) else f"B{index + 1}")
        for index, description in enumerate(header.descriptions)
    ]
    if len(set(names)) < len(names):
        raise InputError(
            f"{path} names two of its bands alike ({', '.join(names)}): give each a description of its own."
        )
    started = acquired_at(path.stem, header.tags) or datetime(2020, 7, 1, tzinfo=UTC)
    properties: dict[str, object] = {"system:index": path.stem}
    if collection == SENTINEL2.collection:
        try:
            properties[str(SENTINEL2.cloud_property)] = float(
                header.tags.get(str(SENTINEL2.cloud_property), 0.0)
            )
        except ValueError as error:
            raise InputError(
                f"{path}: its tag {SENTINEL2.cloud_property} is no number. Correct it."
            ) from error
    return Scene(
        scene_id=f"{collection}/{path.stem}",
        started=started,
        ended=started + timedelta(days=1),
        crs=header.crs,
        x0_m=header.x0_m,
        y0_m=header.y0_m,
        bands=tuple(
            Band(name, header.dtype, header.gsd_m, header.width_px, header.height_px) for name in names
        ),
        footprint=Footprint(header.footprint),
        properties=properties,
        path=str(path.resolve()),
    )


def read_mount(scene: Scene, bands: Sequence[Band], grid: PixelGrid) -> list[np.ndarray]:
    """Reproject a mounted file to a grid: GDAL's nearest neighbour, 0 outside and where the file has no data.

    Args:
        scene: a mounted scene.
        bands: some of its bands.
        grid: what is asked for.

    Returns:
        One (height, width) array per band, in the file's type.
    """
    import rasterio

    numbers = [scene.bands.index(band) + 1 for band in bands]
    with rasterio.open(scene.path) as file:
        affine = rasterio.Affine(*grid.affine)
        return list(warp(file, numbers, affine, grid.crs, grid.width_px, grid.height_px))
