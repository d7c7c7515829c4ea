"""Search indexes of sensors: one part for each region, made of its chip embeddings, kept current region by region.

How they are asked is in search.py; how chips are embedded, in embeddings.py; what large ones have besides, in
shortlist.py.
"""

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.embeddings import vectors_of
from graft_pipeline.errors import DataError
from graft_pipeline.grid import kept_as
from graft_pipeline.manifests import (
    atomic_local_file,
    is_local,
    open_table,
    partial_files,
    partition_file,
    publish,
    read_table,
    remove_partial_files,
    write_bytes_atomic,
)
from graft_pipeline.progress import Report
from graft_pipeline.provenance import fingerprint
from graft_pipeline.schemas import CHIP_EMBEDDINGS, CHIPS, search_part

if TYPE_CHECKING:
    from upath import UPath

    from graft_pipeline.shortlist import Shortlist

logger = logging.getLogger(__name__)

#: Changes with what a part holds: parts of another version are made anew.
VERSION = 1
#: Up to so many vectors every one is scored, which takes tens of milliseconds; more have a shortlist.
EXACT_ROWS = 100_000
#: Lists are learned anew when the number of vectors grew or fell by this factor.
_RELEARN_FACTOR = 4
_BATCH = 16_384
#: Columns of CHIPS that a part is made of.
_OF_CHIPS = ["tile_id", "status", "scene_id", "acquired_at_utc"]
#: Footers read at the same time; on an object store each is a request or two.
_THREADS = 16


@dataclass(frozen=True)
class Part:
    """One region's vectors in an index.

    Attributes:
        file: name of its Arrow file (`schemas.search_part`), which changes with the content.
        rows: tiles.
        source: fingerprint of what it was made from.
        bounds: (west, south, east, north) of the tiles' centres, degrees.
    """

    file: str
    rows: int
    source: str
    bounds: tuple[float, float, float, float]


@dataclass(frozen=True)
class ShortlistFile:
    """The shortlist of an index of many vectors.

    Attributes:
        file: name of its faiss file, which changes with the content.
        exact_rows: searches that admit no more tiles do without it.
        learned_from: vectors of the index when its lists were learned.
        first_ids: number of each region's first row; rows follow each other.
        next_id: first number that was never given.
    """

    file: str
    exact_rows: int
    learned_from: int
    first_ids: dict[str, int]
    next_id: int


@dataclass(frozen=True)
class Manifest:
    """What an index consists of; written last, so that readers see the old index or the new.

    Attributes:
        model_id: fingerprint of the satellite encoder; vectors of others are in another space.
        width: dimensions of its vectors.
        parts: by region, sorted.
        left_out: regions that have embeddings but no part, and why.
        shortlist: of all parts; None while they are searched exactly.
    """

    model_id: str
    width: int
    parts: dict[str, Part]
    left_out: dict[str, str]
    shortlist: ShortlistFile | None = None

    @property
    def rows(self) -> int:
        """Tiles of all parts."""
        return sum(part.rows for part in self.parts.values())


@dataclass(frozen=True)
class Source:
    """What a region's part would be made from, read from the footers of its files.

    Attributes:
        fingerprint: changes when chip embeddings or chips do.
        rows: embedded tiles.
        model_ids: encoders of the embeddings.
    """

    fingerprint: str
    rows: int
    model_ids: tuple[str, ...]


@dataclass(frozen=True)
class Update:
    """What an update did.

    Attributes:
        manifest: the index as it is now.
        made: regions whose parts were made (anew).
        removed: regions whose parts went.
        without_chip: embedded tiles left out as they have no stored chip, of the parts made.
        is_changed: whether any file changed.
        seconds: wall time.
    """

    manifest: Manifest
    made: tuple[str, ...]
    removed: tuple[str, ...]
    without_chip: int
    is_changed: bool
    seconds: float


def index_folder(root: "UPath | Path", sensor: str) -> "UPath":
    """Folder of a sensor's index."""
    return cast("UPath", root / "search_index" / f"sensor={sensor}")


