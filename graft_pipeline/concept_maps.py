"""Concept maps: how densely the tiles that answer a few words lie, over the cells of a grid (paper, figure 5).

Which tiles there are and what they score is search.py's matter; how a map becomes a file, map_files.py's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from graft_pipeline.errors import DataError, InputError
from graft_pipeline.geometry import transformer
from graft_pipeline.manifests import columns
from graft_pipeline.progress import Report
from graft_pipeline.schemas import CONCEPT_MAPS, SEARCH_RESULTS
from graft_pipeline.search import Filters, SearchIndex

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

Keys = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

#: Contrasts at which hits are counted, so that a reader of a map may choose among them.
LADDER = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
#: Contrast from which a tile is a hit: so many standard deviations above the background's mean.
THRESHOLD = 1.0
#: Finest and coarsest H3 resolution. Coarser hexagons can hold a pole, finer ones hold less than a tile.
RESOLUTIONS = (3, 10)
#: Cylindrical and of equal area (NSIDC's EASE-Grid 2.0, metres): one grid for the globe, on which cells of squares
#: and pixels of rasters count the same ground everywhere. Away from 30 degrees they are squares in area only.
EQUAL_AREA = "EPSG:6933"
#: Keys of squares are made of two numbers that are not negative.
_STEP, _ZERO = 1 << 32, 1 << 20


class Cells(Protocol):
    """A division of the globe into cells; a cell is known by an integer key."""

    @property
    def pixel_m(self) -> float:
        """Side of the pixels of `EQUAL_AREA` that show a cell well, metres."""
        ...

    def keys(self, lon_deg: npt.ArrayLike, lat_deg: npt.ArrayLike) -> Keys:
        """The cell of each place, (N,) int64; each place has exactly one."""
        ...

    def names(self, keys: Keys) -> list[str]:
        """What the cells are called in tables."""
        ...

    def centers(self, keys: Keys) -> tuple[FloatArray, FloatArray]:
        """Longitudes and latitudes of the cells' centres, EPSG:4326."""
        ...

    def outlines(self, keys: Keys) -> "npt.NDArray[np.object_]":
        """The cells as shapely geometries, EPSG:4326; those on the antimeridian in two parts."""
        ...


@dataclass(frozen=True)
class Hexagons:
    """Cells of H3, the hexagonal grid of the globe (h3geo.org).

    Attributes:
        resolution: 3 (12,400 km2 a cell on average) to 10 (0.015 km2); 7 is 5.2 km2.
    """

    resolution: int = 7

    def __post_init__(self) -> None:
        """Reject what is no useful resolution."""
        low, high = RESOLUTIONS
        if not low <= self.resolution <= high:
            raise InputError(f"H3 resolution {self.resolution}: give {low} (coarse) to {high} (fine).")

    @property
    def pixel_m(self) -> float:
        """A sixth of an edge: a hexagon is then about 94 pixels."""
        import h3.api.basic_int as h3

        return float(h3.average_hexagon_edge_length(self.resolution, "m")) / 6

    def keys(self, lon_deg: npt.ArrayLike, lat_deg: npt.ArrayLike) -> Keys:
        """See `Cells`."""
        import h3.api.basic_int as h3

        lon, lat = np.asarray(lon_deg, np.float64).ravel(), np.asarray(lat_deg, np.float64).ravel()
        resolutions = [self.resolution] * lon.size
        return np.fromiter(
            map(h3.latlng_to_cell, lat.tolist(), lon.tolist(), resolutions), np.int64, lon.size
        )

    def names(self, keys: Keys) -> list[str]:
        """H3's own indexes, such as `872a31ce0ffffff`."""
        import h3.api.basic_int as h3

        return [h3.int_to_str(key) for key in keys.tolist()]

    def centers(self, keys: Keys) -> tuple[FloatArray, FloatArray]:
        """See `Cells`."""
        import h3.api.basic_int as h3

        places = np.array([h3.cell_to_latlng(key) for key in keys.tolist()], np.float64).reshape(-1, 2)
        return places[:, 1], places[:, 0]

    def outlines(self, keys: Keys) -> "npt.NDArray[np.object_]":
        """See `Cells`."""
        import h3.api.basic_int as h3
        import shapely

        rings = [[(lon, lat) for lat, lon in h3.cell_to_boundary(key)] for key in keys.tolist()]
        made = np.array([shapely.Polygon(ring) for ring in rings], dtype=object)
        if len(made) == 0:
            return made
        west, _, east, _ = shapely.bounds(made).T
        for number in np.flatnonzero(east - west > 180):
            made[number] = split_at_antimeridian(rings[number])
        return made


