"""Labelled chips of the planet, for evaluation only: pixels through Earth Engine's client, labels from its truth.

No asset of the training path reads this module; scores of encoders on it are computed in training/zero_shot.
"""

import io
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from upath import UPath

from graft_pipeline import chips as chip_rules
from graft_pipeline import scenes as scene_rules
from graft_pipeline.errors import DataError, InputError, ItemError
from graft_pipeline.geometry import Grid, Projection, utm_epsg
from graft_pipeline.imagery import ImagerySource, Sensor
from graft_pipeline.manifests import write_bytes_atomic
from resources.planet.truth_client import PlanetTruth

logger = logging.getLogger(__name__)

#: Cells of the coarse truth map along one crop.
CELLS_PER_CROP = 16
#: Coarse map cells along one side at most; a larger area is cut at its south-west corner.
MAX_CELLS = 2400
#: The truth is asked for at most this coarsely, and in strips of at most so many cells.
COARSEST_TRUTH_M = 36.0
MAX_TRUTH_CELLS = 1_000_000
#: A chip has the class of at least this share of its crop.
DOMINANT_SHARE = 0.6
#: Classes too narrow ever to dominate a crop: the label of chips that they cross through the centre.
NARROW = ("river", "beach", "highway", "baseball")
NARROW_SHARE = 0.12
#: A class with fewer chips than this is left out of classification and retrieval, and is named in the report.
MIN_CHIPS = 10
#: Sentinel-2 scenes closest to this date are used.
REFERENCE_DATE = datetime(2021, 7, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Benchmark:
    """Labelled crops of one sensor.

    Attributes:
        all_classes: names of every class of the planet, by id.
        palette: (C, 3) uint8 colours of all classes.
        classes: names of the classes that classification and retrieval use.
        chips: (N, P, P, 3) uint8 RGB crops for classification and retrieval.
        labels: (N,) int64 indices into `classes`.
        segmentation_chips: (M, P, P, 3) uint8 RGB crops.
        masks: (M, P, P) uint8 ids into `all_classes`.
        squares: (N + M, 4) float64 west, south, east, north of every crop, EPSG:4326 degrees.
    """

    all_classes: tuple[str, ...]
    palette: np.ndarray
    classes: tuple[str, ...]
    chips: np.ndarray
    labels: np.ndarray
    segmentation_chips: np.ndarray
    masks: np.ndarray
    squares: np.ndarray

    def save(self, path: UPath) -> bool:
        """Write the benchmark as one .npz file, atomically; True if its bytes changed."""
        buffer = io.BytesIO()
        np.savez(buffer, **{name: np.asarray(getattr(self, name)) for name in self.__dataclass_fields__})
        return write_bytes_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: UPath) -> "Benchmark":
        """Read a benchmark.

        Raises:
            DataError: if it was not made yet.
        """
        if not path.exists():
            raise DataError(f"There is no benchmark at {path}: materialise the `benchmark` asset first.")
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            fields = {name: arrays[name] for name in cls.__dataclass_fields__}
        for name in ("all_classes", "classes"):
            fields[name] = tuple(str(value) for value in fields[name])
        return cls(**fields)


