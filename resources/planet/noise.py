"""Pure numbers for the planet: hashes of lattice indices, smooth noise made of them, interpolation from nodes.

What the numbers mean on the ground is in landcover.py, overhead.py and photographers.py.

Everything is elementwise and of one fixed order of operations, so that a value does not depend on the shape of
the request that it is part of: the same point gives the same bits on axes, among points and in any window. That
rules out matrix products (their rounding varies with shape) and transcendental functions of strided arrays.
"""

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

_STRIDE_X = np.uint64(0x9E3779B97F4A7C15)
_STRIDE_Y = np.uint64(0xC2B2AE3D27D4EB4F)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_TO_UNIT = 2.0**-53


def salt(*parts: object) -> int:
    """A 64-bit number that is different for every tuple of parts.

    Args:
        *parts: anything whose `repr` is stable: names, integers, tuples of them.

    Returns:
        Unsigned 64-bit integer.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def hashes(salts: ArrayLike, i: ArrayLike, j: ArrayLike = 0) -> NDArray[np.uint64]:
    """Hash lattice indices (SplitMix64's finaliser on a mixed index).

    Args:
        salts: broadcastable unsigned 64-bit integers.
        i: broadcastable first index, any integer.
        j: broadcastable second index, any integer.

    Returns:
        Broadcast shape, uint64, uniform.
    """
    # At least one dimension: numpy warns about the (intended) overflow of scalars only.
    first = np.atleast_1d(np.asarray(i, np.int64)).astype(np.uint64)
    second = np.atleast_1d(np.asarray(j, np.int64)).astype(np.uint64)
    value = first * _STRIDE_X + second * _STRIDE_Y
    value = value ^ np.asarray(salts, np.uint64)
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def uniforms(salts: ArrayLike, i: ArrayLike, j: ArrayLike = 0) -> NDArray[np.float64]:
    """Hash lattice indices to numbers in [0, 1); arguments as for `hashes`."""
    return (hashes(salts, i, j) >> np.uint64(11)).astype(np.float64) * _TO_UNIT


def _spline_weights(t: NDArray[np.float64]) -> tuple[NDArray[np.float32], ...]:
    """Weights of the four lattice values around a point; t in [0, 1) is its place between the inner two."""
    s = 1.0 - t
    w0 = s * s * s * (1.0 / 6.0)
    w3 = t * t * t * (1.0 / 6.0)
    w1 = (4.0 - 6.0 * t * t + 3.0 * t * t * t) * (1.0 / 6.0)
    w2 = (4.0 - 6.0 * s * s + 3.0 * s * s * s) * (1.0 / 6.0)
    return tuple(w.astype(np.float32) for w in (w0, w1, w2, w3))


class SplineNoise:
    """Several independent smooth fields: random values on a lattice, under cubic B-splines.

    B-splines rather than linear interpolation: nearly isotropic, twice differentiable, of even variance.

    Attributes:
        spacing_m: lattice spacing, metres; features are about one and a half times as large.
    """

    #: Makes the standard deviation about one: uniform lattice values have 0.58, the splines leave 0.49 of it.
    _SCALE = 2.0 / 0.283

    def __init__(self, salts: ArrayLike, spacing_m: float) -> None:
        self.spacing_m = spacing_m
        self._salts = np.atleast_1d(np.asarray(salts, np.uint64))

    def _lattice(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.float32]:
        salts = self._salts.reshape((-1,) + (1,) * np.broadcast(i, j).ndim)
        return ((uniforms(salts, i[None], j[None]) - 0.5) * self._SCALE).astype(np.float32)

    def _place(
        self, positions: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], tuple[NDArray[np.float32], ...]]:
        scaled = positions / self.spacing_m
        index = np.floor(scaled)
        return index.astype(np.int64) - 1, _spline_weights(scaled - index)

    def on_axes(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float32]:
        """The fields on an axis-aligned grid.

        Args:
            x: (W,) float64, metres.
            y: (H,) float64, metres.

        Returns:
            (K, H, W) float32, mean 0 and standard deviation about 1; the same bits as `at`.
        """
        ix, wx = self._place(x)
        iy, wy = self._place(y)
        i0, j0 = int(ix.min()), int(iy.min())
        columns = np.arange(i0, int(ix.max()) + 4)
        rows = np.arange(j0, int(iy.max()) + 4)
        lattice = self._lattice(columns[None, :], rows[:, None])
        ix, iy = ix - i0, iy - j0
        along_x = lattice.take(ix, axis=2) * wx[0]
        for m in (1, 2, 3):
            along_x += lattice.take(ix + m, axis=2) * wx[m]
        values = along_x.take(iy, axis=1)
        values *= wy[0][:, None]
        for n in (1, 2, 3):
            part = along_x.take(iy + n, axis=1)
            part *= wy[n][:, None]
            values += part
        return values

    def at(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float32]:
        """The fields at points.

        Args:
            x: (N,) float64, metres.
            y: (N,) float64, metres.

        Returns:
            (K, N) float32; the same bits as `on_axes`.
        """
        ix, wx = self._place(x)
        iy, wy = self._place(y)
        i0, j0 = int(ix.min()), int(iy.min())
        wide, high = int(ix.max()) - i0 + 4, int(iy.max()) - j0 + 4
        if wide * high <= 16 * len(x):
            # Points close together share lattice values.
            lattice = self._lattice(np.arange(i0, i0 + wide)[None, :], np.arange(j0, j0 + high)[:, None])
            lattice = lattice.reshape(len(lattice), -1)
            first = (iy - j0) * wide + (ix - i0)
            return self._summed(lambda m, n: lattice.take(first + n * wide + m, axis=1), wx, wy)
        return self._summed(lambda m, n: self._lattice(ix + m, iy + n), wx, wy)

    @staticmethod
    def _summed(
        value: Callable[[int, int], NDArray[np.float32]],
        wx: tuple[NDArray[np.float32], ...],
        wy: tuple[NDArray[np.float32], ...],
    ) -> NDArray[np.float32]:
        """The sum over a point's 4 x 4 lattice values, in the order of `on_axes`."""
        total: NDArray[np.float32] | None = None
        for n in range(4):
            along_x = value(0, n) * wx[0]
            for m in (1, 2, 3):
                along_x += value(m, n) * wx[m]
            along_x *= wy[n]
            total = along_x if total is None else total + along_x
        assert total is not None
        return total


class NodeAxes:
    """Where the pixels of an axis-aligned grid lie between the nodes of a square lattice.

    Attributes:
        x: (nx,) float64, positions of the nodes that the grid needs.
        y: (ny,) float64, likewise, descending (north up).
    """

    def __init__(self, x: NDArray[np.float64], y: NDArray[np.float64], spacing_m: float) -> None:
        scaled_x, scaled_y = x / spacing_m, -y / spacing_m
        floor_x, floor_y = np.floor(scaled_x), np.floor(scaled_y)
        i0, j0 = int(floor_x.min()), int(floor_y.min())
        self.x = np.arange(i0, int(floor_x.max()) + 2) * spacing_m
        self.y = np.arange(j0, int(floor_y.max()) + 2) * -spacing_m
        self.column = floor_x.astype(np.int64) - i0
        self.row = floor_y.astype(np.int64) - j0
        self._tx = (scaled_x - floor_x).astype(np.float32)
        self._ty = (scaled_y - floor_y).astype(np.float32)
        # Rows of one cell are neighbours: few wide cells are filled faster one by one than by gathering.
        starts = np.flatnonzero(np.diff(self.row, prepend=self.row[0] - 1))
        self._bands = list(zip(starts, [*starts[1:], len(self.row)], strict=True))
        self._is_banded = bool(np.all(np.diff(self.row) >= 0)) and len(self.row) >= 12 * len(self._bands)

    def interpolate(self, nodes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Bilinear interpolation of node values at all pixels.

        Args:
            nodes: (ny, nx) float32.

        Returns:
            (H, W) float32; every pixel lies between the least and the greatest of its four nodes.
        """
        left = nodes.take(self.column, axis=1)
        along_x = left + self._tx * (nodes.take(self.column + 1, axis=1) - left)
        steps = along_x[1:] - along_x[:-1]
        if self._is_banded:
            values = np.empty((len(self.row), len(self.column)), np.float32)
            for start, stop in self._bands:
                k = self.row[start]
                np.multiply(self._ty[start:stop, None], steps[k], out=values[start:stop])
                values[start:stop] += along_x[k]
            return values
        values = steps.take(self.row, axis=0)
        values *= self._ty[:, None]
        values += along_x.take(self.row, axis=0)
        return values


def nodes_around(
    x: NDArray[np.float64], y: NDArray[np.float64], spacing_m: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions of the four nodes around points, as `interpolate_points` wants their values.

    Args:
        x: (N,) float64, metres.
        y: (N,) float64, metres.
        spacing_m: spacing of the nodes.

    Returns:
        (4N,) float64 x and y: all north-western nodes, then north-eastern, south-western, south-eastern.
    """
    i, j = np.floor(x / spacing_m), np.floor(-y / spacing_m)
    return (
        np.concatenate([i, i + 1, i, i + 1]) * spacing_m,
        np.concatenate([j, j, j + 1, j + 1]) * -spacing_m,
    )


def interpolate_points(
    values: NDArray[np.float32], x: NDArray[np.float64], y: NDArray[np.float64], spacing_m: float
) -> NDArray[np.float32]:
    """Bilinear interpolation at points, the same bits as `NodeAxes.interpolate`.

    Args:
        values: (..., 4N) float32 at `nodes_around(x, y, spacing_m)`.
        x: (N,) float64, metres.
        y: (N,) float64, metres.
        spacing_m: spacing of the nodes.

    Returns:
        (..., N) float32.
    """
    scaled_x, scaled_y = x / spacing_m, -y / spacing_m
    tx = (scaled_x - np.floor(scaled_x)).astype(np.float32)
    ty = (scaled_y - np.floor(scaled_y)).astype(np.float32)
    north_west, north_east, south_west, south_east = np.split(values, 4, axis=-1)
    north = north_west + tx * (north_east - north_west)
    south = south_west + tx * (south_east - south_west)
    return ty * (south - north) + north
