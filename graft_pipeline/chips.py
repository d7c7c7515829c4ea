"""Chips, from tiles and scenes to stored pixels: which to fetch, what is accepted, how each is encoded.

Which scene comes first is decided in scenes.py; the request itself is in resources/.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date, datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline import geotiff
from graft_pipeline.errors import DataError, ItemError
from graft_pipeline.fetching import (
    StoredItems,
    changed_requests,
    most_ahead,
    ordered_map,
    pending_rows,
    retry_day,
    sample_rows,
    without_damaged,
)
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import read_table
from graft_pipeline.provenance import fingerprint
from graft_pipeline.scenes import (
    candidates_for_grids,
    center_times,
    most_candidates,
    not_held,
    tile_grids,
)
from graft_pipeline.schemas import CHIPS
from graft_pipeline.shards import MEND, read_member
from graft_pipeline.unfinished import Unfinished

if TYPE_CHECKING:
    from upath import UPath

logger = logging.getLogger(__name__)

#: (sensor, scene id, grid) in, (H, W, bands) pixels of the sensor's requested bands in the scene's own dtype out;
#: ItemError for a chip that cannot be. See `imagery.ImagerySource.get_chip`.
Fetch = Callable[[Sensor, str, Grid], npt.NDArray[Any]]

_GRID_COLUMNS = ("epsg", "x0_m", "y0_m", "gsd_m", "chip_px")


@dataclass(frozen=True)
class Quality:
    """What decides whether a scene serves a chip.

    Attributes:
        nodata_px: pixels without data: 0 in each of the three bands, as sources fill what a scene does not cover,
            or not finite in one of them.
        cloud_pct: percentage of the chip under cloud or its shadow by the mask band; None without one.
    """

    nodata_px: int
    cloud_pct: float | None

    def suits(self, sensor: Sensor) -> bool:
        """Whether no pixel is missing and, under the rule by chip, clouds are below the limit."""
        return self.nodata_px == 0 and self.is_clear(sensor)

    def is_clear(self, sensor: Sensor) -> bool:
        """Whether clouds are below the limit; true where the rule looks at scenes."""
        return self.cloud_pct is None or self.cloud_pct < (sensor.max_cloud_pct or 0.0)


def quality(array: npt.NDArray[Any], sensor: Sensor) -> Quality:
    """Judge what a scene gave for a chip.

    Args:
        array: (H, W, bands) source values of the sensor's requested bands, before any scaling.
        sensor: names them, and the cloud rule.

    Returns:
        Its quality.
    """
    missing = 0
    colours = array[..., :3]
    # Hardly any chip has a 0 at all, which is ten times as fast to see.
    if not colours.all() or not np.isfinite(colours).all():
        # Band by band: ten times as fast as any(axis=-1) over three values.
        red, green, blue = (array[..., band] for band in range(3))
        has_data = (red != 0) | (green != 0) | (blue != 0)
        has_data &= np.isfinite(red) & np.isfinite(green) & np.isfinite(blue)
        missing = has_data.size - int(np.count_nonzero(has_data))
    if not sensor.has_mask:
        return Quality(missing, None)
    mask = array[..., sensor.requested_bands.index(str(sensor.mask_band))]
    return Quality(missing, 100.0 * float(np.isin(mask, sensor.cloud_classes).mean()))


def to_uint8(array: npt.NDArray[Any], sensor: Sensor) -> npt.NDArray[np.uint8]:
    """Scale source values to what a chip holds.

    Args:
        array: (H, W, 3), source values.
        sensor: its `display_range` is mapped to 0..255, rounded, values beyond it clipped. Without one the
            source is uint8 already.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: if the shape, or the dtype of a sensor without display range, is another.
    """
    if array.ndim != 3 or array.shape[2] != 3:
        raise DataError(
            f"A chip of {sensor.name} has shape {array.shape}, not (H, W, 3): correct the sensor's bands."
        )
    if sensor.display_range is None:
        if array.dtype != np.uint8:
            raise DataError(f"{sensor.name} gives {array.dtype}, not uint8: set its display_range.")
        return array
    low, high = sensor.display_range
    scaled = (array.astype(np.float64) - low) / (high - low) * 255.0
    # Half up, not to even: one rule for all values.
    return np.floor(np.clip(scaled, 0.0, 255.0) + 0.5).astype(np.uint8)


def encode(array: npt.NDArray[np.uint8], grid: Grid) -> bytes:
    """Encode a chip as GeoTIFF: lossless, georeferenced; same pixels, same bytes.

    The one strip is deflated here and not by GDAL: ISA-L takes a third of the time, which is most of what storing a
    chip costs, for 3 % more bytes. Another version of it, or another kind of processor, may give other bytes of the
    same pixels.

    Args:
        array: (H, W, 3) uint8, RGB.
        grid: its grid.

    Returns:
        The file's content.
    """
    from isal import isal_zlib

    differences = array.copy()
    differences[:, 1:] -= array[:, :-1]
    strip = isal_zlib.compress(differences.tobytes(), 2)
    affine = (grid.gsd_m, 0.0, grid.x0_m, 0.0, -grid.gsd_m, grid.y0_m)
    return geotiff.header(grid.crs, affine, array.shape, "uint8", len(strip), is_deflated=True) + strip


def encode_raw(array: npt.NDArray[Any], grid: Grid, names: Sequence[str]) -> bytes:
    """Encode source values as GeoTIFF: lossless, georeferenced; same pixels, same bytes.

    Args:
        array: (H, W, bands) in the source's dtype.
        grid: its grid.
        names: of the bands, kept as their descriptions.

    Returns:
        The file's content.
    """
    from rasterio.io import MemoryFile

    height, width, count = array.shape
    # Deflate at its fastest with differences of neighbours: as small as slower settings on imagery, and any
    # reader of TIFF opens it.
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": count,
        "dtype": array.dtype.name,
        "crs": grid.crs,
        "transform": grid.affine,
        "interleave": "pixel",
        "compress": "deflate",
        "predictor": 2 if array.dtype.kind in "ui" else 3,
        "zlevel": 1,
        "blockysize": height,
        "photometric": "MINISBLACK",
    }
    with MemoryFile() as memory:
        with memory.open(**profile) as file:
            file.write(np.moveaxis(array, -1, 0))
            for number, name in enumerate(names, start=1):
                file.set_band_description(number, name)
        return bytes(memory.getbuffer())


def decode(content: bytes) -> npt.NDArray[np.uint8]:
    """Decode a stored chip.

    Its strips are inflated here and not by GDAL, which passes over the checksum at their end: a chip that was
    damaged on its disk would come back as an image. It takes half the time, too.

    Args:
        content: GeoTIFF as `encode` made it.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        DataError: if it is no such file, or was damaged.
    """
    from isal import isal_zlib
    from PIL import Image, UnidentifiedImageError
    from PIL.TiffImagePlugin import TiffImageFile

    try:
        with Image.open(BytesIO(content), formats=["TIFF"]) as file:
            (width, height), tags = file.size, cast(TiffImageFile, file).tag_v2
        # TIFF 6.0: compression, planar configuration, predictor, strips' offsets and lengths.
        if (file.mode, tags[259], tags[284]) != ("RGB", 8, 1) or tags.get(317, 1) not in (1, 2):
            raise ValueError("it is no deflated RGB image")
        strips = [content[start : start + size] for start, size in zip(tags[273], tags[279], strict=True)]
        raw = b"".join(map(isal_zlib.decompress, strips))
        array = np.frombuffer(raw, dtype=np.uint8).reshape(height, width, 3)
    except (UnidentifiedImageError, KeyError, ValueError, isal_zlib.error) as error:  # type: ignore[misc]
        raise DataError(f"A stored chip cannot be decoded ({error}): {MEND}.") from error
    # Predictor 2 stores each value's difference from its left neighbour, modulo 256.
    return np.cumsum(array, axis=1, dtype=np.uint8) if tags.get(317, 1) == 2 else array


def decode_all(contents: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    """Decode chips of one size.

    Args:
        contents: GeoTIFFs.

    Returns:
        (N, H, W, 3) uint8; (0, 0, 0, 3) without any.
    """
    chips = [decode(content) for content in contents]
    return np.stack(chips) if chips else np.zeros((0, 0, 0, 3), dtype=np.uint8)


@dataclass(frozen=True)
class _Order:
    """One chip to be fetched; `is_last`: it is not tried again by itself."""

    tile_id: str
    grid: Grid
    taken_at_utc: datetime | None
    scene_ids: list[str]
    is_last: bool = False


@dataclass(frozen=True)
class _Outcome:
    """What came of it; scene_id, content and raw are None unless status is ok.

    Else nodata_px and chip_cloud_pct are the least of the scenes that were tried.
    """

    status: str
    reason: str | None
    scenes_tried: int
    scene_id: str | None = None
    nodata_px: int | None = None
    chip_cloud_pct: float | None = None
    content: bytes | None = None
    raw: bytes | None = None


def update(
    tiles: pa.Table,
    scenes: pa.Table,
    photos: pa.Table,
    sensor: Sensor,
    folder: "UPath | Path",
    fetch: Fetch,
    *,
    concurrency: int,
    max_attempts: int,
    today: date,
    retry_now: bool = False,
    verify: bool = False,
    shard_size: int = 500,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[pa.Table, bool]:
    """Fetch the chips that a region's tiles do not have yet, and store them.

    A tile's candidate scenes are asked in their order. One with missing pixels there, with clouds over it where
    the sensor's rule looks at the chip, or that cannot serve it for good, gives way to the next; on the last of
    `max_attempts` one that fails in passing does, too. `failed`, to be tried again: `no_scene` (none contains the
    chip; costs nothing, counts as no attempt, and is looked at each time), `nodata` (each has missing pixels),
    `cloudy` (each that has none has clouds), or a passing failure's own reason; these wait for the day in
    `retry_on`. `rejected`: every scene refused for good. Whatever its status and attempts, a chip that is not ok is
    tried anew where the sensor's record or the candidate scenes are others than they were.

    A stored chip is fetched anew where it does not obey the cloud rule in force, where the sensor's record says
    something else of pixels than it did, where raw bands are wanted that were not kept, or where its scene's
    footprint holds it no more. It stays where its scene is listed no more.

    Args:
        tiles: TILES rows of the region.
        scenes: SCENES rows of it.
        photos: FLICKR_PHOTOS rows of it, for the times of centre photos.
        sensor: the sensor.
        folder: the partition's folder; the index and its shards are there. Rows of tiles that are gone stay in
            the index, as their pixels were paid for, but are not returned.
        fetch: gives pixels; called from threads.
        concurrency: number of threads.
        max_attempts: tries before a tile is left alone.
        today: UTC day; failed rows say on which they are tried again.
        retry_now: try failed and rejected rows again, whatever their day and attempts.
        verify: read every stored chip, and fetch those anew that were damaged on their disk.
        shard_size: tiles after which a shard and the index are written.
        progress: called with (done, total).

    Returns:
        CHIPS rows of all these tiles, sorted by tile_id, and whether any file changed.

    Raises:
        GraftError: whatever but an ItemError `fetch` raises; what was fetched before is stored.
    """
    existing = read_table(folder / f"{CHIPS.name}.parquet", CHIPS)
    known = CHIPS.empty() if existing is None else existing
    valid = _obeying(_of_same_grid(known, tiles), sensor)
    valid = valid.filter(pa.array(~not_held(valid, scenes, sensor)))
    if verify:
        valid = without_damaged(folder, valid, "tile_id")
    ordered = tiles.sort_by([("tile_index", "ascending"), ("tile_id", "ascending")])
    stored = valid.filter(pc.equal(valid["status"], "ok"))
    is_stored = pc.is_in(ordered["tile_id"], stored["tile_id"].combine_chunks())
    lacking = ordered.filter(pc.invert(is_stored))
    grids, times = tile_grids(lacking), center_times(lacking, photos)
    scene_ids = candidates_for_grids(grids, times, scenes, sensor, most_candidates(sensor))
    ids, record = lacking["tile_id"].to_pylist(), fingerprint(sensor)
    requests = {
        tile_id: fingerprint(record, offered) for tile_id, offered in zip(ids, scene_ids, strict=True)
    }
    todo, attempts = pending_rows(
        lacking.select(["tile_id"]),
        valid,
        "tile_id",
        max_attempts,
        today,
        retry_now=retry_now,
        changed=changed_requests(valid, "tile_id", requests),
    )
    pending = {row["tile_id"] for row in todo}
    orders = [
        _Order(tile_id, grid, time, offered, is_last=attempts.get(tile_id, 0) + 1 >= max_attempts)
        for tile_id, grid, time, offered in zip(ids, grids, times, scene_ids, strict=True)
        if tile_id in pending
    ]
    sensor_id = pixels_id(sensor)
    listed = {row["scene_id"]: row for row in scenes.drop_columns(["footprint_wkb"]).to_pylist()}
    store = StoredItems(folder, CHIPS, known, stem="chips", extension="tif", shard_size=shard_size)
    without = [order for order in orders if not order.scene_ids]
    served = [order for order in orders if order.scene_ids]

    def outcome(order: _Order) -> _Outcome:
        return _kept_or_served(order, sensor, fetch, store.unfinished)

    # At most floats of 4 bytes are kept as raw bands.
    ahead = most_ahead(concurrency, sensor.chip_px**2 * (3 + 4 * len(sensor.raw_bands)))
    with store, closing(ordered_map(outcome, served, concurrency, ahead)) as results:
        for order in without:
            row = _row(order, attempts.get(order.tile_id, 0)) | {"request_id": requests[order.tile_id]}
            store.add({**row, "status": "failed", "reason": "no_scene", "scenes_tried": 0})
        for done, (order, result) in enumerate(results, start=1):
            row = {
                **_row(order, attempts.get(order.tile_id, 0) + 1),
                "status": result.status,
                "reason": result.reason,
                "scenes_tried": result.scenes_tried,
                "nodata_px": result.nodata_px,
                "chip_cloud_pct": result.chip_cloud_pct,
            }
            if result.status == "failed":
                row["retry_on"] = retry_day(row["attempts"], today)
            if result.scene_id is None:
                row["request_id"] = requests[order.tile_id]
            else:
                row |= {"sensor_id": sensor_id, "raw_bands": ",".join(sensor.raw_bands) or None}
                scene = listed[result.scene_id]
                row |= {name: scene[name] for name in ("scene_id", "acquired_at_utc", "cloud_pct")}
                if order.taken_at_utc is not None:
                    elapsed = scene["acquired_at_utc"] - order.taken_at_utc
                    row["time_difference_days"] = elapsed.total_seconds() / 86_400
            store.add(row, result.content, raw=result.raw)
            if progress:
                progress(done, len(served))
        table = store.finish()
    current = pc.is_in(table["tile_id"], tiles["tile_id"].combine_chunks())
    return table.filter(current).combine_chunks(), store.is_changed


def _row(order: _Order, attempts: int) -> dict[str, Any]:
    grid = order.grid
    values = (grid.epsg, grid.x0_m, grid.y0_m, grid.gsd_m, grid.width_px)
    return {"tile_id": order.tile_id, "attempts": attempts, **dict(zip(_GRID_COLUMNS, values, strict=True))}


def _kept_or_served(order: _Order, sensor: Sensor, fetch: Fetch, unfinished: Unfinished) -> _Outcome:
    """`_serve`, unless an interrupted run did."""
    request = fingerprint(sensor, order)
    kept = unfinished.take(order.tile_id, request)
    if kept is not None:
        values, content = kept
        size = values.pop("content_bytes")
        return _Outcome(**values, content=content[:size] or None, raw=content[size:] or None)
    result = _serve(order, sensor, fetch)
    # What may pass is tried again by the next run, whether this one comes to its end or not.
    if result.status != "failed":
        values = {name: value for name, value in vars(result).items() if name not in ("content", "raw")}
        content, raw = result.content or b"", result.raw or b""
        unfinished.keep(order.tile_id, request, {**values, "content_bytes": len(content)}, content + raw)
    return result


def _serve(order: _Order, sensor: Sensor, fetch: Fetch) -> _Outcome:
    """Ask a tile's scenes in turn."""
    refusal, passing, tried = "", "", 0
    judged: list[Quality] = []
    shape = (order.grid.height_px, order.grid.width_px, len(sensor.requested_bands))
    for scene_id in order.scene_ids:
        tried += 1
        try:
            array = fetch(sensor, scene_id, order.grid)
        except ItemError as error:
            if error.is_permanent:
                refusal = error.reason
            elif order.is_last:
                # What has failed each time may fail for ever: better another scene than none.
                passing = passing or error.reason
            else:
                # The same scene is asked again next time: a passing failure must not change which one serves.
                return _Outcome("failed", error.reason, tried)
            continue
        if array.shape != shape:
            raise DataError(
                f"Scene {scene_id} gave {array.shape} for {order.tile_id}, not {shape} (rows, columns, bands of "
                f"{order.grid.width_px} px): report it, the client should have refused it."
            )
        found = quality(array, sensor)
        judged.append(found)
        if found.suits(sensor):
            rgb = to_uint8(np.ascontiguousarray(array[..., :3]), sensor)
            raw = None
            if sensor.raw_bands:
                numbers = [sensor.requested_bands.index(name) for name in sensor.raw_bands]
                raw = encode_raw(array[..., numbers], order.grid, sensor.raw_bands)
            return _Outcome("ok", None, tried, scene_id, 0, found.cloud_pct, encode(rgb, order.grid), raw)
    if not judged:
        return _Outcome("failed", passing, tried) if passing else _Outcome("rejected", refusal, tried)
    whole = [found for found in judged if found.nodata_px == 0]
    clouds = [found.cloud_pct for found in whole or judged if found.cloud_pct is not None]
    return _Outcome(
        "failed",
        passing or ("cloudy" if whole else "nodata"),
        tried,
        nodata_px=min(found.nodata_px for found in judged),
        chip_cloud_pct=min(clouds, default=None),
    )


