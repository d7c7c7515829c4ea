"""Pairs: which photos lie in which tile's footprint, where in its chip, and which of many are kept.

How tiles are chosen is in sampling.py; how their chips are had, in chips.py.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.errors import DataError
from graft_pipeline.geometry import projection
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import columns
from graft_pipeline.regions import Region
from graft_pipeline.schemas import CHIPS, PAIRS

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

#: Pairs looked at together; bounds memory where hundreds of tiles share a crowded square (random sampling).
_CANDIDATES_PER_BATCH = 8_000_000

_DAY = np.timedelta64(86_400_000, "ms")


def assign(tiles: pa.Table, photos: pa.Table, sensor: Sensor, epsg: int, cap: int | None = None) -> pa.Table:
    """The photos of every tile's footprint.

    Footprints are half-open: a tile holds the photos with `-f/2 <= x - center_x < f/2` and the same in y,
    where f is `sensor.footprint_m`. Footprints overlap, so a photo may belong to several tiles.

    Of more than `cap` photos on a tile a random few are kept (paper, section 3.2: 25): those whose ids'
    hashes come first, so the choice depends neither on order nor on what lies elsewhere.

    Args:
        tiles: TILES rows of one UTM zone.
        photos: FLICKR_PHOTOS rows.
        sensor: the sensor.
        epsg: the tiles' UTM zone.
        cap: most photos of a tile; None: all.

    Returns:
        Table (tile_id, photo_id, x_m, y_m), the photo's place in that zone; in the order of tiles, then
        photos.
    """
    x, y = _project(photos, epsg)
    tile_rows, photo_rows = _members(tiles, photos, x, y, sensor, cap)
    return pa.table(
        {
            "tile_id": tiles["tile_id"].combine_chunks().take(pa.array(tile_rows)),
            "photo_id": photos["photo_id"].combine_chunks().take(pa.array(photo_rows)),
            "x_m": pa.array(x[photo_rows]),
            "y_m": pa.array(y[photo_rows]),
        }
    )


def make_pairs(
    tiles: pa.Table, chips: pa.Table, photos: pa.Table, region: Region, sensor: Sensor, cap: int
) -> pa.Table:
    """The pairs of a region: photos in the footprint of tiles whose chip is stored.

    Args:
        tiles: TILES rows.
        chips: CHIPS rows; only ok ones make pairs.
        photos: FLICKR_PHOTOS rows that may be paired.
        region: their region.
        sensor: the sensor.
        cap: most photos of a tile, see `assign`.

    Returns:
        PAIRS rows, sorted by tile_id and photo_id.

    Raises:
        DataError: if a chip lies on another grid than its tile.
    """
    used, chips_used = _tiles_with_chips(tiles, chips)
    x, y = _project(photos, region.epsg)
    tile_rows, photo_rows = _members(used, photos, x, y, sensor, cap)
    ids = photos["photo_id"].combine_chunks()
    x0_m, y0_m, gsd_m = (column[tile_rows] for column in columns(used, "x0_m", "y0_m", "gsd_m"))
    of_tile, of_photo = pa.array(tile_rows), pa.array(photo_rows)
    acquired = chips_used["acquired_at_utc"].combine_chunks().take(of_tile)
    taken = photos["taken_at_utc"].combine_chunks().take(of_photo)
    table = pa.table(
        {
            "tile_id": used["tile_id"].combine_chunks().take(of_tile),
            "photo_id": ids.take(of_photo),
            "center_photo_id": used["center_photo_id"].combine_chunks().take(of_tile),
            "scene_id": chips_used["scene_id"].combine_chunks().take(of_tile),
            "lon_deg": photos["lon_deg"].combine_chunks().take(of_photo),
            "lat_deg": photos["lat_deg"].combine_chunks().take(of_photo),
            "col_px": pa.array((x[photo_rows] - x0_m) / gsd_m),
            "row_px": pa.array((y0_m - y[photo_rows]) / gsd_m),
            "taken_at_utc": taken,
            "acquired_at_utc": acquired,
            "time_difference_days": days_between(taken, acquired),
            "split": used["split"].combine_chunks().take(of_tile),
        }
    ).cast(PAIRS.schema)
    return table.sort_by([(name, "ascending") for name in PAIRS.order]).combine_chunks()


def days_between(earlier: pa.Array, later: pa.Array) -> pa.Array:
    """Signed days from one time to another.

    Args:
        earlier: (N,) timestamps, UTC, null where unknown.
        later: (N,) timestamps, UTC.

    Returns:
        (N,) float64, `later` minus `earlier`, null where either is.
    """
    start = earlier.to_numpy(zero_copy_only=False).astype("datetime64[ms]")
    end = later.to_numpy(zero_copy_only=False).astype("datetime64[ms]")
    unknown = np.isnat(start) | np.isnat(end)
    return pa.array(np.where(unknown, 0.0, (end - start) / _DAY), mask=unknown)


def split_counts(pairs: pa.Table) -> dict[str, int]:
    """Pairs by split.

    Args:
        pairs: rows with a `split` column.

    Returns:
        Counts, sorted by name.
    """
    return dict(sorted(Counter(pairs["split"].to_pylist()).items()))


def chips_with_pairs(chips: pa.Table, pairs: pa.Table) -> pa.Table:
    """The chips that at least one pair uses.

    Args:
        chips: CHIPS rows.
        pairs: PAIRS rows.

    Returns:
        CHIPS rows in their order.
    """
    return chips.filter(pc.is_in(chips["tile_id"], pairs["tile_id"].combine_chunks()))


def _project(photos: pa.Table, epsg: int) -> tuple[FloatArray, FloatArray]:
    lon, lat = columns(photos, "lon_deg", "lat_deg")
    return projection(epsg).forward(lon, lat)


def _members(
    tiles: pa.Table, photos: pa.Table, x: FloatArray, y: FloatArray, sensor: Sensor, cap: int | None
) -> tuple[IntArray, IntArray]:
    """(tile row, photo row) of the photos that tiles keep, by tile and photo."""
    center_x, center_y = columns(tiles, "center_x_m", "center_y_m")
    if cap is None:
        return _all_matches(center_x, center_y, x, y, sensor.footprint_m)
    by_hash = np.argsort(_hashes(photos["photo_id"]))
    tile_rows, hashed_rows = _first_matches(
        center_x, center_y, x[by_hash], y[by_hash], sensor.footprint_m, cap
    )
    return _sorted_matches(tile_rows, by_hash[hashed_rows], len(x))


def _tiles_with_chips(tiles: pa.Table, chips: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Tiles whose chip is ok, and those chips in the same order."""
    ok = chips.filter(pc.equal(chips["status"], "ok"))
    position = pc.index_in(tiles["tile_id"], ok["tile_id"].combine_chunks())
    used = tiles.filter(pc.is_valid(position))
    chips_used = ok.take(position.drop_null())
    for name in ("epsg", "x0_m", "y0_m", "gsd_m", "chip_px"):
        if not used[name].combine_chunks().equals(chips_used[name].combine_chunks()):
            raise DataError(
                f"Some {CHIPS.name} lie on another grid than their tiles ({name}): fetch them anew."
            )
    return used, chips_used


