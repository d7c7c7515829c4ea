"""Images that questions are asked about: files that GDAL opens, and tiles of a deployment.

What is done with them is in interpreter.py; rasters that are mapped as a whole are read in ../raster.py.
"""

import warnings
from pathlib import Path

import duckdb
import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from upath import UPath

from graft_pipeline.chips import decode
from graft_pipeline.errors import DataError, InputError
from graft_pipeline.manifests import connect, partition_folder
from graft_pipeline.schemas import CHIPS
from graft_pipeline.shards import read_member
from training.zero_shot.answering.interpreter import Image, Limits
from training.zero_shot.raster import pixel_size_m, rgb_bands


def read_image(
    file: str | Path,
    gsd_m: float | None,
    display_range: tuple[float, float] | None = None,
    most_px: int = Limits.pixels,
) -> Image:
    """Read an image file.

    Args:
        file: GeoTIFF, PNG, JPEG or whatever else GDAL opens; rows run from north to south.
        gsd_m: metres per pixel of files that have no coordinates; None: they are refused.
        display_range: source values mapped linearly to 0..255; None when they are bytes already.
        most_px: pixels that are read at most.

    Returns:
        The image, with square pixels.

    Raises:
        InputError: if it cannot be opened, is no RGB image, too large, or not north-up, or the range holds no values.
        DataError: if its pixels cannot be read.
    """
    if display_range is not None and not display_range[0] < display_range[1]:
        low, high = display_range
        raise InputError(
            f"No value is between {low:g} and {high:g}: give a range whose first value is the lower."
        )
    try:
        with warnings.catch_warnings():
            # A picture without coordinates is what `gsd_m` is for.
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            opened = rasterio.open(file)
    except RasterioError as error:
        raise InputError(f"{file} is no image that can be opened ({error}): check the path.") from error
    with opened as source:
        size = pixel_size_m(source) if source.crs is not None else (gsd_m, gsd_m)
        if None in size:
            raise InputError(f"{file} does not say how large its pixels are: give the metres per pixel.")
        turn = source.transform
        if source.crs is not None and (turn.b or turn.d or turn.a < 0 or turn.e > 0):
            raise InputError(f"{file} is not north-up: warp it first, such as with gdalwarp.")
        if source.width * source.height > most_px:
            raise InputError(
                f"{file} has {source.width * source.height:,} pixels, more than {most_px:,}: cut out a part of it."
            )
        bands = rgb_bands(source)
        if display_range is None and any(source.dtypes[band - 1] != "uint8" for band in bands):
            raise InputError(
                f"{file} holds {source.dtypes[bands[0] - 1]}, not uint8: give the range of values to display, such as "
                "0 3000 for Sentinel-2 reflectance."
            )
        gsd = max(size)
        shape = tuple(
            max(1, round(side * own / gsd))
            for side, own in ((source.height, size[1]), (source.width, size[0]))
        )
        try:
            pixels = source.read(bands, out_shape=(3, *shape), resampling=Resampling.average)
        except RasterioError as error:
            raise DataError(f"Pixels of {file} cannot be read ({error}): restore the file.") from error
    return Image(_shown(np.moveaxis(pixels, 0, -1), display_range), float(gsd))


def _shown(pixels: NDArray[np.generic], display_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    if display_range is None or pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels, dtype=np.uint8)
    low, high = display_range
    scaled = (np.nan_to_num(pixels.astype(np.float32)) - low) / (high - low) * 255
    return np.ascontiguousarray(np.clip(scaled, 0, 255), dtype=np.uint8)


def read_tile(root: UPath | Path, tile_id: str) -> Image:
    """Read the chip of a tile.

    Args:
        root: storage root of the deployment.
        tile_id: such as `naip-30012`.

    Returns:
        The chip.

    Raises:
        InputError: if there is no such tile, or it has no chip.
        DataError: if the chip is damaged.
    """
    query = "SELECT sensor, region, shard, \"offset\", size_bytes, gsd_m FROM chips WHERE tile_id = ? AND status = 'ok'"
    try:
        with connect(root, [CHIPS]) as connection:
            row = connection.execute(query, [tile_id]).fetchone()
    except duckdb.CatalogException:
        row = None
    if row is None:
        raise InputError(
            f"{tile_id!r} is neither a file nor a tile with a chip: name an image file, or an id of graft query "
            "\"SELECT tile_id FROM chips WHERE status = 'ok'\"."
        )
    sensor, region, shard, offset, size_bytes, gsd_m = row
    folder = partition_folder(root, CHIPS, sensor=sensor, region=region)
    pixels = decode(read_member(folder, shard, offset, size_bytes))
    return Image(pixels, float(gsd_m))
