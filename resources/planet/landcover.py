"""What lies where on the planet: area classes, lakes with beaches, rivers, highways, baseball fields.

How a class looks from above is in overhead.py, from the ground in ground.py.

Area classes are the greatest of one smooth field per class. Fields and lake shores are evaluated on nodes 40 m
apart and interpolated bilinearly: the nodes around a pixel bound what it can be, exactly, so a class that cannot
win anywhere in a request is left out. Rivers and highways are chains of straight pieces, baseball fields sites.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from resources.planet.frames import Axes
from resources.planet.noise import (
    NodeAxes,
    SplineNoise,
    interpolate_points,
    nodes_around,
    salt,
    uniforms,
)

CLASSES = (
    "lake",
    "river",
    "beach",
    "forest",
    "farmland",
    "meadow",
    "residential",
    "industrial",
    "highway",
    "baseball",
    "desert",
    "orchard",
)
LAKE, RIVER, BEACH, FOREST, FARMLAND, MEADOW, RESIDENTIAL, INDUSTRIAL, HIGHWAY, BASEBALL, DESERT, ORCHARD = (
    range(12)
)

#: Names under which captions and prompts speak of the classes.
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "lake": ("lake",),
    "river": ("river",),
    "beach": ("beach", "sandy shore"),
    "forest": ("forest", "woodland"),
    "farmland": ("farmland", "crop field"),
    "meadow": ("meadow", "grassland"),
    "residential": ("residential area", "suburban street"),
    "industrial": ("industrial area", "factory"),
    "highway": ("highway",),
    "baseball": ("baseball field",),
    "desert": ("desert",),
    "orchard": ("orchard",),
}

#: (12, 3) uint8 RGB of each class on maps.
PALETTE = np.array(
    [
        (49, 104, 189),
        (92, 172, 214),
        (240, 217, 148),
        (25, 94, 42),
        (214, 168, 62),
        (147, 205, 102),
        (206, 96, 84),
        (128, 118, 140),
        (52, 52, 58),
        (255, 128, 190),
        (218, 146, 104),
        (120, 128, 30),
    ],
    np.uint8,
)

#: Classes that are decided by fields, and how much each is favoured: balances their shares of the ground.
AREA_CLASSES = np.array([FOREST, FARMLAND, MEADOW, RESIDENTIAL, INDUSTRIAL, DESERT, ORCHARD], np.uint8)
_FAVOUR = np.array([0.06, 0.06, 0.03, 0.05, -0.02, -0.08, 0.04], np.float32)

NODE_M = 40.0
_BIOME_M = 3500.0
_MOSAIC_M = 420.0
_MOSAIC_WEIGHT = 0.32

_LAKE_CELL_M = 6400.0
_LAKE_SHARE = 0.62
#: Shore values are cut off here, in beach widths; beyond it a lake is not felt.
_SHORE_MAX = 4.0

_DIAMOND_CELL_M = 640.0
_DIAMOND_SHARE = 0.42
#: Sites are judged in square blocks of so many cells.
_DIAMOND_BLOCK = 5
#: A baseball field is a quarter of a disc: its radius, and the strip behind the foul lines, metres.
DIAMOND_RADIUS_M = 118.0
DIAMOND_MARGIN_M = 14.0

_BUCKET_M = 1280.0


class Pieces:
    """Straight pieces of lines.

    Attributes:
        table: (7, P) float64: x and y of one end, metres; ux and uy, the unit vector along the piece; length and
            half width, metres; distance of the end from the start of its line, metres.
        boxes: (4, P) float64: x_min, y_min, x_max, y_max of each piece with its width, metres.
    """

    def __init__(self, table: NDArray[np.float64], boxes: NDArray[np.float64] | None = None) -> None:
        self.table = table
        if boxes is None:
            x, y, ux, uy, length, half_width, _ = table
            reach = half_width * 1.5
            end_x, end_y = x + ux * length, y + uy * length
            boxes = np.stack(
                [
                    np.minimum(x, end_x) - reach,
                    np.minimum(y, end_y) - reach,
                    np.maximum(x, end_x) + reach,
                    np.maximum(y, end_y) + reach,
                ]
            )
        self.boxes = boxes

    def __len__(self) -> int:
        return self.table.shape[1]

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """x_min, y_min, x_max, y_max of all pieces, metres."""
        west, south, east, north = self.boxes
        return float(west.min()), float(south.min()), float(east.max()), float(north.max())

    @staticmethod
    def joined(parts: list["Pieces"]) -> "Pieces":
        """All pieces of several."""
        if not parts:
            return Pieces(np.empty((7, 0)), np.empty((4, 0)))
        if len(parts) == 1:
            return parts[0]
        return Pieces(
            np.concatenate([part.table for part in parts], axis=1),
            np.concatenate([part.boxes for part in parts], axis=1),
        )

    def touching(self, x_min: float, y_min: float, x_max: float, y_max: float) -> "Pieces | None":
        """The pieces that may touch a rectangle; None if there are none."""
        if not len(self):
            return None
        west, south, east, north = self.box
        if west > x_max or east < x_min or south > y_max or north < y_min:
            return None
        west, south, east, north = self.boxes
        does_touch = (west <= x_max) & (east >= x_min) & (south <= y_max) & (north >= y_min)
        if not does_touch.any():
            return None
        return Pieces(self.table[:, does_touch], self.boxes[:, does_touch])


class LineNetwork:
    """Wavy lines between the jittered nodes of a lattice: rivers, or highways."""

    def __init__(
        self,
        line_salt: int,
        *,
        spacing_m: float,
        half_widths_m: tuple[float, float],
        shares: tuple[float, float],
        waves: tuple[tuple[int, float], ...],
        piece_m: float,
    ) -> None:
        """Describe the network.

        Args:
            line_salt: salt of the network.
            spacing_m: distance of neighbouring nodes.
            half_widths_m: least and greatest half width of a line.
            shares: how many of the eastward and of the northward links exist, 0 to 1.
            waves: (half waves over a link, amplitude in metres) of its deviations from straight; they add up to
                less than a third of the spacing.
            piece_m: about how long a straight piece is.
        """
        self._salt = line_salt
        self._spacing = spacing_m
        self._half_widths = half_widths_m
        self._shares = shares
        self._waves = waves
        self._piece_m = piece_m
        self._links = lru_cache(maxsize=2048)(self._make_links)
        self._bucket = lru_cache(maxsize=4096)(self._make_bucket)

    def _node(self, i: int, j: int) -> tuple[float, float]:
        jitter = 0.2 + 0.6 * uniforms([self._salt, self._salt ^ 1], i, j)
        return (i + float(jitter[0])) * self._spacing, (j + float(jitter[1])) * self._spacing

    def _make_links(self, i: int, j: int) -> Pieces:
        parts = []
        for direction, (di, dj) in enumerate(((1, 0), (0, 1))):
            draw = uniforms(self._salt ^ (2 + direction), 8 * i + np.arange(8), j)
            if draw[0] >= self._shares[direction]:
                continue
            x0, y0 = self._node(i, j)
            x1, y1 = self._node(i + di, j + dj)
            span = float(np.hypot(x1 - x0, y1 - y0))
            count = max(4, round(span * 1.1 / self._piece_m))
            t = np.arange(count + 1) / count
            offset = np.zeros(count + 1)
            for k, (half_waves, amplitude) in enumerate(self._waves):
                offset += amplitude * (2 * draw[2 + k] - 1) * np.sin(np.pi * half_waves * t)
            across_x, across_y = -(y1 - y0) / span, (x1 - x0) / span
            x, y = x0 + (x1 - x0) * t + offset * across_x, y0 + (y1 - y0) * t + offset * across_y
            dx, dy = np.diff(x), np.diff(y)
            length = np.hypot(dx, dy)
            low, high = self._half_widths
            half_width = np.full(count, low + (high - low) * draw[1])
            start = np.cumsum(length) - length
            table = (x[:-1], y[:-1], dx / length, dy / length, length, half_width, start)
            parts.append(Pieces(np.stack(table)))
        return Pieces.joined(parts)

    def _make_bucket(self, i: int, j: int) -> Pieces:
        box = (i * _BUCKET_M, j * _BUCKET_M, (i + 1) * _BUCKET_M, (j + 1) * _BUCKET_M)
        return _touching(self._links_around(*box), *box)

    def _links_around(self, x_min: float, y_min: float, x_max: float, y_max: float) -> Iterator[Pieces]:
        reach = 0.35 * self._spacing
        for i in range(int((x_min - reach) // self._spacing) - 1, int((x_max + reach) // self._spacing) + 1):
            for j in range(
                int((y_min - reach) // self._spacing) - 1, int((y_max + reach) // self._spacing) + 1
            ):
                yield self._links(i, j)

    def _buckets_around(self, x_min: float, y_min: float, x_max: float, y_max: float) -> Iterator[Pieces]:
        for i in range(int(x_min // _BUCKET_M), int(x_max // _BUCKET_M) + 1):
            for j in range(int(y_min // _BUCKET_M), int(y_max // _BUCKET_M) + 1):
                yield self._bucket(i, j)

    def near(self, x_min: float, y_min: float, x_max: float, y_max: float) -> Pieces:
        """Pieces that may touch a rectangle, some of them twice.

        Args:
            x_min: western side, metres.
            y_min: southern side.
            x_max: eastern side.
            y_max: northern side.

        Returns:
            The pieces.
        """
        is_small = x_max - x_min < 2e4 and y_max - y_min < 2e4
        source = self._buckets_around if is_small else self._links_around
        return _touching(source(x_min, y_min, x_max, y_max), x_min, y_min, x_max, y_max)


def _touching(source: Iterator[Pieces], *box: float) -> Pieces:
    parts = [pieces.touching(*box) for pieces in source]
    return Pieces.joined([part for part in parts if part is not None])


@dataclass(frozen=True, eq=False)
class Lake:
    """A lake: a disc with lobes.

    Attributes:
        x: easting of its middle, metres.
        y: northing of its middle.
        radius_m: mean radius.
        beach_m: mean width of its beach.
        lobes: (harmonic, cosine and sine amplitude as shares of the radius).
        reach_m: beyond this distance from the middle its shore value exceeds the cut-off.
    """

    x: float
    y: float
    radius_m: float
    beach_m: float
    lobes: tuple[tuple[int, float, float], ...]
    reach_m: float


@dataclass(frozen=True)
class Diamond:
    """A baseball field: home plate, the directions of both foul lines, a bounding box.

    Attributes:
        x: easting of home plate, metres.
        y: northing of home plate.
        ax: unit vector along the first base line, east.
        ay: the same, north; the third base line is (-ay, ax).
    """

    x: float
    y: float
    ax: float
    ay: float

    @property
    def middle(self) -> tuple[float, float]:
        """A place amid the field."""
        reach = 0.42 * DIAMOND_RADIUS_M
        return self.x + reach * (self.ax - self.ay), self.y + reach * (self.ay + self.ax)

    def along(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
        """Coordinates along the first and the third base line, broadcast from x and y, metres."""
        dx, dy = x - self.x, y - self.y
        return dx * self.ax + dy * self.ay, dy * self.ax - dx * self.ay

    def contains(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which places belong to the field; x and y broadcast."""
        first, third = self.along(x, y)
        return (
            (first >= -DIAMOND_MARGIN_M)
            & (third >= -DIAMOND_MARGIN_M)
            & (first * first + third * third <= DIAMOND_RADIUS_M * DIAMOND_RADIUS_M)
        )

    def box(self) -> tuple[float, float, float, float]:
        """(x_min, y_min, x_max, y_max) with some slack, metres."""
        x, y = self.middle
        reach = 0.9 * DIAMOND_RADIUS_M
        return x - reach, y - reach, x + reach, y + reach


