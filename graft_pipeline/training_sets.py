"""Training sets: snapshots of all regions' pairs with the embeddings of their photos, named by their content.

How a training set is read into tensors is in training/data.py.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.embeddings import vectors_of
from graft_pipeline.errors import DataError
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import (
    TableWriter,
    open_table,
    partial_files,
    partition_file,
    partition_folder,
    publish,
    read_table,
    remove_partial_files,
    write_bytes_atomic,
)
from graft_pipeline.photos import MOVED
from graft_pipeline.provenance import code_version, fingerprint
from graft_pipeline.schemas import (
    CHIPS,
    FLICKR_PHOTOS,
    GROUND_EMBEDDINGS,
    GROUND_IMAGES,
    PAIRS,
    TRAINING_PAIRS,
    Dataset,
)
from graft_pipeline.splits import TRAIN, VALIDATION

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from upath import UPath

logger = logging.getLogger(__name__)

#: File beside a sensor's snapshots that names the one built last.
LATEST = "latest.json"

EMBEDDINGS = "ground_embeddings.npy"

_TABLE = f"{TRAINING_PAIRS.name}.parquet"

#: Of a photo that a region pairs and whose record it lacks.
_NOWHERE = (False, 0.0, False)

#: Bounds memory: 32 MB of vectors of 512.
_EMBEDDINGS_PER_BATCH = 16_384


@dataclass(frozen=True)
class TrainingSetInfo:
    """A snapshot.

    Attributes:
        folder: its folder, `training_set/sensor=S/snapshot=F`.
        fingerprint: F, 16 hexadecimal digits of its content.
        is_new: whether any file was written.
        tiles: tiles with at least one pair.
        photos: photos with at least one pair: rows of ground_embeddings.npy.
        pairs: (tile, photo) rows.
        pairs_by_split: pairs of `train` and `validation`.
        guard_pairs: pairs left out because their chip touches ground of both splits.
        unembedded_pairs: pairs left out because their photo has no embedding yet.
        moved_pairs: pairs left out because their photo, or their tile's centre photo, lies in another region by now.
        regions: regions with pairs.
        model_id: fingerprint of the foundation model.
    """

    folder: "UPath"
    fingerprint: str
    is_new: bool
    tiles: int
    photos: int
    pairs: int
    pairs_by_split: dict[str, int]
    guard_pairs: int
    unembedded_pairs: int
    moved_pairs: int
    regions: tuple[str, ...]
    model_id: str


def build_training_set(
    root: "UPath | Path",
    sensor: Sensor,
    regions: Sequence[str] | None = None,
    photos_root: "UPath | Path | None" = None,
) -> TrainingSetInfo:
    """Freeze the pairs of a sensor: one table, and one matrix of the photos' embeddings.

    Regions are read one after the other, and written as they come; memory holds one region's pairs, a few thousand
    embeddings, the pairs of the validation split, which come last, and eight bytes for each photo. Chips stay in
    their shards, which never change.

    A photo whose geotag was moved to another region may still be paired in both, as a region does not look at its
    neighbours: it is used where its latest record places it, and with it the tile that it is the centre of.

    The fingerprint covers the rows, the embeddings, the versions of what they were made from (the content of the
    images and of the chips, the scenes and their times) and that of this module.

    Args:
        root: storage root.
        sensor: the sensor.
        regions: keys of the regions to use; None: all that have pairs.
        photos_root: root where FLICKR_PHOTOS lie; None: the same.

    Returns:
        The snapshot. The same content gives the same folder and is not written twice.

    Raises:
        DataError: if there are no pairs, or embeddings of several models or widths.
    """
    keys = _stored_regions(root, PAIRS, sensor) if regions is None else sorted(set(regions))
    folder = root / TRAINING_PAIRS.name / f"sensor={sensor.name}"
    remove_partial_files(folder)
    elsewhere = _elsewhere(root, sensor, keys, photos_root or root)
    found = _Found()
    with partial_files(folder, EMBEDDINGS, _TABLE) as (embeddings, table):
        with _MatrixWriter(embeddings) as matrix, TableWriter(table, TRAINING_PAIRS) as rows:
            validation = []
            for key in keys:
                of_region = _read_region(root, sensor, key, elsewhere.get(key, []), matrix, found)
                rows.write(of_region.filter(pc.equal(of_region["split"], TRAIN)))
                validation.append(of_region.filter(pc.equal(of_region["split"], VALIDATION)))
            for piece in validation:
                rows.write(piece)
        _check(found, sensor)
        with table.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        snapshot = fingerprint(code_version(__name__), sensor, content, matrix.content, found.versions)
        folder = partition_folder(root, TRAINING_PAIRS, sensor=sensor.name, snapshot=snapshot)
        is_new = not (folder / _TABLE).exists()
        if is_new:
            publish(embeddings, folder / EMBEDDINGS)
            # Last: a snapshot with a table is complete.
            publish(table, folder / _TABLE)
    write_bytes_atomic(folder.parent / LATEST, json.dumps({"snapshot": snapshot}).encode())
    return TrainingSetInfo(
        folder=folder,
        fingerprint=snapshot,
        is_new=is_new,
        tiles=found.tiles,
        photos=matrix.rows,
        pairs=sum(found.pairs.values()),
        pairs_by_split=found.pairs,
        guard_pairs=found.guard,
        unembedded_pairs=found.unembedded,
        moved_pairs=found.moved,
        regions=tuple(found.regions),
        model_id=found.model_ids.pop(),
    )


def latest(root: "UPath | Path", sensor: Sensor) -> "UPath":
    """The snapshot that was built last.

    Args:
        root: storage root.
        sensor: the sensor.

    Returns:
        Its folder.

    Raises:
        DataError: if none was built.
    """
    folder = root / TRAINING_PAIRS.name / f"sensor={sensor.name}"
    try:
        snapshot = json.loads((folder / LATEST).read_bytes())["snapshot"]
    except FileNotFoundError as error:
        raise DataError(f"{sensor.name} has no training set yet: materialise training_set first.") from error
    return partition_folder(root, TRAINING_PAIRS, sensor=sensor.name, snapshot=snapshot)


def read(folder: "UPath | Path", names: Sequence[str] | None = None) -> pa.Table:
    """The table of a snapshot.

    Args:
        folder: its folder.
        names: columns to read; None: all.

    Returns:
        TRAINING_PAIRS rows, sorted by split, region, tile_id and photo_id.

    Raises:
        DataError: if there is none.
    """
    table = read_table(folder / _TABLE, TRAINING_PAIRS, names)
    if table is None:
        raise DataError(f"{folder} holds no training set: materialise training_set first.")
    return table


def _stored_regions(root: "UPath | Path", dataset: Dataset, sensor: Sensor) -> list[str]:
    folder = root / dataset.name / f"sensor={sensor.name}"
    if not folder.exists():
        return []
    files = folder.glob(f"region=*/{dataset.name}.parquet")
    return sorted(file.parent.name.removeprefix("region=") for file in files)


@dataclass
class _Found:
    """What regions hold, added up while they are read."""

    regions: list[str] = field(default_factory=list)
    pairs: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    tiles: int = 0
    model_ids: set[str] = field(default_factory=set)
    versions: list[str] = field(default_factory=list)
    guard: int = 0
    unembedded: int = 0
    moved: int = 0


def _check(found: _Found, sensor: Sensor) -> None:
    if not found.regions:
        raise DataError(
            f"{sensor.name} has no pairs of the training or validation split with embeddings "
            f"({found.guard} guard pairs, {found.unembedded} without embedding): "
            "materialise pairs and ground_embeddings first."
        )
    if len(found.model_ids) > 1:
        raise DataError(
            f"Ground embeddings come from several foundation models {sorted(found.model_ids)}: "
            "materialise ground_embeddings of all regions with one."
        )


def _elsewhere(
    root: "UPath | Path", sensor: Sensor, regions: Sequence[str], photos_root: "UPath | Path"
) -> dict[str, list[str]]:
    """By region, the photos that its pairs name, but that lie in another one that names them too."""
    import duckdb

    named: dict[str, list[str]] = defaultdict(list)
    with closing(duckdb.connect(":memory:")) as database:
        hashes = {region: _hashes(database, _named_photos(root, sensor, region)) for region in regions}
    every = np.sort(np.concatenate([*hashes.values(), np.empty(0, np.uint64)]))
    repeated = np.unique(every[1:][every[1:] == every[:-1]])
    if not repeated.size:
        return {}
    for region in regions:
        is_repeated = np.isin(hashes[region], repeated)
        if is_repeated.any():
            for photo_id in _named_photos(root, sensor, region).filter(pa.array(is_repeated)).to_pylist():
                named[photo_id].append(region)
    places = {
        region: _places(photos_root, region, list(named))
        for region in sorted({region for several in named.values() for region in several})
    }
    elsewhere: dict[str, list[str]] = defaultdict(list)
    for photo_id in sorted(named):
        *others, _ = sorted(named[photo_id], key=lambda region: places[region].get(photo_id, _NOWHERE))
        for region in others:
            elsewhere[region].append(photo_id)
    return elsewhere


def _named_photos(root: "UPath | Path", sensor: Sensor, region: str) -> pa.Array:
    """The photos that a region's pairs name, those at the tiles' centres too; each once."""
    path = partition_file(root, PAIRS, sensor=sensor.name, region=region)
    pairs = read_table(path, PAIRS, ["tile_id", "photo_id"])
    if pairs is None:
        return pa.array([], pa.string())
    centers = pc.utf8_slice_codeunits(pc.unique(pairs["tile_id"]), len(sensor.name) + 1)
    return pc.unique(pa.concat_arrays([pc.unique(pairs["photo_id"]), centers]))


def _hashes(database: "DuckDBPyConnection", ids: pa.Array) -> npt.NDArray[np.uint64]:
    """One number for each id: what all regions name is compared in a fraction of the memory."""
    database.register("ids", pa.table({"id": ids}))
    hashes: npt.NDArray[np.uint64] = database.execute("SELECT hash(id) AS h FROM ids").fetchnumpy()["h"]
    return hashes


def _places(root: "UPath | Path", region: str, photo_ids: list[str]) -> dict[str, tuple[bool, float, bool]]:
    """How well a region knows where photos lie, to be compared: the greatest is right."""
    names = ["photo_id", "status", "reason", "updated_at_utc"]
    photos = read_table(partition_file(root, FLICKR_PHOTOS, region=region), FLICKR_PHOTOS, names)
    if photos is None:
        return {}
    # A record that shows a photo in its new place is younger than any that shows it in its old one.
    return {
        row["photo_id"]: (
            row["reason"] != MOVED,
            row["updated_at_utc"].timestamp() if row["updated_at_utc"] else 0.0,
            row["status"] == "ok",
        )
        for row in photos.filter(pc.is_in(photos["photo_id"], pa.array(photo_ids))).to_pylist()
    }


def _read_region(
    root: "UPath | Path",
    sensor: Sensor,
    region: str,
    elsewhere: list[str],
    matrix: "_MatrixWriter",
    found: _Found,
) -> pa.Table:
    """TRAINING_PAIRS rows of one region, sorted by tile_id and photo_id; its embeddings go to the matrix."""
    names = ["tile_id", "photo_id", "split", "col_px", "row_px", "lon_deg", "lat_deg"]
    pairs = read_table(partition_file(root, PAIRS, sensor=sensor.name, region=region), PAIRS, names)
    if pairs is None:
        return TRAINING_PAIRS.empty()
    if elsewhere:
        tiles = pa.array([f"{sensor.name}-{photo_id}" for photo_id in elsewhere])
        is_moved = pc.or_(pc.is_in(pairs["photo_id"], pa.array(elsewhere)), pc.is_in(pairs["tile_id"], tiles))
        found.moved += pc.sum(is_moved).as_py() or 0
        pairs = pairs.filter(pc.invert(is_moved))
    used = pairs.filter(pc.is_in(pairs["split"], pa.array([TRAIN, VALIDATION])))
    found.guard += pairs.num_rows - used.num_rows
    with open_table(partition_file(root, GROUND_EMBEDDINGS, region=region), GROUND_EMBEDDINGS) as file:
        embedded = (GROUND_EMBEDDINGS.empty() if file is None else file.read(["photo_id"]))["photo_id"]
        located = used.filter(pc.is_in(used["photo_id"], embedded.combine_chunks()))
        found.unembedded += used.num_rows - located.num_rows
        if file is None or not located.num_rows:
            return TRAINING_PAIRS.empty()
        photo_ids = embedded.filter(pc.is_in(embedded, pc.unique(located["photo_id"]))).combine_chunks()
        first_row, model_ids = matrix.rows, set[str]()
        for batch in _ahead(file.iter_batches(_EMBEDDINGS_PER_BATCH)):
            some = pa.table(batch)
            is_used = pc.is_in(some["photo_id"], photo_ids)
            model_ids.update(pc.unique(some["model_id"].filter(is_used)).to_pylist())
            # Rows of a matrix are copied several times as fast as lists of Arrow.
            matrix.write(_vectors(some, region)[is_used.to_numpy()])
    chips = _chips_of(root, sensor, region, located)
    position = pc.index_in(located["tile_id"], chips["tile_id"].combine_chunks())
    found.model_ids |= model_ids
    found.regions.append(region)
    found.tiles += chips.num_rows
    for name in found.pairs:
        found.pairs[name] += pc.sum(pc.equal(located["split"], name)).as_py()
    images = read_table(
        partition_file(root, GROUND_IMAGES, region=region), GROUND_IMAGES, ["photo_id", "sha256"]
    )
    found.versions.append(
        fingerprint(
            chips.select(["tile_id", "scene_id", "acquired_at_utc", "sha256"]),
            images and images.filter(pc.is_in(images["photo_id"], photo_ids)),
        )
    )
    chips = chips.take(position)
    prefix = pa.scalar(f"{CHIPS.name}/sensor={sensor.name}/region={region}/")
    columns = {
        **{name: located[name] for name in names},
        "region": pa.array([region] * located.num_rows, pa.string()),
        "chip_shard": pc.binary_join_element_wise(prefix, chips["shard"], ""),
        "chip_offset": chips["offset"],
        "chip_size_bytes": chips["size_bytes"],
        "embedding_row": pc.add(pc.index_in(located["photo_id"], photo_ids).cast(pa.int64()), first_row),
        # One of all regions, or none is published.
        "model_id": pa.repeat(min(model_ids), located.num_rows),
    }
    return pa.table(columns).select(TRAINING_PAIRS.schema.names).cast(TRAINING_PAIRS.schema)


def _chips_of(root: "UPath | Path", sensor: Sensor, region: str, pairs: pa.Table) -> pa.Table:
    """The chips of one region that pairs use, sorted by tile_id."""
    names = ["tile_id", "status", "scene_id", "acquired_at_utc", "shard", "offset", "size_bytes", "sha256"]
    chips = read_table(partition_file(root, CHIPS, sensor=sensor.name, region=region), CHIPS, names)
    tile_ids = pc.unique(pairs["tile_id"])
    if chips is None:
        chips = CHIPS.empty().select(names)
    chips = chips.filter(pc.and_(pc.equal(chips["status"], "ok"), pc.is_in(chips["tile_id"], tile_ids)))
    missing = len(tile_ids) - chips.num_rows
    if missing:
        raise DataError(
            f"{missing} tiles of {sensor.name} in {region} have pairs but no stored chip: "
            "materialise pairs of that region again."
        )
    return chips


def _vectors(embedded: pa.Table, region: str) -> npt.NDArray[np.float32]:
    widths = pc.unique(pc.list_value_length(embedded["embedding"])).to_pylist()
    if len(widths) > 1:
        raise DataError(
            f"Ground embeddings of {region} have several widths {widths}: materialise them with one model."
        )
    return vectors_of(embedded)


def _ahead(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches, each decoded by a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


class _MatrixWriter:
    """Writes a (P, D) float32 .npy file row by row, P being known at the end; memory holds nothing.

    Attributes:
        rows: P so far.
        content: hash of the rows, once the file is closed.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._width = 0
        self.rows = 0
        self.content = ""

    def write(self, vectors: npt.NDArray[np.float32]) -> None:
        """Add (N, D) rows."""
        if not len(vectors):
            return
        if self._width and vectors.shape[1] != self._width:
            raise DataError(
                f"Ground embeddings are {self._width} and {vectors.shape[1]} wide: materialise them with one model."
            )
        if not self._width:
            self._width = vectors.shape[1]
            self._write_header()
        data = np.ascontiguousarray(vectors).data.cast("B")
        self._digest.update(data)
        self._file.write(data)
        self.rows += len(vectors)

    def _write_header(self) -> None:
        # NumPy pads the header so that the number of rows may grow in place.
        shape = (self.rows, self._width)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()
        self._digest.update(repr((self.rows, self._width)).encode())
        self.content = self._digest.hexdigest()
