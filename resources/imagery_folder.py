"""Imagery from a folder of GeoTIFFs: an index of its files that is kept beside them, and chips cut out of them.

What a file's header says is read in rasters.py; which scene serves which chip is decided in graft_pipeline/scenes.py.
"""

import csv
import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from graft_pipeline.errors import DataError, InputError, ServiceError, SettingsError
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import read_table, remove_partial_files, write_table
from graft_pipeline.provenance import fingerprint
from graft_pipeline.schemas import IMAGERY_FILES
from graft_pipeline.settings import Settings
from resources.http import Retries, TransientError
from resources.imagery import RequestError, checked_window, chip_or_item_error, scene_record, widened
from resources.rasters import acquired_at, cut, read_header

logger = logging.getLogger(__name__)

#: Files that are scenes; a VRT joins the files of a scene that has one for each band.
EXTENSIONS = (".tif", ".tiff", ".vrt")
#: What a user may say of the files, one row each: `file`, `acquired_at_utc`, `cloud_pct`; GeoParquet: its footprint.
DESCRIPTIONS = ("index.parquet", "index.csv")
#: Names of bands that a file does not describe, in the order in which such files hold them.
PLAIN_BANDS = ("R", "G", "B", "N")


@dataclass(frozen=True)
class _Described:
    """What is said of a file outside of it; None where nothing is."""

    acquired_at_utc: datetime | None = None
    cloud_pct: float | None = None
    footprint_wkb: bytes | None = None


