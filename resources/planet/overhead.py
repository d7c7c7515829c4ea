"""How the planet's land looks from above, in NAIP's and in Sentinel-2's pixels.

What lies where is in landcover.py; which scenes exist, with their footprints and dates, in catalog.py.

Texture is laid out once per planet as periodic patterns of 1 m pixels, packed R, G, B, near infrared, and turned or
mirrored from one repetition to the next. Sentinel-2 paints with the same patterns averaged over 10 m, so both
sensors see one ground. Parcels, lanes and baseball fields are drawn where they lie.
"""

from collections.abc import Callable, Sequence
from datetime import date
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from resources.planet.frames import Axes
from resources.planet.landcover import (
    BASEBALL,
    CLASSES,
    DIAMOND_RADIUS_M,
    FARMLAND,
    HIGHWAY,
    ORCHARD,
    Cover,
    Diamond,
    Land,
)
from resources.planet.noise import NodeAxes, SplineNoise, hashes, salt, uniforms

#: Metres after which a pattern repeats; multiples of 10 m, so that Sentinel-2 repeats with it.
_FINE_M = 480
_TOWN_M = 960

#: How far tone (brightness) and hue vary slowly over the ground, of 127, per class.
_TONE = {"lake": 5, "river": 6, "beach": 6, "forest": 12, "farmland": 5, "meadow": 9, "residential": 5}
_TONE |= {"industrial": 5, "highway": 4, "baseball": 4, "desert": 9, "orchard": 7}

#: Crops: RGB and near infrared; some are green, some ripe, some bare.
_CROPS = np.array(
    [
        (92, 126, 54, 196),
        (70, 108, 48, 206),
        (196, 178, 104, 120),
        (176, 152, 88, 116),
        (136, 104, 74, 92),
        (112, 88, 66, 84),
        (132, 150, 76, 178),
        (158, 160, 92, 150),
        (104, 140, 84, 202),
        (184, 168, 128, 110),
    ],
    np.int64,
)
#: Orchard blocks: soil and grass between the rows.
_ORCHARD_TINTS = np.array([128, 112, 142, 120, 134], np.uint32)
#: Mean size of parcels of farmland and of orchard blocks, metres.
_PARCEL_M = 290.0
_BLOCK_M = 230.0


def pack(red: NDArray, green: NDArray, blue: NDArray, infrared: NDArray) -> NDArray[np.uint32]:
    """Four bands of 0..255 in one number per pixel."""
    bands = [np.clip(band, 1, 255).astype(np.uint32) for band in (red, green, blue, infrared)]
    return bands[0] | bands[1] << np.uint32(8) | bands[2] << np.uint32(16) | bands[3] << np.uint32(24)


def unpack(packed: NDArray[np.uint32], bands: Sequence[int] = (0, 1, 2, 3)) -> NDArray[np.uint8]:
    """(H, W) packed pixels as (bands, H, W) uint8; R, G, B, near infrared are numbered from 0."""
    parts = packed.astype("<u4", copy=False)[..., None].view(np.uint8)
    return np.stack([parts[..., band] for band in bands])


def _colour(red: int, green: int, blue: int, infrared: int) -> np.uint32:
    return np.uint32(red | green << 8 | blue << 16 | infrared << 24)


class _Sheet:
    """A periodic drawing of float bands, (T, T, 4); everything drawn wraps around."""

    def __init__(self, size: int, colour: tuple[int, int, int, int], rng: np.random.Generator) -> None:
        self.size = size
        self.rng = rng
        self.bands = np.empty((size, size, 4), np.float32)
        self.bands[:] = colour

    def noise(self, cell: int) -> NDArray[np.float32]:
        """(T, T) periodic smooth noise of standard deviation about one; cell divides the size."""
        count = self.size // cell
        lattice = self.rng.uniform(-1, 1, (count, count)).astype(np.float32) * np.float32(2.2)
        if cell == 1:
            return lattice * np.float32(0.8)
        t = (np.arange(self.size) % cell + 0.5) / cell
        weight = (t * t * (3 - 2 * t)).astype(np.float32)
        index = np.arange(self.size) // cell
        after = (index + 1) % count
        along = lattice[:, index] + weight * (lattice[:, after] - lattice[:, index])
        return along[index] + weight[:, None] * (along[after] - along[index])

    def shade(self, amount: NDArray[np.float32]) -> None:
        """Multiply all bands by one plus an amount per pixel."""
        self.bands *= (1 + amount)[..., None]

    def rectangle(self, x: float, y: float, width: float, height: float, colour: tuple) -> None:
        """Fill a rectangle; coordinates in pixels from the upper left."""
        columns = np.arange(round(x), round(x + width)) % self.size
        rows = np.arange(round(y), round(y + height)) % self.size
        self.bands[rows[:, None], columns] = colour

    def discs(
        self,
        x: NDArray,
        y: NDArray,
        radius: NDArray,
        colour: NDArray,
        *,
        relief: float = 0.0,
        shadow: float = 0.0,
    ) -> None:
        """Fill discs one after the other, lit from the north-west, each with a shadow to its south-east."""
        for cx, cy, r, tint in zip(x, y, radius, colour, strict=True):
            reach = int(np.ceil(r)) + 1
            offset = np.arange(-reach, reach + 1)
            rows, columns = (round(cy) + offset) % self.size, (round(cx) + offset) % self.size
            inside = offset[:, None] ** 2 + offset**2 <= r * r
            if shadow:
                shift = max(1, round(r * 0.5))
                index = np.ix_((rows + shift) % self.size, (columns + shift) % self.size)
                part = self.bands[index]
                part[inside] *= 1 - shadow
                self.bands[index] = part
            index = np.ix_(rows, columns)
            part = self.bands[index]
            light = 1 - relief * (offset[:, None] + offset) / (2 * max(r, 1.0))
            part[inside] = (np.asarray(tint, np.float32) * light[..., None])[inside]
            self.bands[index] = part

    def packed(self) -> NDArray[np.uint32]:
        return pack(*np.moveaxis(self.bands, -1, 0))


