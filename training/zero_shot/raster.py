"""Zero-shot segmentation of a raster file of any size: overlapping windows in, a GeoTIFF of classes out.

Scores of single crops are in segment.py; which words stand for a class, in prompts.py.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyproj
import rasterio
from numpy.typing import NDArray
from pyproj.exceptions import ProjError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, DatasetWriter
from rasterio.windows import Window

from graft_pipeline.errors import DataError, InputError
from graft_pipeline.manifests import atomic_local_file
from training.encoders import CROP_PX, Clip, check_patch_tower, encode_texts
from training.zero_shot.classify import class_embeddings
from training.zero_shot.prompts import PromptSet
from training.zero_shot.windows import Lattice, finished_rows

logger = logging.getLogger(__name__)

#: Value of pixels that the raster has no data for.
NODATA = 255
#: Colours of the classes, in their order, repeated when they run out (Tol's "muted" and "bright" schemes).
PALETTE = (
    (51, 34, 136), (136, 204, 238), (68, 170, 153), (17, 119, 51), (153, 153, 51), (221, 204, 119),
    (204, 102, 119), (136, 34, 85), (170, 68, 153), (68, 119, 170), (102, 204, 238), (34, 136, 51),
    (204, 187, 68), (238, 102, 119), (170, 51, 119), (187, 187, 187),
)  # fmt: skip
_BLOCK_PX = 256
#: Side of the blocks that are refined, about: what SAM looks at.
_REFINED_PX = 1024

#: What a projection's scale may be off without being corrected: UTM's is 0.9996, which is nothing to an encoder.
_SCALE_TOLERANCE = 0.01

#: (H, W, 3) uint8 pixels, (K, rows, columns) float32 patch scores, and height and width of a patch in pixels in,
#: (K, H, W) float32 scores out; patches may reach beyond the pixels to the south and east.
Refine = Callable[[NDArray[np.uint8], NDArray[np.float32], tuple[float, float]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class RasterOptions:
    """How a raster is read and cut.

    Attributes:
        gsd_m: metres per pixel that the encoder was trained at; the raster is resampled to it for the encoder
            alone, the map keeps the raster's own grid.
        bands: 1-based numbers of the red, green and blue band; None: by the file's colour interpretation, else
            the first three.
        display_range: source values mapped linearly to 0..255; None when the raster is uint8.
        overlap: share of a window's side that its neighbour sees too.
        batch_size: windows encoded at once.
    """

    gsd_m: float = 1.0
    bands: tuple[int, int, int] | None = None
    display_range: tuple[float, float] | None = None
    overlap: float = 0.25
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Reject options that no raster can be cut with."""
        if self.gsd_m <= 0 or self.batch_size <= 0 or not 0 <= self.overlap < 1:
            raise InputError("Give a positive gsd_m and batch_size, and an overlap from 0 to below 1.")
        if self.display_range is not None and not self.display_range[0] < self.display_range[1]:
            low, high = self.display_range
            raise InputError(
                f"A range of values from {low:g} to {high:g} shows nothing: give the lower one first."
            )


@dataclass(frozen=True)
class RasterMap:
    """What was written.

    Attributes:
        path: the GeoTIFF.
        classes: its classes, by pixel value.
        share: share of the valid pixels of each class.
        windows: how many windows were encoded.
        width_px: width of the map.
        height_px: height of the map.
    """

    path: Path
    classes: tuple[str, ...]
    share: dict[str, float]
    windows: int
    width_px: int
    height_px: int