def build_benchmark(
    truth: PlanetTruth,
    imagery: ImagerySource,
    sensor: Sensor,
    bounds: tuple[float, float, float, float],
    *,
    chips_per_class: int = 40,
    segmentation_chips: int = 240,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Choose and fetch labelled crops of an area.

    Args:
        truth: the planet's truth.
        imagery: the client that chips come through.
        sensor: the sensor.
        bounds: (west, south, east, north) of the area, EPSG:4326, within one UTM zone.
        chips_per_class: crops for each class, at most.
        segmentation_chips: crops for segmentation; their centres are spread evenly over the classes.
        seed: chooses among the places.
        progress: told (done, total).

    Returns:
        The benchmark.

    Raises:
        InputError: if no scene shows a crop of the area.
    """
    rng = np.random.default_rng([seed, 0xBE7C4])
    west, south, east, north = bounds
    projection = Projection(utm_epsg((west + east) / 2, (south + north) / 2))
    coarse = _coarse_grid(projection, bounds, sensor)
    cover = coarse_cover(truth, coarse)
    labelled = _dominated_places(cover, truth.classes, chips_per_class, rng)
    labelled = {name: places for name, places in labelled.items() if len(places) >= MIN_CHIPS}
    stratified = _stratified_places(cover, len(truth.classes), segmentation_chips, rng)

    def grid_at(place: np.ndarray) -> Grid:
        x, y = coarse.to_xy(place[1] + 0.5, place[0] + 0.5)
        return Grid.snapped(coarse.epsg, float(x), float(y), sensor.gsd_m, sensor.crop_px)

    grids = [grid_at(place) for places in labelled.values() for place in places]
    labels = np.repeat(np.arange(len(labelled)), [len(places) for places in labelled.values()])
    mask_grids = [grid_at(place) for place in stratified]
    pixels = fetch_crops(imagery, sensor, bounds, [*grids, *mask_grids], progress)
    kept = np.array([array is not None for array in pixels], bool)
    if not kept.all():
        logger.warning(
            "%d of %d benchmark crops have no usable scene and are left out", (~kept).sum(), len(kept)
        )
    split = len(grids)
    # Crops without a scene may leave too few of a class.
    counts = np.bincount(labels[kept[:split]], minlength=len(labelled))
    kept[:split] &= counts[labels] >= MIN_CHIPS
    side = sensor.crop_px
    blank = np.zeros((side, side, 3), np.uint8)
    crops = np.stack([blank if array is None else array for array in pixels])
    masks = [truth.land_cover(grid) for grid, k in zip(mask_grids, kept[split:], strict=True) if k]
    return Benchmark(
        all_classes=tuple(truth.classes),
        palette=truth.palette,
        classes=tuple(name for name, count in zip(labelled, counts, strict=True) if count >= MIN_CHIPS),
        chips=crops[:split][kept[:split]],
        labels=np.unique(labels[kept[:split]], return_inverse=True)[1],
        segmentation_chips=crops[split:][kept[split:]],
        masks=np.array(masks, np.uint8).reshape(-1, side, side),
        squares=np.array([square_of(g) for g, k in zip([*grids, *mask_grids], kept, strict=True) if k]),
    )


def square_of(grid: Grid) -> tuple[float, float, float, float]:
    """West, south, east, north of a crop, EPSG:4326 degrees."""
    lon, lat = Projection(grid.epsg).inverse(*grid.outline_m())
    return float(lon.min()), float(lat.min()), float(lon.max()), float(lat.max())


def _coarse_grid(projection: Projection, bounds: tuple[float, float, float, float], sensor: Sensor) -> Grid:
    """A grid inside the area with CELLS_PER_CROP cells along a crop."""
    west, south, east, north = bounds
    x, y = projection.forward(np.array([west, east, east, west]), np.array([south, south, north, north]))
    x_min, x_max, y_min, y_max = max(x[0], x[3]), min(x[1], x[2]), max(y[0], y[1]), min(y[2], y[3])
    gsd = sensor.footprint_m / CELLS_PER_CROP
    columns, rows = (int(min(MAX_CELLS, side // gsd)) for side in (x_max - x_min, y_max - y_min))
    return Grid(projection.epsg, float(x_min), float(y_min) + rows * gsd, gsd, columns, rows)


def coarse_cover(truth: PlanetTruth, grid: Grid) -> np.ndarray:
    """The class at the middle of every cell, from a finer map asked for in strips: quicker, and little memory.

    Args:
        truth: the planet's truth.
        grid: of the cells.

    Returns:
        (height, width) uint8 class ids.
    """
    finer = max(1, int(np.ceil(grid.gsd_m / COARSEST_TRUTH_M)))
    gsd, width = grid.gsd_m / finer, grid.width_px * finer
    rows = max(1, MAX_TRUTH_CELLS // (width * finer))
    strips = []
    for top in range(0, grid.height_px, rows):
        height = min(rows, grid.height_px - top) * finer
        strip = Grid(grid.epsg, grid.x0_m, grid.y0_m - top * grid.gsd_m, gsd, width, height)
        strips.append(truth.land_cover(strip)[finer // 2 :: finer, finer // 2 :: finer])
    return np.concatenate(strips)


def _dominated_places(
    cover: np.ndarray, classes: tuple[str, ...], per_class: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Cells around which a crop has a clear class; crops never overlap. Values are (n, 2) of (row, column)."""
    from scipy.ndimage import uniform_filter

    half = CELLS_PER_CROP // 2 + 1
    taken = np.zeros(cover.shape, bool)
    taken[:half], taken[-half:], taken[:, :half], taken[:, -half:] = True, True, True, True
    chosen: dict[str, np.ndarray] = {}
    # Narrow classes first: they have the fewest places.
    for name in sorted(classes, key=lambda c: (c not in NARROW, c)):
        of_class = (cover == classes.index(name)).astype(np.float32)
        share = uniform_filter(of_class, CELLS_PER_CROP, mode="constant")
        if name in NARROW:
            fits = (share >= NARROW_SHARE) & (uniform_filter(of_class, 3, mode="constant") >= DOMINANT_SHARE)
        else:
            fits = share >= DOMINANT_SHARE
        cells = np.argwhere(fits & ~taken)
        places: list[np.ndarray] = []
        for row, column in rng.permutation(cells, axis=0):
            if len(places) == per_class:
                break
            if not taken[row, column]:
                places.append(np.array([row, column]))
                around = slice(max(0, row - CELLS_PER_CROP), row + CELLS_PER_CROP + 1)
                taken[around, max(0, column - CELLS_PER_CROP) : column + CELLS_PER_CROP + 1] = True
        chosen[name] = np.array(places).reshape(-1, 2)
    return {name: chosen[name] for name in classes}


def _stratified_places(cover: np.ndarray, classes: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(M, 2) cells, as many of each class: pixel scores are then not weighted by area."""
    half = CELLS_PER_CROP // 2 + 1
    inner = cover[half:-half, half:-half]
    places = []
    for class_id in range(classes):
        cells = np.argwhere(inner == class_id) + half
        places.append(rng.permutation(cells, axis=0)[: count // classes])
    return np.concatenate(places)


def fetch_crops(
    imagery: ImagerySource,
    sensor: Sensor,
    bounds: tuple[float, float, float, float],
    grids: list[Grid],
    progress: Callable[[int, int], None] | None,
) -> list[np.ndarray | None]:
    """Fetch a crop for every grid.

    Args:
        imagery: the client that chips come through.
        sensor: the sensor.
        bounds: (west, south, east, north) of the area that the grids lie in, EPSG:4326.
        grids: the crops' grids.
        progress: told (done, total).

    Returns:
        (P, P, 3) uint8 RGB each, None where no scene has all its pixels.

    Raises:
        InputError: if there is no crop at all.
    """
    listed = scene_rules.scene_rows(imagery.list_scenes(sensor, bounds), sensor)
    candidates = scene_rules.candidates_for_grids(
        grids, [REFERENCE_DATE] * len(grids), listed, sensor, scene_rules.most_candidates(sensor)
    )

    def fetch(work: tuple[Grid, list[str]]) -> np.ndarray | None:
        grid, scene_ids = work
        for scene_id in scene_ids:
            try:
                array = imagery.get_chip(sensor, scene_id, grid)
            except ItemError as error:
                logger.warning("benchmark crop of %s: %s", scene_id, error)
                continue
            if chip_rules.quality(array, sensor).suits(sensor):
                return chip_rules.to_uint8(array[..., :3], sensor)
        return None

    results: list[np.ndarray | None] = []
    with ThreadPoolExecutor(min(8, imagery.concurrency)) as pool:
        for done, array in enumerate(pool.map(fetch, zip(grids, candidates, strict=True)), start=1):
            results.append(array)
            if progress:
                progress(done, len(grids))
    if all(array is None for array in results):
        raise InputError(
            f"No scene of {sensor.collection} shows a crop of {bounds}: set GRAFT_BENCHMARK_BOUNDS to a larger area, "
            "or to one that the collection covers."
        )
    return results
