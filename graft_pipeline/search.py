"""Search over chip embeddings: the tiles nearest to a vector, among those that an area and dates admit.

How the index comes about is in search_index.py; how words become a vector, in training/zero_shot/queries.py.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.errors import DataError, InputError
from graft_pipeline.manifests import atomic_local_file
from graft_pipeline.schemas import SEARCH_RESULTS
from graft_pipeline.search_index import (
    Manifest,
    Part,
    ShortlistFile,
    drop_copies,
    foreign_regions,
    index_folder,
    open_part,
    open_shortlist,
    read_manifest,
    read_sources,
)

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry
    from upath import UPath

    from graft_pipeline.shortlist import Shortlist

logger = logging.getLogger(__name__)

#: Whoever wants more than so many of the nearest gets them from scoring every tile.
_MOST_SHORTLISTED = 1000


@dataclass(frozen=True)
class Filters:
    """Which tiles a search may answer.

    Attributes:
        area: polygon in which the tile's centre lies, EPSG:4326; its border belongs to it. None: anywhere.
        since: first UTC day of the scene's acquisition.
        until: UTC day before which the scene was acquired.
    """

    area: "BaseGeometry | None" = None
    since: date | None = None
    until: date | None = None


class _OpenPart:
    """A region's part; its file is opened when its rows are first asked for."""

    def __init__(self, path: "UPath", region: str, part: Part) -> None:
        self._path, self.region, self.rows = path, region, part.rows

    @cached_property
    def _opened(self) -> tuple[pa.RecordBatch, npt.NDArray[np.float32]]:
        return open_part(self._path)

    def load(self) -> None:
        """Open the file."""
        _ = self._opened

    @property
    def vectors(self) -> npt.NDArray[np.float32]:
        """(N, D) float32, L2-normalised."""
        return self._opened[1]

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column as an array."""
        return np.asarray(self._opened[0].column(name).to_numpy(zero_copy_only=False))

    def take(self, rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
        """Some rows without their embeddings."""
        return self._opened[0].take(pa.array(rows))

    def find(self, tile_id: str) -> int:
        """Row of a tile; -1 if it is in another part."""
        return int(pc.index(self._opened[0].column("tile_id"), tile_id).as_py())

    def scores(
        self, vector: npt.NDArray[np.float32], rows: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.float32]:
        """Cosine of some rows, or of all, (N,) float32."""
        if rows is None:
            return np.asarray(self.vectors @ vector, dtype=np.float32)
        # Of few rows only these are read from the disk.
        if 4 * len(rows) < self.rows:
            return np.asarray(self.vectors[rows] @ vector, dtype=np.float32)
        return np.asarray(self.vectors @ vector, dtype=np.float32)[rows]

    def admitted(self, filters: Filters) -> npt.NDArray[np.bool_] | None:
        """Which rows some filters admit, (N,) bool; None: all of them."""
        import shapely

        admitted: npt.NDArray[np.bool_] | None = None
        if filters.area is not None:
            lon, lat = self.numbers("center_lon_deg"), self.numbers("center_lat_deg")
            admitted = np.asarray(shapely.intersects_xy(filters.area, lon, lat))
        for day, is_first in ((filters.since, True), (filters.until, False)):
            if day is not None:
                start = np.datetime64(datetime.combine(day, time()), "ms")
                acquired = self.numbers("acquired_at_utc")
                fits = acquired >= start if is_first else acquired < start
                admitted = fits if admitted is None else admitted & fits
        return None if admitted is None or admitted.all() else admitted


@dataclass(frozen=True)
class _Hits:
    """Rows of one part, and their scores."""

    part: _OpenPart
    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


#: A part, which of its rows are admitted (None: all), and how many.
_Admitted = tuple[_OpenPart, npt.NDArray[np.bool_] | None, int]


class SearchIndex:
    """The chip embeddings of a sensor's regions, to be asked for the tiles nearest to a vector.

    Where at most `search_index.EXACT_ROWS` tiles are admitted, as in every small collection, each is scored and the
    answer is exact. Of more, a shortlist says which are worth scoring: scores are exact then, too, but a few of the
    nearest may be missing (benchmarks/search.py tells how many). May be asked from several threads.

    Attributes:
        sensor: name of the sensor.
        model_id: fingerprint of the satellite encoder whose vectors these are.
        width: their dimensions, D.
        manifest: what the index consists of.
        stale: regions whose part is not what their embeddings are now, and why; answers are the part's.
    """

    def __init__(self, folder: "UPath", sensor: str, manifest: Manifest, stale: dict[str, str]) -> None:
        """Use `open`."""
        self.sensor, self.model_id, self.width = sensor, manifest.model_id, manifest.width
        self.stale = stale
        self.manifest, self._folder = manifest, folder
        parts = {region: part for region, part in manifest.parts.items() if part.rows}
        self._parts = [_OpenPart(folder / part.file, region, part) for region, part in parts.items()]
        self._bounds = np.array([part.bounds for part in parts.values()])

    @classmethod
    def open(cls, root: "UPath | Path", sensor: str) -> Self:
        """Open a sensor's index.

        Args:
            root: storage root.
            sensor: name of the sensor.

        Returns:
            The index; what of it is stale is logged, and in `stale`.

        Raises:
            DataError: if there is no index, or it is damaged.
        """
        from upath import UPath

        root = UPath(root)
        manifest = read_manifest(root, sensor)
        if manifest is None or not manifest.rows:
            what = "There is no search index of" if manifest is None else "No tile is in the search index of"
            raise DataError(
                f"{what} {sensor}: materialise {sensor}/chip_embeddings of its regions, then {sensor}/search_index."
            )
        folder = index_folder(root, sensor)
        drop_copies(folder, manifest)
        stale = stale_regions(root, sensor, manifest)
        if stale:
            logger.warning(
                "Search index of %s: %d regions are stale (%s ...); materialise %s/search_index.",
                *(sensor, len(stale), next(iter(stale.values())), sensor),
            )
        return cls(folder, sensor, manifest, stale)

    @property
    def rows(self) -> int:
        """Tiles in the index."""
        return self.manifest.rows

    @property
    def regions(self) -> list[str]:
        """Regions in the index, sorted."""
        return list(self.manifest.parts)

    def load(self) -> None:
        """Open every file of the index now: for servers, which go on when an update removes files of the old index.

        Raises:
            DataError: if a file is damaged, or gone.
        """
        for part in self._parts:
            part.load()
        if self.manifest.shortlist is not None:
            _ = self._shortlist

    def check_model(self, model_id: str) -> None:
        """Refuse vectors of another encoder.

        Args:
            model_id: fingerprint of the encoder whose text tower makes the queries.

        Raises:
            DataError: if the index holds another one's vectors.
        """
        if model_id != self.model_id:
            raise DataError(
                f"The search index of {self.sensor} holds vectors of encoder {self.model_id}, the query is of "
                f"{model_id}: materialise {self.sensor}/chip_embeddings and {self.sensor}/search_index."
            )

    def vector_of(self, tile_id: str) -> npt.NDArray[np.float32]:
        """The embedding of a tile, to search for what looks like it.

        Args:
            tile_id: the tile.

        Returns:
            (D,) float32, L2-normalised.

        Raises:
            InputError: if the index has no such tile.
        """
        for part in self._parts:
            row = part.find(tile_id)
            if row >= 0:
                return np.array(part.vectors[row])
        raise InputError(
            f"The search index of {self.sensor} has no tile {tile_id!r}: take an id that a search answers."
        )

    def search(
        self,
        vector: npt.NDArray[np.float32],
        top: int,
        filters: Filters = Filters(),
        *,
        is_exact: bool = False,
    ) -> pa.Table:
        """The tiles nearest to a vector.

        Args:
            vector: (D,) float32, L2-normalised.
            top: how many at most.
            filters: which tiles are admitted; they are chosen before the nearest are, so none is lost.
            is_exact: score every admitted tile, however many they are.

        Returns:
            SEARCH_RESULTS rows, best first; equal scores in the order of region and tile.

        Raises:
            InputError: if the vector has another width, or `top` is not positive.
            DataError: if a part is damaged.
        """
        vector = self._query(vector)
        if top < 1:
            raise InputError(f"A search for {top} tiles finds none: ask for at least one.")
        admitted = self._admitted(filters)
        count = sum(number for _, _, number in admitted)
        has = self.manifest.shortlist
        if is_exact or has is None or count <= has.exact_rows or top > _MOST_SHORTLISTED:
            found = [_nearest(part, _rows_of(mask), vector, top) for part, mask, _ in admitted]
        else:
            found = self._shortlisted(has, vector, top, admitted, is_all=count == self.rows)
        return _results(_merged(found, top))

    def scores(self, vector: npt.NDArray[np.float32], filters: Filters = Filters()) -> pa.Table:
        """The score of every admitted tile, exact.

        Args:
            vector: (D,) float32, L2-normalised.
            filters: which tiles are admitted.

        Returns:
            SEARCH_RESULTS rows in the order of region and tile.

        Raises:
            InputError: if the vector has another width.
            DataError: if a part is damaged.
        """
        vector = self._query(vector)
        found = []
        for part, mask, _ in self._admitted(filters):
            rows = _rows_of(mask)
            scores = part.scores(vector, rows)
            found.append(_Hits(part, np.arange(part.rows) if rows is None else rows, scores))
        return _results(found)

    @cached_property
    def _shortlist(self) -> "Shortlist":
        assert self.manifest.shortlist is not None
        return open_shortlist(self._folder / self.manifest.shortlist.file)

    def _shortlisted(
        self,
        has: ShortlistFile,
        vector: npt.NDArray[np.float32],
        top: int,
        admitted: Sequence[_Admitted],
        *,
        is_all: bool,
    ) -> list[_Hits]:
        """Those rows of each part that are worth scoring, scored."""
        mask: npt.NDArray[np.bool_] | None = None
        if not is_all:
            mask = np.zeros(has.next_id, dtype=np.bool_)
            for part, rows, _ in admitted:
                first = has.first_ids[part.region]
                mask[first : first + part.rows] = True if rows is None else rows
        ids = self._shortlist.candidates(vector, top, mask)
        firsts = np.array([has.first_ids[part.region] for part, _, _ in admitted])
        begins = np.searchsorted(ids, firsts)
        ends = np.searchsorted(ids, firsts + [part.rows for part, _, _ in admitted])
        runs = [
            (part, ids[begin:end] - first, slice(begin, end))
            for (part, _, _), first, begin, end in zip(admitted, firsts, begins, ends, strict=True)
            if end > begin
        ]
        # One product for all: there may be a thousand parts with two candidates each.
        vectors = np.empty((len(ids), self.width), dtype=np.float32)
        for part, rows, run in runs:
            vectors[run] = part.vectors[rows]
        scores = vectors @ vector
        return [_Hits(part, rows, scores[run]) for part, rows, run in runs]

    def _admitted(self, filters: Filters) -> list[_Admitted]:
        """Parts that have admitted tiles."""
        import shapely

        touched = is_inside = np.ones(len(self._parts), dtype=np.bool_)
        if filters.area is not None:
            shapely.prepare(filters.area)
            boxes = shapely.box(*self._bounds.T)
            touched = np.asarray(shapely.intersects(filters.area, boxes))
            is_inside = np.asarray(shapely.covers(filters.area, boxes))
        rest = replace(filters, area=None)
        found = []
        for number in np.flatnonzero(touched):
            part = self._parts[number]
            mask = part.admitted(rest if is_inside[number] else filters)
            count = part.rows if mask is None else int(np.count_nonzero(mask))
            if count:
                found.append((part, mask, count))
        return found

    def _query(self, vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if vector.shape != (self.width,):
            raise InputError(
                f"A query of shape {vector.shape} does not fit vectors of {self.width} dimensions: "
                "take it from the encoder that the index was made with."
            )
        return np.ascontiguousarray(vector, dtype=np.float32)


def _rows_of(mask: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64] | None:
    return None if mask is None else np.flatnonzero(mask)


def _nearest(
    part: _OpenPart, rows: npt.NDArray[np.int64] | None, vector: npt.NDArray[np.float32], top: int
) -> _Hits:
    """The nearest of some rows of a part; None: of all."""
    scores = part.scores(vector, rows)
    chosen = best(scores, top)
    return _Hits(part, chosen if rows is None else rows[chosen], scores[chosen])


def _merged(found: Sequence[_Hits], top: int) -> list[_Hits]:
    """The best of the hits of several parts, best first: runs of one part each."""
    if not found:
        return []
    scores = np.concatenate([hits.scores for hits in found])
    rows = np.concatenate([hits.rows for hits in found])
    numbers = np.repeat(np.arange(len(found)), [len(hits.rows) for hits in found])
    order = best(scores, top)
    runs = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
    return [_Hits(found[numbers[run[0]]].part, rows[run], scores[run]) for run in runs]


def _results(found: Sequence[_Hits]) -> pa.Table:
    """SEARCH_RESULTS rows of hits, in their order."""
    if not found:
        return SEARCH_RESULTS.empty()
    table = pa.Table.from_batches([hits.part.take(hits.rows) for hits in found])
    regions = [hits.part.region for hits in found]
    numbers = np.repeat(np.arange(len(found)), [len(hits.rows) for hits in found])
    columns = {name: table[name] for name in table.column_names}
    columns["region"] = pa.array(regions, pa.string()).take(pa.array(numbers))
    columns["score"] = pa.array(np.concatenate([hits.scores for hits in found]), pa.float32())
    schema = SEARCH_RESULTS.schema
    return pa.table([columns[name] for name in schema.names], schema=schema).combine_chunks()


def best(scores: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Positions of the greatest scores.

    Args:
        scores: (N,) float.
        count: how many at most.

    Returns:
        Positions, greatest score first, equal scores by position.
    """
    if len(scores) > count:
        cut = np.partition(scores, len(scores) - count)[len(scores) - count]
        candidates = np.flatnonzero(scores >= cut)
    else:
        candidates = np.arange(len(scores))
    return candidates[np.argsort(-scores[candidates], kind="stable")[:count]]


