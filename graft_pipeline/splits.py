"""Splits: which ground is for training and which for validation, the same for every region, zone and run.

Tiles get their split when they are chosen, in sampling.py.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from graft_pipeline.geometry import projection
from graft_pipeline.imagery import Sensor

#: Metres of a degree of latitude, rounded down.
_DEGREE_M = 110_000.0

#: Degrees by which a square's bounds are widened: its sides are not quite straight in longitude and latitude.
_HAIR_DEG = 1e-6

TRAIN, VALIDATION, GUARD = "train", "validation", "guard"


def block_degrees(sensor: Sensor) -> float:
    """Side of a sensor's blocks: the smallest 1/2**n degree that holds three chips from south to north.

    Powers of two nest: a coarser sensor's block is made of whole blocks of a finer one, and a region of whole
    blocks as long as they are not larger than it.

    Args:
        sensor: the sensor.

    Returns:
        Degrees, of longitude and of latitude.
    """
    side_deg = 1.0
    while side_deg / 2 * _DEGREE_M >= 3 * sensor.chip_m:
        side_deg /= 2
    return side_deg


def is_validation_block(
    column: npt.NDArray[np.int64], row: npt.NDArray[np.int64], block_deg: float, validation_fraction: float
) -> npt.NDArray[np.bool_]:
    """Which blocks are for validation: a hash of the block's place, so no list is kept and none can disagree.

    Args:
        column: (N,) floor(longitude / block_deg).
        row: (N,) floor(latitude / block_deg).
        block_deg: side of the blocks, degrees.
        validation_fraction: expected share of validation blocks, 0 to 1.

    Returns:
        (N,) bool.
    """
    # One integer for each block: rows of pairs are a hundred times slower to sort.
    first_row = row.min(initial=0)
    rows_around = int(row.max(initial=0) - first_row) + 1
    blocks, inverse = np.unique(column * rows_around + (row - first_row), return_inverse=True)
    places = zip((blocks // rows_around).tolist(), (blocks % rows_around + first_row).tolist(), strict=True)
    draws = np.array([_draw(f"{block_deg!r} {c} {r}") for c, r in places], dtype=np.float64)
    return np.asarray(draws < validation_fraction, dtype=np.bool_)[inverse.ravel()]


def _draw(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def split_of_squares(
    x_min_m: npt.ArrayLike,
    y_min_m: npt.ArrayLike,
    side_m: float,
    epsg: int,
    sensor: Sensor,
    validation_fraction: float,
) -> npt.NDArray[np.object_]:
    """Split of ground squares by the blocks that they touch.

    A square that touches blocks of both kinds is `guard` and used by neither. So a training square and a
    validation square never share ground, in whatever regions and zones they lie.

    Args:
        x_min_m: (N,) western edges, metres.
        y_min_m: (N,) southern edges.
        side_m: side of the squares; no longer than a block.
        epsg: UTM zone of these coordinates.
        sensor: whose blocks.
        validation_fraction: expected share of validation blocks, 0 to 1.

    Returns:
        (N,) str: train, validation or guard.
    """
    x = np.atleast_1d(np.asarray(x_min_m, dtype=np.float64))
    y = np.atleast_1d(np.asarray(y_min_m, dtype=np.float64))
    if x.size == 0:
        return np.empty(0, dtype=object)
    corners_x = np.stack([x, x + side_m, x, x + side_m])
    corners_y = np.stack([y, y, y + side_m, y + side_m])
    lon, lat = projection(epsg).inverse(corners_x, corners_y)
    # A square across the antimeridian is seen from the first corner's side.
    lon = lon[0] + (lon - lon[0] + 180.0) % 360.0 - 180.0
    block_deg = block_degrees(sensor)
    first_column, last_column = _blocks(lon, block_deg)
    first_row, last_row = _blocks(lat, block_deg)
    columns_around = round(360.0 / block_deg)
    right = np.arange(int((last_column - first_column).max()) + 1)[:, None, None]
    up = np.arange(int((last_row - first_row).max()) + 1)[:, None]
    column, row = np.broadcast_arrays(
        np.minimum(first_column + right, last_column), np.minimum(first_row + up, last_row)
    )
    # Column numbers go around the globe.
    wrapped = (column + columns_around // 2) % columns_around - columns_around // 2
    touched = is_validation_block(wrapped.ravel(), row.ravel(), block_deg, validation_fraction)
    touched = touched.reshape(-1, x.size)
    split = np.where(touched.any(axis=0), VALIDATION, TRAIN).astype(object)
    split[touched.any(axis=0) & ~touched.all(axis=0)] = GUARD
    return split


def _blocks(
    degrees: npt.NDArray[np.float64], block_deg: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    first = np.floor((degrees.min(axis=0) - _HAIR_DEG) / block_deg)
    last = np.floor((degrees.max(axis=0) + _HAIR_DEG) / block_deg)
    return first.astype(np.int64), last.astype(np.int64)