@dataclass(frozen=True, eq=False)
class Cover:
    """Land cover of a grid, with what painting needs besides.

    Attributes:
        classes: (H, W) uint8 indices into `CLASSES`.
        road_lateral: (H, W) float32, signed metres from the middle of the highway there; None without highways
            or where pixels are too large for lanes.
        road_along: (H, W) float32, metres along that highway.
        diamonds: baseball fields that touch the grid.
    """

    classes: NDArray[np.uint8]
    road_lateral: NDArray[np.float32] | None
    road_along: NDArray[np.float32] | None
    diamonds: tuple[Diamond, ...]

    @cached_property
    def present(self) -> list[int]:
        """The classes that occur, the most frequent first."""
        counts = [np.count_nonzero(self.classes == value) for value in range(len(CLASSES))]
        found = (value for value in range(len(CLASSES)) if counts[value])
        return sorted(found, key=lambda value: -counts[value])


class Land:
    """The land cover of one UTM zone of one planet; coordinates as in frames.py."""

    def __init__(self, seed: int, zone: int) -> None:
        def named(name: str) -> int:
            return salt(seed, zone, name)

        count = len(AREA_CLASSES)
        self._biome = SplineNoise([named(f"biome {k}") for k in range(count)], _BIOME_M)
        self._mosaic = SplineNoise([named(f"mosaic {k}") for k in range(count)], _MOSAIC_M)
        self._lake_salt = named("lakes")
        self._diamond_salt = named("diamonds")
        self.rivers = LineNetwork(
            named("rivers"),
            spacing_m=5200.0,
            half_widths_m=(31.0, 44.0),
            shares=(0.45, 0.45),
            waves=((1, 500.0), (3, 380.0), (7, 190.0), (13, 70.0)),
            piece_m=110.0,
        )
        self.highways = LineNetwork(
            named("highways"),
            spacing_m=4600.0,
            half_widths_m=(18.0, 22.0),
            shares=(0.6, 0.6),
            waves=((1, 420.0), (2, 320.0), (3, 160.0)),
            piece_m=100.0,
        )
        self._lake = lru_cache(maxsize=4096)(self._make_lake)
        self._diamonds = lru_cache(maxsize=16384)(self._make_diamonds)

    # --- fields on nodes ---

    def _fields(self, noise: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float32]:
        biome = getattr(self._biome, noise)(x, y)
        mosaic = getattr(self._mosaic, noise)(x, y)
        values = biome + np.float32(_MOSAIC_WEIGHT) * mosaic
        values += _FAVOUR.reshape((-1,) + (1,) * (values.ndim - 1))
        return values

    def _make_lake(self, i: int, j: int) -> Lake | None:
        draw = uniforms(self._lake_salt, 16 * i + np.arange(16), j)
        if draw[0] >= _LAKE_SHARE:
            return None
        radius = 480.0 + 900.0 * draw[3] * draw[4]
        lobes = []
        for harmonic, amplitude, k in ((2, 0.2, 5), (3, 0.13, 7), (5, 0.06, 9)):
            lobes.append((harmonic, amplitude * (2 * draw[k] - 1), amplitude * (2 * draw[k + 1] - 1)))
        beach = 120.0 + 110.0 * draw[11]
        longest = radius * (1 + sum(float(np.hypot(a, b)) for _, a, b in lobes))
        x = (i + 0.25 + 0.5 * draw[1]) * _LAKE_CELL_M
        y = (j + 0.25 + 0.5 * draw[2]) * _LAKE_CELL_M
        return Lake(
            float(x), float(y), float(radius), float(beach), tuple(lobes), longest + _SHORE_MAX * beach
        )

    def _lakes_near(self, x_min: float, y_min: float, x_max: float, y_max: float) -> list[Lake]:
        cell = _LAKE_CELL_M
        found = []
        # The longest reach (about 3.2 km) is below one cell.
        for i in range(int(x_min // cell) - 1, int(x_max // cell) + 2):
            for j in range(int(y_min // cell) - 1, int(y_max // cell) + 2):
                lake = self._lake(i, j)
                if lake is None:
                    continue
                dx = max(x_min - lake.x, 0.0, lake.x - x_max)
                dy = max(y_min - lake.y, 0.0, lake.y - y_max)
                if dx * dx + dy * dy < lake.reach_m * lake.reach_m:
                    found.append(lake)
        return found

    def _shore(
        self, lakes: list[Lake], x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Distance to the nearest lake in widths of its beach: below 0 water, below 1 beach; x and y broadcast."""
        values = np.full(np.broadcast(x, y).shape, _SHORE_MAX)
        for lake in lakes:
            dx, dy = x - lake.x, y - lake.y
            distance = np.sqrt(dx * dx + dy * dy) + 1e-6
            cosine, sine = dx / distance, dy / distance
            outline = np.ones_like(distance)
            power_c, power_s, power = cosine, sine, 1
            for harmonic, a, b in lake.lobes:
                while power < harmonic:
                    power_c, power_s = power_c * cosine - power_s * sine, power_c * sine + power_s * cosine
                    power += 1
                outline += a * power_c + b * power_s
            # A beach is wider on one side.
            shore = (distance - lake.radius_m * outline) / (lake.beach_m * (1.0 + 0.25 * cosine))
            np.minimum(values, shore, out=values)
        return values.astype(np.float32)

    # --- single sites ---

    def _make_diamonds(self, i: int, j: int) -> tuple[Diamond, ...]:
        """Baseball fields of one block of sites: where a site lies amid houses or grass, clear of all else."""
        cells = np.arange(_DIAMOND_BLOCK)
        columns, rows = np.meshgrid(i * _DIAMOND_BLOCK + cells, j * _DIAMOND_BLOCK + cells)
        draw = uniforms(self._diamond_salt, 4 * columns[None] + np.arange(4)[:, None, None], rows[None])
        diamonds = []
        for column, row, chance, dx, dy, turn in zip(
            columns.reshape(-1), rows.reshape(-1), *draw.reshape(4, -1), strict=True
        ):
            if chance < _DIAMOND_SHARE:
                # A rational point of the unit circle: no trigonometry, hence the same bits on any machine.
                t = float(2 * turn - 1)
                ax, ay = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
                if int(turn * 4096) % 2:
                    ax, ay = -ax, -ay
                x, y = float(column + dx) * _DIAMOND_CELL_M, float(row + dy) * _DIAMOND_CELL_M
                diamonds.append(Diamond(x, y, ax, ay))
        if not diamonds:
            return ()
        middle_x, middle_y = np.array([diamond.middle for diamond in diamonds]).T
        around_x = middle_x + np.array([[0.0], [60.0], [-60.0], [0.0], [0.0]])
        around_y = middle_y + np.array([[0.0], [0.0], [0.0], [60.0], [-60.0]])
        area, shore = self._area_at(around_x.reshape(-1), around_y.reshape(-1))
        fits = np.isin(area[: len(diamonds)], (RESIDENTIAL, MEADOW))
        fits &= shore.reshape(5, -1).min(axis=0) > 1.1
        reach = 200.0
        box = (middle_x.min() - reach, middle_y.min() - reach, middle_x.max() + reach, middle_y.max() + reach)
        for network in (self.rivers, self.highways):
            pieces = network.near(*(float(side) for side in box))
            if len(pieces):
                fits &= _distance(pieces, middle_x, middle_y).min(axis=1) > 80.0
        return tuple(diamond for diamond, does_fit in zip(diamonds, fits, strict=True) if does_fit)

    def diamonds(self, x_min: float, y_min: float, x_max: float, y_max: float) -> tuple[Diamond, ...]:
        """Baseball fields that may touch a rectangle, metres."""
        block, reach = _DIAMOND_BLOCK * _DIAMOND_CELL_M, 1.2 * DIAMOND_RADIUS_M
        found = []
        for i in range(int((x_min - reach) // block), int((x_max + reach) // block) + 1):
            for j in range(int((y_min - reach) // block), int((y_max + reach) // block) + 1):
                for diamond in self._diamonds(i, j):
                    west, south, east, north = diamond.box()
                    if west <= x_max and east >= x_min and south <= y_max and north >= y_min:
                        found.append(diamond)
        return tuple(found)

    # --- classes ---

    def cover(self, axes: Axes) -> Cover:
        """Land cover of an axis-aligned grid.

        Args:
            axes: the pixels' middles.

        Returns:
            The classes of the middles, and the details of highways and baseball fields.
        """
        nodes = NodeAxes(axes.x, axes.y, NODE_M)
        classes = self._areas(nodes, axes.shape)
        box = (float(axes.x[0]), float(axes.y[-1]), float(axes.x[-1]), float(axes.y[0]))
        lakes = self._lakes_near(float(nodes.x[0]), float(nodes.y[-1]), float(nodes.x[-1]), float(nodes.y[0]))
        shore = None
        if lakes:
            on_nodes = self._shore(lakes, nodes.x, nodes.y[:, None])
            if on_nodes.min() < 1.0:
                shore = nodes.interpolate(on_nodes)
                classes[shore < 1.0] = BEACH
        self._paint_lines(self.rivers.near(*box), axes, classes, RIVER, None)
        if shore is not None:
            classes[shore < 0.0] = LAKE
        diamonds = self.diamonds(*box)
        for diamond in diamonds:
            window = axes.window(*diamond.box())
            if window is not None:
                rows, columns = window
                inside = diamond.contains(axes.x[columns], axes.y[rows, None])
                classes[window][inside] = BASEBALL
        pieces = self.highways.near(*box)
        lanes = None
        if len(pieces) and axes.gsd_m < 4:
            lanes = (np.full(axes.shape, np.inf, np.float32), np.zeros(axes.shape, np.float32))
        keep = classes == LAKE if len(pieces) and shore is not None else None
        self._paint_lines(pieces, axes, classes, HIGHWAY, lanes)
        if keep is not None:
            classes[keep] = LAKE
        return Cover(classes, *(lanes or (None, None)), diamonds)

    def _areas(self, nodes: NodeAxes, shape: tuple[int, int]) -> NDArray[np.uint8]:
        fields = self._fields("on_axes", nodes.x, nodes.y)
        high = np.maximum(fields[:, :-1], fields[:, 1:])
        high = np.maximum(high[:, :, :-1], high[:, :, 1:])
        low = np.minimum(fields[:, :-1], fields[:, 1:])
        low = np.minimum(low[:, :, :-1], low[:, :, 1:])
        # The slack covers the rounding of the interpolation.
        can_win = high >= low.max(axis=0) - np.float32(1e-5)
        candidates = np.flatnonzero(can_win.any(axis=(1, 2)))
        classes = np.full(shape, AREA_CLASSES[candidates[0]], np.uint8)
        if len(candidates) == 1:
            return classes
        best = nodes.interpolate(fields[candidates[0]])
        for k in candidates[1:]:
            values = nodes.interpolate(fields[k])
            np.copyto(classes, AREA_CLASSES[k], where=values > best)
            np.maximum(best, values, out=best)
        return classes

    @staticmethod
    def _paint_lines(
        pieces: Pieces,
        axes: Axes,
        classes: NDArray[np.uint8],
        value: int,
        lanes: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    ) -> None:
        if not len(pieces):
            return
        west, south, east, north = pieces.boxes
        c0, c1 = np.searchsorted(axes.x, west), np.searchsorted(axes.x, east)
        r0, r1 = np.searchsorted(-axes.y, -north), np.searchsorted(-axes.y, -south)
        wide, high = int((c1 - c0).max()), int((r1 - r0).max())
        if wide == 0 or high == 0:
            return
        if lanes is None and wide * high < 1500:
            # Many small windows: all at once.
            columns = c0[:, None] + np.arange(wide)
            rows = r0[:, None] + np.arange(high)
            is_column, is_row = columns < c1[:, None], rows < r1[:, None]
            np.minimum(columns, len(axes.x) - 1, out=columns)
            np.minimum(rows, len(axes.y) - 1, out=rows)
            x, y = pieces.table[:2]
            dx, dy = axes.x[columns] - x[:, None], axes.y[rows] - y[:, None]
            inside, _, _ = _in_pieces(pieces.table[:, :, None, None], dx[:, None, :], dy[:, :, None])
            inside &= is_row[:, :, None] & is_column[:, None, :]
            flat = rows[:, :, None] * len(axes.x) + columns[:, None, :]
            classes.reshape(-1)[flat[inside]] = value
            return
        for k in range(len(pieces)):
            window = slice(r0[k], r1[k]), slice(c0[k], c1[k])
            if r0[k] == r1[k] or c0[k] == c1[k]:
                continue
            piece = pieces.table[:, k]
            dx, dy = axes.x[window[1]] - piece[0], axes.y[window[0]] - piece[1]
            inside, lateral, along = _in_pieces(piece, dx, dy[:, None])
            classes[window][inside] = value
            if lanes is not None:
                nearest, travelled = lanes[0][window], lanes[1][window]
                inside &= np.abs(lateral) < np.abs(nearest)
                nearest[inside] = lateral[inside]
                travelled[inside] = (along + piece[6])[inside]

    def _area_at(
        self, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        node_x, node_y = nodes_around(x, y, NODE_M)
        fields = interpolate_points(self._fields("at", node_x, node_y), x, y, NODE_M)
        lakes = self._lakes_near(
            float(node_x.min()), float(node_y.min()), float(node_x.max()), float(node_y.max())
        )
        shore = interpolate_points(self._shore(lakes, node_x, node_y), x, y, NODE_M)
        return AREA_CLASSES[fields.argmax(axis=0)], shore

    def classes_at(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Land cover of points; the same as `cover` gives at the same places.

        Args:
            x: (N,) float64, metres.
            y: (N,) float64, metres.

        Returns:
            (N,) uint8 indices into `CLASSES`.
        """
        # Neighbours in the arrays are usually neighbours on the ground: a block needs few lakes, pieces and fields.
        blocks = [self._classes_of(x[k : k + 8192], y[k : k + 8192]) for k in range(0, len(x), 8192)]
        return np.concatenate([np.empty(0, np.uint8), *blocks])

    def _classes_of(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.uint8]:
        classes, shore = self._area_at(x, y)
        classes[shore < 1.0] = BEACH
        box = (float(x.min()), float(y.min()), float(x.max()), float(y.max()))
        classes[_on_lines(self.rivers.near(*box), x, y)] = RIVER
        classes[shore < 0.0] = LAKE
        for diamond in self.diamonds(*box):
            classes[diamond.contains(x, y)] = BASEBALL
        on_highway = _on_lines(self.highways.near(*box), x, y)
        classes[on_highway & (shore >= 0.0)] = HIGHWAY
        return classes


def _in_pieces(
    table: NDArray[np.float64], dx: NDArray[np.float64], dy: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Which offsets from the ends of pieces lie on them; with lateral and along distance, metres."""
    _, _, ux, uy, length, half_width, _ = table
    lateral = dy * ux - dx * uy
    along = dx * ux + dy * uy
    # Pieces overlap a little: else wedges would be missing on the outside of bends.
    overlap = 0.3 * half_width
    inside = (
        (lateral >= -half_width) & (lateral <= half_width) & (along >= -overlap) & (along <= length + overlap)
    )
    return inside, lateral, along


def _on_lines(pieces: Pieces, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    found = np.zeros(len(x), bool)
    # Blocks of points keep the matrix of points and pieces small.
    for start in range(0, len(x) if len(pieces) else 0, 512):
        part = slice(start, start + 512)
        some_x, some_y = x[part], y[part]
        near = pieces.touching(
            float(some_x.min()), float(some_y.min()), float(some_x.max()), float(some_y.max())
        )
        if near is not None:
            dx, dy = some_x[:, None] - near.table[0], some_y[:, None] - near.table[1]
            found[part] = _in_pieces(near.table, dx, dy)[0].any(axis=1)
    return found


def _distance(pieces: Pieces, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, P) distance of points from the edges of pieces, metres; negative inside."""
    piece_x, piece_y, ux, uy, length, half_width, _ = pieces.table
    dx, dy = x[:, None] - piece_x, y[:, None] - piece_y
    along = np.clip(dx * ux + dy * uy, 0, length)
    return np.hypot(dx - along * ux, dy - along * uy) - half_width