def segment_raster(
    clip: Clip,
    source: str | Path,
    output: Path,
    prompts: PromptSet,
    options: RasterOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    refine: Refine | None = None,
) -> RasterMap:
    """Give every pixel of a raster the class that its text is nearest to.

    Windows that the encoder sees at its training resolution overlap; the scores of a patch are the mean over
    the windows that show it, weighted down towards their edges. Pixels are interpolated bilinearly between
    patches. Rows are written as soon as no later window touches them: memory grows with the raster's width,
    not with its height.

    Args:
        clip: pixel-level satellite encoder, or any open_clip ViT.
        source: anything that rasterio opens, with at least three bands.
        output: GeoTIFF to write: uint8 class numbers, `NODATA` where the source has no data, with the source's
            CRS and transform, a palette, and the class names as tags; it appears whole or not at all.
        prompts: classes and words, at most 255 classes.
        options: how the raster is read.
        progress: told (rows of windows done, rows of windows).
        refine: draws patch scores to outlines in the pixels, block by block, such as `prompted.Sam.refine`.

    Returns:
        What was written.

    Raises:
        InputError: if the source cannot be opened or has fewer than three bands, or the options do not fit it.
        DataError: if pixels of the source cannot be read.
    """
    options = options or RasterOptions()
    check_patch_tower(clip.model.visual)
    names = prompts.names
    if len(names) > NODATA:
        raise InputError(f"{len(names)} classes do not fit a uint8 map: segment at most {NODATA} at once.")
    classes = class_embeddings(prompts, partial(encode_texts, clip))
    try:
        file = rasterio.open(source)
    except RasterioError as error:
        raise InputError(f"{source} is no raster that can be opened ({error}): check the path.") from error
    with file:
        grid = _lattice(file, clip, options)
        reader = _Reader(file, grid, options)
        counts = np.zeros(NODATA + 1, dtype=np.int64)
        profile = {
            "driver": "GTiff", "width": file.width, "height": file.height, "count": 1, "dtype": "uint8",
            "crs": file.crs, "transform": file.transform, "nodata": NODATA, "compress": "deflate", "zlevel": 1,
            "tiled": True, "blockxsize": _BLOCK_PX, "blockysize": _BLOCK_PX, "bigtiff": "if_safer",
        }  # fmt: skip
        with (
            atomic_local_file(output) as partial_file,
            rasterio.open(partial_file, "w", **profile) as written,
        ):
            _describe(written, names, prompts)
            rows = finished_rows(clip, classes, reader.window, grid, options.batch_size, progress)
            blocks = (
                _pixel_rows(rows, grid, file, reader)
                if refine is None
                else _refined_rows(rows, grid, file, reader, refine)
            )
            for top, block in blocks:
                counts += np.bincount(block.ravel(), minlength=NODATA + 1)
                written.write(block, 1, window=Window(0, top, file.width, len(block)))
    valid = max(1, int(counts[:NODATA].sum()))
    logger.info("segmented %s into %s: %d windows", source, output, grid.windows)
    return RasterMap(
        path=output,
        classes=names,
        share={name: float(counts[number] / valid) for number, name in enumerate(names)},
        windows=grid.windows,
        width_px=int(profile["width"]),
        height_px=int(profile["height"]),
    )


def _lattice(file: DatasetReader, clip: Clip, options: RasterOptions) -> Lattice:
    """Patches over a raster, each as large on the ground as in training."""
    # A window shows CROP_PX pixels of the sensor, as training crops do.
    patch_m = options.gsd_m * CROP_PX / clip.model.visual.grid_size[0]
    x_m, y_m = pixel_size_m(file)
    if patch_m < max(x_m, y_m):
        raise InputError(
            f"A patch of the encoder ({patch_m:g} m) is smaller than a pixel of {file.name} "
            f"({x_m:g} x {y_m:g} m): the raster is too coarse for this encoder; check its gsd_m."
        )
    return Lattice.over(clip, file.width, file.height, patch_m / x_m, patch_m / y_m, options.overlap)


def pixel_size_m(file: DatasetReader) -> tuple[float, float]:
    """Width and height of a raster's pixel on the ground.

    Args:
        file: the raster.

    Returns:
        Metres at its middle; a metre of Web Mercator (EPSG:3857) is half a metre at 60 degrees north.
    """
    x, y = file.res
    if file.crs is None or not (file.crs.is_geographic or file.crs.is_projected):
        # Drawings and cameras have coordinates that lie nowhere on the Earth.
        return x, y
    middle = (file.bounds.top + file.bounds.bottom) / 2
    if not file.crs.is_geographic:
        factor = file.crs.linear_units_factor[1]
        along, across = _scale_at(file.crs, (file.bounds.left + file.bounds.right) / 2, middle)
        return x * factor / along, y * factor / across
    # Mean length of a degree on the WGS 84 ellipsoid; a few per mille are nothing to an encoder.
    return x * 111_320 * math.cos(math.radians(middle)), y * 111_132