def read_manifest(root: "UPath | Path", sensor: str) -> Manifest | None:
    """What a sensor's index consists of.

    Args:
        root: storage root.
        sensor: name of the sensor.

    Returns:
        The manifest; None if there is no index yet, or one of another version, in whose place the next update makes
        a new one.

    Raises:
        DataError: if the file is damaged.
    """
    path = index_folder(root, sensor) / "index.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            logger.warning("%s is of another version: materialise %s/search_index.", path, sensor)
            return None
        parts = {
            region: Part(**{**part, "bounds": tuple(part["bounds"])})
            for region, part in content.pop("parts").items()
        }
        shortlist = content.pop("shortlist")
        return Manifest(
            parts=parts, shortlist=None if shortlist is None else ShortlistFile(**shortlist), **content
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({error!r}): delete it and materialise {sensor}/search_index."
        ) from error


def read_sources(root: "UPath | Path", sensor: str, known: Manifest | None = None) -> dict[str, Source]:
    """What the parts of an index would be made from now; only footers are read.

    Args:
        root: storage root.
        sensor: name of the sensor.
        known: an index; of regions that are as they were for it, fewer bytes are looked at.

    Returns:
        Sources by region, sorted; regions without an embedding are left out.

    Raises:
        DataError: if a file is damaged.
    """
    pattern = f"{CHIP_EMBEDDINGS.name}/sensor={{}}/region=*/{CHIP_EMBEDDINGS.name}.parquet"
    files = [file for name in kept_as(sensor) for file in root.glob(pattern.format(name))]
    regions = sorted({str(file.parts[-2]).partition("=")[2] for file in files})
    with ThreadPoolExecutor(_THREADS) as pool:
        sources = pool.map(lambda region: _source(root, sensor, region, known), regions)
        found = dict(zip(regions, sources, strict=True))
    return {region: source for region, source in found.items() if source is not None}


def _source(root: "UPath | Path", sensor: str, region: str, known: Manifest | None) -> Source | None:
    places = [{"sensor": name, "region": region} for name in kept_as(sensor)]
    embedded = [partition_file(root, CHIP_EMBEDDINGS, **place) for place in places]
    chips = [partition_file(root, CHIPS, **place) for place in places]
    digest = fingerprint(VERSION, [_footer_digest(file) for file in (*embedded, *chips)])
    if known is not None and region in known.parts and known.parts[region].source == digest:
        return Source(digest, known.parts[region].rows, (known.model_id,))
    model_ids, rows = set[str](), 0
    for path in embedded:
        with open_table(path, CHIP_EMBEDDINGS) as file:
            if file is None:
                continue
            footer = file.metadata
        # A column of a few values: each row group's least and greatest name them all, or show that they differ.
        number = footer.schema.names.index("model_id")
        groups = [footer.row_group(group).column(number).statistics for group in range(footer.num_row_groups)]
        model_ids |= {value for group in groups if group is not None for value in (group.min, group.max)}
        rows += footer.num_rows
    return Source(digest, rows, tuple(sorted(model_ids))) if rows else None


