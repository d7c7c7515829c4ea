"""A scene's pixels on any requested grid, cut as Earth Engine does: natively where grids agree, else nearest.

How the world looks is world.py; which file format and which limits the protocol has, earth_engine_api.py.
"""

import math
import os
import threading
from dataclasses import dataclass

import numpy as np

from graft_pipeline.geometry import Grid, transformer
from resources.planet.catalog import Band, Scene
from resources.planet.sentinel2_scenes import BANDS_10M
from resources.planet.world import World

#: Native pixels are drawn in blocks of this side at most, whatever is asked for.
BLOCK_PX = 1024
_METRES_PER_DEGREE = 111_320.0
#: Classes of Sen2Cor's scene classification: cloud shadow, high-probability cloud, vegetation for clear ground.
_SCL_SHADOW, _SCL_CLOUD, _SCL_CLEAR = 3, 9, 4

# Drawing is arithmetic of many small steps: more threads would take each other's caches and turns, and who asks needs
# cores, too.
_drawing = threading.BoundedSemaphore(max(1, (os.cpu_count() or 1) // 2))


@dataclass(frozen=True)
class PixelGrid:
    """A requested grid.

    Attributes:
        crs: CRS code or WKT as requested.
        affine: (scale_x, shear_x, translate_x, shear_y, scale_y, translate_y), pixel corner to CRS.
        width_px: columns.
        height_px: rows.
    """

    crs: str
    affine: tuple[float, float, float, float, float, float]
    width_px: int
    height_px: int


def wgs84_twin(crs: str) -> str:
    """The WGS 84 code of a NAD83 CRS: the planet has one datum, so both name the same ground."""
    if crs.startswith("EPSG:269") and len(crs) == 10 and 1 <= int(crs[-2:]) <= 23:
        return f"EPSG:326{crs[-2:]}"
    return "EPSG:4326" if crs == "EPSG:4269" else crs


def read_pixels(world: World, scene: Scene, bands: list[Band], grid: PixelGrid) -> list[np.ndarray]:
    """Cut bands of a scene on a grid.

    A pixel depends on its own ground only, never on the window. Where the grid is the band's own, or one of
    its overviews (twice, four times ... the pixel size), the pixels are the band's; elsewhere each output
    pixel takes the pixel its centre lies in, as Earth Engine does by default.

    Args:
        world: the planet.
        scene: a procedural or mounted scene.
        bands: some of its bands.
        grid: what is asked for.

    Returns:
        One (height, width) array per band, in the band's own type; 0 where the scene has no pixel.
    """
    if scene.path is not None:
        from resources.planet.mounts import read_mount

        return read_mount(scene, bands, grid)
    answer: dict[str, np.ndarray] = {}
    for gsd_m in sorted({band.gsd_m for band in bands}):
        group = [band for band in bands if band.gsd_m == gsd_m]
        with _drawing:
            for band, pixels in zip(group, _cut(world, scene, group, grid), strict=True):
                answer[band.name] = pixels
    return [answer[band.name] for band in bands]


def _cut(world: World, scene: Scene, bands: list[Band], grid: PixelGrid) -> np.ndarray:
    """(bands, height, width) of bands that share a native grid."""
    source, target = wgs84_twin(scene.crs), wgs84_twin(grid.crs)
    native = bands[0]
    gsd = native.gsd_m * 2 ** _overview(native, target, grid)
    width = math.ceil(native.width_px * native.gsd_m / gsd)
    height = math.ceil(native.height_px * native.gsd_m / gsd)
    scale_x, shear_x, x0, shear_y, scale_y, y0 = grid.affine
    out = np.zeros((len(bands), grid.height_px, grid.width_px), native.dtype)
    if source == target and shear_x == shear_y == 0:
        cols = _index((x0 + (np.arange(grid.width_px) + 0.5) * scale_x - scene.x0_m) / gsd, width)
        rows = _index((scene.y0_m - y0 - (np.arange(grid.height_px) + 0.5) * scale_y) / gsd, height)
        out_cols, out_rows = np.flatnonzero(cols >= 0), np.flatnonzero(rows >= 0)
        if not (len(out_cols) and len(out_rows)):
            return out
        cols, rows = cols[out_cols], rows[out_rows]
        for top in range(int(rows.min()), int(rows.max()) + 1, BLOCK_PX):
            in_rows = (rows >= top) & (rows < top + BLOCK_PX)
            for left in range(int(cols.min()), int(cols.max()) + 1, BLOCK_PX):
                in_cols = (cols >= left) & (cols < left + BLOCK_PX)
                if not (in_rows.any() and in_cols.any()):
                    continue
                r, c = rows[in_rows], cols[in_cols]
                block = _draw(world, scene, bands, gsd, c.min(), r.min(), np.ptp(c) + 1, np.ptp(r) + 1)
                if len(c) != block.shape[2] or len(r) != block.shape[1] or scale_x < 0 or scale_y > 0:
                    block = block[:, (r - r.min())[:, None], c - c.min()]
                # Indices rise or fall along an axis, so each block fills a rectangle: slices, not index arrays.
                to_rows, to_cols = out_rows[in_rows], out_cols[in_cols]
                out[:, to_rows[0] : to_rows[-1] + 1, to_cols[0] : to_cols[-1] + 1] = block
        return out
    col, row = np.meshgrid(np.arange(grid.width_px) + 0.5, np.arange(grid.height_px) + 0.5)
    x, y = transformer(target, source).transform(
        x0 + col * scale_x + row * shear_x, y0 + col * shear_y + row * scale_y
    )
    cols = _index((x - scene.x0_m) / gsd, width)
    rows = _index((scene.y0_m - y) / gsd, height)
    # In blocks of the output, so that what is drawn stays close to what is asked for.
    for top in range(0, grid.height_px, BLOCK_PX // 2):
        for left in range(0, grid.width_px, BLOCK_PX // 2):
            window = np.s_[top : top + BLOCK_PX // 2, left : left + BLOCK_PX // 2]
            c, r = cols[window], rows[window]
            inside = (c >= 0) & (r >= 0)
            if not inside.any():
                continue
            c, r = c[inside], r[inside]
            block = _draw(world, scene, bands, gsd, c.min(), r.min(), np.ptp(c) + 1, np.ptp(r) + 1)
            out[:, *window][:, inside] = block[:, r - r.min(), c - c.min()]
    return out


def _overview(band: Band, crs: str, grid: PixelGrid) -> int:
    """How often the pixel size is doubled: the requested pixel size alone decides, so every window agrees."""
    scale = min(math.hypot(grid.affine[0], grid.affine[3]), math.hypot(grid.affine[1], grid.affine[4]))
    if transformer("EPSG:4326", crs).target_crs.is_geographic:
        scale *= _METRES_PER_DEGREE
    # The last overview is one pixel high or wide.
    ratio = min(scale / band.gsd_m, band.width_px, band.height_px)
    return max(0, math.floor(math.log2(ratio) + 1e-9)) if ratio > 0 else 0


def _index(position: np.ndarray, size: int) -> np.ndarray:
    """Pixel indices of positions, -1 outside of 0..size-1."""
    finite = np.isfinite(position)
    index = np.floor(np.where(finite, position, -1.0)).clip(-1, size)
    return np.where(index < size, index, -1).astype(np.int64)


def _draw(
    world: World, scene: Scene, bands: list[Band], gsd: float, col: int, row: int, width: int, height: int
) -> np.ndarray:
    """(bands, height, width) of native or overview pixels."""
    epsg = int(wgs84_twin(scene.crs).removeprefix("EPSG:"))
    grid = Grid(
        epsg,
        scene.x0_m + int(col) * gsd,
        scene.y0_m - int(row) * gsd,
        gsd,
        width_px=int(width),
        height_px=int(height),
    )
    names = tuple(band.name for band in bands)
    if scene.cloud_pct is None:
        # Near infrared is hardly ever asked for.
        order = names
        drawn = world.render_naip(grid, scene.started.year, scene.key, ["RGBN".index(name) for name in names])
    elif bands[0].name == "SCL":
        clouds = world.cloud_mask(grid, scene.key, scene.cloud_pct)
        ground = np.where(world.shadow_mask(grid, scene.key, scene.cloud_pct), _SCL_SHADOW, _SCL_CLEAR)
        drawn = np.where(clouds, _SCL_CLOUD, ground).astype(np.uint8)[None]
        order = ("SCL",)
    else:
        drawn = world.render_sentinel2(grid, scene.started.date(), scene.key, scene.cloud_pct)
        order = BANDS_10M
    pixels = drawn if names == order else drawn[[order.index(name) for name in names]]
    if scene.swath is not None or scene.lost_m is not None:
        x = grid.x0_m + (np.arange(grid.width_px) + 0.5) * gsd
        if scene.lost_m is not None:
            pixels[:, :, (x >= scene.lost_m[0]) & (x < scene.lost_m[1])] = 0
        if scene.swath is not None:
            side, edge, slope = scene.swath
            below = (np.arange(grid.height_px) + 0.5) * -gsd + (grid.y0_m - scene.y0_m)
            pixels[:, side * (x - edge - slope * below[:, None]) > 0] = 0
    return pixels
