"""Search indexes of sensors: one part for each region, made of its chip embeddings, kept current region by region.

How they are asked is in search.py; how chips are embedded, in embeddings.py.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.embeddings import vectors_of
from graft_pipeline.errors import DataError
from graft_pipeline.manifests import (
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
from graft_pipeline.schemas import CHIP_EMBEDDINGS, CHIPS, Dataset, search_part

if TYPE_CHECKING:
    from upath import UPath

logger = logging.getLogger(__name__)

#: Changes with what a part holds: parts of another version are made anew.
VERSION = 1
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
class Manifest:
    """What an index consists of; written last, so that readers see the old index or the new.

    Attributes:
        model_id: fingerprint of the satellite encoder; vectors of others are in another space.
        width: dimensions of its vectors.
        parts: by region, sorted.
        left_out: regions that have embeddings but no part, and why.
    """

    model_id: str
    width: int
    parts: dict[str, Part]
    left_out: dict[str, str]

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
    """

    manifest: Manifest
    made: tuple[str, ...]
    removed: tuple[str, ...]
    without_chip: int
    is_changed: bool


def index_folder(root: "UPath | Path", sensor: str) -> "UPath":
    """Folder of a sensor's index."""
    return cast("UPath", root / "search_index" / f"sensor={sensor}")


def read_manifest(root: "UPath | Path", sensor: str) -> Manifest | None:
    """What a sensor's index consists of.

    Args:
        root: storage root.
        sensor: name of the sensor.

    Returns:
        The manifest; None if there is no index yet.

    Raises:
        DataError: if the file is damaged, or was written by another version.
    """
    path = index_folder(root, sensor) / "index.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            raise DataError(f"{path} is of another version: materialise {sensor}/search_index.")
        parts = {
            region: Part(**{**part, "bounds": tuple(part["bounds"])})
            for region, part in content.pop("parts").items()
        }
        return Manifest(parts=parts, **content)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({error!r}): delete it and materialise {sensor}/search_index."
        ) from error


def read_sources(root: "UPath | Path", sensor: str) -> dict[str, Source]:
    """What the parts of an index would be made from now; only footers are read.

    Args:
        root: storage root.
        sensor: name of the sensor.

    Returns:
        Sources by region, sorted; regions without an embedding are left out.

    Raises:
        DataError: if a file is damaged.
    """
    pattern = f"{CHIP_EMBEDDINGS.name}/sensor={sensor}/region=*/{CHIP_EMBEDDINGS.name}.parquet"
    regions = sorted(str(file.parts[-2]).partition("=")[2] for file in root.glob(pattern))
    with ThreadPoolExecutor(_THREADS) as pool:
        sources = pool.map(lambda region: _source(root, sensor, region), regions)
        found = dict(zip(regions, sources, strict=True))
    return {region: source for region, source in found.items() if source is not None and source.rows}


def _source(root: "UPath | Path", sensor: str, region: str) -> Source | None:
    embedded = _footer(root, CHIP_EMBEDDINGS, sensor, region)
    chips = _footer(root, CHIPS, sensor, region)
    if embedded is None:
        return None
    # A column of at most a few values: each row group's least and greatest name them all, or show that they differ.
    number = embedded.schema.names.index("model_id")
    groups = [embedded.row_group(group).column(number).statistics for group in range(embedded.num_row_groups)]
    model_ids = {value for group in groups if group is not None for value in (group.min, group.max)}
    digest = fingerprint(VERSION, _digest(embedded), None if chips is None else _digest(chips))
    return Source(digest, embedded.num_rows, tuple(sorted(model_ids)))


def _footer(root: "UPath | Path", dataset: Dataset, sensor: str, region: str) -> Any:
    with open_table(partition_file(root, dataset, sensor=sensor, region=region), dataset) as file:
        return None if file is None else file.metadata


