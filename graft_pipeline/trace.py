"""Everything that the datasets hold of one tile or photo, as one page for people: rows, files, pictures.

What Dagster's event log knows of it is read in assets/history.py and shown here as `Step`s.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
from upath import UPath

from graft_pipeline import previews, schemas, sheets
from graft_pipeline.chips import sample_chips
from graft_pipeline.errors import InputError
from graft_pipeline.grid import sensor_of
from graft_pipeline.ground_images import sample_images
from graft_pipeline.manifests import (
    connect,
    is_local,
    literal,
    partition_file,
    partition_folder,
    unreadable,
    write_bytes_atomic,
)
from graft_pipeline.schemas import Dataset
from graft_pipeline.web.licences import licence

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from rich.tree import Tree

#: Tiles of one photo, and photos of one tile, that are drawn.
MOST_TILES, MOST_PHOTOS = 6, 20

_EARTH_RADIUS_KM = 6371.0


@dataclass(frozen=True)
class Record:
    """One row of a dataset.

    Attributes:
        about: whose it is: `region N42W071`, `photo 123`, `tile naip-123`, `pair naip-123 + 456`.
        dataset: its name.
        place: its partition.
        file: its Parquet file, relative to the storage root.
        values: its columns.
    """

    about: str
    dataset: str
    place: Mapping[str, str]
    file: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Trace:
    """What the datasets hold of one item.

    Attributes:
        item: the id that was asked for.
        kind: `tile` or `photo`.
        regions: where it is.
        sensors: whose tiles it is or is on.
        records: its rows, upstream first.
        notes: what rows do not say: that it was purged, that it is on no tile ...
    """

    item: str
    kind: str
    regions: tuple[str, ...]
    sensors: tuple[str, ...]
    records: tuple[Record, ...]
    notes: tuple[str, ...]

    def of(self, dataset: Dataset) -> list[Record]:
        """Its rows of one dataset."""
        return [record for record in self.records if record.dataset == dataset.name]


@dataclass(frozen=True)
class Check:
    """One check of a materialisation: its name, `passed`, `failed` or `warns`, and what it found."""

    name: str
    outcome: str
    message: str


@dataclass(frozen=True)
class Step:
    """The latest materialisation of an asset that the item came through.

    Attributes:
        asset: its key, `naip/tiles`.
        partition: of it, None where it has none.
        at: when, UTC.
        run_id: of the run.
        code_version, data_version: as Dagster keeps them.
        seconds: what it took, if it was measured.
        checks: what was checked.
    """

    asset: str
    partition: str | None
    at: datetime
    run_id: str
    code_version: str
    data_version: str
    seconds: float | None
    checks: tuple[Check, ...] = field(default=())


def trace(root: UPath, item: str) -> Trace:
    """Gather the rows of a tile or a photo.

    Its region is looked for in the one column of ids; then only files of that region are read, of them only row
    groups that may hold it.

    Args:
        root: storage root.
        item: a tile's or a photo's id.

    Returns:
        The rows.

    Raises:
        InputError: if nothing is known of it.
    """
    purged = _purged(root, item.rpartition("-")[2])
    is_tile = "-" in item and sensor_of(item) in _values(root, schemas.TILES, "sensor")
    made = _trace_tile(root, item) if is_tile else _trace_photo(root, item)
    if not made.records and not purged:
        raise InputError(
            f"No tile or photo {item!r} in {root}: give a photo's id of Flickr, or a tile's, such as naip-123; "
            'graft query "SELECT tile_id FROM tiles" lists them.'
        )
    return Trace(made.item, made.kind, made.regions, made.sensors, made.records, (*purged, *made.notes))


def _trace_tile(root: UPath, tile_id: str) -> Trace:
    sensor = sensor_of(tile_id)
    records: list[Record] = []
    notes = []
    regions = _regions(root, schemas.TILES, "tile_id", tile_id, sensor=sensor)
    with closing(connect(root, ())) as database:
        for region in regions:
            rows = _Rows(database, root, records)
            rows.region(region)
            (center,) = rows.add(f"tile {tile_id}", schemas.TILES, "tile_id", [tile_id], sensor, region)
            is_of_grid = not center["center_photo_id"]
            if not is_of_grid:
                rows.photo(center["center_photo_id"], region)
            rows.chip(tile_id, sensor, region)
            paired = rows.pairs("tile_id", tile_id, sensor, region)
            if is_of_grid:
                notes.append(f"{tile_id} lies on the regular grid: no photo is paired with it")
            elif not paired:
                notes.append(
                    f"{tile_id} has no pair: see the reason of its chip, and `pairs` of {region} may be older than it"
                )
            rows.learned("tile_id", tile_id, sensor)
    return Trace(tile_id, "tile", tuple(regions), (sensor,), tuple(records), tuple(notes))


def _trace_photo(root: UPath, photo_id: str) -> Trace:
    records: list[Record] = []
    notes, sensors = [], []
    regions = _regions(root, schemas.FLICKR_PHOTOS, "photo_id", photo_id)
    with closing(connect(root, ())) as database:
        for region in regions:
            rows = _Rows(database, root, records)
            rows.region(region)
            rows.photo(photo_id, region)
            for sensor in sorted(_values(root, schemas.PAIRS, "sensor")):
                paired = rows.pairs("photo_id", photo_id, sensor, region)
                if not paired:
                    notes.append(f"on no tile of {sensor} in {region}")
                elif sensor not in sensors:
                    sensors.append(sensor)
                for pair in paired:
                    tile_id = pair["tile_id"]
                    rows.add(f"tile {tile_id}", schemas.TILES, "tile_id", [tile_id], sensor, region)
                    rows.chip(tile_id, sensor, region)
                rows.learned("photo_id", photo_id, sensor)
    return Trace(photo_id, "photo", tuple(regions), tuple(sensors), tuple(records), tuple(notes))


class _Rows:
    """Collects rows of one region into a list, each with its file."""

    def __init__(self, database: "DuckDBPyConnection", root: UPath, records: list[Record]) -> None:
        self._database = database
        self._root = root
        self._records = records

    def add(
        self,
        about: str,
        dataset: Dataset,
        column: str,
        ids: Sequence[str],
        sensor: str = "",
        region: str = "",
    ) -> list[dict[str, Any]]:
        """Rows of one partition whose column has one of some values."""
        place = {name: {"sensor": sensor, "region": region}[name] for name in dataset.partitions}
        file = partition_file(self._root, dataset, **place)
        found = select(self._database, file, column, ids)
        relative = file.path.removeprefix(self._root.path).lstrip("/")
        self._records += [Record(about, dataset.name, place, relative, row) for row in found]
        return found

    def region(self, region: str) -> None:
        """The region, by area."""
        self.add(f"region {region}", schemas.REGIONS, "region", [region])

    def photo(self, photo_id: str, region: str) -> None:
        """One photo from the search to its outdoor score."""
        about = f"photo {photo_id}"
        file = partition_file(self._root, schemas.FLICKR_PHOTOS, region=region)
        for row in select(self._database, file, "photo_id", [photo_id])[:1]:
            self._searched(row, region)
        for dataset in (
            schemas.FLICKR_PHOTOS,
            schemas.GROUND_IMAGES,
            schemas.GROUND_EMBEDDINGS,
            schemas.OUTDOOR_PHOTOS,
        ):
            self.add(about, dataset, "photo_id", [photo_id], region=region)

    def _searched(self, photo: Mapping[str, Any], region: str) -> None:
        """Search locations whose disc holds the photo."""
        file = partition_file(self._root, schemas.SEARCH_LOCATIONS, region=region)
        found = [
            row
            for row in select(self._database, file)
            if _distance_km(photo["lon_deg"], photo["lat_deg"], row["lon_deg"], row["lat_deg"])
            <= row["radius_km"]
        ]
        ids = [row["location_id"] for row in found]
        about = f"photo {photo['photo_id']}"
        self.add(about, schemas.SEARCH_LOCATIONS, "location_id", ids, region=region)

    def chip(self, tile_id: str, sensor: str, region: str) -> None:
        """A tile's scene, chip, labels and embedding."""
        place = (sensor, region)
        about = f"tile {tile_id}"
        chip = self.add(about, schemas.CHIPS, "tile_id", [tile_id], *place)
        scene_ids = [row["scene_id"] for row in chip if row["scene_id"]]
        self.add(about, schemas.SCENES, "scene_id", scene_ids, *place)
        for dataset in (schemas.CHIP_EMBEDDINGS, schemas.OSM_LABELS):
            self.add(about, dataset, "tile_id", [tile_id], *place)

    def pairs(self, column: str, item: str, sensor: str, region: str) -> list[dict[str, Any]]:
        """Pairs of a tile or of a photo."""
        start = len(self._records)
        found = self.add("", schemas.PAIRS, column, [item], sensor, region)
        for number in range(start, len(self._records)):
            old = self._records[number]
            about = f"pair {old.values['tile_id']} + {old.values['photo_id']}"
            self._records[number] = Record(about, old.dataset, old.place, old.file, old.values)
        return found

    def learned(self, column: str, item: str, sensor: str) -> None:
        """Training sets that hold a tile or a photo, a row for each."""
        snapshots = (self._root / schemas.TRAINING_PAIRS.name / f"sensor={sensor}").glob("snapshot=*")
        for folder in sorted(snapshots, key=str):
            snapshot = folder.name.partition("=")[2]
            file = folder / f"{schemas.TRAINING_PAIRS.name}.parquet"
            found = select(self._database, file, column, [item])
            place = {"sensor": sensor, "snapshot": snapshot}
            relative = file.path.removeprefix(self._root.path).lstrip("/")
            about = f"training set {snapshot} of {sensor}"
            self._records += [
                Record(about, schemas.TRAINING_PAIRS.name, place, relative, row) for row in found
            ]