class ImageryFolder:
    """Folders of GeoTIFFs as imagery: a sensor's `collection` is a folder in the root, each file a scene.

    When a file was acquired is said, in this order, by `index.parquet` or `index.csv` in the folder, by a STAC item
    `{name}.json` beside it, by its name (`_YYYYMMDD`, `_YYYY`), or by its TIFFTAG_DATETIME. The same index, item or a
    TIFF tag of the sensor's cloud property says how cloudy it is. Headers are read once: `imagery_files.parquet`
    in the folder keeps them, where the folder can be written.

    Args:
        root: folder of collections.
        concurrency: files read at the same time; the machine's cores unless given.

    Attributes:
        concurrency: as given; for the caller's thread pool.
        requests: chips read so far.
        downloaded_bytes: always 0: nothing is.
    """

    def __init__(self, root: Path, *, concurrency: int | None = None) -> None:
        self._root = root.expanduser().absolute()
        if not self._root.is_dir():
            raise SettingsError(f"There is no folder {root}: correct GRAFT_IMAGERY_FOLDER.")
        self.concurrency = concurrency or os.cpu_count() or 1
        self.requests = 0
        self.downloaded_bytes = 0
        self._retries = Retries(attempts=1)
        self._lock = threading.Lock()
        self._indexes: dict[Sensor, dict[str, dict[str, Any]]] = {}

    @classmethod
    def from_settings(cls, settings: Settings) -> "ImageryFolder":
        """The source of a deployment.

        Raises:
            SettingsError: if no folder is set, or there is none.
        """
        if settings.imagery_folder is None:
            raise SettingsError("GRAFT_IMAGERY=folder needs a folder of GeoTIFFs: set GRAFT_IMAGERY_FOLDER.")
        return cls(settings.imagery_folder)

    def __repr__(self) -> str:
        return f"ImageryFolder({str(self._root)!r})"

    def list_scenes(
        self,
        sensor: Sensor,
        bounds: tuple[float, float, float, float],
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> list[dict[str, Any]]:
        """Every file of a sensor's folder that touches a box, was acquired in a time window and is clear enough.

        Args:
            sensor: names the folder and its cloud rule.
            bounds: (west, south, east, north), degrees of EPSG:4326. Scenes up to 0.01 degrees outside are listed
                as well.
            start: first acquisition time; the sensor's `listed_from` unless given.
            end: acquired before this time; unlimited unless given.

        Returns:
            Scenes as `scenes.scene_rows` takes them, unique by id, in the order of their files.

        Raises:
            InputError: if there is no such folder, or what describes its files cannot be used.
        """
        first, last = checked_window(sensor, start, end)
        box = shapely.box(*widened(bounds))
        found = []
        for row in self._index(sensor).values():
            footprint = shapely.from_wkb(row["footprint_wkb"])
            cloud, acquired = row["cloud_pct"], row["acquired_at_utc"]
            is_clear = sensor.scene_limit_pct is None or (
                cloud is not None and cloud < sensor.scene_limit_pct
            )
            in_time = first <= acquired and (last is None or acquired < last)
            if is_clear and in_time and shapely.intersects(footprint, box):
                found.append(_scene(row, footprint, sensor))
        return found

    def get_chip(self, sensor: Sensor, scene_id: str, grid: Grid) -> NDArray[Any]:
        """The pixels of one file on a grid.

        Args:
            sensor: names the bands.
            scene_id: of a listed scene.
            grid: where; its CRS must be projected, metres.

        Returns:
            (grid.height_px, grid.width_px, bands) array of the sensor's requested bands in the file's own dtype; 0
            where it has no data.

        Raises:
            ItemError: if this chip cannot be had. Permanent: `scene_missing`, `bad_request` (no such band). To be
                tried again: `truncated` (the file cannot be read).
        """
        import rasterio
        from rasterio.errors import RasterioError

        def attempt() -> NDArray[Any]:
            row = self._index(sensor).get(scene_id)
            path = None if row is None else self._folder(sensor) / row["file"]
            if row is None or path is None or not path.is_file():
                raise RequestError("there is no such file any more", 404)
            numbers = _numbers(row["bands"], sensor)
            try:
                with rasterio.open(path) as file:
                    chip = cut([(file, number) for number in numbers], grid)
            except RasterioError as error:
                raise TransientError("truncated", f"{path.name} cannot be read: {error}") from None
            if sensor.display_range is None and chip.dtype != np.uint8:
                raise RequestError(f"bands of type {chip.dtype}: set the sensor's display_range", 400)
            return chip

        with self._lock:
            self.requests += 1
        return chip_or_item_error(scene_id, attempt, self._retries, breaker=None, unreachable=None)

    def _folder(self, sensor: Sensor) -> Path:
        # By its name: the folder may be a link to another disk.
        folder = Path(os.path.normpath(self._root / sensor.collection))
        if not folder.is_relative_to(os.path.normpath(self._root)) or not folder.is_dir():
            raise InputError(
                f"There is no folder {sensor.collection!r} in {self._root}: correct the collection of the sensor "
                f"{sensor.name}, or GRAFT_IMAGERY_FOLDER."
            )
        return folder

    def _index(self, sensor: Sensor) -> dict[str, dict[str, Any]]:
        """Usable files by scene id; the folder is scanned once."""
        with self._lock:
            if sensor not in self._indexes:
                table = scan(self._folder(sensor), sensor)
                rows = table.to_pylist()
                unusable = [row for row in rows if row["status"] != "ok"]
                for row in unusable[:20]:
                    logger.warning("%s is no scene: %s", row["file"], row["reason"])
                if unusable:
                    logger.warning("%d files of %s are no scenes", len(unusable), sensor.collection)
                self._indexes[sensor] = {row["scene_id"]: row for row in rows if row["status"] == "ok"}
            return self._indexes[sensor]


def scan(folder: Path, sensor: Sensor) -> pa.Table:
    """Bring the index of a folder up to date; only new and changed files are opened.

    Args:
        folder: with GeoTIFFs in it, and below.
        sensor: its collection begins the scenes' ids, its cloud property names a TIFF tag.

    Returns:
        IMAGERY_FILES rows, sorted by file. `rejected`: a file that is no raster, has no CRS, no time, or the name of
        another.

    Raises:
        InputError: if what describes the files cannot be used.
    """
    index = folder / f"{IMAGERY_FILES.name}.parquet"
    try:
        known = read_table(index, IMAGERY_FILES)
    except (DataError, OSError) as error:
        logger.warning("The index of %s is made anew: %s", folder, error)
        known = None
    rows = {row["file"]: row for row in ([] if known is None else known.to_pylist())}
    described = _descriptions(folder)
    table_rows: list[dict[str, Any]] = []
    taken: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS):
        name = path.relative_to(folder).as_posix()
        said = described.get(name) or _item_beside(path, sensor)
        # A link may lead to a disk that is not there.
        stat = path.stat() if path.exists() else path.lstat()
        signature = fingerprint(
            stat.st_size, stat.st_mtime_ns, said, sensor.collection, sensor.cloud_property
        )
        row = rows.get(name)
        if row is None or row["signature"] != signature:
            row = _file_row(path, name, signature, said or _Described(), sensor)
        if row["status"] == "ok" and taken.setdefault(row["scene_id"], name) != name:
            reason = f"it has the name of {taken[row['scene_id']]}"
            # Not remembered: the other may go.
            row = {**row, "status": "rejected", "reason": reason, "signature": ""}
        table_rows.append(row)
    table = pa.Table.from_pylist(table_rows, schema=IMAGERY_FILES.schema)
    try:
        remove_partial_files(folder)
        write_table(index, table, IMAGERY_FILES)
    except (OSError, ServiceError) as error:
        logger.warning("The index of %s cannot be kept there (%s): it is made anew next time", folder, error)
    return table