def pixels_id(sensor: Sensor) -> str:
    """Fingerprint of what decides a chip's pixels and how cloudy they are, its scene aside.

    Args:
        sensor: its name, its cloud limits and how scenes are listed and chosen do not count: chips of one scene are
            the same under all of them. Raw bands have a column of their own, as fewer need no other chip.

    Returns:
        16 hexadecimal digits.
    """
    scale = None if sensor.display_range is None else [float(value) for value in sensor.display_range]
    return fingerprint(
        sensor.collection,
        sensor.bands,
        float(sensor.gsd_m),
        sensor.chip_px,
        scale,
        sensor.offset,
        sensor.mask_band,
        sorted(sensor.cloud_classes),
    )


def _obeying(known: pa.Table, sensor: Sensor) -> pa.Table:
    """Rows without the chips that another cloud rule or another sensor made, or that lack raw bands."""
    is_kept = pc.not_equal(known["status"], "ok")
    is_good = pc.fill_null(pc.equal(known["sensor_id"], pixels_id(sensor)), False)
    if sensor.scene_limit_pct is not None:
        is_good = pc.and_(is_good, pc.fill_null(pc.less(known["cloud_pct"], sensor.scene_limit_pct), False))
    if sensor.has_mask:
        is_clear = pc.less(known["chip_cloud_pct"], sensor.max_cloud_pct or 0.0)
        is_good = pc.and_(is_good, pc.fill_null(is_clear, False))
    if sensor.raw_bands:
        wanted = set(",".join(sensor.raw_bands).split(","))
        enough = [
            bands
            for bands in pc.unique(known["raw_bands"]).to_pylist()
            if wanted <= set((bands or "").split(","))
        ]
        is_good = pc.and_(is_good, pc.is_in(known["raw_bands"], pa.array(enough, pa.string())))
    return known.filter(pc.or_(is_kept, is_good))


def _of_same_grid(known: pa.Table, tiles: pa.Table) -> pa.Table:
    """Rows whose grid is their tile's; others were made for a tile of that name that is no more."""
    position = pc.index_in(known["tile_id"], tiles["tile_id"].combine_chunks())
    same = pc.is_valid(position)
    for name in _GRID_COLUMNS:
        equal = pc.equal(known[name], tiles[name].take(position))
        same = pc.and_(same, pc.fill_null(equal, False))
    return known.filter(same)


def sample_chips(
    folder: "UPath | Path", table: pa.Table, count: int, seed: int = 0
) -> list[tuple[str, npt.NDArray[np.uint8]]]:
    """A few stored chips for people to look at.

    Args:
        folder: the partition's folder.
        table: CHIPS rows to choose from; only ok ones are.
        count: how many at most.
        seed: of the choice.

    Returns:
        (tile_id, (H, W, 3) uint8 RGB), in the table's order.
    """
    return [
        (row["tile_id"], decode(read_member(folder, row["shard"], row["offset"], row["size_bytes"])))
        for row in sample_rows(table, count, seed)
    ]