def _ranges(
    center_x: FloatArray, center_y: FloatArray, x: FloatArray, y: FloatArray, side_m: float
) -> tuple[IntArray, IntArray, IntArray]:
    """Where to look for the photos of squares: a square overlaps at most two by two cells of its own side.

    Returns:
        Photo rows sorted by cell, within a cell in their order; for each square the first positions (T, 4) in
        that of its four cells, and how many photos (T, 4) each holds.
    """
    step = 1 << 32

    def cell(a: FloatArray, b: FloatArray) -> IntArray:
        return np.asarray(
            np.floor_divide(a, side_m).astype(np.int64) * step + np.floor_divide(b, side_m).astype(np.int64)
        )

    keys = cell(x, y)
    order = _stable_order(keys)
    sorted_keys = keys[order]
    corner = cell(center_x - side_m / 2, center_y - side_m / 2)
    wanted = corner[:, None] + np.array([0, 1, step, step + 1])
    first = np.searchsorted(sorted_keys, wanted, side="left")
    return order, first, np.searchsorted(sorted_keys, wanted, side="right") - first


def _batches(counts: IntArray) -> Iterator[slice]:
    """Consecutive squares with about _CANDIDATES_PER_BATCH photos to look at; at least one each."""
    total = np.cumsum(counts.sum(axis=1))
    start = 0
    while start < len(counts):
        done = total[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(total, done + _CANDIDATES_PER_BATCH, side="right")))
        yield slice(start, end)
        start = end