def select(
    database: "DuckDBPyConnection", file: UPath, column: str = "", ids: Sequence[Any] = ()
) -> list[dict[str, Any]]:
    """Rows of a Parquet file whose column has one of some values; row groups that cannot hold them are not read.

    Args:
        database: a connection of `manifests.connect`, which knows the root's file system.
        file: the file, which need not exist.
        column: the column; none: all rows.
        ids: its values.

    Returns:
        The rows in the file's order.

    Raises:
        DataError: if the file is damaged.
        ServiceError: if it cannot be read.
    """
    import duckdb

    if (column and not ids) or not file.exists():
        return []
    where = f"WHERE {column} IN ({', '.join('?' * len(ids))})" if column else ""
    path = literal(file.path if is_local(file) else str(file))
    query = f"SELECT * FROM read_parquet(?, hive_partitioning = false) {where}"
    try:
        found = database.sql(query, params=[path, *ids]).to_arrow_table()
    except duckdb.Error as error:
        raise unreadable(str(file), error) from error
    return cast("list[dict[str, Any]]", found.to_pylist())


def _regions(root: UPath, dataset: Dataset, column: str, item: str, sensor: str | None = None) -> list[str]:
    """Regions whose partition of a dataset names an item."""
    with closing(connect(root, [dataset])) as database:
        of_sensor = "" if sensor is None else " AND sensor = ?"
        found = database.execute(
            f"SELECT DISTINCT region FROM {dataset.name} WHERE {column} = ?{of_sensor} ORDER BY region",
            [item, *([] if sensor is None else [sensor])],
        ).fetchall()
    return [region for (region,) in found]


