"""Where to look and which tiles to cut: uniform search locations, and tiles that keep their distance.

Which photos belong to a tile is in pairing.py; which scene serves it, in scenes.py.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline.errors import DataError, InputError
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import columns
from graft_pipeline.regions import Region
from graft_pipeline.schemas import FLICKR_PHOTOS, SEARCH_LOCATIONS, TILES
from graft_pipeline.splits import split_of_squares

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

Mode = Literal["non_overlapping", "random", "per_quarter"]

#: A centre keeps half the spacing, and so much more, from its region's border: grids of two zones that meet
#: at a meridian differ in scale and bend, by less than this.
BORDER_HAIR = 0.005

_DRAWS_PER_BATCH = 1024
_MOST_BATCHES = 2000


def sample_locations(
    region: Region, area_geometry: "BaseGeometry", count: int, radius_km: float, seed: int
) -> pa.Table:
    """Points sampled uniformly (by area on the sphere) from the ground that a region and an area share.

    Args:
        region: the region.
        area_geometry: shapely (multi)polygon, EPSG:4326.
        count: how many; a larger count only appends. Slivers that a bounded number of draws does not hit
            often enough give fewer.
        radius_km: radius of the search around each.
        seed: with the region's key, of the draw.

    Returns:
        SEARCH_LOCATIONS rows; none when region and area share no ground.

    Raises:
        InputError: if count or radius are not positive.
    """
    import shapely

    if count <= 0 or radius_km <= 0:
        raise InputError(f"{count} search locations of {radius_km} km: give positive numbers.")
    shared = shapely.intersection(area_geometry, region.polygon)
    if shared.is_empty or shared.area == 0:
        return SEARCH_LOCATIONS.empty()
    shapely.prepare(shared)
    west, south, east, north = shared.bounds
    generator = np.random.default_rng([seed & 0xFFFFFFFF, _hash_64(region.key)])
    lon, lat = np.empty(0), np.empty(0)
    for _ in range(_MOST_BATCHES):
        draws = generator.random((2, _DRAWS_PER_BATCH))
        # Equal areas on the sphere are equal steps in longitude and in the sine of latitude.
        low, high = np.sin(np.radians([south, north]))
        x, y = west + draws[0] * (east - west), np.degrees(np.arcsin(low + draws[1] * (high - low)))
        inside = shapely.contains_xy(shared, x, y) & region.contains(x, y)
        lon, lat = np.concatenate([lon, x[inside]]), np.concatenate([lat, y[inside]])
        if lon.size >= count:
            break
    if lon.size == 0:
        point = shared.representative_point()
        lon, lat = np.array([point.x]), np.array([point.y])
    found = min(count, lon.size)
    return pa.table(
        {
            "location_id": pa.array(np.arange(found, dtype=np.int32)),
            "lon_deg": pa.array(lon[:found]),
            "lat_deg": pa.array(lat[:found]),
            "radius_km": pa.array(np.full(found, float(radius_km))),
        },
        schema=SEARCH_LOCATIONS.schema,
    )


def sample_tiles(
    photos: pa.Table,
    region: Region,
    sensor: Sensor,
    existing: pa.Table | None,
    mode: Mode = "non_overlapping",
    seed: int = 0,
    validation_fraction: float = 0.1,
) -> pa.Table:
    """Choose a region's tiles (paper, section 3.2), starting from those that it has.

    `non_overlapping`: photos in the order (uploaded_at, photo_id); one that no chosen centre covers becomes a
    centre. Covered means closer than `sensor.spacing_m` in x and in y. `per_quarter` does so for each quarter
    of the year in which photos were taken, apart from the others. `random` is the paper's ablation (section
    4.4): as many centres as `non_overlapping` gives, drawn at random from the photos.

    A photo nearer than half the spacing to its region's border is no centre; so no two centres of different
    regions are closer than the spacing either.

    Args:
        photos: FLICKR_PHOTOS rows that may be paired.
        region: their region.
        sensor: the sensor.
        existing: TILES rows of an earlier call; they stay, first and unchanged, but for a split that follows
            validation_fraction. None starts over.
        mode: see above.
        seed: of `random`.
        validation_fraction: expected share of validation ground.

    Returns:
        TILES rows: the existing ones, then the new ones with the next indexes.

    Raises:
        DataError: if the existing tiles were made in another mode or on another grid.
        InputError: if the mode is unknown.
    """
    if mode not in ("non_overlapping", "random", "per_quarter"):
        raise InputError(f"Sampling {mode!r} is unknown: use non_overlapping, random or per_quarter.")
    known = TILES.empty() if existing is None else existing
    _check_same_rule(known, region, sensor, mode)
    needed = ["photo_id", "uploaded_at_utc", "taken_at_local", "lon_deg", "lat_deg"]
    ordered = photos.select(needed).sort_by([(name, "ascending") for name in FLICKR_PHOTOS.order])
    lon, lat = columns(ordered, "lon_deg", "lat_deg")
    margin_m = sensor.spacing_m / 2 * (1 + BORDER_HAIR)
    inside = region.holds_squares(lon, lat, margin_m)
    # Before they were projected: whatever is not a candidate need not be.
    rows = np.flatnonzero(inside)
    x, y = region.projection.forward(lon[rows], lat[rows])
    known_x, known_y = columns(known, "center_x_m", "center_y_m")

    if mode == "random":
        target = len(choose_centers(x, y, sensor.spacing_m))
        chosen = _draw_centers(ordered, rows, known, target, seed)
    elif mode == "per_quarter":
        chosen = _choose_per_quarter(ordered, rows, x, y, known, sensor.spacing_m)
    else:
        chosen = choose_centers(x, y, sensor.spacing_m, known_x, known_y)
    new = _tile_rows(
        ordered.take(pa.array(rows[chosen])),
        x[chosen],
        y[chosen],
        region=region,
        sensor=sensor,
        mode=mode,
        first_index=int(pc.max(known["tile_index"]).as_py()) + 1 if known.num_rows else 0,
        validation_fraction=validation_fraction,
    )
    return pa.concat_tables([_split_anew(known, region, sensor, validation_fraction), new]).combine_chunks()


def choose_centers(
    x_m: npt.NDArray[np.float64],
    y_m: npt.NDArray[np.float64],
    spacing_m: float,
    known_x_m: Sequence[float] | npt.NDArray[np.float64] = (),
    known_y_m: Sequence[float] | npt.NDArray[np.float64] = (),
) -> npt.NDArray[np.int64]:
    """Greedy choice of points at least a spacing apart, Chebyshev, in the order given.

    A cell of side `spacing_m` holds at most one centre, as two points of a cell are always closer. So a point
    looks at its own cell and the eight around it: linear time, whatever the density.

    Args:
        x_m: (N,) eastings.
        y_m: (N,) northings.
        spacing_m: least distance in x or in y; exactly this far is allowed.
        known_x_m: (K,) eastings of centres chosen before, at any distance from one another.
        known_y_m: (K,) their northings.

    Returns:
        (M,) indices of the chosen points, ascending.
    """
    known_x, known_y = np.asarray(known_x_m, dtype=np.float64), np.asarray(known_y_m, dtype=np.float64)
    open_rows = np.flatnonzero(~_is_covered(x_m, y_m, known_x, known_y, spacing_m))
    keys, step = _cells(x_m[open_rows], y_m[open_rows], spacing_m)
    around = (1, -1, step, -step, step + 1, step - 1, 1 - step, -1 - step)
    cells: dict[int, tuple[float, float]] = {}
    look_up = cells.get
    chosen: list[int] = []
    points = zip(
        open_rows.tolist(), keys.tolist(), x_m[open_rows].tolist(), y_m[open_rows].tolist(), strict=True
    )
    for row, key, x, y in points:
        if key in cells:
            continue
        for offset in around:
            center = look_up(key + offset)
            if center is not None and abs(center[0] - x) < spacing_m and abs(center[1] - y) < spacing_m:
                break
        else:
            cells[key] = (x, y)
            chosen.append(row)
    return np.asarray(chosen, dtype=np.int64)


def _cells(
    x_m: npt.NDArray[np.float64], y_m: npt.NDArray[np.float64], side_m: float
) -> tuple[npt.NDArray[np.int64], int]:
    """One integer for each point's square cell, and what to add for the next cell in x (in y it is 1)."""
    # floor_divide, not floor(x / side): the quotient may round up across a border.
    column = np.floor_divide(x_m, side_m).astype(np.int64)
    row = np.floor_divide(y_m, side_m).astype(np.int64)
    step = 1 << 32
    return column * step + row, step