def _file_row(path: Path, name: str, signature: str, said: _Described, sensor: Sensor) -> dict[str, Any]:
    stem = Path(name).with_suffix("").as_posix()
    collection = sensor.collection.strip("./")
    row: dict[str, Any] = {
        **dict.fromkeys(IMAGERY_FILES.schema.names),
        "file": name,
        "signature": signature,
        "status": "rejected",
        "scene_id": f"{collection}/{stem}" if collection else stem,
        "bands": [],
    }
    try:
        header = read_header(path)
    except InputError as error:
        return {**row, "reason": str(error)}
    acquired = said.acquired_at_utc or acquired_at(path.stem, header.tags)
    if acquired is None:
        remedy = "name it _YYYYMMDD, or list it in index.csv"
        return {**row, "reason": f"nothing says when it was acquired: {remedy}"}
    cloud = said.cloud_pct
    tag = header.tags.get(sensor.cloud_property or "")
    if cloud is None and tag is not None:
        try:
            cloud = float(tag)
        except ValueError:
            return {**row, "reason": f"its tag {sensor.cloud_property} is no number: correct it"}
    return {
        **row,
        "status": "ok",
        "acquired_at_utc": acquired,
        "cloud_pct": cloud,
        "crs": header.crs,
        "x0_m": header.x0_m,
        "y0_m": header.y0_m,
        "gsd_m": header.gsd_m,
        "width_px": header.width_px,
        "height_px": header.height_px,
        "bands": [description or "" for description in header.descriptions],
        "footprint_wkb": said.footprint_wkb or shapely.to_wkb(header.footprint),
    }


def _descriptions(folder: Path) -> dict[str, _Described]:
    """What index.parquet or index.csv says, by file."""
    path = next((folder / name for name in DESCRIPTIONS if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        rows = _csv_rows(path) if path.suffix == ".csv" else _parquet_rows(path)
        return {Path(str(row["file"])).as_posix(): _described(row) for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} cannot be used ({type(error).__name__}: {error}): give the columns file, acquired_at_utc (ISO "
            "8601) and, if known, cloud_pct."
        ) from error


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    if b"geo" in (pq.read_schema(path).metadata or {}):
        import geopandas

        footprints = geopandas.read_parquet(path).to_crs("EPSG:4326").geometry
        return [row | {"footprint": shape} for row, shape in zip(rows, footprints, strict=True)]
    return rows


def _described(row: Mapping[str, Any]) -> _Described:
    acquired, cloud, footprint = row.get("acquired_at_utc"), row.get("cloud_pct"), row.get("footprint")
    return _Described(
        _utc(acquired) if acquired not in (None, "") else None,
        float(cloud) if cloud not in (None, "") else None,
        None if footprint is None or footprint.is_empty else shapely.to_wkb(footprint),
    )


def _item_beside(path: Path, sensor: Sensor) -> _Described | None:
    """What a STAC item beside a file says of it."""
    item = path.with_suffix(".json")
    if not item.is_file():
        return None
    try:
        properties = json.loads(item.read_text())["properties"]
        cloud = properties.get("eo:cloud_cover", properties.get(sensor.cloud_property or ""))
        time = properties.get("datetime") or properties.get("start_datetime")
        return _Described(_utc(time) if time else None, None if cloud is None else float(cloud))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{item} is no STAC item ({type(error).__name__}: {error}): correct or remove it."
        ) from error


def _utc(value: Any) -> datetime:
    time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _scene(row: Mapping[str, Any], footprint: Any, sensor: Sensor) -> dict[str, Any]:
    try:
        _numbers(row["bands"], sensor)
        bands: tuple[str, ...] = sensor.requested_bands
    except RequestError:
        bands = ()
    return scene_record(
        row["scene_id"],
        row["acquired_at_utc"],
        bands,
        row["crs"],
        (row["gsd_m"], 0.0, row["x0_m"], 0.0, -row["gsd_m"], row["y0_m"]),
        (row["width_px"], row["height_px"]),
        shapely.geometry.mapping(footprint),
        {} if sensor.cloud_property is None else {sensor.cloud_property: row["cloud_pct"]},
    )


def _numbers(descriptions: list[str], sensor: Sensor) -> list[int]:
    """Numbers of a sensor's bands in a file: by description, by their own number, or by the order R, G, B, N."""
    is_silent = not any(descriptions)
    numbers = []
    for name in sensor.requested_bands:
        if name in descriptions:
            number = descriptions.index(name) + 1
        elif name.isdigit():
            number = int(name)
        elif is_silent and name in PLAIN_BANDS:
            number = PLAIN_BANDS.index(name) + 1
        else:
            number = 0
        if not 1 <= number <= len(descriptions):
            raise RequestError(f"the file has no band {name!r}, but {descriptions}", 400)
        numbers.append(number)
    return numbers