def _lake(rng: np.random.Generator) -> NDArray[np.uint32]:
    sheet = _Sheet(_FINE_M, (42, 74, 86, 16), rng)
    sheet.shade(
        0.05 * sheet.noise(4) + 0.05 * sheet.noise(24) + 0.05 * sheet.noise(96) + 0.03 * sheet.noise(1)
    )
    return sheet.packed()


def _river(rng: np.random.Generator) -> NDArray[np.uint32]:
    sheet = _Sheet(_FINE_M, (96, 100, 76, 44), rng)
    sheet.shade(0.05 * sheet.noise(6) + 0.06 * sheet.noise(24) + 0.03 * sheet.noise(1))
    return sheet.packed()


def _beach(rng: np.random.Generator) -> NDArray[np.uint32]:
    sheet = _Sheet(_FINE_M, (218, 204, 170, 214), rng)
    sheet.shade(
        0.03 * sheet.noise(2) + 0.04 * sheet.noise(12) + 0.04 * sheet.noise(60) + 0.02 * sheet.noise(1)
    )
    count = 260
    x, y = rng.uniform(0, _FINE_M, (2, count))
    tints = np.array([(214, 70, 66, 120), (70, 110, 200, 110), (240, 240, 240, 220), (150, 130, 100, 120)])
    radius = rng.uniform(1.2, 2.2, count)
    sheet.discs(x, y, radius, tints[rng.integers(0, 4, count)], shadow=0.3)
    return sheet.packed()


def _forest(rng: np.random.Generator) -> NDArray[np.uint32]:
    sheet = _Sheet(_FINE_M, (24, 40, 24, 90), rng)
    count = 7000
    x, y = rng.uniform(0, _FINE_M, (2, count))
    radius = rng.uniform(2.2, 5.6, count)
    tint = np.array([50, 80, 40, 168]) * rng.uniform(0.72, 1.2, (count, 1))
    tint[:, 0] *= rng.uniform(0.85, 1.2, count)
    order = np.argsort(radius)
    sheet.discs(x[order], y[order], radius[order], tint[order], relief=0.5, shadow=0.35)
    sheet.shade(0.06 * sheet.noise(1) + 0.06 * sheet.noise(40))
    return sheet.packed()


def _farmland(rng: np.random.Generator) -> NDArray[np.uint32]:
    # Parcels are coloured later: here only what grows unevenly, around 128.
    sheet = _Sheet(_FINE_M, (128, 128, 128, 128), rng)
    sheet.shade(0.04 * sheet.noise(1) + 0.04 * sheet.noise(8) + 0.05 * sheet.noise(48))
    return sheet.packed()


def _meadow(rng: np.random.Generator) -> NDArray[np.uint32]:
    sheet = _Sheet(_FINE_M, (138, 158, 88, 176), rng)
    patches = sheet.noise(24) + 0.7 * sheet.noise(60)
    sheet.bands += patches[..., None] * np.array([8, 3, 5, 4], np.float32)
    sheet.shade(0.05 * sheet.noise(1) + 0.05 * sheet.noise(4) + 0.03 * sheet.noise(12))
    count = 150
    x, y = rng.uniform(0, _FINE_M, (2, count))
    tint = np.array([66, 92, 48, 160]) * rng.uniform(0.8, 1.2, (count, 1))
    sheet.discs(x, y, rng.uniform(1.5, 4.0, count), tint, relief=0.4, shadow=0.4)
    return sheet.packed()


def _residential(rng: np.random.Generator) -> NDArray[np.uint32]:
    sheet = _Sheet(_TOWN_M, (112, 126, 92, 148), rng)
    sheet.shade(0.10 * sheet.noise(12) + 0.05 * sheet.noise(3))
    street, pavement = (142, 140, 142, 116), (188, 184, 178, 150)
    wide, deep = 120, 80
    for x in range(0, _TOWN_M, wide):
        half = 9 if x % 480 == 0 else 5
        sheet.rectangle(x - half - 2, 0, 2 * half + 4, _TOWN_M, pavement)
        sheet.rectangle(x - half, 0, 2 * half, _TOWN_M, street)
    for y in range(0, _TOWN_M, deep):
        half = 9 if y % 480 == 0 else 5
        for x in range(0, _TOWN_M, wide):
            sheet.rectangle(x + 7, y - half - 2, wide - 14, 2 * half + 4, pavement)
        sheet.rectangle(0, y - half, _TOWN_M, 2 * half, street)
    roofs = np.array(
        [(150, 92, 74), (120, 112, 108), (94, 88, 90), (168, 148, 128), (132, 76, 66), (186, 180, 172)]
    )
    tree_x, tree_y = [], []
    for x in range(0, _TOWN_M, wide):
        for y in range(0, _TOWN_M, deep):
            if rng.random() < 0.06:  # a small park
                tree_x.extend(rng.uniform(x + 14, x + wide - 14, 26))
                tree_y.extend(rng.uniform(y + 14, y + deep - 14, 26))
                continue
            for side in (0, 1):
                left = x + 15.0
                while left < x + wide - 26:
                    width, depth = rng.uniform(11, 16), rng.uniform(9, 13)
                    top = y + (15 if side == 0 else deep - 15 - depth) + rng.uniform(-1, 3)
                    tint = roofs[rng.integers(0, len(roofs))] * rng.uniform(0.88, 1.12)
                    lit, dark = (*(tint * 1.12), 118), (*(tint * 0.78), 92)
                    sheet.rectangle(left + 2, top + 2, width, depth, (58, 66, 50, 70))
                    sheet.rectangle(left, top, width, depth / 2, lit)
                    sheet.rectangle(left, top + depth / 2, width, depth / 2, dark)
                    drive = y + 7 if side == 0 else top + depth
                    sheet.rectangle(
                        left + 1, drive, 3, abs(top - drive) if side == 0 else 8, (164, 160, 154, 140)
                    )
                    if rng.random() < 0.09:
                        pool = y + deep / 2 + (-9 if side == 0 else 3)
                        sheet.rectangle(left + 3, pool, 7, 5, (92, 190, 210, 40))
                    tree_x.extend(rng.uniform(left - 4, left + width + 4, 2))
                    tree_y.extend(rng.uniform(y + deep / 2 - 9, y + deep / 2 + 9, 2))
                    left += width + rng.uniform(6, 12)
    count = len(tree_x)
    tint = np.array([62, 92, 46, 166]) * rng.uniform(0.75, 1.2, (count, 1))
    sheet.discs(
        np.array(tree_x), np.array(tree_y), rng.uniform(2.0, 4.6, count), tint, relief=0.45, shadow=0.3
    )
    sheet.shade(0.04 * sheet.noise(1))
    return sheet.packed()