def _digest(metadata: Any) -> str:
    """Hash of a Parquet file by its footer: sizes, least and greatest values of every column of every row group."""
    buffer = BytesIO()
    metadata.write_metadata_file(buffer)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def update(
    root: "UPath | Path", sensor: str, *, model_id: str | None = None, progress: Report | None = None
) -> Update:
    """Bring a sensor's index up to date: parts of regions that changed are made, all others are left alone.

    An update that was killed is completed by the next one; parts that it finished are not made again.

    Args:
        root: storage root.
        sensor: name of the sensor.
        model_id: fingerprint of the encoder whose vectors are wanted; None: the one of most tiles.
        progress: called with (done, total) regions.

    Returns:
        What was done.

    Raises:
        DataError: if a dataset is damaged.
        ServiceError: if the disk is full.
    """
    folder = index_folder(root, sensor)
    remove_partial_files(folder)
    known = read_manifest(root, sensor)
    sources = read_sources(root, sensor)
    wanted = model_id or _most_common_model(sources.values())
    left_out = {
        region: f"its embeddings come from encoder {', '.join(source.model_ids)}, not {wanted}"
        for region, source in sources.items()
        if source.model_ids != (wanted,)
    }
    current = {region: source for region, source in sources.items() if region not in left_out}
    old = {} if known is None else known.parts
    parts: dict[str, Part] = {}
    made: list[str] = []
    without_chip = 0
    width = known.width if known is not None and known.model_id == wanted else 0
    for done, (region, source) in enumerate(current.items(), start=1):
        if region in old and old[region].source == source.fingerprint:
            parts[region] = old[region]
        else:
            table, lost = _part_table(root, sensor, region)
            width = table.schema.field("embedding").type.list_size
            parts[region] = _write_part(folder, region, source, table)
            made.append(region)
            without_chip += lost
        if progress:
            progress(done, len(current))
    manifest = Manifest(wanted, width, parts, left_out)
    content = {"version": VERSION, **dataclasses.asdict(manifest)}
    is_changed = write_bytes_atomic(
        folder / "index.json", (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    )
    # Only now: until its manifest was replaced, a reader of the old index could still ask for them.
    kept = {part.file for part in parts.values()}
    for file in folder.glob("*.arrow"):
        if file.name not in kept:
            file.unlink()
    removed = tuple(region for region in old if region not in parts)
    return Update(manifest, tuple(made), removed, without_chip, is_changed)


def _most_common_model(sources: Iterable[Source]) -> str:
    rows: dict[str, int] = {}
    for source in sources:
        if len(source.model_ids) == 1:
            rows[source.model_ids[0]] = rows.get(source.model_ids[0], 0) + source.rows
    return max(sorted(rows), key=lambda model_id: rows[model_id], default="")


def _part_table(root: "UPath | Path", sensor: str, region: str) -> tuple[pa.Table, int]:
    """Rows of a region's part, sorted by tile, and how many tiles have no stored chip."""
    place = {"sensor": sensor, "region": region}
    embedded = read_table(partition_file(root, CHIP_EMBEDDINGS, **place), CHIP_EMBEDDINGS)
    chips = read_table(
        partition_file(root, CHIPS, **place), CHIPS, ["tile_id", "status", "scene_id", "acquired_at_utc"]
    )
    embedded = CHIP_EMBEDDINGS.empty() if embedded is None else embedded.sort_by("tile_id")
    chips = CHIPS.empty() if chips is None else chips.filter(pc.equal(chips["status"], "ok"))
    position = pc.index_in(embedded["tile_id"], chips["tile_id"].combine_chunks())
    has_chip = pc.is_valid(position)
    embedded, position = embedded.filter(has_chip), position.filter(has_chip)
    vectors = vectors_of(embedded)
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
    with partial_files(folder, region) as (partial,):
        # Uncompressed, in one batch: readers map it into memory and touch only the rows that they look at.
        with pa.ipc.new_file(partial, table.schema) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))
        publish(partial, folder / name)
    lon, lat = (table[name].to_numpy() for name in ("center_lon_deg", "center_lat_deg"))
    bounds = (
        tuple(float(value) for value in (lon.min(), lat.min(), lon.max(), lat.max()))
        if len(lon)
        else (0.0,) * 4
    )
    return Part(name, table.num_rows, source.fingerprint, cast("tuple[float, float, float, float]", bounds))