def _footer_digest(path: "UPath") -> str | None:
    """Hash of a Parquet file's footer, which holds sizes, least and greatest values of every column; None: no file."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            # Parquet ends with the footer, its length in four bytes, and four letters.
            size = file.tell()
            file.seek(max(0, size - 8))
            length = int.from_bytes(file.read(4), "little")
            file.seek(max(0, size - 8 - length))
            return hashlib.sha256(file.read()).hexdigest()
    except FileNotFoundError:
        return None


def update(
    root: "UPath | Path",
    sensor: str,
    *,
    model_id: str | None = None,
    exact_rows: int = EXACT_ROWS,
    progress: Report | None = None,
) -> Update:
    """Bring a sensor's index up to date: parts of regions that changed are made, all others are left alone.

    Above `exact_rows` vectors there is a shortlist as well; of it, only the rows of these regions are taken out and
    put in. Lists are learned anew when the number of vectors has changed by a factor of four.

    An update that was killed is completed by the next one; parts that it finished are not made again.

    Args:
        root: storage root.
        sensor: name of the sensor.
        model_id: fingerprint of the encoder whose vectors are wanted; None: the one of most tiles.
        exact_rows: up to so many vectors there is no shortlist, and searches that admit no more do without it.
        progress: called with (done, total) regions.

    Returns:
        What was done.

    Raises:
        DataError: if a dataset is damaged.
        ServiceError: if the disk is full.
    """
    started = time.perf_counter()
    folder = index_folder(root, sensor)
    remove_partial_files(folder)
    before = read_manifest(root, sensor)
    sources = read_sources(root, sensor, before)
    wanted = model_id or _most_common_model(sources.values())
    known = _usable(folder, before, wanted)
    left_out = foreign_regions(sources, wanted)
    current = {region: source for region, source in sources.items() if region not in left_out}
    width, parts, made, without_chip = known.width, dict[str, Part](), list[str](), 0
    for done, (region, source) in enumerate(current.items(), start=1):
        if region in known.parts and known.parts[region].source == source.fingerprint:
            parts[region] = known.parts[region]
        else:
            table, lost = _part_table(root, sensor, region)
            found = table.schema.field("embedding").type.list_size
            if width not in (0, found):
                raise DataError(
                    f"{region}: embeddings of encoder {wanted} have {found} dimensions, elsewhere {width}: "
                    f"delete that file of {CHIP_EMBEDDINGS.name} and materialise it again."
                )
            width = found
            parts[region] = _write_part(folder, region, source, table)
            made.append(region)
            without_chip += lost
        if progress:
            progress(done, len(current))
    manifest = Manifest(wanted, width, parts, left_out)
    manifest = dataclasses.replace(
        manifest, shortlist=_update_shortlist(folder, known, manifest, exact_rows) if parts else None
    )
    content = {"version": VERSION, **dataclasses.asdict(manifest)}
    is_changed = write_bytes_atomic(
        folder / "index.json", (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    )
    # Only now: until its manifest was replaced, a reader of the old index could still ask for them.
    kept = files_of(manifest)
    for file in folder.iterdir():
        if file.name not in kept and file.suffix in (".arrow", ".faiss"):
            file.unlink()
    removed = tuple(region for region in known.parts if region not in parts)
    return Update(manifest, tuple(made), removed, without_chip, is_changed, time.perf_counter() - started)


def foreign_regions(sources: dict[str, Source], model_id: str) -> dict[str, str]:
    """Regions that another encoder embedded, whose vectors are in another space.

    Args:
        sources: by region.
        model_id: fingerprint of the encoder that is wanted.

    Returns:
        Why they have no part, in words, by region.
    """
    return {
        region: f"{region}: embedded by encoder {', '.join(source.model_ids)}, not {model_id}"
        for region, source in sources.items()
        if source.model_ids != (model_id,)
    }


def refresh(root: "UPath | Path") -> None:
    """Bring every index below a root up to date, with the encoder that each was made with.

    Args:
        root: storage root.

    Raises:
        DataError: if a dataset or an index is damaged.
        ServiceError: if the disk is full.
    """
    files = [file.parts[-2] for file in root.glob("search_index/sensor=*/index.json")]
    for sensor in sorted(folder.partition("=")[2] for folder in files):
        known = read_manifest(root, sensor)
        if known is None:
            update(root, sensor)
            continue
        rows = EXACT_ROWS if known.shortlist is None else known.shortlist.exact_rows
        update(root, sensor, model_id=known.model_id or None, exact_rows=rows)


def _usable(folder: "UPath", known: Manifest | None, model_id: str) -> Manifest:
    """What an update can start from: the parts of that encoder whose files are there."""
    if known is None or known.model_id != model_id:
        return Manifest(model_id, 0, {}, {})
    present = {file.name for file in folder.iterdir()}
    parts = {region: part for region, part in known.parts.items() if part.file in present}
    # Without each part that it was made of, nobody knows how many of its rows are to go.
    is_whole = known.shortlist is not None and files_of(known) <= present
    return dataclasses.replace(known, parts=parts, shortlist=known.shortlist if is_whole else None)


def files_of(manifest: Manifest) -> set[str]:
    """Names of the files that an index consists of, its manifest aside."""
    shortlist = () if manifest.shortlist is None else (manifest.shortlist.file,)
    return {*(part.file for part in manifest.parts.values()), *shortlist}


def size_bytes(root: "UPath | Path", sensor: str, manifest: Manifest) -> int:
    """Bytes of an index's files, its manifest aside."""
    folder = index_folder(root, sensor)
    return sum((folder / name).stat().st_size for name in files_of(manifest))


