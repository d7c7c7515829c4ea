"""GeoTIFFs as scenes: what their headers and names say, and their pixels on another grid.

Where files come from is in stac.py, imagery_folder.py and planet/mounts.py.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid, transformer

#: Largest block of a GeoTIFF from elsewhere that is decoded: one whose tiles a few bytes inflate to gigabytes is no
#: scene.
MAX_BLOCK_BYTES = 1 << 28

_DTYPES = ("uint8", "uint16", "int16", "float32")
_DATE = re.compile(r"(?:^|_)((?:19|20)\d\d)(?:-?(\d\d)-?(\d\d)(?:T(\d\d)(\d\d)(\d\d)Z?)?)?(?=_|$)")
_TAG = re.compile(r"((?:19|20)\d\d):(\d\d):(\d\d)(?: (\d\d):(\d\d):(\d\d))?")


@dataclass(frozen=True)
class Header:
    """What a usable file says of itself.

    Attributes:
        crs: code of its CRS, such as `EPSG:26914`.
        x0_m: easting of the upper left corner.
        y0_m: northing of that corner.
        gsd_m: side of a pixel.
        width_px: columns.
        height_px: rows.
        dtype: numpy name of every band's type.
        descriptions: of the bands, None where there is none.
        tags: its TIFF tags.
        footprint: its rectangle, a polygon in EPSG:4326.
    """

    crs: str
    x0_m: float
    y0_m: float
    gsd_m: float
    width_px: int
    height_px: int
    dtype: str
    descriptions: tuple[str | None, ...]
    tags: dict[str, str]
    footprint: shapely.Polygon


def read_header(path: Path) -> Header:
    """Read what a GeoTIFF says of itself.

    Args:
        path: a local file.

    Returns:
        Its header.

    Raises:
        InputError: if it is no raster with an EPSG code, square north-up pixels, one type and a place on earth.
    """
    import rasterio
    from rasterio.errors import CRSError, RasterioIOError

    if not path.is_file():
        raise InputError(f"No file {path}: correct the path.")
    try:
        with rasterio.open(path) as file:
            crs, affine, size = file.crs, file.transform, (file.width, file.height)
            dtypes, descriptions, tags = file.dtypes, _descriptions(file), file.tags()
    except (RasterioIOError, CRSError, UnicodeDecodeError) as error:
        problem = str(error).rstrip(".")
        raise InputError(f"Cannot read {path} as a raster: {problem}. Give a GeoTIFF.") from error
    try:
        epsg = crs.to_epsg() if crs else None
    except CRSError:
        epsg = None
    if epsg is None:
        raise InputError(
            f"{path} has no CRS with an EPSG code: reproject it, for example with gdalwarp -t_srs EPSG:..."
        )
    # Sides that were divided out of bounds differ by rounding.
    if affine.b or affine.d or affine.a <= 0 or not math.isclose(affine.a, -affine.e, rel_tol=1e-6):
        raise InputError(f"{path} is not a north-up grid of square pixels: reproject it with gdalwarp.")
    if len(set(dtypes)) > 1 or dtypes[0] not in _DTYPES:
        raise InputError(
            f"{path} holds {', '.join(sorted(set(dtypes)))} pixels: use one of {', '.join(_DTYPES)}."
        )
    width, height = size
    ground = shapely.box(affine.c, affine.f - height * affine.a, affine.c + width * affine.a, affine.f)
    try:
        points = shapely.get_coordinates(shapely.segmentize(ground, max(width, height) * affine.a / 16))
    except shapely.errors.GEOSException:
        # Pixels so small that there is no ground.
        points = np.full((1, 2), np.nan)
    lon, lat = transformer(f"EPSG:{epsg}", "EPSG:4326").transform(points[:, 0], points[:, 1])
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()):
        raise InputError(
            f"{path} reaches beyond the range of EPSG:{epsg}: cut it, or correct its georeference."
        )
    return Header(
        crs=f"EPSG:{epsg}",
        x0_m=affine.c,
        y0_m=affine.f,
        gsd_m=affine.a,
        width_px=width,
        height_px=height,
        dtype=dtypes[0],
        descriptions=tuple(descriptions),
        tags=dict(tags),
        footprint=shapely.Polygon(np.column_stack([lon, lat])),
    )


def _descriptions(source: Any) -> tuple[str | None, ...]:
    """What a raster calls its bands; None where it does not, or not in UTF-8."""
    try:
        return tuple(source.descriptions)
    except UnicodeDecodeError:
        return (None,) * int(source.count)


def block_bytes(source: Any) -> int:
    """Memory that decoding one block of an open rasterio dataset takes, all bands."""
    height, width = max(source.block_shapes, key=lambda shape: shape[0] * shape[1])
    return int(height * width * sum(np.dtype(dtype).itemsize for dtype in source.dtypes))


def acquired_at(stem: str, tags: dict[str, str]) -> datetime | None:
    """When a file was acquired, by its name or else by its tags.

    Args:
        stem: file name without extension; `_YYYY`, `_YYYYMMDD`, `_YYYY-MM-DD` or `_YYYYMMDDTHHMMSS` of it counts, a
            full date before a year.
        tags: TIFF tags; TIFFTAG_DATETIME counts.

    Returns:
        UTC; the middle of the year where only that is known; None where nothing is.
    """
    named = sorted(_DATE.finditer(stem), key=lambda match: match[2] is None)
    tagged = _TAG.match(tags.get("TIFFTAG_DATETIME", ""))
    for match in (*named, *([tagged] if tagged else [])):
        year, *rest = (int(part) for part in match.groups() if part is not None)
        try:
            return datetime(year, *(rest or (7, 1)), tzinfo=UTC)  # type: ignore[misc]
        except ValueError:
            # Digits that are no date, such as a sheet's number.
            continue
    return None


def warp(
    source: Any, numbers: Sequence[int], affine: Any, crs: str, width_px: int, height_px: int
) -> NDArray[Any]:
    """Bands of an open raster on a grid: GDAL's nearest neighbour, which keeps pixels of the raster's own grid.

    Args:
        source: open rasterio dataset; only the window below the grid is read.
        numbers: of its bands, from 1.
        affine: the grid's transform.
        crs: the grid's CRS.
        width_px: columns.
        height_px: rows.

    Returns:
        (bands, height_px, width_px) in the raster's type; 0 outside of it and where it has no data: by its nodata
        value (in all of these bands), by its mask, or where its alpha band is 0. Values that are not finite stay.

    Raises:
        rasterio.errors.RasterioError: if it cannot be read.
    """
    import rasterio
    from rasterio.warp import Resampling, reproject

    def warped(these: list[int]) -> NDArray[Any]:
        out = np.zeros((len(these), height_px, width_px), source.dtypes[these[0] - 1])
        reproject(
            rasterio.band(source, these),
            out,
            dst_transform=affine,
            dst_crs=crs,
            resampling=Resampling.nearest,
        )
        return out

    bands = warped(list(numbers))
    # rasterio fills what has no data with the raster's nodata value: it takes a 0 to fill with for none given.
    if source.nodata is not None:
        blank = np.isnan(bands) if np.isnan(source.nodata) else bands == np.array(source.nodata, bands.dtype)
        bands[:, blank.all(axis=0)] = 0
    # Warped by itself: as GDAL's alpha of the others it would darken those that it makes translucent.
    if alpha := _alpha_band(source, numbers):
        bands[:, warped([alpha])[0] == 0] = 0
    return bands


def _alpha_band(source: Any, numbers: Sequence[int]) -> int:
    """Number of a raster's alpha band; 0 without one.

    GDAL takes the fourth band of many files for alpha that is near infrared: one that is asked for, or that has
    another description, is none.
    """
    from rasterio.enums import ColorInterp

    for number, (kind, said) in enumerate(
        zip(source.colorinterp, _descriptions(source), strict=True), start=1
    ):
        if kind == ColorInterp.alpha and number not in numbers and "alpha" in (said or "alpha").lower():
            return number
    return 0


def cut(parts: Sequence[tuple[Any, int]], grid: Grid) -> NDArray[Any]:
    """Bands of one or several open rasters on a grid.

    Args:
        parts: (open dataset, band number) in the order of the result.
        grid: where.

    Returns:
        (grid.height_px, grid.width_px, bands) array in the widest of the bands' types.

    Raises:
        rasterio.errors.RasterioError: if one cannot be read.
    """
    planes: dict[tuple[int, int], NDArray[Any]] = {}
    for source in {id(source): source for source, _ in parts}.values():
        # All bands of a file at once: pixels that lie side by side are decoded once.
        numbers = list(dict.fromkeys(number for other, number in parts if other is source))
        cut_out = warp(source, numbers, grid.affine, grid.crs, grid.width_px, grid.height_px)
        planes |= {(id(source), number): plane for number, plane in zip(numbers, cut_out, strict=True)}
    return np.stack([planes[id(source), number] for source, number in parts], axis=-1)
