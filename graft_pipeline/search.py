"""Search over chip embeddings: the tiles nearest to a vector, among those that an area and dates admit.

How the index comes about is in search_index.py; how words become a vector, in training/zero_shot/queries.py.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.errors import DataError, InputError
from graft_pipeline.manifests import is_local
from graft_pipeline.schemas import SEARCH_RESULTS
from graft_pipeline.search_index import Manifest, Part, index_folder, read_manifest, read_sources

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry
    from upath import UPath

logger = logging.getLogger(__name__)


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

    def select(self, part: "_OpenPart") -> "npt.NDArray[np.bool_] | None":
        """Which rows of a part are admitted.

        Args:
            part: the part.

        Returns:
            (N,) bool; None: all of them.
        """
        import shapely

        admitted: npt.NDArray[np.bool_] | None = None
        if self.area is not None:
            box = shapely.box(*part.bounds)
            if not self.area.intersects(box):
                return np.zeros(part.rows, dtype=np.bool_)
            if not self.area.covers(box):
                admitted = shapely.intersects_xy(
                    self.area, part.numbers("center_lon_deg"), part.numbers("center_lat_deg")
                )
        for day, is_first in ((self.since, True), (self.until, False)):
            if day is not None:
                start = np.datetime64(datetime.combine(day, time()), "ms")
                acquired = part.numbers("acquired_at_utc")
                fits = acquired >= start if is_first else acquired < start
                admitted = fits if admitted is None else admitted & fits
        return admitted


class _OpenPart:
    """A region's part, mapped into memory where its folder is local."""

    def __init__(self, folder: "UPath", region: str, part: Part) -> None:
        path = folder / part.file
        try:
            source = pa.memory_map(str(path)) if is_local(path) else pa.BufferReader(path.read_bytes())
            table = pa.ipc.open_file(source).read_all()
        except FileNotFoundError as error:
            raise DataError(f"{path} is gone: materialise the search index again.") from error
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{path} is damaged ({error}): delete it and materialise the search index again."
            ) from error
        self.region, self.rows, self.bounds = region, part.rows, part.bounds
        self._table = table.drop_columns(["embedding"])
        vectors = table["embedding"].combine_chunks()
        self.vectors = np.asarray(vectors.flatten()).reshape(part.rows, -1)

    def numbers(self, name: str) -> npt.NDArray[Any]:
        """A column as an array."""
        return np.asarray(self._table[name].combine_chunks().to_numpy(zero_copy_only=False))

    def scores(self, vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Cosine of every row, (N,) float32."""
        return np.asarray(self.vectors @ vector, dtype=np.float32)

    def results(self, rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]) -> pa.Table:
        """SEARCH_RESULTS rows of some rows."""
        table = self._table.take(pa.array(rows))
        table = table.append_column("region", pa.array([self.region] * len(rows), pa.string()))
        table = table.append_column("score", pa.array(scores, pa.float32()))
        return table.select(SEARCH_RESULTS.schema.names).cast(SEARCH_RESULTS.schema)

    def find(self, tile_id: str) -> int:
        """Row of a tile; -1 if it is in another part."""
        return int(pc.index(self._table["tile_id"], tile_id).as_py())


class SearchIndex:
    """The chip embeddings of a sensor's regions, to be asked for the tiles nearest to a vector.

    Attributes:
        sensor: name of the sensor.
        model_id: fingerprint of the satellite encoder whose vectors these are.
        width: their dimensions, D.
        stale: regions whose part is not what their embeddings are now, and why; answers are the part's.
    """

    def __init__(self, folder: "UPath", sensor: str, manifest: Manifest, stale: dict[str, str]) -> None:
        """Use `open`."""
        self.sensor, self.model_id, self.width = sensor, manifest.model_id, manifest.width
        self.stale = stale
        self._manifest = manifest
        self._parts = {region: _OpenPart(folder, region, part) for region, part in manifest.parts.items()}

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
        if manifest is None:
            raise DataError(f"There is no search index of {sensor}: materialise {sensor}/search_index.")
        stale = _stale(root, sensor, manifest)
        if stale:
            logger.warning(
                "Search index of %s: %d regions are stale (%s); materialise %s/search_index.",
                *(sensor, len(stale), next(iter(stale.values())), sensor),
            )
        return cls(index_folder(root, sensor), sensor, manifest, stale)

    @property
    def rows(self) -> int:
        """Tiles in the index."""
        return self._manifest.rows

    @property
    def regions(self) -> list[str]:
        """Regions in the index, sorted."""
        return list(self._parts)

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
        for part in self._parts.values():
            row = part.find(tile_id)
            if row >= 0:
                return np.array(part.vectors[row])
        raise InputError(
            f"The search index of {self.sensor} has no tile {tile_id!r}: take an id from a search."
        )

    def search(
        self,
        vector: npt.NDArray[np.float32],
        top: int,
        filters: Filters = Filters(),
    ) -> pa.Table:
        """The tiles nearest to a vector.

        Args:
            vector: (D,) float32, L2-normalised.
            top: how many at most.
            filters: which tiles are admitted; they are chosen before the nearest are, so none is lost.

        Returns:
            SEARCH_RESULTS rows, best first; equal scores in the order of region and tile.

        Raises:
            InputError: if the vector has another width, or `top` is not positive.
        """
        vector = self._query(vector)
        if top < 1:
            raise InputError(f"A search for {top} tiles finds none: ask for at least one.")
        found = []
        for part, rows in self._admitted(filters):
            scores = part.scores(vector)
            scores = scores if rows is None else scores[rows]
            chosen = best(scores, top)
            found.append(part.results(chosen if rows is None else rows[chosen], scores[chosen]))
        table = pa.concat_tables([SEARCH_RESULTS.empty(), *found]).combine_chunks()
        return table.take(pa.array(best(table["score"].to_numpy(), top)))

    def scores(
        self,
        vector: npt.NDArray[np.float32],
        filters: Filters = Filters(),
    ) -> pa.Table:
        """The score of every admitted tile, exact.

        Args:
            vector: (D,) float32, L2-normalised.
            filters: which tiles are admitted.

        Returns:
            SEARCH_RESULTS rows in the order of region and tile.

        Raises:
            InputError: if the vector has another width.
        """
        vector = self._query(vector)
        found = []
        for part, rows in self._admitted(filters):
            scores = part.scores(vector)
            rows = np.arange(part.rows) if rows is None else rows
            found.append(part.results(rows, scores[rows]))
        return pa.concat_tables([SEARCH_RESULTS.empty(), *found])

    def _admitted(self, filters: Filters) -> Iterator[tuple[_OpenPart, npt.NDArray[np.int64] | None]]:
        """Parts with admitted tiles, and their rows; None: all."""
        if filters.area is not None:
            import shapely

            shapely.prepare(filters.area)
        for part in self._parts.values():
            admitted = filters.select(part)
            if admitted is None:
                if part.rows:
                    yield part, None
            elif admitted.any():
                yield part, np.flatnonzero(admitted)

    def _query(self, vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if vector.shape != (self.width,):
            raise InputError(
                f"A query of shape {vector.shape} does not fit vectors of {self.width} dimensions: "
                "take it from the encoder that the index was made with."
            )
        return np.ascontiguousarray(vector, dtype=np.float32)


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


def _stale(root: "UPath", sensor: str, manifest: Manifest) -> dict[str, str]:
    sources = read_sources(root, sensor)
    stale = dict(manifest.left_out)
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