def _update_shortlist(
    folder: "UPath", known: Manifest, manifest: Manifest, exact_rows: int
) -> ShortlistFile | None:
    """The shortlist of some parts, made from the one before where that saves work."""
    if manifest.rows <= exact_rows:
        return None
    old, parts = known.shortlist, manifest.parts
    is_suited = (
        old is not None
        and old.learned_from / _RELEARN_FACTOR <= manifest.rows <= old.learned_from * _RELEARN_FACTOR
        # Numbers are given once; those of rows that are gone cost a bit each in every filtered search.
        and old.next_id <= 2 * _RELEARN_FACTOR * manifest.rows
    )
    if old is None or not is_suited:
        old = ShortlistFile("", exact_rows, manifest.rows, {}, 0)
    stays = {
        region: first_id
        for region, first_id in old.first_ids.items()
        if region in parts and parts[region].file == known.parts[region].file
    }
    gone = [region for region in old.first_ids if region not in stays]
    added = [region for region in parts if region not in stays]
    if not gone and not added:
        return dataclasses.replace(old, exact_rows=exact_rows)
    name = f"shortlist-{fingerprint(old.file, gone, [parts[region].file for region in added])}.faiss"
    first_ids, next_id = dict(stays), old.next_id
    for region in added:
        first_ids[region] = next_id
        next_id += parts[region].rows
    made = ShortlistFile(name, exact_rows, old.learned_from, dict(sorted(first_ids.items())), next_id)
    if (folder / name).exists():
        # Of an update that was killed before its manifest.
        return made
    from graft_pipeline.shortlist import Shortlist

    if old.file:
        index = open_shortlist(folder / old.file)
        for region in gone:
            index.remove(old.first_ids[region], known.parts[region].rows)
    else:
        index = Shortlist.train(_sample(folder, manifest), manifest.rows)
    for region in added:
        vectors = open_part(folder / parts[region].file)[1]
        for start in range(0, len(vectors), _BATCH):
            index.add(vectors[start : start + _BATCH], first_ids[region] + start)
    with partial_files(folder, "shortlist") as (partial,):
        index.write(partial)
        publish(partial, folder / name)
    return made


def _sample(folder: "UPath", manifest: Manifest) -> npt.NDArray[np.float32]:
    """Vectors that lists are learned from: a random choice of all, the same for the same index."""
    from graft_pipeline.shortlist import sample_size

    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(manifest.rows, sample_size(manifest.rows), replace=False))
    found, first = [], 0
    for part in manifest.parts.values():
        begin, end = np.searchsorted(chosen, (first, first + part.rows))
        if end > begin:
            found.append(open_part(folder / part.file)[1][chosen[begin:end] - first])
        first += part.rows
    return np.concatenate(found)


def open_part(path: "UPath") -> tuple[pa.RecordBatch, npt.NDArray[np.float32]]:
    """Open a part; rows are read from the disk as they are looked at, and take no memory that cannot be dropped.

    Args:
        path: its Arrow file; one of an object store is copied to this machine first.

    Returns:
        Its rows without the embedding, and the (N, D) float32 embeddings; read-only.

    Raises:
        DataError: if the file is gone or damaged.
    """
    try:
        with pa.memory_map(str(local_copy(path))) as source:
            # What is mapped outlives the file's descriptor, of which there are fewer than regions.
            reader = pa.ipc.open_file(source)
            # As it was written, in one batch: putting chunks together would copy even a single one.
            rows = (
                reader.get_batch(0)
                if reader.num_record_batches
                else pa.RecordBatch.from_pylist([], reader.schema)
            )
    except FileNotFoundError as error:
        raise _gone(path) from error
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path} is damaged ({error}): delete it and materialise the search index again."
        ) from error
    width = rows.schema.field("embedding").type.list_size
    vectors = np.asarray(rows["embedding"].flatten()).reshape(rows.num_rows, width)
    return rows.drop_columns(["embedding"]), vectors


def open_shortlist(path: "UPath") -> "Shortlist":
    """Read a shortlist.

    Args:
        path: its faiss file; one of an object store is copied to this machine first.

    Returns:
        The shortlist.

    Raises:
        DataError: if the file is gone or damaged.
    """
    from graft_pipeline.shortlist import Shortlist

    try:
        return Shortlist.read(local_copy(path))
    except FileNotFoundError as error:
        raise _gone(path) from error