def _industrial(rng: np.random.Generator) -> NDArray[np.uint32]:
    sheet = _Sheet(_TOWN_M, (134, 130, 126, 112), rng)
    sheet.shade(0.05 * sheet.noise(20) + 0.03 * sheet.noise(4))
    lot = 160
    roofs = [
        (222, 222, 220),
        (196, 202, 208),
        (168, 176, 186),
        (206, 198, 182),
        (150, 152, 158),
        (236, 236, 234),
    ]
    cars = np.array(
        [(210, 210, 212, 150), (60, 60, 66, 60), (170, 50, 46, 90), (60, 80, 140, 80), (236, 236, 236, 180)]
    )
    for x in range(0, _TOWN_M, lot):
        sheet.rectangle(x - 6, 0, 12, _TOWN_M, (100, 99, 100, 84))
        sheet.rectangle(0, x - 6, _TOWN_M, 12, (100, 99, 100, 84))
    for x in range(0, _TOWN_M, lot):
        for y in range(0, _TOWN_M, lot):
            kind = rng.random()
            if kind < 0.14:  # tanks
                for k in range(9):
                    cx, cy = x + 38 + 42 * (k % 3), y + 38 + 42 * (k // 3)
                    tint = np.array([(214, 214, 210, 170)]) * rng.uniform(0.85, 1.05)
                    sheet.discs(
                        np.array([cx]), np.array([cy]), np.array([15.0]), tint, relief=0.25, shadow=0.4
                    )
                continue
            if kind < 0.22:  # waste ground
                sheet.rectangle(x + 12, y + 12, lot - 24, lot - 24, (150, 140, 108, 130))
                continue
            tint = np.array(roofs[rng.integers(0, len(roofs))]) * rng.uniform(0.92, 1.05)
            width, depth = rng.uniform(72, 132), rng.uniform(58, 104)
            left, top = x + 13 + rng.uniform(0, 134 - width), y + 13
            sheet.rectangle(left + 5, top + 5, width, depth, (60, 60, 62, 50))
            sheet.rectangle(left, top, width, depth, (*tint, 160))
            for ridge in np.arange(left + 6, left + width - 4, 11):
                sheet.rectangle(ridge, top, 1.6, depth, (*(tint * 0.86), 140))
            for _ in range(rng.integers(2, 7)):
                unit_x, unit_y = left + rng.uniform(6, width - 12), top + rng.uniform(6, depth - 12)
                sheet.rectangle(unit_x, unit_y, 5, 5, (*(tint * 0.62), 90))
            lower = top + depth + 8
            for row_y in np.arange(lower, y + lot - 14, 9):
                for car_x in np.arange(x + 14, x + lot - 16, 3.4):
                    if rng.random() < 0.55:
                        sheet.rectangle(car_x, row_y, 2, 4, cars[rng.integers(0, len(cars))])
    sheet.shade(0.03 * sheet.noise(1))
    return sheet.packed()


def _highway(rng: np.random.Generator) -> NDArray[np.uint32]:
    sheet = _Sheet(_FINE_M, (98, 98, 102, 86), rng)
    sheet.shade(0.03 * sheet.noise(1) + 0.04 * sheet.noise(10))
    return sheet.packed()


def _baseball(rng: np.random.Generator) -> NDArray[np.uint32]:
    sheet = _Sheet(_FINE_M, (86, 132, 62, 190), rng)
    sheet.shade(0.03 * sheet.noise(1) + 0.03 * sheet.noise(16))
    return sheet.packed()


def _desert(rng: np.random.Generator) -> NDArray[np.uint32]:
    sheet = _Sheet(_FINE_M, (190, 148, 108, 186), rng)
    warp = 9 * sheet.noise(60) + 4 * sheet.noise(24)
    position = np.arange(_FINE_M)
    phase = (position[:, None] + 0.5 * position + warp) * (2 * np.pi / 24)
    dunes = np.sin(phase) + 0.3 * np.sin(2 * phase)
    sheet.shade((0.09 * dunes).astype(np.float32) + 0.03 * sheet.noise(1) + 0.04 * sheet.noise(30))
    count = 420
    x, y = rng.uniform(0, _FINE_M, (2, count))
    tint = np.array([112, 104, 70, 120]) * rng.uniform(0.8, 1.15, (count, 1))
    sheet.discs(x, y, rng.uniform(0.8, 2.4, count), tint, shadow=0.3)
    return sheet.packed()


def _orchard(rng: np.random.Generator) -> NDArray[np.uint32]:
    sheet = _Sheet(_FINE_M, (180, 156, 100, 136), rng)
    sheet.shade(0.04 * sheet.noise(1) + 0.05 * sheet.noise(8))
    position = np.arange(0, _FINE_M, 12)
    x, y = (axis.ravel() + 6.0 for axis in np.meshgrid(position, position))
    is_there = rng.random(len(x)) < 0.96
    x, y = x[is_there], y[is_there]
    tint = np.array([66, 90, 36, 176]) * rng.uniform(0.82, 1.18, (len(x), 1))
    radius = rng.uniform(3.4, 4.6, len(x))
    sheet.discs(
        x + rng.uniform(-0.6, 0.6, len(x)),
        y + rng.uniform(-0.6, 0.6, len(x)),
        radius,
        tint,
        relief=0.4,
        shadow=0.45,
    )
    return sheet.packed()


_PATTERNS: dict[str, Callable[[np.random.Generator], NDArray[np.uint32]]] = {
    "lake": _lake,
    "river": _river,
    "beach": _beach,
    "forest": _forest,
    "farmland": _farmland,
    "meadow": _meadow,
    "residential": _residential,
    "industrial": _industrial,
    "highway": _highway,
    "baseball": _baseball,
    "desert": _desert,
    "orchard": _orchard,
}


#: Metres after which the turns of the patterns repeat, and with them all texture.
_PERIOD_M = 3840


class Texture:
    """One class's pattern at 1 m and at 10 m, turned and mirrored from block to block.

    Attributes:
        tens: (384, 384) uint32, one whole period at 10 m, packed bands.
    """

    def __init__(self, seed: int, name: str) -> None:
        texture_salt = salt(seed, "texture", name)
        metres = _PATTERNS[name](np.random.default_rng(texture_salt))
        self._size = len(metres)
        self._turned = self._turns(metres)
        blocks = np.arange(_PERIOD_M // self._size)
        draw = hashes(texture_salt, blocks[None, :], blocks[:, None]) >> np.uint64(20)
        self._turn = (draw % np.uint64(8)).astype(np.int64)
        size = self._size // 10
        # Means of integers: exact in float64, whatever the order of summation.
        means = unpack(metres).reshape(4, size, 10, size, 10).mean(axis=(2, 4), dtype=np.float64)
        turned = self._turns(pack(*np.rint(means)))
        self.tens = np.block([[turned[turn] for turn in row] for row in self._turn])

    @staticmethod
    def _turns(pattern: NDArray[np.uint32]) -> list[NDArray[np.uint32]]:
        plain = [pattern, pattern[::-1], pattern[:, ::-1], pattern[::-1, ::-1]]
        return [np.ascontiguousarray(turned) for one in plain for turned in (one, one.T)]

    def paint(self, axes: Axes) -> NDArray[np.uint32]:
        """The pattern over a whole grid of 1 m.

        Args:
            axes: native 1 m pixels.

        Returns:
            (H, W) uint32, packed bands.
        """
        size, period = self._size, len(self._turn)
        block_columns, block_rows = axes.columns // size, axes.rows // size
        columns, rows = axes.columns - block_columns * size, axes.rows - block_rows * size
        canvas = np.empty(axes.shape, np.uint32)
        for top, bottom in pairwise(_cuts(block_rows)):
            for left, right in pairwise(_cuts(block_columns)):
                pattern = self._turned[self._turn[block_rows[top] % period, block_columns[left] % period]]
                if axes.is_contiguous:
                    canvas[top:bottom, left:right] = pattern[
                        rows[top] : rows[bottom - 1] + 1, columns[left] : columns[right - 1] + 1
                    ]
                else:
                    canvas[top:bottom, left:right] = pattern[rows[top:bottom, None], columns[left:right]]
        return canvas


def _cuts(numbers: NDArray[np.int64]) -> list[int]:
    """Where runs of equal numbers start, and the length at the end."""
    return [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]


class _Parcels:
    """Rectangles that ground is divided into, like bricks in a wall: bands of rows, each with its own columns.

    Attributes:
        band: (H,) which band each row of the grid belongs to, from 0.
        draw: (B, W) uint64, a hash per parcel, spread over its columns.
        row_margin: (H,) distance from the borders of the band, metres.
        column_margin: (B, W) distance from the borders of the parcel, metres.
    """

    _JITTER = 0.55

    def __init__(self, parcel_salt: int, axes: Axes, spacing_m: float) -> None:
        south = -axes.y / spacing_m
        first, last = int(np.floor(south.min())) - 1, int(np.floor(south.max())) + 2
        numbers = np.arange(first, last + 1)
        lines = numbers + self._JITTER * (uniforms(parcel_salt, numbers) - 0.5)
        index = np.searchsorted(lines, south, side="right") - 1
        self.row_margin = np.minimum(south - lines[index], lines[index + 1] - south) * spacing_m
        low = int(index.min())
        self.band = index - low
        bands = numbers[low : int(index.max()) + 1]
        shift = uniforms(parcel_salt ^ 5, bands)[:, None]
        east = axes.x / spacing_m + shift
        nearest = np.floor(east).astype(np.int64)
        first = int(nearest.min()) - 1
        numbers = np.arange(first, int(nearest.max()) + 3)
        lines = numbers + self._JITTER * (uniforms(parcel_salt ^ 3, numbers, bands[:, None]) - 0.5)
        each = np.arange(len(bands))[:, None]
        # A border is less than half a spacing from where it would be: the parcel is this one or a neighbour.
        nearest += east >= lines[each, nearest + 1 - first]
        nearest -= east < lines[each, nearest - first]
        west_side, east_side = lines[each, nearest - first], lines[each, nearest + 1 - first]
        self.column_margin = np.minimum(east - west_side, east_side - east) * spacing_m
        self.draw = hashes(parcel_salt ^ 7, numbers, bands[:, None])[each, nearest - first]


class Painter:
    """Paints the land of any zone of one planet."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._texture = lru_cache(maxsize=None)(lambda name: Texture(seed, name))
        self._tones = lru_cache(maxsize=64)(self._make_tones)
        self._tone_of_class = np.array([_TONE[name] for name in CLASSES], np.int16)

    def _make_tones(self, zone: int) -> tuple[SplineNoise, SplineNoise]:
        return (
            SplineNoise([salt(self._seed, zone, "tone"), salt(self._seed, zone, "hue")], 170.0),
            SplineNoise([salt(self._seed, zone, "wide tone"), salt(self._seed, zone, "wide hue")], 900.0),
        )

    # --- colours of the ground ---

    def _ground(self, zone: int, axes: Axes, cover: Cover) -> NDArray[np.uint32]:
        """(H, W) packed colours under even light."""
        if axes.gsd_m == 1.0:
            canvas = self._ground_of_metres(zone, axes, cover)
        else:
            canvas = self._ground_of_tens(zone, axes, cover)
        for diamond in cover.diamonds:
            self._paint_diamond(canvas, axes, cover, diamond)
        return canvas

    def _ground_of_metres(self, zone: int, axes: Axes, cover: Cover) -> NDArray[np.uint32]:
        canvas: NDArray[np.uint32] | None = None
        for value in cover.present:
            texture = self._texture(CLASSES[value]).paint(axes)
            if value == FARMLAND:
                texture = self._sown(zone, axes, texture)
            elif value == ORCHARD:
                parcels = self._orchard_blocks(zone, axes)
                texture = self._tinted(texture, self._orchard_tints(parcels), parcels.band)
                track = _colour(168, 148, 112, 130)
                texture[parcels.row_margin < 4.0] = track
                np.copyto(texture, track, where=(parcels.column_margin < 4.0).take(parcels.band, axis=0))
            if canvas is None:
                canvas = texture
            else:
                np.copyto(canvas, texture, where=cover.classes == value)
        assert canvas is not None
        if cover.road_lateral is not None:
            self._paint_lanes(canvas, cover)
        return canvas

    def _ground_of_tens(self, zone: int, axes: Axes, cover: Cover) -> NDArray[np.uint32]:
        atlas = self._atlas
        side = atlas.shape[1]
        place = (axes.rows % side * side).astype(np.int32)[:, None] + (axes.columns % side).astype(np.int32)
        place += cover.classes * np.int32(side * side)
        canvas = atlas.reshape(-1).take(place)
        is_farmland = cover.classes == FARMLAND
        if is_farmland.any():
            parcels = _Parcels(salt(self._seed, zone, "parcels"), axes, _PARCEL_M)
            even, odd = self._crop_colours(parcels)
            np.copyto(canvas, (even | odd << np.uint32(8)).take(parcels.band, axis=0), where=is_farmland)
        is_orchard = cover.classes == ORCHARD
        if is_orchard.any():
            parcels = self._orchard_blocks(zone, axes)
            tinted = self._tinted(canvas, self._orchard_tints(parcels), parcels.band)
            np.copyto(canvas, tinted, where=is_orchard)
        return canvas

    @cached_property
    def _atlas(self) -> NDArray[np.uint32]:
        """(12, 384, 384): all classes' textures at 10 m."""
        return np.stack([self._texture(name).tens for name in CLASSES])

    @staticmethod
    def _crop_colours(parcels: _Parcels) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """(B, W) colours of the crops, two bands of 8 bits each in 16-bit lanes: R and B, G and infrared."""
        crop = _CROPS[(parcels.draw % np.uint64(len(_CROPS))).astype(np.int64)]
        light = 118 + (parcels.draw >> np.uint64(20)).astype(np.int64) % 22
        colours = (crop * light[..., None] >> 7).astype(np.uint32)
        return colours[..., 0] | colours[..., 2] << np.uint32(16), colours[..., 1] | colours[
            ..., 3
        ] << np.uint32(16)

    def _sown(self, zone: int, axes: Axes, texture: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Fields in rows of plants, with tracks between them, from the texture of bare growth around 128."""
        parcels = _Parcels(salt(self._seed, zone, "parcels"), axes, _PARCEL_M)
        even, odd = self._crop_colours(parcels)
        is_upright = ((parcels.draw >> np.uint64(40)) % np.uint64(2)).astype(np.int16)
        depth = 3 + ((parcels.draw >> np.uint64(44)) % np.uint64(6)).astype(np.int16)
        along_x = self._stripes(axes.columns) * (is_upright * depth)
        across = (1 - is_upright) * depth
        gain = (texture & np.uint32(0xFF)).astype(np.int16)
        gain += along_x.take(parcels.band, axis=0)
        gain += across.take(parcels.band, axis=0) * self._stripes(axes.rows)[:, None]
        # The brightest crop is 223 of 255: a gain of 145/128 keeps each lane below 256.
        factor = np.clip(gain, 90, 145).astype(np.uint32)
        low, lanes = even.take(parcels.band, axis=0), odd.take(parcels.band, axis=0)
        low *= factor
        lanes *= factor
        low >>= np.uint32(7)
        lanes <<= np.uint32(1)
        low &= np.uint32(0x00FF00FF)
        lanes &= np.uint32(0xFF00FF00)
        low |= lanes
        track = _colour(150, 132, 96, 120)
        low[parcels.row_margin < 2.5] = track
        np.copyto(low, track, where=(parcels.column_margin < 2.5).take(parcels.band, axis=0))
        return low

    @staticmethod
    def _stripes(index: NDArray[np.int64]) -> NDArray[np.int16]:
        """Rows of plants 16 m apart and drills 5 m apart, -3 to 3."""
        wide = np.where(index % 16 < 8, 2, -2)
        return (wide + np.where(index % 5 < 2, -1, 1)).astype(np.int16)

    def _orchard_blocks(self, zone: int, axes: Axes) -> _Parcels:
        return _Parcels(salt(self._seed, zone, "orchard blocks"), axes, _BLOCK_M)

    @staticmethod
    def _orchard_tints(parcels: _Parcels) -> NDArray[np.uint32]:
        return _ORCHARD_TINTS[(parcels.draw % np.uint64(len(_ORCHARD_TINTS))).astype(np.int64)]

    @staticmethod
    def _tinted(
        texture: NDArray[np.uint32], tints: NDArray[np.uint32], band: NDArray[np.int64]
    ) -> NDArray[np.uint32]:
        """The texture times a tint of 128, two of four bands at once; orchards are too dark to overflow."""
        factor = tints.take(band, axis=0)
        even, odd = texture & np.uint32(0x00FF00FF), (texture >> np.uint32(8)) & np.uint32(0x00FF00FF)
        even *= factor
        odd *= factor
        even >>= np.uint32(7)
        odd <<= np.uint32(1)
        even &= np.uint32(0x00FF00FF)
        odd &= np.uint32(0xFF00FF00)
        return even | odd

    def _paint_lanes(self, canvas: NDArray[np.uint32], cover: Cover) -> None:
        assert cover.road_lateral is not None
        assert cover.road_along is not None
        pixels = np.flatnonzero(
            np.isfinite(cover.road_lateral.reshape(-1)) & (cover.classes.reshape(-1) == HIGHWAY)
        )
        if not len(pixels):
            return
        lateral = cover.road_lateral.reshape(-1)[pixels]
        along = cover.road_along.reshape(-1)[pixels]
        side = np.abs(lateral)
        flat = canvas.reshape(-1)
        colours = flat[pixels]
        # From the middle: median of grass, two lanes of 5.5 m, hard shoulder.
        colours[side < 2.4] = _colour(116, 132, 84, 150)
        colours[side > 15.5] = _colour(132, 128, 118, 118)
        white = _colour(226, 226, 222, 200)
        colours[(np.abs(side - 3.2) < 0.5) | (np.abs(side - 14.8) < 0.5)] = white
        colours[(np.abs(side - 9.0) < 0.55) & (along % 14 < 6)] = white
        lane = np.floor((lateral + 15) / 6).astype(np.int64)
        slot = np.floor(along / 17).astype(np.int64)
        draw = hashes(salt("cars"), slot, lane)
        in_lane = np.abs((lateral + 15) % 6 - 3) < 1.4
        is_car = (
            (draw % np.uint64(100) < np.uint64(24))
            & (along % 17 < 5.5)
            & in_lane
            & (side > 3.6)
            & (side < 14.4)
        )
        paints = np.array(
            [
                _colour(236, 236, 238, 190),
                _colour(40, 40, 46, 40),
                _colour(176, 44, 40, 90),
                _colour(52, 76, 150, 80),
                _colour(190, 192, 196, 150),
            ],
            np.uint32,
        )
        paint = ((draw >> np.uint64(16)) % np.uint64(5)).astype(np.int64)
        colours[is_car] = paints[paint[is_car]]
        flat[pixels] = colours

    @staticmethod
    def _paint_diamond(canvas: NDArray[np.uint32], axes: Axes, cover: Cover, diamond: Diamond) -> None:
        window = axes.window(*diamond.box())
        if window is None:
            return
        rows, columns = window
        first, third = diamond.along(axes.x[columns], axes.y[rows, None])
        squared = first * first + third * third
        is_field = cover.classes[window] == BASEBALL
        part = canvas[window]
        in_fair = (first >= 0) & (third >= 0)
        grass_light = _colour(104, 150, 74, 200)
        stripe = (np.floor(first / 9).astype(np.int64) & 1) == 0
        np.copyto(part, grass_light, where=is_field & stripe & in_fair)
        dirt, line = _colour(186, 128, 88, 140), _colour(240, 240, 236, 210)
        warning = (squared > (DIAMOND_RADIUS_M - 7) ** 2) & in_fair
        bases = 38.0
        dx, dy = first - 0.62 * bases, third - 0.62 * bases
        arc = (dx * dx + dy * dy < (0.92 * bases) ** 2) & (first >= -4) & (third >= -4)
        infield = (first > 6) & (third > 6) & (first < bases - 6) & (third < bases - 6)
        home = squared < 64
        mound_x, mound_y = first - bases / 2, third - bases / 2
        mound = mound_x * mound_x + mound_y * mound_y < 14
        np.copyto(part, dirt, where=is_field & (warning | home | mound | (arc & ~infield)))
        if axes.gsd_m < 3:
            foul = ((np.abs(first) < 0.7) & (third > 0)) | ((np.abs(third) < 0.7) & (first > 0))
            np.copyto(part, line, where=is_field & foul)

    def mean_colours(self) -> NDArray[np.uint8]:
        """(12, 3) uint8 RGB: the mean over each class's texture; of farmland, over all crops too."""
        means = unpack(self._atlas.reshape(len(CLASSES), -1))[:3].mean(axis=-1).T
        means[FARMLAND] = _CROPS[:, :3].mean(axis=0)
        return np.rint(means).astype(np.uint8)

    # --- light and sensors ---

    def _gains(self, zone: int, axes: Axes, cover: Cover) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """(H, W) slow variation of tone and hue, of 128."""
        nodes = NodeAxes(axes.x, axes.y, 40.0)
        near, wide = self._tones(zone)
        values = near.on_axes(nodes.x, nodes.y) + np.float32(0.8) * wide.on_axes(nodes.x, nodes.y)
        first, *others = cover.present
        amount = np.full(axes.shape, self._tone_of_class[first], np.int16)
        for value in others:
            np.copyto(amount, self._tone_of_class[value], where=cover.classes == value)
        tone = (nodes.interpolate(values[0]) * np.float32(64)).astype(np.int16)
        hue = (nodes.interpolate(values[1]) * np.float32(32)).astype(np.int16)
        tone *= amount
        tone >>= 6
        hue *= amount
        hue >>= 6
        return tone, hue

    def naip(
        self, zone: int, land: Land, axes: Axes, year: int, scene_key: int, bands: Sequence[int]
    ) -> NDArray[np.uint8]:
        """NAIP pixels.

        Args:
            zone: UTM zone of the land.
            land: the land.
            axes: native 1 m pixels.
            year: year of the flight: overall tint.
            scene_key: scene: brightness and tint of its own.
            bands: numbers of R, G, B, near infrared, from 0.

        Returns:
            (bands, H, W) uint8, 1..255.
        """
        cover = land.cover(axes)
        out = unpack(self._ground(zone, axes, cover), bands)
        tone, hue = self._gains(zone, axes, cover)
        tint = (uniforms(salt(self._seed, "naip", year), np.arange(4)) * 8).astype(np.int16) - 4
        tint += (uniforms(salt(self._seed, "naip scene", year, scene_key), np.arange(4)) * 6).astype(
            np.int16
        ) - 3
        tint += np.int16(uniforms(salt(self._seed, "naip light", year, scene_key), 0)[0] * 12 - 6)
        tone += 128
        for pixels, band in zip(out, bands, strict=True):
            gain = tone + tint[band]
            if hue_sign := (1, 0, -1, 0)[band]:
                gain += hue if hue_sign > 0 else -hue
            product = np.multiply(pixels, gain.view(np.uint16), dtype=np.uint16, casting="unsafe")
            product >>= 7
            np.clip(product, 1, 255, out=product)
            pixels[:] = product
        return out

    def sentinel2(
        self, zone: int, land: Land, axes: Axes, day: date, scene_key: int, cloud_pct: float
    ) -> NDArray[np.uint16]:
        """Sentinel-2 surface reflectance.

        Args:
            zone: UTM zone of the land.
            land: the land.
            axes: native 10 m pixels.
            day: date of the acquisition: season.
            scene_key: scene: its haze, noise and clouds.
            cloud_pct: share of clouded pixels of the whole scene, percent.

        Returns:
            (4, H, W) uint16, reflectance times 10,000 of B2, B3, B4, B8; never 0.
        """
        cover = land.cover(axes)
        bands = unpack(self._ground(zone, axes, cover))
        tone, hue = self._gains(zone, axes, cover)
        # 1 in the middle of July, 0 in the middle of January; a parabola twice, no cosine.
        t = ((day.timetuple().tm_yday + 15) % 365) / 365
        summer = (4 * t * (1 - t)) ** 2
        haze = uniforms(salt(self._seed, "s2 scene", scene_key), np.arange(5))
        tone += np.int16(128)
        tone += self._grain.take(axes.rows, axes.columns, scene_key)
        factors = {
            0: tone.astype(np.uint32),
            1: (tone + hue).astype(np.uint32),
            -1: (tone - hue).astype(np.uint32),
        }
        out = np.empty((4, *axes.shape), np.uint16)
        # (band of the paint, reflectance per step, offset, sign of hue, what winter adds)
        for k, (band, slope, offset, hue_sign, winter) in enumerate(
            (
                (2, 9.6, 70, -1, 0.04),
                (1, 10.0, 80, 0, -0.06),
                (0, 10.2, 60, 1, 0.10),
                (3, 17.0, 60, 0, -0.22),
            )
        ):
            gain = 1 + winter * (1 - summer) + 0.05 * (haze[k] - 0.5)
            # Fixed point: 4 bits below the reflectance, 7 of the factor; 25 bits in all.
            reflectance = bands[band].astype(np.uint32)
            reflectance *= np.uint32(round(slope * gain * 16))
            reflectance += np.uint32(round((offset + 70 * haze[4]) * 16))
            reflectance *= factors[hue_sign]
            reflectance >>= np.uint32(11)
            out[k] = reflectance
        if cloud_pct > 0:
            self._clouds.cover(out, axes, scene_key, cloud_pct)
        return out

    @cached_property
    def _grain(self) -> "_Grain":
        return _Grain(salt(self._seed, "grain"))

    @cached_property
    def _clouds(self) -> "Clouds":
        return Clouds(self._seed)

    def cloud_mask(self, axes: Axes, scene_key: int, cloud_pct: float) -> NDArray[np.bool_]:
        """(H, W): which pixels a scene's clouds hide."""
        return self._clouds.mask(axes, scene_key, cloud_pct)

    def shadow_mask(self, axes: Axes, scene_key: int, cloud_pct: float) -> NDArray[np.bool_]:
        """(H, W): which pixels lie in the shadow of a scene's clouds, whether a cloud hides them or not."""
        return self._clouds.shadow(axes, scene_key, cloud_pct)


class _Grain:
    """The sensor's own noise: one small periodic array, shifted by scene."""

    def __init__(self, grain_salt: int) -> None:
        draw = hashes(grain_salt, np.arange(512)[:, None], np.arange(512)[None, :])
        self._values = (draw % np.uint64(5)).astype(np.int16) - 2

    def take(self, rows: NDArray[np.int64], columns: NDArray[np.int64], scene_key: int) -> NDArray[np.int16]:
        shift = hashes(scene_key & 0xFFFFFFFF, [1, 2])
        return self._values.take((rows + int(shift[0] % np.uint64(512))) % 512, axis=0).take(
            (columns + int(shift[1] % np.uint64(512))) % 512, axis=1
        )


class Clouds:
    """Cloud fields whose share of a scene is the scene's cloud percentage.

    One periodic field per planet; its period is the side of a Sentinel-2 scene, so that any scene sees exactly one
    period of it, shifted and turned by the scene's key, and a quantile of the field is a share of the scene.
    """

    _PERIOD_M = 109_800.0
    _NODE_M = 300.0
    _COUNT = 366

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(salt(seed, "clouds"))
        frequency = np.fft.fftfreq(self._COUNT, 1 / self._COUNT)
        radius = np.hypot(frequency[:, None], frequency)
        spectrum = np.where(radius > 0, 1, 0) / np.maximum(radius, 4.0) ** 1.75
        field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((self._COUNT, self._COUNT))) * spectrum).real
        # Steps of a fixed size: the last bits of a Fourier transform are nobody's business.
        self._field = np.rint(field / field.std() * 1024).astype(np.float32) / np.float32(1024)
        # Quantiles of what is seen: the field between its nodes, on every third pixel or so.
        t = (np.arange(8, dtype=np.float32) + np.float32(0.5)) / np.float32(8)
        ahead = np.roll(self._field, -1, axis=1)
        along = self._field[:, :, None] + t * (ahead - self._field)[:, :, None]
        below = np.roll(along, -1, axis=0)
        self._sorted = np.sort((along[..., None] + t * (below - along)[..., None]).reshape(-1))

    def _threshold(self, cloud_pct: float) -> np.float32:
        index = round((1 - min(cloud_pct, 100.0) / 100) * (len(self._sorted) - 1))
        return self._sorted[index]

    def _thickness(self, axes: Axes, scene_key: int, dx: float = 0.0, dy: float = 0.0) -> NDArray[np.float32]:
        draw = hashes(salt("cloud scene", scene_key), np.arange(3))
        period = int(self._PERIOD_M)
        shift_x, shift_y = (
            int(draw[0] % np.uint64(period)) // 10 * 10,
            int(draw[1] % np.uint64(period)) // 10 * 10,
        )
        turn = int(draw[2] % np.uint64(8))
        field = self._field if turn & 1 else self._field.T
        field = field[:: 1 if turn & 2 else -1, :: 1 if turn & 4 else -1]
        nodes = NodeAxes(axes.x + shift_x + dx, axes.y - shift_y + dy, self._NODE_M)
        columns = np.rint(nodes.x / self._NODE_M).astype(np.int64) % self._COUNT
        rows = np.rint(-nodes.y / self._NODE_M).astype(np.int64) % self._COUNT
        return nodes.interpolate(np.ascontiguousarray(field[rows[:, None], columns]))

    def mask(self, axes: Axes, scene_key: int, cloud_pct: float) -> NDArray[np.bool_]:
        """(H, W): which pixels clouds hide; none if the percentage is 0."""
        if cloud_pct <= 0:
            return np.zeros(axes.shape, bool)
        return self._thickness(axes, scene_key) >= self._threshold(cloud_pct)

    def shadow(self, axes: Axes, scene_key: int, cloud_pct: float) -> NDArray[np.bool_]:
        """(H, W): which pixels lie in a cloud's shadow; none if the percentage is 0."""
        if cloud_pct <= 0:
            return np.zeros(axes.shape, bool)
        return self._thickness(axes, scene_key, dx=-380.0, dy=290.0) >= self._threshold(cloud_pct)

    def cover(self, bands: NDArray[np.uint16], axes: Axes, scene_key: int, cloud_pct: float) -> None:
        """Draw clouds and their shadows into (4, H, W) reflectances, in place."""
        shadow = self.shadow(axes, scene_key, cloud_pct)
        thickness = self._thickness(axes, scene_key) - self._threshold(cloud_pct)
        is_cloud = thickness >= 0
        if shadow.any():
            shadow &= ~is_cloud
            for band in bands:
                band[shadow] = np.maximum(band[shadow] * np.uint32(5) // np.uint32(9), 1)
        if is_cloud.any():
            opacity = np.minimum(np.float32(0.6) + np.float32(2.0) * thickness[is_cloud], np.float32(1.0))
            for band in bands:
                under = band[is_cloud].astype(np.float32)
                band[is_cloud] = (under + opacity * (np.float32(6200) - under)).astype(np.uint16)