def _scale_at(crs: CRS, x: float, y: float) -> tuple[float, float]:
    """Metres of a projection for a metre on the ground, eastwards and northwards; 1 where they nearly agree."""
    try:
        projected = pyproj.CRS.from_wkt(crs.to_wkt())
        lon, lat = pyproj.Transformer.from_crs(projected, projected.geodetic_crs, always_xy=True).transform(
            x, y
        )
        factors = pyproj.Proj(projected).get_factors(lon, lat)
    except ProjError:
        # A place where the projection is not defined.
        return 1.0, 1.0
    found = (float(factors.parallel_scale), float(factors.meridional_scale))
    if not all(math.isfinite(scale) for scale in found) or all(
        abs(scale - 1) < _SCALE_TOLERANCE for scale in found
    ):
        return 1.0, 1.0
    return found


class _Reader:
    """Windows of a raster as the encoder sees them."""

    def __init__(self, file: DatasetReader, grid: Lattice, options: RasterOptions) -> None:
        self._file, self._grid, self._range = file, grid, options.display_range
        self._bands = options.bands or rgb_bands(file)
        missing = [band for band in self._bands if not 1 <= band <= file.count]
        if missing:
            raise InputError(f"{file.name} has {file.count} bands, not {missing}: name three of its bands.")
        if self._range is None and any(file.dtypes[band - 1] != "uint8" for band in self._bands):
            raise InputError(
                f"{file.name} holds {file.dtypes[self._bands[0] - 1]}, not uint8: give the range of values to "
                "display, such as 0 3000 for Sentinel-2 reflectance."
            )

    def window(self, row: int, column: int) -> NDArray[np.uint8]:
        """The window that starts at a patch, (model_px, model_px, 3) uint8; mirrored beyond the raster."""
        grid, file = self._grid, self._file
        left, top = column * grid.patch_x, row * grid.patch_y
        right = min(file.width, left + grid.side * grid.patch_x)
        bottom = min(file.height, top + grid.side * grid.patch_y)
        width, height = right - left, bottom - top
        shape = (
            max(1, round(height / (grid.side * grid.patch_y) * grid.model_px)),
            max(1, round(width / (grid.side * grid.patch_x) * grid.model_px)),
        )
        image = self.pixels(Window(left, top, width, height), shape)
        outside = (grid.model_px - shape[0], grid.model_px - shape[1])
        return np.pad(image, ((0, outside[0]), (0, outside[1]), (0, 0)), mode="symmetric")

    def pixels(self, window: Window, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """Pixels of a window as they are shown, (*shape, 3) uint8."""
        # Averaged when it shrinks, so that nothing aliases.
        resampling = Resampling.average if shape[0] < window.height else Resampling.bilinear
        try:
            pixels = self._file.read(self._bands, window=window, out_shape=(3, *shape), resampling=resampling)
        except RasterioError as error:
            raise DataError(
                f"Pixels of {self._file.name} at row {window.row_off:.0f}, column {window.col_off:.0f} cannot be read "
                f"({error}): restore the file."
            ) from error
        if self._range is not None:
            low, high = self._range
            pixels = np.clip((pixels.astype(np.float32) - low) / (high - low) * 255, 0, 255)
            # No number is dark, as what other rasters have where they have no data.
            np.nan_to_num(pixels, copy=False)
        return np.moveaxis(pixels, 0, -1).astype(np.uint8)

    def is_missing(self, top: int, rows: int) -> NDArray[np.bool_]:
        """Where some rows of the raster have no data, (rows, width) bool."""
        window = Window(0, top, self._file.width, rows)
        missing = np.asarray(self._file.dataset_mask(window=window) == 0)
        # Rasters of floats have NaN there, whether they say so or not.
        for band in self._bands:
            if self._file.dtypes[band - 1].startswith("float"):
                missing |= np.isnan(self._file.read(band, window=window))
        return missing


def rgb_bands(file: DatasetReader) -> tuple[int, int, int]:
    """Which bands of a raster are red, green and blue.

    Args:
        file: the raster.

    Returns:
        1-based numbers, by the file's colour interpretation, else the first three.

    Raises:
        InputError: if it has fewer than three bands.
    """
    if file.count < 3:
        raise InputError(f"{file.name} has {file.count} bands: give an image of red, green and blue.")
    by_colour = {colour: number for number, colour in enumerate(file.colorinterp, start=1)}
    wanted = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    found = [by_colour[colour] for colour in wanted if colour in by_colour]
    return (found[0], found[1], found[2]) if len(found) == 3 else (1, 2, 3)


def _pixel_rows(
    patch_rows: Iterator[NDArray[np.float32]], grid: Lattice, file: DatasetReader, reader: _Reader
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Blocks of pixel rows, (top, (rows, width) uint8 classes), interpolated between patch rows."""
    place = (np.arange(file.width) + 0.5) / grid.patch_x - 0.5
    west, east_share = _neighbours(place, grid.columns)
    block = np.empty((_BLOCK_PX, file.width), dtype=np.uint8)
    at, top = 0, 0
    upsampled: dict[int, NDArray[np.float32]] = {}
    have = 0
    for y in range(file.height):
        north, south_share = _neighbours(np.array([(y + 0.5) / grid.patch_y - 0.5]), grid.rows)
        upper, lower = int(north[0]), min(int(north[0]) + 1, grid.rows - 1)
        while have <= lower:
            row = next(patch_rows)
            # (K, width): the class is the outer axis, as argmax over it then runs along memory.
            left, right = row[west].T, row[np.minimum(west + 1, grid.columns - 1)].T
            upsampled[have] = left + (right - left) * east_share
            have += 1
        for old in [number for number in upsampled if number < upper]:
            del upsampled[old]
        share = np.float32(south_share[0])
        scores = upsampled[upper] + (upsampled[lower] - upsampled[upper]) * share
        block[at] = scores.argmax(axis=0)
        at += 1
        if at == _BLOCK_PX or y == file.height - 1:
            block[:at][reader.is_missing(top, at)] = NODATA
            yield top, block[:at]
            top, at = top + at, 0


def _refined_rows(
    patch_rows: Iterator[NDArray[np.float32]],
    grid: Lattice,
    file: DatasetReader,
    reader: _Reader,
    refine: Refine,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """As `_pixel_rows`, with the scores of each block refined by its pixels.

    Blocks are refined with the patches around them, between which scores are interpolated across their borders.
    """

    def down(patch: int) -> int:
        return file.height if patch >= grid.rows else int(patch * grid.patch_y)

    def along(patch: int) -> int:
        return file.width if patch >= grid.columns else int(patch * grid.patch_x)

    upper: list[NDArray[np.float32]] = []
    for first, last, above, below in _blocks(grid.rows, grid.patch_y):
        upper += [next(patch_rows) for _ in range(below - above - len(upper))]
        scores = np.stack(upper).transpose(2, 0, 1)
        block = np.empty((down(last) - down(first), file.width), dtype=np.uint8)
        for start, end, west, east in _blocks(grid.columns, grid.patch_x):
            shape = (down(below) - down(above), along(east) - along(west))
            pixels = reader.pixels(Window(along(west), down(above), shape[1], shape[0]), shape)
            refined = refine(pixels, scores[:, :, west:east], (grid.patch_y, grid.patch_x)).argmax(axis=0)
            rows = slice(down(first) - down(above), down(last) - down(above))
            block[:, along(start) : along(end)] = refined[
                rows, along(start) - along(west) : along(end) - along(west)
            ]
        block[reader.is_missing(down(first), len(block))] = NODATA
        yield down(first), block
        # The block's last patches are above the next one.
        upper = upper[last - 1 - above :]


def _blocks(patches: int, patch_px: float) -> Iterator[tuple[int, int, int, int]]:
    """Blocks along an axis: first patch, the one behind the last, and the same with a patch more on either side."""
    step = max(1, round(_REFINED_PX / patch_px))
    for first in range(0, patches, step):
        last = min(first + step, patches)
        yield first, last, max(0, first - 1), min(last + 1, patches)


def _neighbours(place: NDArray[np.float64], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The patch before each place on an axis, and the share of the one behind; ends repeat."""
    inside = np.clip(place, 0, count - 1)
    before = np.floor(inside).astype(np.int64)
    return before, (inside - before).astype(np.float32)


def _describe(written: DatasetWriter, names: Sequence[str], prompts: PromptSet) -> None:
    written.write_colormap(
        1, {number: (*PALETTE[number % len(PALETTE)], 255) for number in range(len(names))}
    )
    written.set_band_description(1, "class")
    tags: Mapping[str, str] = {f"class_{number}": name for number, name in enumerate(names)}
    written.update_tags(1, **tags, templates=" | ".join(prompts.templates))