def _gone(path: "UPath") -> DataError:
    return DataError(
        f"{path} is gone, as after an update: search again; if it is still gone, materialise the search index."
    )


def local_copy(path: "UPath") -> Path:
    """A file of an index as a file of this machine.

    Args:
        path: the file. From an object store it is copied once into the user's cache folder, as its name changes
            with its content.

    Returns:
        The local file.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if is_local(path):
        return Path(str(path))
    copy = _cache(path.parent) / path.name
    if not copy.exists():
        with atomic_local_file(copy) as partial:
            path.fs.get_file(path.path, str(partial))
    return copy


def drop_copies(folder: "UPath", manifest: Manifest) -> None:
    """Remove local copies of files that an index on an object store no longer has."""
    if is_local(folder) or not _cache(folder).exists():
        return
    kept, a_day_ago = files_of(manifest), time.time() - 86_400
    for file in _cache(folder).iterdir():
        # Hidden ones are being copied, by another process maybe; old ones were, when it was killed.
        is_passing = file.name.startswith(".") and file.stat().st_mtime > a_day_ago
        if file.name not in kept and not is_passing:
            file.unlink(missing_ok=True)


def _cache(folder: "UPath") -> Path:
    import platformdirs

    return platformdirs.user_cache_path("graft-pipeline") / "search" / fingerprint(str(folder))


def _most_common_model(sources: Iterable[Source]) -> str:
    rows: dict[str, int] = {}
    for source in sources:
        if len(source.model_ids) == 1:
            rows[source.model_ids[0]] = rows.get(source.model_ids[0], 0) + source.rows
    return max(sorted(rows), key=lambda model_id: rows[model_id], default="")


def _part_table(root: "UPath | Path", sensor: str, region: str) -> tuple[pa.Table, int]:
    """Rows of a region's part, sorted by tile, and how many tiles have no stored chip."""
    embedded, chips = CHIP_EMBEDDINGS.empty(), CHIPS.empty().select(_OF_CHIPS)
    for name in kept_as(sensor):
        place = {"sensor": name, "region": region}
        more = read_table(partition_file(root, CHIP_EMBEDDINGS, **place), CHIP_EMBEDDINGS)
        stored = read_table(partition_file(root, CHIPS, **place), CHIPS, _OF_CHIPS)
        embedded = embedded if more is None else pa.concat_tables([embedded, more])
        chips = chips if stored is None else pa.concat_tables([chips, stored])
    embedded, chips = embedded.sort_by("tile_id"), chips.filter(pc.equal(chips["status"], "ok"))
    position = pc.index_in(embedded["tile_id"], chips["tile_id"].combine_chunks())
    has_chip = pc.is_valid(position)
    # Before rows are left out: without any, nobody knows how wide they are.
    vectors = vectors_of(embedded)[has_chip.to_numpy()]
    embedded, position = embedded.filter(has_chip), position.filter(has_chip)
    schema = search_part(vectors.shape[1])
    columns = {
        "tile_id": embedded["tile_id"],
        "center_lon_deg": embedded["center_lon_deg"],
        "center_lat_deg": embedded["center_lat_deg"],
        "acquired_at_utc": chips["acquired_at_utc"].take(position),
        "scene_id": chips["scene_id"].take(position),
        "embedding": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.ravel()), type=schema.field("embedding").type
        ),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema), len(has_chip) - len(position)


def _write_part(folder: "UPath", region: str, source: Source, table: pa.Table) -> Part:
    name = f"{region}-{source.fingerprint}.arrow"
    lon, lat = (table[name].to_numpy() for name in ("center_lon_deg", "center_lat_deg"))
    bounds = (
        [float(value) for value in (lon.min(), lat.min(), lon.max(), lat.max())] if len(lon) else [0.0] * 4
    )
    part = Part(
        name, table.num_rows, source.fingerprint, cast("tuple[float, float, float, float]", tuple(bounds))
    )
    if (folder / name).exists():
        # Of an update that was killed before its manifest.
        return part
    with partial_files(folder, region) as (partial,):
        # Uncompressed, in one batch: readers map it into memory and touch only the rows that they look at.
        with pa.ipc.new_file(partial, table.schema) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))
        publish(partial, folder / name)
    return part