def _purged(root: UPath, photo_id: str) -> list[str]:
    """That a photo was purged, when and why."""
    with closing(connect(root, ())) as database:
        rows = select(database, partition_file(root, schemas.PURGED_PHOTOS), "photo_id", [photo_id])
    return [
        f"photo {photo_id} was purged on {row['purged_at_utc']:%Y-%m-%d}: {row['reason']}" for row in rows
    ]


def _values(root: UPath, dataset: Dataset, column: str) -> set[str]:
    """Values of a dataset's outermost partition column."""
    return {folder.name.partition("=")[2] for folder in (root / dataset.name).glob(f"{column}=*")}


def _distance_km(lon_a: float, lat_a: float, lon_b: float, lat_b: float) -> float:
    x = math.radians(lon_b - lon_a) * math.cos(math.radians((lat_a + lat_b) / 2))
    return _EARTH_RADIUS_KM * math.hypot(x, math.radians(lat_b - lat_a))


def pictures(root: UPath, found: Trace, crop_px: Mapping[str, int]) -> dict[str, bytes]:
    """Draw an item: of each tile its chip with its photos' positions, and those photos around it.

    Args:
        root: storage root.
        found: the item's trace.
        crop_px: side of the footprint by sensor; 224 for those that are not there.

    Returns:
        JPEGs by tile id; of a photo on no tile, the photo by its id. What is not stored is left out.
    """
    drawn: dict[str, bytes] = {}
    with closing(connect(root, ())) as database:
        for tile in found.of(schemas.TILES)[:MOST_TILES]:
            tile_id = tile.values["tile_id"]
            picture = _tile_picture(database, root, tile, found.item, crop_px.get(tile.place["sensor"], 224))
            if picture is not None:
                drawn[tile_id] = picture
    if not drawn:
        for record in found.of(schemas.GROUND_IMAGES)[:1]:
            folder = partition_folder(root, schemas.GROUND_IMAGES, **record.place)
            rows = pa.Table.from_pylist([dict(record.values)], schema=schemas.GROUND_IMAGES.schema)
            for photo_id, image in sample_images(folder, rows, 1):
                drawn[photo_id] = previews.contact_sheet([image], cell_px=448)
    return drawn


