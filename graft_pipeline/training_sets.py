"""Training sets: snapshots of all regions' pairs with the embeddings of their photos, named by their content.

How a training set is read into tensors is in training/data.py.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.errors import DataError
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import (
    atomic_local_file,
    is_local,
    partition_file,
    partition_folder,
    read_table,
    write_bytes_atomic,
    write_table,
)
from graft_pipeline.provenance import fingerprint
from graft_pipeline.schemas import CHIPS, GROUND_EMBEDDINGS, PAIRS, TRAINING_PAIRS, Dataset
from graft_pipeline.splits import TRAIN, VALIDATION

if TYPE_CHECKING:
    from upath import UPath

logger = logging.getLogger(__name__)

#: File beside a sensor's snapshots that names the one built last.
LATEST = "latest.json"

EMBEDDINGS = "ground_embeddings.npy"


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
    regions: tuple[str, ...]
    model_id: str


def build_training_set(
    root: "UPath | Path", sensor: Sensor, regions: Sequence[str] | None = None
) -> TrainingSetInfo:
    """Freeze the pairs of a sensor: one table, and one matrix of the photos' embeddings.

    Regions are read one after the other; embeddings go to disk as they come, so memory holds the table alone.
    Chips stay in their shards, which never change.

    Args:
        root: storage root.
        sensor: the sensor.
        regions: keys of the regions to use; None: all that have pairs.

    Returns:
        The snapshot. The same content gives the same folder and is not written twice.

    Raises:
        DataError: if there are no pairs, or embeddings of several models.
    """
    keys = _stored_regions(root, PAIRS, sensor) if regions is None else sorted(set(regions))
    parts, guard, unembedded, model_ids = [], 0, 0, set[str]()
    content = hashlib.sha256()
    for key in keys:
        pairs = read_table(partition_file(root, PAIRS, sensor=sensor.name, region=key), PAIRS)
        embedded = read_table(partition_file(root, GROUND_EMBEDDINGS, region=key), GROUND_EMBEDDINGS)
        if pairs is None or pairs.num_rows == 0:
            continue
        embedded = GROUND_EMBEDDINGS.empty() if embedded is None else embedded
        used = pairs.filter(pc.is_in(pairs["split"], pa.array([TRAIN, VALIDATION])))
        guard += pairs.num_rows - used.num_rows
        has_embedding = pc.is_in(used["photo_id"], embedded["photo_id"].combine_chunks())
        located = _with_chips(root, sensor, key, used.filter(has_embedding))
        unembedded += used.num_rows - pc.sum(has_embedding).as_py() if used.num_rows else 0
        if located.num_rows:
            parts.append(located)
            rows = _embeddings_of(embedded, located["photo_id"])
            model_ids |= set(pc.unique(rows["model_id"]).to_pylist())
            content.update(fingerprint(rows.drop_columns(["embedding"]), _matrix(rows)).encode())
    if not parts:
        raise DataError(
            f"{sensor.name} has no pairs of the training or validation split with embeddings "
            f"({guard} guard pairs, {unembedded} without embedding): materialise pairs and ground_embeddings first."
        )
    if len(model_ids) > 1:
        raise DataError(
            f"Ground embeddings come from several foundation models {sorted(model_ids)}: "
            "materialise ground_embeddings of all regions with one."
        )
    table = pa.concat_tables(parts)
    photo_ids = pc.unique(table["photo_id"])
    photo_ids = photo_ids.take(pc.sort_indices(photo_ids))
    rows_of_photos = pc.index_in(table["photo_id"], photo_ids).cast(pa.int64())
    table = table.append_column("embedding_row", rows_of_photos).select(TRAINING_PAIRS.schema.names)
    table = table.cast(TRAINING_PAIRS.schema).sort_by([(name, "ascending") for name in TRAINING_PAIRS.order])
    snapshot = fingerprint(sensor, table, content.hexdigest())
    folder = partition_folder(root, TRAINING_PAIRS, sensor=sensor.name, snapshot=snapshot)
    used_regions = tuple(sorted(set(table["region"].to_pylist())))
    is_new = not (folder / EMBEDDINGS).exists()
    if is_new:
        _write_embeddings(root, folder / EMBEDDINGS, photo_ids, used_regions)
    # Last: a snapshot with a table is complete.
    is_new |= write_table(folder / f"{TRAINING_PAIRS.name}.parquet", table, TRAINING_PAIRS)
    write_bytes_atomic(folder.parent / LATEST, json.dumps({"snapshot": snapshot}).encode())
    splits = table["split"].value_counts().to_pylist()
    return TrainingSetInfo(
        folder=folder,
        fingerprint=snapshot,
        is_new=is_new,
        tiles=pc.count_distinct(table["tile_id"]).as_py(),
        photos=len(photo_ids),
        pairs=table.num_rows,
        pairs_by_split={
            name: sum(row["counts"] for row in splits if row["values"] == name)
            for name in (TRAIN, VALIDATION)
        },
        guard_pairs=guard,
        unembedded_pairs=unembedded,
        regions=used_regions,
        model_id=model_ids.pop(),
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


def read(folder: "UPath | Path") -> pa.Table:
    """The table of a snapshot.

    Args:
        folder: its folder.

    Returns:
        TRAINING_PAIRS rows, sorted by tile_id and photo_id.

    Raises:
        DataError: if there is none.
    """
    table = read_table(folder / f"{TRAINING_PAIRS.name}.parquet", TRAINING_PAIRS)
    if table is None:
        raise DataError(f"{folder} holds no training set: materialise training_set first.")
    return table


def _stored_regions(root: "UPath | Path", dataset: Dataset, sensor: Sensor) -> list[str]:
    folder = root / dataset.name / f"sensor={sensor.name}"
    if not folder.exists():
        return []
    files = folder.glob(f"region=*/{dataset.name}.parquet")
    return sorted(file.parent.name.removeprefix("region=") for file in files)


def _with_chips(root: "UPath | Path", sensor: Sensor, region: str, pairs: pa.Table) -> pa.Table:
    """Pairs of one region with the place of their chips; no embedding_row yet."""
    chips = read_table(partition_file(root, CHIPS, sensor=sensor.name, region=region), CHIPS)
    chips = CHIPS.empty() if chips is None else chips.filter(pc.equal(chips["status"], "ok"))
    position = pc.index_in(pairs["tile_id"], chips["tile_id"].combine_chunks())
    if position.null_count:
        raise DataError(
            f"{position.null_count} pairs of {sensor.name} in {region} have no stored chip: "
            "materialise pairs of that region again."
        )
    chips = chips.take(position)
    prefix = pa.scalar(f"{CHIPS.name}/sensor={sensor.name}/region={region}/")
    columns = {
        name: pairs[name]
        for name in ("tile_id", "photo_id", "split", "col_px", "row_px", "lon_deg", "lat_deg")
    }
    return pa.table(
        {
            **columns,
            "region": pa.array([region] * pairs.num_rows, pa.string()),
            "chip_shard": pc.binary_join_element_wise(prefix, chips["shard"], ""),
            "chip_offset": chips["offset"],
            "chip_size_bytes": chips["size_bytes"],
        }
    )


def _embeddings_of(embedded: pa.Table, photo_ids: pa.ChunkedArray) -> pa.Table:
    """Rows of embeddings for some photos, sorted by photo_id."""
    wanted = embedded.filter(pc.is_in(embedded["photo_id"], pc.unique(photo_ids)))
    return wanted.sort_by("photo_id")


def _matrix(embedded: pa.Table) -> npt.NDArray[np.float32]:
    column = embedded["embedding"].combine_chunks()
    values = np.asarray(column.flatten(), dtype=np.float32)
    widths = np.unique(np.asarray(pc.list_value_length(column)))
    if len(widths) > 1:
        raise DataError(
            f"Ground embeddings have several widths {widths.tolist()}: materialise them with one model."
        )
    return values.reshape(embedded.num_rows, -1)


def _write_embeddings(
    root: "UPath | Path", path: "UPath", photo_ids: pa.Array, regions: Sequence[str]
) -> None:
    """Write the (P, D) float32 matrix of photos, rows in the order of `photo_ids`, region by region."""
    with _file_for(path) as partial:
        matrix: npt.NDArray[np.float32] | None = None
        for key in regions:
            embedded = read_table(partition_file(root, GROUND_EMBEDDINGS, region=key), GROUND_EMBEDDINGS)
            if embedded is None:
                continue
            rows = pc.index_in(embedded["photo_id"], photo_ids)
            used = embedded.filter(pc.is_valid(rows))
            vectors = _matrix(used)
            if matrix is None:
                shape = (len(photo_ids), vectors.shape[1])
                matrix = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            if vectors.shape[1] != matrix.shape[1]:
                raise DataError(
                    f"Ground embeddings of {key} have another width: materialise them with one model."
                )
            matrix[rows.drop_null().to_numpy()] = vectors
        if matrix is not None:
            cast(np.memmap, matrix).flush()


@contextmanager
def _file_for(path: "UPath") -> Iterator[Path]:
    """A local file that becomes `path` when the block ends well: renamed, or put in one go."""
    if is_local(path):
        with atomic_local_file(path) as partial:
            yield partial
        return
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder) / path.name
        yield partial
        path.fs.put_file(str(partial), path.path)