def _is_covered(
    x_m: npt.NDArray[np.float64],
    y_m: npt.NDArray[np.float64],
    center_x_m: npt.NDArray[np.float64],
    center_y_m: npt.NDArray[np.float64],
    spacing_m: float,
) -> npt.NDArray[np.bool_]:
    """Which points are closer than the spacing, in x and in y, to any of the centres."""
    covered = np.zeros(x_m.size, dtype=np.bool_)
    if not center_x_m.size or not x_m.size:
        return covered
    keys, step = _cells(x_m, y_m, spacing_m)
    # Looking up cells in their order is several times as fast as jumping about.
    by_cell = np.argsort(keys)
    x_m, y_m, keys = x_m[by_cell], y_m[by_cell], keys[by_cell]
    center_keys, _ = _cells(center_x_m, center_y_m, spacing_m)
    order = np.argsort(center_keys, kind="stable")
    sorted_keys = center_keys[order]
    for offset in (a * step + b for a in (-1, 0, 1) for b in (-1, 0, 1)):
        first = np.searchsorted(sorted_keys, keys + offset, side="left")
        last = np.searchsorted(sorted_keys, keys + offset, side="right")
        # Centres of `random` and `per_quarter` may share a cell: one after the other.
        for nth in range(int((last - first).max(initial=0))):
            rows = np.flatnonzero(first + nth < last)
            centers = order[first[rows] + nth]
            near_x = np.abs(center_x_m[centers] - x_m[rows]) < spacing_m
            covered[rows] |= near_x & (np.abs(center_y_m[centers] - y_m[rows]) < spacing_m)
    in_order = np.empty_like(covered)
    in_order[by_cell] = covered
    return in_order