def _tile_picture(
    database: "DuckDBPyConnection", root: UPath, tile: Record, item: str, crop_px: int
) -> bytes | None:
    """One tile with its photos; the item's own photo first, else the centre's."""
    tile_id, place = tile.values["tile_id"], dict(tile.place)
    region = {"region": place["region"]}
    chips = select(database, partition_file(root, schemas.CHIPS, **place), "tile_id", [tile_id])
    table = pa.Table.from_pylist(chips, schema=schemas.CHIPS.schema)
    stored = sample_chips(partition_folder(root, schemas.CHIPS, **place), table, 1)
    if not stored:
        return None
    pairs = select(database, partition_file(root, schemas.PAIRS, **place), "tile_id", [tile_id])
    first = {item: 0, tile.values["center_photo_id"]: 1}
    pairs.sort(key=lambda pair: (first.get(pair["photo_id"], 2), pair["photo_id"]))
    ids = [pair["photo_id"] for pair in pairs]
    file = partition_file(root, schemas.GROUND_IMAGES, **region)
    rows = pa.Table.from_pylist(
        select(database, file, "photo_id", ids[:MOST_PHOTOS]), schema=schemas.GROUND_IMAGES.schema
    )
    folder = partition_folder(root, schemas.GROUND_IMAGES, **region)
    photos = dict(sample_images(folder, rows, MOST_PHOTOS))
    ((_, chip),) = stored
    marks = np.array([[pair["col_px"], pair["row_px"]] for pair in pairs]).reshape(-1, 2)
    return previews.tile_view(
        chip,
        sheets.centered_square(chip.shape[0], crop_px),
        marks,
        [photos.get(photo_id) for photo_id in ids[:MOST_PHOTOS]],
        highlighted=ids.index(item) if item in ids else None,
    )


def page_url(photo: Mapping[str, Any]) -> str:
    """A photo's page on Flickr."""
    return f"https://www.flickr.com/photos/{photo['owner_id']}/{photo['photo_id']}"


def facts(record: Record) -> Iterator[tuple[str, str]]:
    """A row's columns in words: nulls left out, vectors and shapes by their size."""
    for name, value in record.values.items():
        if value is None:
            continue
        if name == "license_id":
            yield name, f"{value} ({licence(str(value))['name']})"
        elif name == "embedding":
            yield name, f"{len(value)} numbers, length {float(np.linalg.norm(value)):.3f}"
        elif isinstance(value, bytes):
            yield name, f"{len(value)} bytes"
        elif isinstance(value, datetime):
            yield name, f"{value:%Y-%m-%d %H:%M:%S}{' UTC' if value.tzinfo else ''}"
        elif isinstance(value, date):
            yield name, value.isoformat()
        elif isinstance(value, float):
            yield name, f"{value:.10g}"
        else:
            yield name, str(value)


def groups(found: Trace) -> dict[str, list[Record]]:
    """Rows by whose they are, in their order."""
    by_item: dict[str, list[Record]] = {}
    for record in found.records:
        by_item.setdefault(record.about, []).append(record)
    return by_item


def title(found: Trace) -> str:
    """The item in one line."""
    where = ", ".join(found.regions) or "no region"
    return f"{found.kind} {found.item} in {where}"