def _expand(first: IntArray, counts: IntArray) -> tuple[IntArray, IntArray]:
    """Positions first, first + 1, ... of every range, laid out one after the other, with their square."""
    lengths = counts.ravel()
    square = np.repeat(np.arange(len(counts)), counts.sum(axis=1))
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return square, np.repeat(first.ravel(), lengths) + within


def _is_inside(dx: FloatArray, dy: FloatArray, side_m: float) -> npt.NDArray[np.bool_]:
    half = side_m / 2
    return np.asarray((dx >= -half) & (dx < half) & (dy >= -half) & (dy < half), dtype=np.bool_)


def _all_matches(
    center_x: FloatArray, center_y: FloatArray, x: FloatArray, y: FloatArray, side_m: float
) -> tuple[IntArray, IntArray]:
    """(square, photo row) of all photos in half-open squares, by square and photo."""
    order, first, counts = _ranges(center_x, center_y, x, y, side_m)
    parts = []
    for batch in _batches(counts):
        square, position = _expand(first[batch], counts[batch])
        square += batch.start
        photo = order[position]
        inside = _is_inside(x[photo] - center_x[square], y[photo] - center_y[square], side_m)
        parts.append((square[inside], photo[inside]))
    return _sorted_matches(*_concatenated(parts), len(x))


def _first_matches(
    center_x: FloatArray, center_y: FloatArray, x: FloatArray, y: FloatArray, side_m: float, cap: int
) -> tuple[IntArray, IntArray]:
    """(square, photo row) of the first `cap` photos, in their order, of each half-open square.

    In a crowded square the first few of each cell decide, so the cost is that of the result, not of the
    crowd: hundreds of tiles on one hot-spot of ten thousand photos look at some hundred photos each.
    """
    order, first, counts = _ranges(center_x, center_y, x, y, side_m)
    parts = []
    todo = np.arange(len(center_x))
    look = 4 * cap
    while todo.size:
        undecided = []
        looked = np.minimum(counts[todo], look)
        for batch in _batches(looked):
            squares = todo[batch]
            number, position = _expand(first[squares], looked[batch])
            photo = order[position]
            inside = _is_inside(
                x[photo] - center_x[squares[number]], y[photo] - center_y[squares[number]], side_m
            )
            # Cells were cut short at some photo: beyond the earliest of those, others may have been missed.
            limit = np.full(looked[batch].size, np.iinfo(np.int64).max)
            is_cut = (looked[batch] < counts[squares]).ravel()
            ends = (first[squares] + looked[batch] - 1).ravel()
            limit[is_cut] = order[ends[is_cut]]
            limit = limit.reshape(-1, 4).min(axis=1)
            inside &= photo <= limit[number]
            number, photo = _sorted_matches(number[inside], photo[inside], len(x))
            found = np.bincount(number, minlength=len(squares))
            is_done = (found >= cap) | ~is_cut.reshape(-1, 4).any(axis=1)
            undecided.append(squares[~is_done])
            rank = np.arange(len(photo)) - np.repeat(np.cumsum(found) - found, found)
            kept = (rank < cap) & is_done[number]
            parts.append((squares[number[kept]], photo[kept]))
        todo = np.concatenate(undecided)
        look *= 8
    return _concatenated(parts)


def _stable_order(keys: IntArray) -> IntArray:
    """As a stable argsort, several times as fast: keys made unique by their place sort without it."""
    count = len(keys)
    low = int(keys.min(initial=0))
    if (int(keys.max(initial=0)) - low + 1) * count >= 1 << 63:
        return np.argsort(keys, kind="stable")
    return np.asarray(np.sort((keys - low) * count + np.arange(count)) % max(count, 1))


def _sorted_matches(squares: IntArray, photos: IntArray, photo_count: int) -> tuple[IntArray, IntArray]:
    """Distinct matches by square and photo."""
    by_both = np.sort(squares * photo_count + photos)
    return by_both // max(photo_count, 1), by_both % max(photo_count, 1)


def _hashes(texts: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    # As bytes, and all digests read at once: half the time of one integer after the other.
    blake2b = hashlib.blake2b
    digests = [blake2b(text, digest_size=8).digest() for text in texts.cast(pa.binary()).to_pylist()]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def _concatenated(parts: list[tuple[IntArray, IntArray]]) -> tuple[IntArray, IntArray]:
    if not parts:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