def write_hits(path: Path, found: pa.Table) -> None:
    """Write what a search answered as points, atomically.

    Args:
        path: file that ends in `.geojson`, or in `.parquet` for GeoParquet.
        found: SEARCH_RESULTS rows.

    Raises:
        InputError: if the name ends in something else.
        ServiceError: if the disk is full.
    """
    import geopandas
    import shapely

    check_hits_name(path)
    centers = shapely.points(found["center_lon_deg"].to_numpy(), found["center_lat_deg"].to_numpy())
    frame = geopandas.GeoDataFrame(found.to_pandas(), geometry=centers, crs="EPSG:4326")
    with atomic_local_file(path) as partial:
        if path.suffix == ".parquet":
            frame.to_parquet(partial, index=False)
        else:
            # The layer is called as the file will be, not as it is until it is whole.
            frame.to_file(partial, driver="GeoJSON", layer=path.stem)


def check_hits_name(path: Path) -> None:
    """Refuse a name that `write_hits` would refuse, before a search.

    Args:
        path: the file.

    Raises:
        InputError: if it ends in something else than `.geojson` or `.parquet`.
    """
    if path.suffix not in (".geojson", ".parquet"):
        raise InputError(f"{path}: end its name in .geojson, or in .parquet for GeoParquet.")


def stale_regions(root: "UPath | Path", sensor: str, manifest: Manifest) -> dict[str, str]:
    """Regions whose part is not what it would be if it were made now.

    Args:
        root: storage root.
        sensor: name of the sensor.
        manifest: the index.

    Returns:
        Why, in words, by region, sorted.
    """
    sources = read_sources(root, sensor, manifest)
    stale = foreign_regions(
        {region: source for region, source in sources.items() if region not in manifest.parts},
        manifest.model_id,
    )
    for region, part in manifest.parts.items():
        if region not in sources:
            stale[region] = f"{region}: its chip embeddings are gone"
        elif sources[region].model_ids != (manifest.model_id,):
            stale[region] = f"{region}: embedded anew by encoder {', '.join(sources[region].model_ids)}"
        elif sources[region].fingerprint != part.source:
            stale[region] = f"{region}: its chips or chip embeddings changed"
    for region in sources:
        if region not in manifest.parts and region not in stale:
            stale[region] = f"{region}: not indexed yet"
    return dict(sorted(stale.items()))
