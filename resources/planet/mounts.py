"""Real GeoTIFFs served as scenes of a collection: their catalogue entries and their pixels.

Everything procedural is elsewhere; over mounted ground the catalogue hides it.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import shapely

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import transformer
from graft_pipeline.imagery import NAIP, SENTINEL2
from resources.planet.catalog import Band, Footprint, Scene
from resources.planet.pixels import PixelGrid

_COLLECTIONS = {sensor.name: sensor.collection for sensor in (NAIP, SENTINEL2)}
#: Names of bands without a description, in the order in which RGB files hold them.
_BANDS = {NAIP.collection: ("R", "G", "B", "N"), SENTINEL2.collection: ("B4", "B3", "B2", "B8")}
_DTYPES = ("uint8", "uint16", "int16", "float32")
_YEAR = re.compile(r"(?:^|_)((?:19|20)\d\d)(\d{4})?(?=_|$)")


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
    import rasterio
    from rasterio.errors import CRSError, RasterioIOError

    if not path.is_file():
        raise InputError(f"No file {path} to mount: correct the path.")
    try:
        with rasterio.open(path) as file:
            crs, affine, size = file.crs, file.transform, (file.width, file.height)
            dtypes, descriptions, tags = file.dtypes, file.descriptions, file.tags()
    except RasterioIOError as error:
        raise InputError(f"Cannot read {path} as a raster: {error}. Mount a GeoTIFF.") from error
    try:
        epsg = crs.to_epsg() if crs else None
    except CRSError:
        epsg = None
    if epsg is None:
        raise InputError(
            f"{path} has no CRS with an EPSG code: reproject it, for example with gdalwarp -t_srs EPSG:..."
        )
    if affine.b or affine.d or affine.a <= 0 or affine.a != -affine.e:
        raise InputError(f"{path} is not a north-up grid of square pixels: reproject it with gdalwarp.")
    if len(set(dtypes)) > 1 or dtypes[0] not in _DTYPES:
        raise InputError(
            f"{path} holds {', '.join(sorted(set(dtypes)))} pixels: use one of {', '.join(_DTYPES)}."
        )
    plain = _BANDS.get(collection, ("R", "G", "B", "N"))
    names = [
        description or (plain[index] if index < len(plain) else f"B{index + 1}")
        for index, description in enumerate(descriptions)
    ]
    started = _date(path.stem, tags.get("TIFFTAG_DATETIME", ""))
    width, height = size
    ground = shapely.box(affine.c, affine.f - height * affine.a, affine.c + width * affine.a, affine.f)
    points = shapely.get_coordinates(shapely.segmentize(ground, max(width, height) * affine.a / 16))
    lon, lat = transformer(f"EPSG:{epsg}", "EPSG:4326").transform(points[:, 0], points[:, 1])
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()):
        raise InputError(
            f"{path} reaches beyond the range of EPSG:{epsg}: cut it, or correct its georeference."
        )
    properties: dict[str, object] = {"system:index": path.stem}
    if collection == SENTINEL2.collection:
        try:
            properties[str(SENTINEL2.cloud_property)] = float(tags.get(str(SENTINEL2.cloud_property), 0.0))
        except ValueError as error:
            raise InputError(
                f"{path}: its tag {SENTINEL2.cloud_property} is no number. Correct it."
            ) from error
    return Scene(
        scene_id=f"{collection}/{path.stem}",
        started=started,
        ended=started + timedelta(days=1),
        crs=f"EPSG:{epsg}",
        x0_m=affine.c,
        y0_m=affine.f,
        bands=tuple(Band(name, dtypes[0], affine.a, width, height) for name in names),
        footprint=Footprint(shapely.Polygon(np.column_stack([lon, lat]))),
        properties=properties,
        path=str(path.resolve()),
    )


def _date(stem: str, tag: str) -> datetime:
    found = _YEAR.search(stem) or re.match(r"((?:19|20)\d\d):(\d\d:\d\d)", tag)
    if found is None:
        return datetime(2020, 7, 1, tzinfo=UTC)
    day = (found[2] or "0701").replace(":", "")
    try:
        return datetime(int(found[1]), int(day[:2]), int(day[2:]), tzinfo=UTC)
    except ValueError:
        return datetime(int(found[1]), 7, 1, tzinfo=UTC)


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
    from rasterio.warp import Resampling, reproject

    out = np.zeros((len(bands), grid.height_px, grid.width_px), bands[0].dtype)
    numbers = [scene.bands.index(band) + 1 for band in bands]
    with rasterio.open(scene.path) as file:
        reproject(
            rasterio.band(file, numbers),
            out,
            dst_transform=rasterio.Affine(*grid.affine),
            dst_crs=grid.crs,
            dst_nodata=0,
            resampling=Resampling.nearest,
        )
    return list(out)