def _choose_per_quarter(
    photos: pa.Table,
    rows: npt.NDArray[np.int64],
    x_m: npt.NDArray[np.float64],
    y_m: npt.NDArray[np.float64],
    known: pa.Table,
    spacing_m: float,
) -> npt.NDArray[np.int64]:
    """As `choose_centers`, apart for each quarter in which photos were taken; unknown times are one more."""
    (taken,) = columns(photos, "taken_at_local")
    quarter = taken.astype("datetime64[M]").astype(np.int64) // 3
    quarter = np.where(np.isnat(taken), np.iinfo(np.int64).min, quarter)
    known_ids, known_x, known_y = columns(known, "center_photo_id", "center_x_m", "center_y_m")
    by_photo = dict(zip(photos["photo_id"].to_pylist(), quarter.tolist(), strict=True))
    # A centre whose photo is no longer paired has no known quarter: it counts in each.
    anywhere = np.iinfo(np.int64).max
    known_quarter = np.array([by_photo.get(photo_id, anywhere) for photo_id in known_ids], dtype=np.int64)
    chosen = []
    for value in np.unique(quarter[rows]):
        own = np.flatnonzero(quarter[rows] == value)
        kept = (known_quarter == value) | (known_quarter == anywhere)
        chosen.append(own[choose_centers(x_m[own], y_m[own], spacing_m, known_x[kept], known_y[kept])])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def _draw_centers(
    photos: pa.Table, rows: npt.NDArray[np.int64], known: pa.Table, target: int, seed: int
) -> npt.NDArray[np.int64]:
    """Photos in the order of a seeded hash of their id, until there are as many centres as wanted."""
    ids = np.asarray(photos["photo_id"].combine_chunks().take(pa.array(rows)).to_pylist(), dtype=object)
    taken = set(known["center_photo_id"].to_pylist())
    free = np.flatnonzero(np.array([photo_id not in taken for photo_id in ids], dtype=bool))
    ranks = np.array([_hash_64(f"{seed} {photo_id}") for photo_id in ids[free]], dtype=np.uint64)
    return np.sort(free[np.argsort(ranks, kind="stable")][: max(0, target - known.num_rows)])


