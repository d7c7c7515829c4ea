"""Photos that are to be forgotten: taken out of every dataset, and kept out of what is found later.

Which photos the rules reject is in photos.py; how a shard loses a member, in shards.py.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline import search_index
from graft_pipeline.errors import InputError
from graft_pipeline.manifests import connect, is_local, remove_partial_files
from graft_pipeline.schemas import (
    CONCEPT_MAPS,
    DATASETS,
    FLICKR_PHOTOS,
    PURGED_OWNERS,
    PURGED_PHOTOS,
    TILES,
    TRAINING_PAIRS,
    Dataset,
)
from graft_pipeline.shards import blank_members, spend_numbers
from graft_pipeline.training_sets import LATEST
from graft_pipeline.unfinished import Unfinished

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from upath import UPath

logger = logging.getLogger(__name__)

_PHOTO_ID = re.compile(r"[A-Za-z0-9_\-]{1,64}")
_OWNER_ID = re.compile(r"[A-Za-z0-9_@\-]{1,64}")

#: Region-partitioned datasets that name photos, downstream first: whoever is killed leaves no row that points to
#: what is gone. Flickr's rows come last: a region that names none of the photos any more is done.
_OF_REGIONS = [
    dataset
    for dataset in reversed(DATASETS.values())
    if "region" in dataset.partitions and {"photo_id", "tile_id"} & set(dataset.schema.names)
]


class Tables(Protocol):
    """Where tables lie (resources.storage.Storage)."""

    @property
    def root(self) -> "UPath":
        """Folder of all datasets."""
        ...

    def folder(self, dataset: Dataset, **values: str) -> "UPath":
        """Folder of one partition."""
        ...

    def partitions(self, dataset: Dataset, **fixed: str) -> list[dict[str, str]]:
        """Partition values that exist."""
        ...

    def read(self, dataset: Dataset, **values: str) -> pa.Table:
        """Rows of one partition."""
        ...

    def write(self, dataset: Dataset, table: pa.Table, **values: str) -> bool:
        """Replace the rows of one partition."""
        ...


@dataclass(frozen=True)
class PurgeReport:
    """What a purge removed, or would.

    Attributes:
        photos: photos that are kept out from now on and were not before.
        owners: owners, likewise.
        rows: rows removed, by dataset, downstream first.
        training_sets: snapshots deleted.
        regions: regions that had anything of the photos; once more for each copy.
    """

    photos: int
    owners: int
    rows: dict[str, int]
    training_sets: int
    regions: int


def keep_out(photos: pa.Table, purged_photos: pa.Table, purged_owners: pa.Table) -> pa.Table:
    """Drop photos that were purged, so that no search brings them back.

    Args:
        photos: FLICKR_PHOTOS rows.
        purged_photos: PURGED_PHOTOS rows.
        purged_owners: PURGED_OWNERS rows.

    Returns:
        The rows whose photo is on no list.
    """
    is_purged = pc.or_(
        pc.is_in(photos["photo_id"], purged_photos["photo_id"].combine_chunks()),
        pc.is_in(photos["owner_id"], purged_owners["owner_id"].combine_chunks()),
    )
    return photos.filter(pc.invert(is_purged))


def purge(
    storage: Tables,
    photo_ids: Iterable[str],
    owner_ids: Iterable[str] = (),
    *,
    reason: str,
    now: datetime,
    copies: Sequence[Tables] = (),
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PurgeReport:
    """Remove photos from every dataset, and keep them out.

    First the photos are listed in PURGED_PHOTOS, and the owners in PURGED_OWNERS: `keep_out` drops them from
    whatever Flickr finds later. Then go the training sets that hold any of them, and the concept maps of sensors
    that lose a tile, as they show the best ones; then, region by region, every row that names one: metadata,
    image, embedding, outdoor score, pairs. A tile goes with its centre photo, whose id and place it has, and so do
    its chip, its chip embedding and its pairs. Photos that were rejected as duplicates of a purged one stay so,
    without its id: the same picture is not to come back by another name.

    Each file is replaced atomically. A purge that was killed is completed by the next one, of whatever photos:
    all that are listed are looked for again. No other process may write into the storage meanwhile.

    Args:
        storage: where the tables lie.
        photo_ids: photos to purge, stored or not.
        owner_ids: owners all of whose photos are purged, also those they upload later.
        reason: kept in the lists.
        now: kept in the lists, with time zone.
        copies: roots of other datasets made of the same photos, such as those of ablations.
        dry_run: only count.
        progress: called with (done, total) regions.

    Returns:
        What was removed, or with `dry_run` would be.

    Raises:
        InputError: if an id cannot be one of Flickr's, or is a tile's.
        DataError: if a dataset or a shard is damaged.
    """
    photo_ids, owner_ids = list(photo_ids), list(owner_ids)
    for name, pattern, ids in (("photo", _PHOTO_ID, photo_ids), ("owner", _OWNER_ID, owner_ids)):
        wrong = [identifier for identifier in ids if pattern.fullmatch(identifier) is None]
        if wrong:
            raise InputError(f"{wrong[0]!r} is no id of a Flickr {name}: give ids as Flickr's API does.")
    known_photos, known_owners = storage.read(PURGED_PHOTOS), storage.read(PURGED_OWNERS)
    owners = _listed(known_owners, PURGED_OWNERS, owner_ids, reason, now)
    with closing(connect(storage.root, [FLICKR_PHOTOS, TILES])) as database:
        database.register("gone_owners", owners.select(["owner_id"]))
        of_owners = database.execute(
            "SELECT photo_id FROM flickr_photos WHERE owner_id IN (SELECT owner_id FROM gone_owners)"
        ).fetchall()
        ids = [*photo_ids, *(photo_id for (photo_id,) in of_owners)]
        # Kept out as a photo's it would purge nothing, and look as if it had.
        of_tiles = database.execute(
            "SELECT tile_id, center_photo_id FROM tiles WHERE list_contains(?, tile_id) ORDER BY tile_id",
            [photo_ids],
        ).fetchall()
    if of_tiles:
        tile_id, photo_id = of_tiles[0]
        raise InputError(f"{tile_id} is a tile, not a photo: give the id of its centre photo, {photo_id}.")
    photos = _listed(known_photos, PURGED_PHOTOS, ids, reason, now)
    plans = [_plan(at, photos) for at in (storage, *copies)]
    regions = [(plan.storage, region) for plan in plans for region in plan.regions]
    report = PurgeReport(
        photos=photos.num_rows - known_photos.num_rows,
        owners=owners.num_rows - known_owners.num_rows,
        rows={dataset.name: sum(plan.rows[dataset.name] for plan in plans) for dataset in _OF_REGIONS},
        training_sets=sum(len(plan.snapshots) for plan in plans),
        regions=len(regions),
    )
    if dry_run:
        return report
    if owners.num_rows:
        storage.write(PURGED_OWNERS, owners)
    storage.write(PURGED_PHOTOS, photos)
    for plan in plans:
        for folder in plan.snapshots:
            _delete_snapshot(folder)
        for file in plan.maps:
            file.unlink(missing_ok=True)
    for at in (storage, *copies):
        _remove_partial_files(at)
    for folder in _folders(storage, FLICKR_PHOTOS):
        # Answers of searches that were interrupted; they hold whatever Flickr found.
        Unfinished(folder).close()
    gone = photos["photo_id"].combine_chunks()
    for done, (at, region) in enumerate(regions, start=1):
        for dataset in _OF_REGIONS:
            for folder in _folders(at, dataset, region):
                _purge_partition(at, dataset, _values(folder, dataset), gone)
        if progress:
            progress(done, len(regions))
    for plan in plans:
        # Whatever was purged before: an index may be older than that.
        search_index.refresh(plan.storage.root)
    return report


def _listed(known: pa.Table, dataset: Dataset, ids: Iterable[str], reason: str, now: datetime) -> pa.Table:
    """A list with more ids; those that it has stay as they are."""
    (key,) = dataset.key
    have = set(known[key].to_pylist())
    rows = [
        {key: identifier, "reason": reason, "purged_at_utc": now} for identifier in sorted(set(ids) - have)
    ]
    return pa.concat_tables([known, pa.Table.from_pylist(rows, schema=dataset.schema)])


@dataclass(frozen=True)
class _Plan:
    """What is to go below one root."""

    storage: Tables
    rows: dict[str, int]
    regions: list[str]
    snapshots: list["UPath"]
    maps: list["UPath"]


def _plan(storage: Tables, photos: pa.Table) -> _Plan:
    """Look for photos below one root, in the columns that name them alone."""
    with closing(connect(storage.root, [*_OF_REGIONS, TRAINING_PAIRS])) as database:
        database.register("gone", photos.select(["photo_id"]))
        hits = {dataset.name: _hits(database, dataset) for dataset in _OF_REGIONS}
        snapshots = _snapshots(storage, database)
    rows = {name: sum(count for _, count in found) for name, found in hits.items()}
    regions = sorted({values["region"] for found in hits.values() for values, _ in found})
    sensors = sorted({values["sensor"] for values, _ in hits[TILES.name]})
    maps = [
        file
        for sensor in sensors
        for file in storage.folder(CONCEPT_MAPS, sensor=sensor).glob(f"{CONCEPT_MAPS.name}.*")
    ]
    return _Plan(storage, rows, regions, snapshots, maps)


def _hits(database: "DuckDBPyConnection", dataset: Dataset) -> list[tuple[dict[str, str], int]]:
    """Partitions of a dataset that name a photo of the view `gone`, and in how many rows."""
    of_photo = "{} IN (SELECT photo_id FROM gone)"
    conditions = [
        of_photo.format(column)
        for column in ("photo_id", "center_photo_id")
        if column in dataset.schema.names
    ]
    if "tile_id" in dataset.schema.names:
        # {sensor}-{center_photo_id}; the sensor is the outermost partition.
        conditions.append(of_photo.format("substr(tile_id, length(sensor) + 2)"))
    columns = ", ".join(dataset.partitions)
    rows = database.execute(
        f"SELECT {columns}, count(*) FROM {dataset.name} WHERE {' OR '.join(conditions)} "
        f"GROUP BY {columns} ORDER BY {columns}"
    ).fetchall()
    return [(dict(zip(dataset.partitions, row[:-1], strict=True)), row[-1]) for row in rows]


def _remove_partial_files(storage: Tables) -> None:
    """What killed writers left half written, wherever it may name a photo: also where no table is yet."""
    if not is_local(storage.root):
        return
    root = Path(str(storage.root))
    for folder in (
        *(root / name for name in DATASETS),
        Path(str(search_index.index_folder(root, "*"))).parent,
    ):
        for beside in sorted({file.parent for file in folder.rglob(".*.partial")}):
            remove_partial_files(beside)


def _purge_partition(storage: Tables, dataset: Dataset, values: dict[str, str], gone: pa.Array) -> None:
    """One partition of a region: its rows, then what its shards and unfinished items hold."""
    table, names = storage.read(dataset, **values), dataset.schema.names
    prefix = f"{values['sensor']}-" if "sensor" in values else ""
    tiles = pc.binary_join_element_wise(pa.scalar(prefix), gone, "")
    is_gone = pa.chunked_array([pa.repeat(pa.scalar(False), table.num_rows)])
    for column, keys in (("photo_id", gone), ("center_photo_id", gone), ("tile_id", tiles)):
        if column in names:
            is_gone = pc.or_(is_gone, pc.is_in(table[column], keys))
    if pc.any(is_gone).as_py():
        kept = table.filter(pc.invert(is_gone))
        if "duplicate_of" in names:
            original = kept["duplicate_of"]
            original = pc.if_else(pc.is_in(original, gone), pa.scalar(None, pa.string()), original)
            kept = kept.set_column(names.index("duplicate_of"), "duplicate_of", original)
        spend_numbers(storage.folder(dataset, **values), table, kept)
        storage.write(dataset, kept, **values)
    if "shard" in names:
        keys = set((tiles if "tile_id" in names else gone).to_pylist())
        folder = storage.folder(dataset, **values)
        Unfinished(folder).forget(keys)
        for shard in sorted(file.name for file in folder.glob("*.tar")):
            blank_members(folder, shard, keys)


def _snapshots(storage: Tables, database: "DuckDBPyConnection") -> list["UPath"]:
    """Folders of training sets that hold a purged photo, or that no run came to complete."""
    hit = {tuple(values.values()) for values, _ in _hits(database, TRAINING_PAIRS)}
    whole = {tuple(values.values()) for values in storage.partitions(TRAINING_PAIRS)}
    folders = []
    for folder in _folders(storage, TRAINING_PAIRS):
        place = tuple(_values(folder, TRAINING_PAIRS).values())
        if place in hit or place not in whole:
            folders.append(folder)
    return folders


def _delete_snapshot(folder: "UPath") -> None:
    """Delete a training set: first what names it as the latest, last the table by which it is found."""
    latest = folder.parent / LATEST
    if latest.exists() and json.loads(latest.read_bytes())["snapshot"] == folder.name.partition("=")[2]:
        latest.unlink()
    table = f"{TRAINING_PAIRS.name}.parquet"
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: (file.name == table, str(file))):
        file.unlink()
    # Object stores have no folders.
    if folder.exists():
        folder.fs.rm(folder.path, recursive=True)


def _folders(storage: Tables, dataset: Dataset, region: str = "*") -> list["UPath"]:
    """Folders of a dataset's partitions, also those without a table yet, sorted."""
    levels = [f"{column}={region if column == 'region' else '*'}" for column in dataset.partitions]
    return sorted(storage.root.glob("/".join([dataset.name, *levels])), key=str)


def _values(folder: "UPath | Path", dataset: Dataset) -> dict[str, str]:
    """Partition values that a folder's path names."""
    parts = cast(tuple[str, ...], folder.parts)[-len(dataset.partitions) :]
    return {column: part.partition("=")[2] for column, part in zip(dataset.partitions, parts, strict=True)}