def tree(found: Trace, steps: Sequence[Step]) -> "Tree":
    """The trace for a terminal.

    Args:
        found: the item's rows.
        steps: of its assets, upstream first.

    Returns:
        A rich tree: rows by item, then materialisations with their checks.
    """
    from rich.markup import escape
    from rich.tree import Tree

    top = Tree(f"[bold]{escape(title(found))}")
    for note in found.notes:
        top.add(f"[yellow]{escape(note)}")
    for about, records in groups(found).items():
        branch = top.add(f"[bold cyan]{escape(about)}")
        for record in records:
            values = "  ".join(f"[dim]{name}[/dim] {escape(text)}" for name, text in facts(record))
            branch.add(f"[green]{record.dataset}[/green] [dim]{escape(record.file)}[/dim]\n{values}")
    branch = top.add("[bold cyan]materialisations")
    if not steps:
        branch.add(
            "[yellow]none is known: set DAGSTER_HOME to the absolute path of the deployment's instance"
        )
    for step in steps:
        took = "" if step.seconds is None else f" in {step.seconds:g} s"
        leaf = branch.add(
            f"[green]{escape(step.asset)}[/green] {step.at:%Y-%m-%d %H:%M:%S} UTC{took}, run {step.run_id[:8]}, "
            f"code {step.code_version}, data {step.data_version}"
        )
        for check in step.checks:
            colour = {"passed": "green", "warns": "yellow"}.get(check.outcome, "red")
            leaf.add(f"[{colour}]{check.outcome}[/{colour}] {check.name}: {escape(check.message)}")
    return top


def check_page_name(path: Path) -> None:
    """Refuse a name that `write_page` would refuse, before an item is looked for.

    Args:
        path: the file.

    Raises:
        InputError: if it ends in something else than `.html` or `.md`.
    """
    if path.suffix not in (".html", ".md"):
        raise InputError(f"{path} is neither a page nor Markdown: name a file that ends in .html or .md.")


def write_page(path: Path, found: Trace, steps: Sequence[Step], drawn: Mapping[str, bytes]) -> None:
    """Write the trace as a page.

    Args:
        path: ends in `.html`, or in `.md`, beside which the pictures are put.
        found: the item's rows.
        steps: of its assets.
        drawn: its pictures, see `pictures`.

    Raises:
        InputError: if it ends otherwise.
    """
    check_page_name(path)
    if path.suffix == ".html":
        write_bytes_atomic(path, to_html(found, steps, drawn).encode())
    else:
        files = {name: f"{path.stem}-{name}.jpg" for name in drawn}
        for name, picture in drawn.items():
            write_bytes_atomic(path.with_name(files[name]), picture)
        write_bytes_atomic(path, to_markdown(found, steps, files).encode())


def to_html(found: Trace, steps: Sequence[Step], drawn: Mapping[str, bytes]) -> str:
    """The trace as one HTML page that needs no network; arguments as of `tree`, and `pictures`."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("graft_pipeline", "."), autoescape=True)
    environment.filters["facts"] = lambda record: list(facts(record))
    return environment.get_template("trace.html").render(
        title=title(found),
        notes=found.notes,
        groups=groups(found),
        steps=steps,
        pictures={name: previews.data_uri(picture) for name, picture in drawn.items()},
        pages={row.values["photo_id"]: page_url(row.values) for row in found.of(schemas.FLICKR_PHOTOS)},
    )


def to_markdown(found: Trace, steps: Sequence[Step], drawn: Mapping[str, str]) -> str:
    """The trace as Markdown.

    Args:
        found: the item's rows.
        steps: of its assets.
        drawn: files of the pictures by tile or photo, relative to the Markdown's.
    """
    lines = [f"# {title(found)}", "", *(f"- {note}" for note in found.notes), ""]
    lines += [line for name, file in drawn.items() for line in (f"![{name}]({file})", "")]
    for about, records in groups(found).items():
        lines += [f"## {about}", ""]
        for record in records:
            lines += [f"`{record.dataset}` in `{record.file}`", "", *_markdown_table(facts(record)), ""]
    lines += ["## materialisations", ""]
    if steps:
        lines += ["| asset | time, UTC | run | code | data | checks |", "|---|---|---|---|---|---|"]
    for step in steps:
        checks = ", ".join(f"{check.name} {check.outcome}" for check in step.checks)
        cells = (
            step.asset,
            f"{step.at:%Y-%m-%d %H:%M:%S}",
            step.run_id,
            step.code_version,
            step.data_version,
        )
        lines.append("| " + " | ".join((*cells, checks)) + " |")
    return "\n".join(lines) + "\n"


def _markdown_table(pairs: Iterable[tuple[str, str]]) -> list[str]:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    return ["| column | value |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in pairs)]