def _hash_64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _check_same_rule(known: pa.Table, region: Region, sensor: Sensor, mode: str) -> None:
    expected = {"epsg": region.epsg, "gsd_m": sensor.gsd_m, "chip_px": sensor.chip_px, "sampling": mode}
    for name, value in expected.items():
        others = set(pc.unique(known[name]).to_pylist()) - {value}
        if others:
            raise DataError(
                f"Tiles of {sensor.name} in {region.key} have {name} {sorted(others)}, now it is {value}: "
                "materialise tiles with full_refresh to start over."
            )


def _split_anew(known: pa.Table, region: Region, sensor: Sensor, validation_fraction: float) -> pa.Table:
    """Old tiles under the fraction of today: two fractions side by side would share ground between splits."""
    x0_m, y0_m = columns(known, "x0_m", "y0_m")
    split = split_of_squares(
        x0_m, y0_m - sensor.chip_m, sensor.chip_m, region.epsg, sensor, validation_fraction
    )
    position = known.schema.get_field_index("split")
    return known.set_column(position, TILES.schema.field("split"), pa.array(split, pa.string())).cast(
        TILES.schema
    )


def _tile_rows(
    centers: pa.Table,
    x_m: npt.NDArray[np.float64],
    y_m: npt.NDArray[np.float64],
    *,
    region: Region,
    sensor: Sensor,
    mode: str,
    first_index: int,
    validation_fraction: float,
) -> pa.Table:
    count, side = centers.num_rows, sensor.chip_px
    # As Grid.snapped, for all at once.
    x0_m = np.floor(x_m / sensor.gsd_m - side / 2 + 0.5) * sensor.gsd_m
    y0_m = np.floor(y_m / sensor.gsd_m + side / 2 + 0.5) * sensor.gsd_m
    split = split_of_squares(
        x0_m, y0_m - sensor.chip_m, sensor.chip_m, region.epsg, sensor, validation_fraction
    )
    prefix = pa.scalar(f"{sensor.name}-")
    ids = centers["photo_id"].combine_chunks()
    return pa.table(
        {
            "tile_id": pc.binary_join_element_wise(prefix, ids, ""),
            "tile_index": pa.array(np.arange(first_index, first_index + count, dtype=np.int32)),
            "center_photo_id": ids,
            "center_lon_deg": centers["lon_deg"],
            "center_lat_deg": centers["lat_deg"],
            "center_x_m": pa.array(x_m),
            "center_y_m": pa.array(y_m),
            "epsg": pa.array(np.full(count, region.epsg, dtype=np.int32)),
            "x0_m": pa.array(x0_m),
            "y0_m": pa.array(y0_m),
            "gsd_m": pa.array(np.full(count, float(sensor.gsd_m))),
            "chip_px": pa.array(np.full(count, side, dtype=np.int32)),
            "sampling": pa.array([mode] * count, pa.string()),
            "split": pa.array(split, pa.string()),
        },
        schema=TILES.schema,
    )