@dataclass(frozen=True)
class Squares:
    """Cells of a square grid of `EQUAL_AREA`.

    Attributes:
        side_km: side of a cell, kilometres; what it covers is its square everywhere.
    """

    side_km: float

    def __post_init__(self) -> None:
        """Reject what is no useful side."""
        if not 0.05 <= self.side_km <= 200:
            raise InputError(f"Cells of {self.side_km:g} km: give 0.05 to 200.")

    @property
    def pixel_m(self) -> float:
        """A cell is one pixel."""
        return self.side_km * 1000

    def keys(self, lon_deg: npt.ArrayLike, lat_deg: npt.ArrayLike) -> Keys:
        """See `Cells`."""
        lon, lat = np.array(lon_deg, np.float64).ravel(), np.array(lat_deg, np.float64).ravel()
        x, y = transformer("EPSG:4326", EQUAL_AREA).transform(lon, lat)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise InputError("Places that are no longitudes and latitudes have no cell: correct them.")
        column, row = (np.floor_divide(values, self.pixel_m).astype(np.int64) + _ZERO for values in (x, y))
        return np.asarray(row * _STEP + column, dtype=np.int64)

    def names(self, keys: Keys) -> list[str]:
        """Side, column from Greenwich and row from the equator: `2km_-3390_+2449`."""
        places = [(key % _STEP - _ZERO, key // _STEP - _ZERO) for key in keys.tolist()]
        return [f"{self.side_km:g}km_{column:+d}_{row:+d}" for column, row in places]

    def centers(self, keys: Keys) -> tuple[FloatArray, FloatArray]:
        """See `Cells`."""
        x, y = self._corners_m(keys)
        return self._to_degrees(x + self.pixel_m / 2, y + self.pixel_m / 2)

    def outlines(self, keys: Keys) -> "npt.NDArray[np.object_]":
        """See `Cells`."""
        import shapely

        x, y = self._corners_m(keys)
        # Meridians and parallels are straight in this projection, so a cell is a box in degrees as well.
        west, south = self._to_degrees(x, y)
        east, north = self._to_degrees(x + self.pixel_m, y + self.pixel_m)
        return np.asarray(shapely.box(west, south, east, north), dtype=object).ravel()

    def _corners_m(self, keys: Keys) -> tuple[FloatArray, FloatArray]:
        column, row = keys % _STEP - _ZERO, keys // _STEP - _ZERO
        return np.asarray(column * self.pixel_m, np.float64), np.asarray(row * self.pixel_m, np.float64)

    @staticmethod
    def _to_degrees(x_m: FloatArray, y_m: FloatArray) -> tuple[FloatArray, FloatArray]:
        # The grid reaches beyond the globe; a cell on the antimeridian ends there.
        x_end, y_end = (end - 0.001 for end in transformer("EPSG:4326", EQUAL_AREA).transform(180.0, 90.0))
        x = np.clip(x_m, -x_end, x_end, dtype=np.float64)
        y = np.clip(y_m, -y_end, y_end, dtype=np.float64)
        lon, lat = transformer(EQUAL_AREA, "EPSG:4326").transform(x, y)
        return np.asarray(lon, np.float64), np.asarray(lat, np.float64)


def split_at_antimeridian(ring: list[tuple[float, float]]) -> "BaseGeometry":
    """A ring across the antimeridian as a part on either side of it.

    Args:
        ring: (longitude, latitude) of its corners, EPSG:4326; longitudes jump from 180 to -180.

    Returns:
        A MultiPolygon, whose longitudes are -180 to 180.
    """
    import shapely
    from shapely import affinity

    around = shapely.Polygon([(lon + 360 if lon < 0 else lon, lat) for lon, lat in ring])
    west = around.intersection(shapely.box(0, -90, 180, 90))
    east = affinity.translate(around.intersection(shapely.box(180, -90, 540, 90)), xoff=-360)
    parts = [part for part in (west, east) if part.area > 0]
    return shapely.MultiPolygon([polygon for part in parts for polygon in shapely.get_parts(part)])


@dataclass(frozen=True)
class Background:
    """How the cosines of a concept are distributed over every tile of the sensor, in whatever area.

    Attributes:
        mean: of the cosines.
        deviation: their standard deviation.
        tiles: how many there are.
    """

    mean: float
    deviation: float
    tiles: int

    @classmethod
    def of(cls, scores: npt.ArrayLike) -> "Background":
        """The background that some cosines are.

        Args:
            scores: (N,) cosines of the concept with every tile.

        Returns:
            The background.

        Raises:
            InputError: if there is no tile.
        """
        values = np.asarray(scores, np.float64)
        if values.size == 0:
            raise InputError("The search index holds no tile: collect and index a region first.")
        return cls(float(values.mean()), float(values.std()), values.size)

    def contrast(self, scores: npt.ArrayLike) -> FloatArray:
        """Standard deviations by which cosines lie above the mean, (N,) float64; 0 where all are one value."""
        values = np.asarray(scores, np.float64) - self.mean
        # Equal values have a mean that is off by rounding, and a deviation of as much.
        return values / self.deviation if self.deviation > 1e-9 else np.zeros_like(values)


@dataclass(frozen=True, eq=False)
class ConceptMaps:
    """Maps of several concepts over the same tiles and cells.

    A cosine of a text and an image has no scale of its own: those of one concept lie around 0.05, of another around
    0.33, and neither is "much". So a tile is measured by its *contrast* in a concept: its cosine less the mean of
    the concept's cosines over every tile of the sensor (the background, whatever area is mapped), in standard
    deviations of those. A tile is a *hit* from a threshold of contrast on. The map's measure is the *share* of a
    cell's tiles that are hits: the density of high-scoring tiles that the paper's figure 5 draws, freed of how many
    photos people took there. It says where a concept is most likely, compared with the rest of the ground that was
    collected; of ground where it is nowhere, it shows what resembles it most.

    Attributes:
        cells: the grid.
        keys: (C,) int64 cells that hold a tile, ascending.
        tiles: (C,) int64 tiles in each.
        concepts: the K concepts, in words.
        backgrounds: one for each.
        thresholds: (T,) contrasts at which hits are counted, ascending.
        threshold: the one among them that `hits` and `share` are of.
        counts: (K, C, T) int64 hits in each cell, from each threshold on.
        mean_score: (K, C) float64 mean cosine.
        mean_contrast: (K, C) float64 mean contrast.
        best: (K, C) int64 number of the tile of greatest score in each cell, as in `rows`.
        scores: (K, N) float32 cosines of the tiles.
        rows: (N,) SEARCH_RESULTS rows of the tiles, without scores.
        cell_of: (N,) int64 number of each tile's cell.
    """

    cells: Cells
    keys: Keys
    tiles: npt.NDArray[np.int64]
    concepts: tuple[str, ...]
    backgrounds: tuple[Background, ...]
    thresholds: tuple[float, ...]
    threshold: float
    counts: npt.NDArray[np.int64]
    mean_score: FloatArray
    mean_contrast: FloatArray
    best: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    rows: pa.Table
    cell_of: npt.NDArray[np.int64]

    @property
    def hits(self) -> npt.NDArray[np.int64]:
        """(K, C) tiles of each cell that are hits."""
        return np.asarray(self.counts[:, :, self.thresholds.index(self.threshold)])

    @property
    def share(self) -> FloatArray:
        """(K, C) float64 share of each cell's tiles that are hits, 0 to 1."""
        return np.asarray(self.hits / self.tiles, dtype=np.float64)

    def best_tiles(self, concept: int, count: int) -> list[tuple[int, float]]:
        """The tiles that answer a concept best.

        Args:
            concept: its number.
            count: how many at most.

        Returns:
            Number of the row and contrast of each, best first.
        """
        scores = self.scores[concept]
        order = np.argsort(-scores, kind="stable")[:count]
        contrast = self.backgrounds[concept].contrast(scores[order])
        return [(int(row), float(value)) for row, value in zip(order, contrast, strict=True)]


def map_concepts(
    tiles: pa.Table,
    scores: Mapping[str, npt.NDArray[np.float32]],
    backgrounds: Mapping[str, Background],
    cells: Cells,
    threshold: float = THRESHOLD,
) -> ConceptMaps:
    """Count what tiles score, cell by cell.

    Args:
        tiles: SEARCH_RESULTS rows of the N tiles that are to be mapped; without or with scores, which are not read.
        scores: by concept, (N,) cosines of the tiles.
        backgrounds: by concept, of every tile of the sensor.
        cells: the grid.
        threshold: contrast from which a tile is a hit.

    Returns:
        The maps; without a cell if there is no tile.

    Raises:
        InputError: if no concept is given, or the threshold is not finite.
        DataError: if there are not as many scores as tiles.
    """
    if not scores:
        raise InputError('Name what is to be mapped, such as "farmland".')
    if not math.isfinite(threshold):
        raise InputError(f"A threshold of {threshold} counts nothing: give standard deviations, such as 1.")
    for concept, values in scores.items():
        if values.shape != (tiles.num_rows,):
            raise DataError(
                f"{concept!r} has scores of shape {values.shape} for {tiles.num_rows} tiles: score them again."
            )
    rows = tiles.select([name for name in SEARCH_RESULTS.schema.names if name != "score"])
    lon, lat = columns(rows, "center_lon_deg", "center_lat_deg")
    keys, cell_of = np.unique(cells.keys(lon, lat), return_inverse=True)
    of_cell = np.bincount(cell_of, minlength=len(keys))
    thresholds = tuple(sorted({*LADDER, float(threshold)}))
    levels = len(thresholds) + 1
    matrix = np.stack([np.asarray(values, np.float32) for values in scores.values()])
    kept = tuple(backgrounds[concept] for concept in scores)
    counts = np.zeros((len(matrix), len(keys), len(thresholds)), np.int64)
    mean_score, mean_contrast = np.zeros((2, len(matrix), len(keys)))
    best = np.zeros((len(matrix), len(keys)), np.int64)
    for number, (values, background) in enumerate(zip(matrix, kept, strict=True)):
        contrast = background.contrast(values)
        level = np.searchsorted(thresholds, contrast, side="right")
        of_level = np.bincount(cell_of * levels + level, minlength=len(keys) * levels).reshape(-1, levels)
        # A tile of level t reaches the first t thresholds: the (t+1)-th is reached by levels above t.
        counts[number] = of_level[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        mean_score[number] = np.bincount(cell_of, values, len(keys)) / of_cell
        mean_contrast[number] = np.bincount(cell_of, contrast, len(keys)) / of_cell
        # The last to be written stays: the greatest score, and of equal ones the first row.
        order = np.lexsort((-np.arange(len(values)), values))
        best[number, cell_of[order]] = order
    return ConceptMaps(
        *(cells, keys, of_cell, tuple(scores), kept, thresholds, float(threshold)),
        *(counts, mean_score, mean_contrast, best, matrix, rows, cell_of),
    )


def map_vectors(
    index: SearchIndex,
    vectors: Mapping[str, npt.NDArray[np.float32]],
    cells: Cells,
    filters: Filters | None = None,
    threshold: float = THRESHOLD,
    progress: Report | None = None,
) -> ConceptMaps:
    """Map what vectors find among an index's tiles, against the background of all of them.

    Args:
        index: the sensor's search index.
        vectors: by concept, (D,) float32, L2-normalised; of words, see training/zero_shot/queries.py.
        cells: the grid.
        filters: which tiles are mapped; None: all.
        threshold: contrast from which a tile is a hit.
        progress: called with (done, total) concepts.

    Returns:
        The maps.

    Raises:
        InputError: if no concept is given, a vector has another width, or the index is empty.
    """
    tiles = SEARCH_RESULTS.empty()
    scores: dict[str, npt.NDArray[np.float32]] = {}
    backgrounds: dict[str, Background] = {}
    for done, (concept, vector) in enumerate(vectors.items(), start=1):
        tiles = index.scores(vector)
        backgrounds[concept] = Background.of(tiles["score"].to_numpy())
        if filters is not None:
            tiles = index.scores(vector, filters)
        scores[concept] = tiles["score"].to_numpy()
        if progress:
            progress(done, len(vectors))
    return map_concepts(tiles, scores, backgrounds, cells, threshold)


def summary(maps: ConceptMaps) -> list[list[str]]:
    """What the maps say in short.

    Args:
        maps: the maps, with at least one cell.

    Returns:
        For each concept: its name, hits, cells with a hit, and name, share and (latitude, longitude) of the cell of
        greatest share, of equal ones that with most tiles.
    """
    rows = []
    for concept, hits, share in zip(maps.concepts, maps.hits, maps.share, strict=True):
        densest = np.lexsort((maps.tiles, share))[-1:]
        (lon,), (lat,) = maps.cells.centers(maps.keys[densest])
        (name,) = maps.cells.names(maps.keys[densest])
        row = [f"{hits.sum():,}", f"{np.count_nonzero(hits):,}", name, f"{share[densest[0]]:.0%}"]
        rows.append([concept, *row, f"{lat:.4f}, {lon:.4f}"])
    return rows


def to_table(maps: ConceptMaps) -> pa.Table:
    """The maps as rows.

    Args:
        maps: the maps.

    Returns:
        CONCEPT_MAPS rows, one for each concept and cell; as a Parquet file they are GeoParquet.
    """
    import shapely

    count = len(maps.concepts)
    names = np.array(maps.cells.names(maps.keys), dtype=object)
    lon, lat = maps.cells.centers(maps.keys)
    outlines = np.array(shapely.to_wkb(maps.cells.outlines(maps.keys)), dtype=object)
    ids = maps.rows["tile_id"].combine_chunks()
    best = maps.best.ravel()
    best_score = np.take_along_axis(maps.scores, maps.best, axis=1).ravel()
    values = {
        "concept": np.repeat(np.array(maps.concepts, dtype=object), len(names)),
        "cell_id": np.tile(names, count),
        "center_lon_deg": np.tile(lon, count),
        "center_lat_deg": np.tile(lat, count),
        "tiles": np.tile(maps.tiles, count),
        "hits": maps.hits.ravel(),
        "share": maps.share.ravel(),
        "mean_score": maps.mean_score.ravel(),
        "mean_contrast": maps.mean_contrast.ravel(),
        "threshold": np.full(count * len(names), maps.threshold),
        "best_tile_id": ids.take(pa.array(best)),
        "best_score": best_score,
        "outline_wkb": np.tile(outlines, count),
    }
    schema = CONCEPT_MAPS.schema
    made = pa.table([pa.array(values[field.name], field.type) for field in schema], schema=schema)
    return made.sort_by([(name, "ascending") for name in CONCEPT_MAPS.key])
