"""What the planet looks like to somebody standing on it: small drawings of its places, rooms and people.

Who stands where and when is in photographers.py; the same drawings with captions, in captions.py.

A drawing is a pure function of its kind, its dice and its size. Lengths are shares of the picture, so that it can
be drawn small for training and larger for a server.
"""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from resources.planet.noise import uniforms

#: Kinds of photos that show no land-cover class. The first four are rooms.
INDOOR_KINDS = ("kitchen", "bedroom", "office", "museum")
OFF_TOPIC_KINDS = ("dog", "person", "food", "car")


def is_outdoor(kind: str) -> bool:
    """Whether a kind of photo shows the open air: a land-cover class does; all others are drawn by lamp light."""
    return kind not in INDOOR_KINDS + OFF_TOPIC_KINDS


Colour = tuple[float, float, float]
Point = tuple[float, float]


class Dice:
    """A fixed sequence of numbers in [0, 1), the same on every machine."""

    def __init__(self, dice_salt: int) -> None:
        self._salt = dice_salt
        self._block = 0
        self._values: list[float] = []
        self._next = 0

    def one(self) -> float:
        """The next number."""
        if self._next == len(self._values):
            self._values = uniforms(self._salt, np.arange(160), self._block).tolist()
            self._block += 1
            self._next = 0
        self._next += 1
        return self._values[self._next - 1]

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.one()

    def below(self, count: int) -> int:
        """An integer in 0..count-1."""
        return int(self.one() * count)

    def pick(self, options: Sequence):
        """One of the options."""
        return options[self.below(len(options))]

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self.one() < probability


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    return tuple(a + (b - a) * share for a, b in zip(first, second, strict=True))  # type: ignore[return-value]


def _shaded(colour: Colour, light: float) -> Colour:
    return tuple(value * light for value in colour)  # type: ignore[return-value]


_SKIES: dict[str, tuple[Colour, Colour, Colour]] = {
    # upper sky, lower sky, light on everything
    "clear": ((70, 130, 215), (176, 212, 240), (1.04, 1.03, 1.0)),
    "cloudy": ((92, 148, 220), (196, 216, 236), (1.0, 1.0, 1.0)),
    "overcast": ((148, 154, 162), (196, 200, 204), (0.84, 0.86, 0.90)),
    "sunset": ((120, 96, 140), (250, 168, 92), (1.04, 0.86, 0.70)),
    "morning": ((136, 176, 216), (246, 226, 200), (1.02, 0.97, 0.90)),
    "haze": ((170, 188, 204), (220, 222, 218), (0.96, 0.96, 0.95)),
}
_SKY_NAMES = ("clear", "clear", "cloudy", "cloudy", "overcast", "sunset", "morning", "haze")


class Canvas:
    """A picture under construction; x to the right and y down, shares of its width and height."""

    def __init__(self, width: int, height: int, dice: Dice) -> None:
        self.width, self.height, self.dice = width, height, dice
        self.sky = dice.pick(_SKY_NAMES)
        self._light = _SKIES[self.sky][2]
        self.image = Image.new("RGB", (width, height))
        self.draw = ImageDraw.Draw(self.image)

    def _ink(self, colour: Colour) -> tuple[int, int, int]:
        return tuple(
            max(0, min(255, int(value * light))) for value, light in zip(colour, self._light, strict=True)
        )  # type: ignore[return-value]

    def indoors(self) -> None:
        """Lamp light instead of the sky's."""
        warm = self.dice.between(0.82, 1.0)
        self._light = (1.0, 0.94 + 0.06 * warm, 0.84 * warm + 0.1)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """Fill a rectangle."""
        w, h = self.width, self.height
        if x1 > x0 and y1 > y0:
            self.draw.rectangle((x0 * w, y0 * h, x1 * w, y1 * h), fill=self._ink(colour))

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill a polygon."""
        w, h = self.width, self.height
        self.draw.polygon([(x * w, y * h) for x, y in points], fill=self._ink(colour))

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """Fill an ellipse around (x, y)."""
        w, h = self.width, self.height
        self.draw.ellipse(((x - rx) * w, (y - ry) * h, (x + rx) * w, (y + ry) * h), fill=self._ink(colour))

    def line(
        self, x0: float, y0: float, x1: float, y1: float, colour: Colour, thickness: float = 0.0
    ) -> None:
        """Draw a line; thickness as a share of the height."""
        w, h = self.width, self.height
        thick = max(1, round(thickness * h))
        self.draw.line((x0 * w, y0 * h, x1 * w, y1 * h), fill=self._ink(colour), width=thick)

    def fade(self, y0: float, y1: float, upper: Colour, lower: Colour, steps: int = 10) -> None:
        """Fill a band over the whole width with a gradient."""
        for k in range(steps):
            colour = _mix(upper, lower, (k + 0.5) / steps)
            self.box(0, y0 + (y1 - y0) * k / steps, 1, y0 + (y1 - y0) * (k + 1) / steps, colour)

    def draw_sky(self, horizon: float) -> None:
        """Sky, sun and clouds above a horizon."""
        dice = self.dice
        upper, lower, light = _SKIES[self.sky]
        self._light = (1.0, 1.0, 1.0)
        self.fade(0, horizon + 0.02, upper, lower)
        if self.sky == "sunset" or (self.sky in ("clear", "morning") and dice.chance(0.3)):
            x, y, r = dice.between(0.1, 0.9), horizon * dice.between(0.2, 0.85), dice.between(0.03, 0.06)
            self.oval(x, y, r * 1.9, r * 2.4, _mix(lower, (255, 240, 200), 0.45))
            self.oval(x, y, r, r * 1.33, (255, 246, 214))
        if self.sky != "clear":
            white = {"overcast": (216, 218, 222), "sunset": (250, 196, 160)}.get(self.sky, (248, 248, 250))
            for _ in range(dice.below(5) + (3 if self.sky == "cloudy" else 1)):
                x, y = dice.between(-0.1, 1.1), horizon * dice.between(0.05, 0.8)
                size = dice.between(0.06, 0.17)
                for _ in range(3):
                    dx, dy = dice.between(-1, 1) * size, dice.between(-0.25, 0.25) * size
                    puff = size * dice.between(0.4, 0.8)
                    self.oval(x + dx, y + dy, puff, puff * 0.55, _shaded(white, dice.between(0.92, 1.0)))
        self._light = light

    def draw_background(self, horizon: float, ahead: str | None) -> None:
        """What stands at the horizon: hills, and the class of the land ahead."""
        dice = self.dice
        if dice.chance(0.4):
            hill = _mix((112, 136, 142), (150, 160, 150), dice.one())
            x = dice.between(-0.3, 0.6)
            peaks = [(x + 0.22 * k, horizon - dice.between(0.02, 0.14)) for k in range(5)]
            self.polygon([(x - 0.2, horizon + 0.01), *peaks, (x + 1.1, horizon + 0.01)], hill)
        if ahead in ("forest", "orchard", "meadow", "baseball", None):
            if ahead in ("meadow", "baseball", None) and dice.chance(0.5):
                return
            tree = (44, 78, 44) if ahead != "orchard" else (78, 104, 52)
            height = dice.between(0.03, 0.09)
            x = -0.05
            while x < 1.05:
                size = dice.between(0.03, 0.07)
                self.oval(
                    x, horizon, size, height * dice.between(0.6, 1.2), _shaded(tree, dice.between(0.8, 1.15))
                )
                x += size * 1.3
        elif ahead in ("residential", "industrial"):
            x = dice.between(-0.1, 0.1)
            while x < 1.0:
                width, height = dice.between(0.05, 0.11), dice.between(0.03, 0.09)
                if ahead == "residential":
                    wall = dice.pick(((214, 206, 190), (196, 176, 160), (226, 222, 214)))
                    self.box(x, horizon - height, x + width, horizon, wall)
                    roof = [(x - 0.01, horizon - height), (x + width / 2, horizon - height * 1.7)]
                    self.polygon([*roof, (x + width + 0.01, horizon - height)], (150, 84, 70))
                else:
                    self.box(x, horizon - height * 1.4, x + width * 1.3, horizon, (150, 152, 158))
                    if dice.chance(0.3):
                        self.box(x + 0.02, horizon - height * 2.6, x + 0.035, horizon, (128, 116, 112))
                x += width * dice.between(1.2, 2.6)
        elif ahead in ("lake", "river"):
            self.box(0, horizon - 0.012, 1, horizon + 0.012, (108, 152, 196))
        elif ahead in ("desert", "beach"):
            self.box(0, horizon - 0.014, 1, horizon + 0.01, (216, 186, 142))

    def tree(self, x: float, base: float, size: float, leaf: Colour) -> None:
        """A tree whose trunk ends at (x, base)."""
        dice = self.dice
        self.box(x - size * 0.06, base - size * 0.6, x + size * 0.06, base, (88, 64, 44))
        for _ in range(4):
            dx, dy = dice.between(-0.22, 0.22) * size, dice.between(-1.05, -0.6) * size * 1.1
            self.oval(x + dx, base + dy, size * 0.26, size * 0.3, _shaded(leaf, dice.between(0.75, 1.15)))

    def person(self, x: float, feet: float, size: float) -> None:
        """A small figure whose feet are at (x, feet)."""
        dice = self.dice
        shirt = dice.pick(((206, 58, 54), (52, 92, 180), (236, 232, 224), (230, 180, 56), (70, 140, 90)))
        self.box(x - size * 0.09, feet - size * 0.45, x + size * 0.09, feet, (58, 60, 78))
        self.box(x - size * 0.12, feet - size * 0.85, x + size * 0.12, feet - size * 0.42, shirt)
        self.oval(
            x, feet - size * 0.94, size * 0.08, size * 0.1, dice.pick(((224, 180, 150), (150, 104, 78)))
        )


# --- places ---


def _lake(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    horizon = dice.between(0.34, 0.54)
    canvas.draw_sky(horizon)
    canvas.draw_background(horizon, dice.pick(("forest", "forest", "residential", "desert", None)))
    near, far = dice.pick((((30, 84, 146), (104, 156, 202)), ((40, 104, 160), (120, 170, 206))))
    canvas.fade(horizon, 1.0, far, near, 12)
    for _ in range(26):
        y = horizon + (1 - horizon) * dice.one() ** 1.4
        x, length = dice.between(-0.1, 1.0), dice.between(0.04, 0.2)
        canvas.line(x, y, x + length, y, _mix(near, (196, 220, 240), dice.between(0.2, 0.7)))
    if dice.chance(0.45):
        x, y, s = dice.between(0.25, 0.75), dice.between(horizon + 0.05, 0.75), dice.between(0.08, 0.18)
        canvas.polygon(
            [(x - s, y), (x + s, y), (x + s * 0.6, y + s * 0.4), (x - s * 0.6, y + s * 0.4)], (96, 60, 44)
        )
        canvas.polygon([(x, y - 2 * s), (x, y - 0.1 * s), (x + 0.8 * s, y - 0.1 * s)], (246, 244, 236))
        canvas.polygon(
            [(x - 0.08, y - 1.6 * s), (x - 0.02, y - 0.1 * s), (x - 0.7 * s, y - 0.1 * s)], (232, 228, 216)
        )
    if dice.chance(0.4):
        x = dice.between(0.1, 0.8)
        deck = [(x - 0.12, 1.0), (x + 0.16, 1.0), (x + 0.05, dice.between(0.66, 0.8)), (x, 0.7)]
        canvas.polygon(deck, (142, 110, 82))


def _river(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    horizon = dice.between(0.26, 0.42)
    canvas.draw_sky(horizon)
    canvas.draw_background(horizon, ahead)
    green = dice.pick(((84, 124, 62), (104, 134, 70), (74, 108, 60)))
    canvas.fade(horizon, 1.0, _shaded(green, 0.9), green, 6)
    water = dice.pick(((82, 124, 128), (70, 112, 124), (98, 132, 126)))
    bend, foot = dice.between(-0.25, 0.25), dice.between(0.38, 0.62)
    left, right = [], []
    for k in range(9):
        t = k / 8
        y = horizon + (1.02 - horizon) * t
        middle = foot + bend * (1 - t) * (1.6 * t + 0.4) * 1.6
        half = 0.03 + (0.30 + 0.05) * t * t + 0.05 * t
        left.append((middle - half, y))
        right.append((middle + half, y))
    canvas.polygon(
        [(x - 0.025, y) for x, y in left] + [(x + 0.025, y) for x, y in reversed(right)], (150, 136, 108)
    )
    canvas.polygon(left + right[::-1], water)
    for _ in range(22):
        k = dice.below(8)
        (x0, y0), (x1, _) = left[k], right[k]
        x = dice.between(x0, x1)
        y = y0 + dice.between(0, 0.07)
        canvas.line(x, y, min(x + 0.08, x1), y, _mix(water, (216, 228, 226), dice.between(0.25, 0.7)))
    for _ in range(5):
        k = dice.below(6) + 2
        x, y = dice.pick((left, right))[k]
        canvas.oval(x, y, 0.03, 0.022, _shaded((136, 132, 124), dice.between(0.75, 1.1)))
    for side in (-1, 1):
        for _ in range(dice.below(3) + 1):
            k = dice.below(5) + 1
            x, y = (left if side < 0 else right)[k]
            size = 0.12 + 0.16 * k / 6
            canvas.tree(
                x + side * dice.between(0.12, 0.3), y, size, dice.pick(((62, 104, 52), (90, 120, 58)))
            )


def _beach(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    horizon = dice.between(0.28, 0.42)
    canvas.draw_sky(horizon)
    shore = horizon + dice.between(0.1, 0.24)
    canvas.fade(horizon, shore + 0.1, (44, 110, 168), (98, 178, 196), 6)
    slope = dice.between(-0.08, 0.08)
    sand = dice.pick(((236, 214, 166), (226, 200, 150), (240, 224, 188)))
    canvas.polygon([(0, shore - slope), (1, shore + slope), (1, 1), (0, 1)], sand)
    canvas.polygon(
        [
            (0, shore - slope - 0.02),
            (1, shore + slope - 0.02),
            (1, shore + slope + 0.015),
            (0, shore - slope + 0.015),
        ],
        (244, 246, 246),
    )
    for _ in range(dice.below(4) + 1):
        x, y, s = dice.between(0.08, 0.92), dice.between(shore + 0.16, 0.92), dice.between(0.07, 0.15)
        colour = dice.pick(((214, 58, 56), (242, 196, 52), (58, 118, 200), (236, 120, 60)))
        canvas.line(x, y - 1.5 * s, x, y, (150, 130, 110), 0.012)
        canvas.polygon([(x - s, y - 1.2 * s), (x, y - 2.0 * s), (x + s, y - 1.2 * s)], colour)
        canvas.box(
            x - s, y, x + s * 0.5, y + 0.025, dice.pick(((250, 250, 250), (80, 160, 190), (230, 110, 130)))
        )
    for _ in range(dice.below(4)):
        canvas.person(dice.between(0.05, 0.95), dice.between(shore + 0.1, 0.85), dice.between(0.1, 0.16))
    for _ in range(14):
        x, y = dice.one(), dice.between(shore + 0.1, 1)
        canvas.oval(x, y, 0.02, 0.008, _shaded(sand, dice.between(0.86, 1.06)))


def _forest(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    floor = dice.between(0.62, 0.8)
    glow = dice.pick(((150, 176, 110), (104, 132, 82), (80, 104, 66), (172, 186, 128)))
    canvas.fade(0, floor, _shaded(glow, 0.45), glow, 8)
    canvas.fade(floor, 1, (92, 74, 46), (66, 58, 36), 5)
    leaf = dice.pick(((52, 92, 44), (70, 106, 48), (44, 78, 42), (112, 112, 48)))
    for _ in range(26):
        x, y, s = dice.one(), dice.between(-0.05, 0.34), dice.between(0.05, 0.14)
        canvas.oval(x, y, s, s * 0.8, _shaded(leaf, dice.between(0.55, 1.2)))
    for depth in (0.35, 0.6, 1.0):
        for _ in range(dice.below(5) + (7 if depth < 0.5 else 3)):
            x, half = dice.one(), dice.between(0.008, 0.026) * (0.4 + depth)
            bark = _mix(glow, (78, 56, 40), 0.35 + 0.65 * depth)
            base = floor + (1.02 - floor) * depth * dice.between(0.5, 1.0)
            canvas.polygon(
                [(x - half, 0), (x + half, 0), (x + half * 1.5, base), (x - half * 1.5, base)], bark
            )
            canvas.line(x - half * 0.5, 0, x - half * 0.6, base, _shaded(bark, 1.25))
    for _ in range(12):
        x, y = dice.one(), dice.between(floor, 1.02)
        canvas.oval(x, y, dice.between(0.03, 0.08), 0.03, _shaded(leaf, dice.between(0.7, 1.3)))


def _farmland(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    horizon = dice.between(0.32, 0.5)
    canvas.draw_sky(horizon)
    canvas.draw_background(horizon, ahead)
    crop, soil = dice.pick(
        (
            ((212, 182, 88), (166, 136, 70)),
            ((96, 140, 58), (104, 84, 56)),
            ((150, 152, 70), (118, 96, 60)),
            ((126, 160, 72), (92, 74, 52)),
            ((150, 116, 80), (112, 84, 60)),
        )
    )
    canvas.fade(horizon, 1, _mix(soil, crop, 0.5), soil, 4)
    vanish = dice.between(0.2, 0.8)
    count = dice.below(6) + 11
    for k in range(-count, count + 1):
        x = vanish + k * 2.6 / count
        half = 0.62 / count
        canvas.polygon(
            [(vanish, horizon), (x - half, 1.02), (x + half, 1.02)], _shaded(crop, 0.94 + 0.1 * (k % 2))
        )
    if dice.chance(0.4):
        x, s = dice.between(0.1, 0.8), dice.between(0.1, 0.18)
        canvas.box(x, horizon - s * 0.8, x + s, horizon + 0.02, (168, 50, 44))
        canvas.polygon(
            [
                (x - 0.01, horizon - s * 0.8),
                (x + s / 2, horizon - s * 1.4),
                (x + s + 0.01, horizon - s * 0.8),
            ],
            (110, 104, 104),
        )
        canvas.box(x + s * 0.38, horizon - s * 0.4, x + s * 0.62, horizon + 0.02, (236, 230, 220))
    elif dice.chance(0.5):
        for _ in range(dice.below(4) + 2):
            x, y = dice.one(), dice.between(horizon + 0.08, 0.85)
            s = 0.03 + 0.07 * (y - horizon)
            canvas.oval(x, y, s, s * 1.1, (206, 172, 96))
            canvas.oval(x, y, s * 0.55, s * 0.6, (178, 142, 76))
    elif dice.chance(0.5):
        x, y = dice.between(0.2, 0.7), horizon + 0.12
        canvas.box(x, y - 0.08, x + 0.13, y, (58, 130, 66))
        canvas.box(x + 0.06, y - 0.15, x + 0.12, y - 0.06, (70, 88, 96))
        canvas.oval(x + 0.11, y, 0.045, 0.06, (38, 38, 40))
        canvas.oval(x + 0.015, y + 0.01, 0.028, 0.037, (38, 38, 40))


def _meadow(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    horizon = dice.between(0.36, 0.56)
    canvas.draw_sky(horizon)
    canvas.draw_background(horizon, ahead)
    grass = dice.pick(((122, 170, 74), (140, 178, 84), (104, 156, 70), (156, 176, 92)))
    crest = [(k / 6, horizon + dice.between(-0.03, 0.03)) for k in range(7)]
    canvas.fade(horizon + 0.04, 1, _shaded(grass, 1.08), _shaded(grass, 0.86), 6)
    canvas.polygon([*crest, (1, horizon + 0.12), (0, horizon + 0.12)], _shaded(grass, 1.1))
    for _ in range(2):
        x, y = dice.between(-0.1, 0.9), dice.between(horizon + 0.1, 0.85)
        canvas.oval(
            x, y, dice.between(0.15, 0.4), dice.between(0.03, 0.09), _shaded(grass, dice.between(0.88, 1.14))
        )
    petals = dice.pick(
        (
            ((250, 250, 246), (250, 218, 70)),
            ((240, 210, 60),),
            ((226, 84, 104), (250, 250, 246)),
            ((170, 110, 196), (246, 240, 250)),
        )
    )
    for _ in range(46):
        t = dice.one()
        y = horizon + 0.05 + (0.97 - horizon) * t
        size = 0.004 + 0.012 * t
        canvas.oval(dice.one(), y, size, size * 1.3, dice.pick(petals))
    for _ in range(24):
        x, y = dice.one(), dice.between(horizon + 0.2, 1.0)
        canvas.line(x, y, x + dice.between(-0.02, 0.02), y - 0.05, _shaded(grass, dice.between(0.7, 0.9)))
    if dice.chance(0.45):
        y = horizon + dice.between(0.03, 0.14)
        canvas.tree(dice.between(0.12, 0.88), y, dice.between(0.16, 0.34), (72, 118, 56))
    if dice.chance(0.25):
        for _ in range(4):
            x, y = dice.one(), horizon + dice.between(0.06, 0.2)
            canvas.oval(x, y, 0.03, 0.022, dice.pick(((244, 242, 238), (72, 54, 46))))


def _house(canvas: Canvas, x: float, base: float, size: float) -> None:
    dice = canvas.dice
    wall = dice.pick(
        ((232, 226, 214), (200, 216, 226), (236, 212, 180), (214, 190, 184), (196, 210, 188), (178, 92, 74))
    )
    roof = dice.pick(((120, 74, 62), (92, 92, 100), (150, 92, 74), (78, 70, 72)))
    tall = size * dice.between(0.6, 0.85)
    canvas.box(x, base - tall, x + size, base, wall)
    canvas.box(x + size * 0.8, base - tall, x + size, base, _shaded(wall, 0.84))
    peak = base - tall - size * dice.between(0.35, 0.6)
    canvas.polygon([(x - size * 0.1, base - tall), (x + size / 2, peak), (x + size * 1.1, base - tall)], roof)
    canvas.box(
        x + size * 0.42, base - tall * 0.5, x + size * 0.58, base, dice.pick(((108, 62, 48), (60, 84, 110)))
    )
    for dx in (0.12, 0.68):
        canvas.box(
            x + size * dx, base - tall * 0.75, x + size * (dx + 0.2), base - tall * 0.4, (88, 112, 136)
        )


def _residential(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    horizon = dice.between(0.46, 0.6)
    canvas.draw_sky(horizon)
    canvas.draw_background(horizon, dice.pick((ahead, "forest")))
    lawn = dice.pick(((112, 152, 78), (96, 138, 70), (128, 156, 88)))
    canvas.fade(horizon, 1, lawn, _shaded(lawn, 0.9), 3)
    count = dice.below(2) + 2
    offset = dice.between(-0.12, 0.1)
    for k in range(count):
        size = dice.between(0.22, 0.34)
        _house(
            canvas,
            offset + k * (1.0 / count) + dice.between(0, 0.05),
            horizon + dice.between(0.04, 0.12),
            size,
        )
    kerb = horizon + dice.between(0.2, 0.28)
    tilt = dice.between(-0.06, 0.06)
    road = [(0, kerb - tilt), (1, kerb + tilt), (1, 1.0), (0, 1.0)]
    canvas.polygon([(x, y - 0.03) for x, y in road[:2]] + road[2:], (196, 192, 184))
    canvas.polygon(road, (118, 116, 118))
    if dice.chance(0.5):
        _car(canvas, dice.between(0.1, 0.7), kerb + 0.12, dice.between(0.2, 0.3))
    for _ in range(dice.below(3) + 1):
        canvas.tree(dice.one(), horizon + dice.between(0.06, 0.18), dice.between(0.18, 0.36), (80, 122, 58))
    if dice.chance(0.5):
        y = kerb - 0.07
        for k in range(20):
            canvas.box(k / 20 + 0.01, y - 0.07, k / 20 + 0.03, y, (246, 244, 240))
        canvas.line(0, y - 0.045, 1, y - 0.045, (246, 244, 240), 0.012)


def _industrial(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    horizon = dice.between(0.52, 0.66)
    canvas.draw_sky(horizon)
    canvas.draw_background(horizon, ahead)
    ground = dice.pick(((138, 134, 130), (150, 146, 138), (124, 124, 126)))
    canvas.fade(horizon, 1, ground, _shaded(ground, 0.86), 3)
    for _ in range(dice.below(2) + 1):
        x, width, top = dice.between(0.05, 0.9), dice.between(0.025, 0.045), dice.between(0.04, 0.22)
        canvas.polygon(
            [(x, top), (x + width, top), (x + width * 1.4, horizon), (x - width * 0.4, horizon)],
            dice.pick(((176, 96, 82), (168, 164, 162))),
        )
        canvas.box(x, top + 0.04, x + width, top + 0.07, (230, 226, 222))
        for k in range(4):
            canvas.oval(
                x + 0.03 + 0.05 * k, top - 0.03 * k, 0.03 + 0.012 * k, 0.03 + 0.01 * k, (206, 206, 210)
            )
    x = dice.between(-0.15, 0.05)
    while x < 0.95:
        width, tall = dice.between(0.2, 0.42), dice.between(0.14, 0.34)
        wall = dice.pick(
            ((172, 178, 188), (196, 190, 180), (148, 158, 172), (186, 160, 140), (206, 208, 210))
        )
        base = horizon + dice.between(0.02, 0.08)
        canvas.box(x, base - tall, x + width, base, wall)
        if dice.chance(0.5):
            teeth = max(2, int(width / 0.09))
            for k in range(teeth):
                a = x + width * k / teeth
                b = x + width * (k + 1) / teeth
                canvas.polygon(
                    [(a, base - tall), (a, base - tall - 0.06), (b, base - tall)], _shaded(wall, 0.8)
                )
        for k in range(int(width / 0.06)):
            canvas.box(
                x + 0.02 + 0.06 * k, base - tall * 0.8, x + 0.05 + 0.06 * k, base - tall * 0.6, (92, 108, 126)
            )
        canvas.box(x + width * 0.3, base - tall * 0.42, x + width * 0.6, base, (98, 100, 106))
        x += width * dice.between(0.95, 1.25)
    if dice.chance(0.4):
        x, s = dice.between(0.1, 0.8), dice.between(0.08, 0.14)
        canvas.box(x, horizon - s * 0.6, x + s * 1.4, horizon + 0.1, (214, 214, 210))
        canvas.oval(x + s * 0.7, horizon - s * 0.6, s * 0.7, s * 0.22, (230, 230, 228))
    if dice.chance(0.45):
        x, y = dice.between(0.05, 0.6), dice.between(0.82, 0.94)
        canvas.box(x, y - 0.17, x + 0.3, y, dice.pick(((226, 226, 226), (60, 96, 160), (190, 70, 56))))
        canvas.box(x + 0.3, y - 0.11, x + 0.38, y, (190, 60, 50))
        for wheel in (0.06, 0.24, 0.34):
            canvas.oval(x + wheel, y, 0.028, 0.037, (34, 34, 36))
    else:
        for k in range(14):
            canvas.line(k / 13, 0.82, k / 13, 0.96, (96, 98, 100))
        canvas.line(0, 0.84, 1, 0.84, (96, 98, 100))


def _highway(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    horizon = dice.between(0.36, 0.5)
    canvas.draw_sky(horizon)
    canvas.draw_background(horizon, ahead)
    verge = dice.pick(((122, 140, 82), (150, 146, 92), (168, 146, 104)))
    canvas.fade(horizon, 1, verge, _shaded(verge, 0.9), 3)
    vanish, foot = dice.between(0.35, 0.65), dice.between(0.35, 0.65)
    half = dice.between(0.62, 0.85)

    def at(lane: float, t: float) -> Point:
        return vanish + (foot + lane * half - vanish) * t, horizon + (1.02 - horizon) * t

    canvas.polygon([at(-1, 0.0), at(-1, 1), at(1, 1), at(1, 0.0)], (98, 98, 102))
    for lane in (-0.94, 0.94):
        canvas.polygon(
            [at(lane - 0.02, 0.02), at(lane - 0.02, 1), at(lane + 0.02, 1), at(lane + 0.02, 0.02)],
            (236, 232, 214),
        )
    canvas.polygon([at(-0.03, 0.02), at(-0.03, 1), at(0.03, 1), at(0.03, 0.02)], (226, 186, 60))
    for lane in (-0.48, 0.48):
        for k in range(7):
            t0, t1 = ((k + 0.1) / 7) ** 2, ((k + 0.6) / 7) ** 2
            canvas.polygon(
                [at(lane - 0.02, t0), at(lane - 0.02, t1), at(lane + 0.02, t1), at(lane + 0.02, t0)],
                (240, 240, 236),
            )
    for side in (-1.12, 1.12):
        (x0, y0), (x1, y1) = at(side, 0.05), at(side, 0.95)
        canvas.line(x0, y0 - 0.01, x1, y1 - 0.1, (176, 180, 184), 0.018)
    for _ in range(dice.below(4) + 2):
        lane, t = dice.pick((-0.72, -0.26, 0.26, 0.72)), dice.between(0.12, 0.75)
        x, y = at(lane, t)
        s = 0.16 * t + 0.02
        paint = dice.pick(((206, 52, 48), (236, 236, 238), (52, 74, 140), (40, 42, 46), (150, 156, 162)))
        tall = s * (1.7 if dice.chance(0.25) else 0.8)
        canvas.box(x - s * 0.6, y - tall, x + s * 0.6, y, paint)
        canvas.box(x - s * 0.45, y - tall * 0.9, x + s * 0.45, y - tall * 0.55, (60, 74, 88))
        canvas.box(x - s * 0.6, y - s * 0.08, x + s * 0.6, y + s * 0.06, (30, 30, 32))
    if dice.chance(0.45):
        y = horizon - dice.between(0.1, 0.2)
        canvas.box(vanish - 0.24, y, vanish + 0.24, y + 0.09, (36, 120, 80))
        canvas.line(vanish - 0.17, y + 0.045, vanish + 0.12, y + 0.045, (240, 244, 240), 0.016)
        for x in (vanish - 0.25, vanish + 0.25):
            canvas.line(x, y, x, horizon + 0.04, (140, 144, 148), 0.014)


def _baseball(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    horizon = dice.between(0.3, 0.44)
    canvas.draw_sky(horizon)
    canvas.draw_background(horizon, dice.pick((ahead, "forest", "residential")))
    fence = horizon + 0.07
    canvas.box(0, horizon - 0.01, 1, fence, dice.pick(((34, 84, 60), (40, 66, 110), (56, 96, 60))))
    grass = dice.pick(((92, 152, 62), (104, 160, 70), (82, 140, 58)))
    canvas.fade(fence, 1, grass, _shaded(grass, 0.94), 4)
    for k in range(0, 8, 2):
        x0, x1 = k / 8, (k + 1) / 8
        band = [(x0 + 0.1, fence), (x1 + 0.1, fence), (2 * x1 - 0.6, 1), (2 * x0 - 0.6, 1)]
        canvas.polygon(band, _shaded(grass, 1.08))
    middle, low = dice.between(0.4, 0.6), dice.between(0.86, 0.96)
    reach = dice.between(0.34, 0.44)
    deep = dice.between(0.40, 0.50)
    dirt = dice.pick(((190, 124, 82), (178, 112, 76), (202, 142, 98)))
    home, second = (middle, low), (middle, low - deep)
    first, third = (middle + reach, low - deep * 0.45), (middle - reach, low - deep * 0.45)
    canvas.polygon(
        [home, (first[0] + 0.06, first[1]), (second[0], second[1] - 0.03), (third[0] - 0.06, third[1])], dirt
    )

    def inner(point: Point) -> Point:
        centre = (middle, low - deep * 0.47)
        return centre[0] + (point[0] - centre[0]) * 0.62, centre[1] + (point[1] - centre[1]) * 0.62

    canvas.polygon([inner(point) for point in (home, first, second, third)], grass)
    canvas.oval(middle, low - deep * 0.45, 0.045, 0.026, dirt)
    canvas.oval(*home, 0.1, 0.055, dirt)
    for base in (first, third):
        far = (home[0] + (base[0] - home[0]) * 1.9, home[1] + (base[1] - home[1]) * 1.9)
        canvas.line(*home, *far, (246, 244, 238), 0.014)
    for point in (home, first, second, third):
        canvas.oval(*point, 0.02, 0.016, (250, 250, 246))
    for _ in range(dice.below(4) + 2):
        canvas.person(dice.between(0.15, 0.85), dice.between(fence + 0.14, 0.9), dice.between(0.12, 0.2))
    if dice.chance(0.3):
        for k in range(9):
            canvas.line(k / 8, 0, k / 8, 1, (120, 124, 128))


def _desert(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    horizon = dice.between(0.36, 0.56)
    canvas.draw_sky(horizon)
    if dice.chance(0.5):
        x, top = dice.between(0.05, 0.7), horizon - dice.between(0.08, 0.2)
        w = dice.between(0.12, 0.3)
        canvas.polygon(
            [(x, horizon + 0.01), (x + 0.03, top), (x + w, top), (x + w + 0.05, horizon + 0.01)],
            (176, 104, 76),
        )
    canvas.draw_background(horizon, "desert" if dice.chance(0.7) else ahead)
    sand = dice.pick(((214, 158, 106), (202, 146, 100), (222, 176, 124), (196, 134, 92)))
    canvas.fade(horizon, 1, _shaded(sand, 1.06), sand, 4)
    for k in range(dice.below(3) + 2):
        y = horizon + 0.06 + 0.17 * k
        peak = dice.between(0.1, 0.9)
        canvas.polygon(
            [(-0.1, y + 0.1), (peak, y - dice.between(0.0, 0.08)), (1.1, y + 0.1)], _shaded(sand, 1.1)
        )
        canvas.polygon([(peak, y), (1.1, y + 0.1), (peak - 0.1, y + 0.16)], _shaded(sand, 0.8))
    for _ in range(18):
        x, y = dice.one(), dice.between(horizon + 0.05, 1)
        s = dice.between(0.006, 0.03) * (0.4 + y)
        canvas.oval(x, y, s, s * 0.7, _shaded((140, 104, 78), dice.between(0.7, 1.1)))
    for _ in range(dice.below(4)):
        x, y, s = dice.between(0.05, 0.95), dice.between(horizon + 0.1, 0.9), dice.between(0.12, 0.3)
        green = _shaded((82, 116, 66), dice.between(0.85, 1.1))
        canvas.box(x - s * 0.09, y - s, x + s * 0.09, y, green)
        canvas.oval(x, y - s, s * 0.09, s * 0.1, green)
        for side in (-1, 1):
            arm, lift = x + side * s * 0.28, dice.between(0.35, 0.6) * s
            canvas.box(min(x, arm), y - lift, max(x, arm), y - lift + s * 0.12, green)
            canvas.box(arm - s * 0.06, y - lift - s * 0.3, arm + s * 0.06, y - lift + s * 0.1, green)


def _orchard(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    horizon = dice.between(0.28, 0.42)
    canvas.draw_sky(horizon)
    canvas.draw_background(horizon, ahead)
    grass = dice.pick(((158, 156, 92), (138, 150, 84), (176, 158, 108)))
    canvas.fade(horizon, 1, grass, _shaded(grass, 0.92), 3)
    leaf = dice.pick(((64, 108, 50), (82, 122, 56), (56, 96, 54)))
    fruit = dice.pick(((206, 46, 42), (240, 150, 40), (214, 200, 70), (246, 224, 232)))
    vanish = dice.between(0.35, 0.65)
    for k in range(7):
        t = ((k + 1) / 7) ** 1.6
        y = horizon + 0.03 + (0.9 - horizon) * t
        size = 0.05 + 0.2 * t
        for lane in (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5):
            x = vanish + lane * (0.07 + 0.5 * t)
            if not -0.2 < x < 1.2:
                continue
            canvas.oval(x, y + 0.01, size * 0.7, size * 0.16, _shaded(grass, 0.7))
            canvas.box(x - size * 0.08, y - size * 0.4, x + size * 0.08, y, (92, 70, 50))
            canvas.oval(x, y - size * 0.75, size * 0.62, size * 0.6, _shaded(leaf, dice.between(0.88, 1.12)))
            canvas.oval(x - size * 0.15, y - size * 0.9, size * 0.34, size * 0.3, _shaded(leaf, 1.2))
            if k > 1:
                for _ in range(5):
                    dx, dy = dice.between(-0.45, 0.45) * size, dice.between(-1.15, -0.4) * size
                    canvas.oval(x + dx, y + dy, 0.010 + 0.012 * t, 0.012 + 0.015 * t, fruit)


# --- rooms, people, things ---


def _room(canvas: Canvas) -> float:
    dice = canvas.dice
    canvas.indoors()
    floor = dice.between(0.62, 0.76)
    wall = (dice.between(150, 236), dice.between(150, 226), dice.between(140, 226))
    canvas.fade(0, floor, _shaded(wall, 0.94), wall, 3)
    boards = dice.pick(((148, 104, 70), (176, 136, 98), (112, 84, 66), (190, 184, 176)))
    canvas.fade(floor, 1, boards, _shaded(boards, 0.84), 4)
    if dice.chance(0.5):
        x = dice.between(0.05, 0.3)
        canvas.polygon([(0, 0), (x, 0.08), (x, floor), (0, 1.0)], _shaded(wall, 0.82))
    return floor


def _kitchen(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    floor = _room(canvas)
    wood = dice.pick(((196, 156, 110), (236, 234, 230), (92, 112, 128), (150, 104, 70)))
    for k in range(6):
        x = k / 6
        canvas.box(x + 0.005, 0.04, x + 0.16, 0.28, _shaded(wood, dice.between(0.94, 1.04)))
        canvas.box(x + 0.005, floor - 0.14, x + 0.16, floor + 0.12, _shaded(wood, dice.between(0.92, 1.02)))
        canvas.oval(x + 0.13, 0.2, 0.008, 0.012, (90, 90, 92))
    canvas.box(0, floor - 0.17, 1, floor - 0.13, dice.pick(((70, 70, 74), (222, 218, 210), (156, 126, 96))))
    x = dice.between(0.05, 0.6)
    canvas.box(x, floor - 0.13, x + 0.18, floor + 0.12, (188, 190, 194))
    canvas.box(x + 0.02, floor - 0.06, x + 0.16, floor + 0.06, (44, 46, 50))
    x = dice.between(0.62, 0.82)
    canvas.box(x, 0.16, x + 0.16, floor + 0.14, (222, 224, 228))
    canvas.line(x, 0.4, x + 0.16, 0.4, (150, 152, 156), 0.012)
    for _ in range(5):
        x = dice.between(0.02, 0.6)
        paint = dice.pick(((206, 60, 50), (240, 200, 70), (90, 150, 90), (240, 240, 240)))
        canvas.box(x, floor - 0.17 - dice.between(0.04, 0.1), x + 0.04, floor - 0.17, paint)


def _bedroom(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    floor = _room(canvas)
    x, y = dice.between(0.12, 0.35), floor - 0.08
    cover = (dice.between(70, 235), dice.between(80, 225), dice.between(90, 235))
    canvas.box(x - 0.02, y - 0.24, x + 0.5, y + 0.1, (120, 82, 56))
    canvas.polygon([(x, y), (x + 0.48, y), (x + 0.62, y + 0.26), (x - 0.08, y + 0.26)], cover)
    for dx in (0.04, 0.27):
        canvas.oval(x + dx + 0.09, y - 0.01, 0.1, 0.055, (246, 244, 240))
    canvas.box(x - 0.08, y + 0.26, x + 0.62, y + 0.32, _shaded(cover, 0.7))
    wx = dice.between(0.3, 0.7)
    canvas.box(wx, 0.08, wx + 0.24, 0.38, (240, 238, 232))
    canvas.box(wx + 0.02, 0.1, wx + 0.22, 0.36, dice.pick(((150, 196, 232), (30, 36, 66), (222, 226, 230))))
    canvas.line(wx + 0.12, 0.1, wx + 0.12, 0.36, (240, 238, 232), 0.014)
    canvas.box(0.84, floor - 0.14, 0.95, floor + 0.04, (132, 92, 62))
    canvas.polygon(
        [(0.85, floor - 0.18), (0.94, floor - 0.18), (0.92, floor - 0.3), (0.87, floor - 0.3)],
        (250, 232, 180),
    )


def _office(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    floor = _room(canvas)
    for k in range(3):
        canvas.box(0.1 + 0.3 * k, 0.03, 0.3 + 0.3 * k, 0.07, (252, 252, 246))
    desk = dice.between(0.55, 0.66)
    canvas.box(0.05, desk, 0.95, desk + 0.05, (178, 138, 98))
    canvas.box(0.08, desk + 0.05, 0.13, 1, (110, 110, 116))
    canvas.box(0.86, desk + 0.05, 0.91, 1, (110, 110, 116))
    for k in range(dice.below(2) + 1):
        x = dice.between(0.12, 0.25) + 0.36 * k
        canvas.box(x, desk - 0.3, x + 0.3, desk - 0.07, (30, 32, 36))
        canvas.box(
            x + 0.015,
            desk - 0.28,
            x + 0.285,
            desk - 0.09,
            dice.pick(((90, 140, 200), (226, 230, 236), (50, 90, 76))),
        )
        canvas.box(x + 0.13, desk - 0.07, x + 0.17, desk, (40, 42, 46))
    x = dice.between(0.3, 0.6)
    seat = dice.pick(((44, 46, 52), (70, 84, 120), (120, 48, 46)))
    canvas.box(x, desk + 0.02, x + 0.2, desk + 0.22, seat)
    canvas.box(x + 0.08, desk + 0.22, x + 0.12, 0.96, (60, 60, 64))
    for _ in range(7):
        x = dice.between(0.72, 0.9)
        canvas.box(
            x, 0.2, x + 0.02, 0.42, dice.pick(((190, 60, 50), (60, 100, 160), (230, 200, 90), (80, 140, 90)))
        )
    canvas.box(0.68, 0.42, 0.94, 0.44, (150, 110, 76))
    canvas.box(0.05, floor + 0.2, 0.5, floor + 0.22, (90, 90, 92))


def _museum(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    floor = _room(canvas)
    count = dice.below(3) + 2
    for k in range(count):
        x, y = 0.06 + k * 0.92 / count, dice.between(0.12, 0.2)
        width, tall = dice.between(0.14, 0.86 / count), dice.between(0.2, 0.34)
        canvas.box(x, y, x + width, y + tall, dice.pick(((150, 112, 50), (60, 48, 40), (230, 226, 220))))
        canvas.box(
            x + 0.015,
            y + 0.02,
            x + width - 0.015,
            y + tall - 0.02,
            (dice.between(30, 220), dice.between(30, 200), dice.between(30, 200)),
        )
        canvas.oval(
            x + width / 2,
            y + tall * 0.6,
            width * 0.25,
            tall * 0.2,
            (dice.between(60, 240), dice.between(60, 220), dice.between(40, 200)),
        )
    for k in range(3):
        x = 0.1 + 0.36 * k
        canvas.polygon([(x, 0), (x + 0.03, 0), (x + 0.12, 0.12), (x - 0.09, 0.12)], (255, 250, 224))
    for _ in range(dice.below(3) + 1):
        canvas.person(dice.between(0.1, 0.9), dice.between(floor + 0.08, 0.95), dice.between(0.26, 0.42))
    canvas.box(0.4, floor + 0.04, 0.62, floor + 0.08, (70, 60, 54))


def _backdrop(canvas: Canvas) -> None:
    dice = canvas.dice
    canvas.indoors()
    base = (dice.between(110, 240), dice.between(110, 235), dice.between(110, 240))
    canvas.fade(0, 1, base, _shaded(base, dice.between(0.65, 0.9)), 8)
    for _ in range(5):
        x, y, s = dice.one(), dice.one(), dice.between(0.08, 0.25)
        canvas.oval(x, y, s, s, _shaded(base, dice.between(0.8, 1.1)))


def _dog(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    _backdrop(canvas)
    fur = dice.pick(
        ((150, 104, 62), (92, 68, 52), (216, 186, 140), (58, 54, 54), (232, 224, 212), (178, 120, 70))
    )
    x, y, side = dice.between(0.4, 0.6), dice.between(0.58, 0.68), dice.pick((-1, 1))
    for dx in (-0.17, -0.08, 0.09, 0.17):
        canvas.box(x + dx - 0.025, y, x + dx + 0.025, y + 0.28, _shaded(fur, 0.85))
    canvas.oval(x, y, 0.25, 0.14, fur)
    canvas.line(x - side * 0.23, y - 0.05, x - side * 0.34, y - 0.2, fur, 0.03)
    hx, hy = x + side * 0.24, y - 0.2
    canvas.oval(hx, hy, 0.12, 0.13, _shaded(fur, 1.05))
    canvas.oval(hx + side * 0.1, hy + 0.045, 0.075, 0.055, _shaded(fur, 1.15))
    canvas.oval(hx - side * 0.07, hy - 0.02, 0.045, 0.12, _shaded(fur, 0.65))
    canvas.oval(hx + side * 0.16, hy + 0.03, 0.022, 0.024, (24, 22, 22))
    canvas.oval(hx + side * 0.04, hy - 0.03, 0.016, 0.02, (20, 18, 18))
    if dice.chance(0.6):
        canvas.line(hx - side * 0.12, hy + 0.1, hx + side * 0.03, hy + 0.14, (200, 50, 50), 0.025)


def _person(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    _backdrop(canvas)
    skin = dice.pick(((236, 196, 166), (208, 158, 124), (150, 104, 76), (104, 70, 52)))
    hair = dice.pick(((44, 32, 26), (96, 64, 40), (190, 150, 90), (120, 116, 112), (150, 60, 36)))
    shirt = (dice.between(30, 230), dice.between(30, 220), dice.between(40, 230))
    x, y = dice.between(0.42, 0.58), dice.between(0.34, 0.42)
    if dice.chance(0.5):
        canvas.oval(x, y + 0.06, 0.2, 0.3, hair)
    canvas.polygon([(x - 0.33, 1.02), (x - 0.24, y + 0.36), (x + 0.24, y + 0.36), (x + 0.33, 1.02)], shirt)
    canvas.box(x - 0.06, y + 0.15, x + 0.06, y + 0.38, _shaded(skin, 0.9))
    canvas.oval(x, y - 0.03, 0.165, 0.235, hair)
    canvas.oval(x, y + 0.03, 0.14, 0.2, skin)
    for side in (-1, 1):
        canvas.oval(x + side * 0.055, y, 0.02, 0.016, (250, 250, 250))
        canvas.oval(x + side * 0.055, y, 0.01, 0.013, (40, 34, 30))
    canvas.line(x - 0.045, y + 0.13, x + 0.045, y + 0.13, (172, 74, 70), 0.02)
    canvas.line(x, y + 0.03, x, y + 0.075, _shaded(skin, 0.8), 0.014)


def _food(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    canvas.indoors()
    table = dice.pick(((150, 104, 68), (214, 206, 196), (92, 96, 104), (186, 62, 58), (70, 100, 120)))
    canvas.fade(0, 1, table, _shaded(table, 0.85), 5)
    for k in range(6):
        canvas.line(0, k / 6, 1, k / 6 + dice.between(-0.04, 0.04), _shaded(table, 0.92))
    x, y, r = dice.between(0.42, 0.58), dice.between(0.44, 0.58), dice.between(0.27, 0.34)
    canvas.oval(x + 0.02, y + 0.04, r, r * 1.2, _shaded(table, 0.6))
    canvas.oval(x, y, r, r * 1.2, (246, 246, 244))
    canvas.oval(x, y, r * 0.75, r * 0.9, (232, 232, 230))
    foods = dice.pick(
        (
            ((196, 60, 44), (232, 196, 90), (92, 140, 60)),
            ((214, 150, 70), (150, 90, 50), (244, 222, 160)),
            ((236, 128, 110), (246, 240, 226), (70, 110, 60)),
        )
    )
    for _ in range(26):
        dx, dy = dice.between(-0.5, 0.5) * r, dice.between(-0.55, 0.55) * r
        s = dice.between(0.03, 0.08)
        canvas.oval(x + dx, y + dy, s, s * 1.1, _shaded(dice.pick(foods), dice.between(0.85, 1.1)))
    canvas.line(x - r - 0.08, y - 0.2, x - r - 0.06, y + 0.25, (196, 198, 204), 0.025)
    if dice.chance(0.6):
        canvas.oval(0.86, 0.18, 0.09, 0.12, (250, 250, 250))
        canvas.oval(0.86, 0.18, 0.065, 0.09, dice.pick(((92, 56, 36), (190, 120, 40), (150, 30, 50))))


def _car(canvas: Canvas, x: float, y: float, size: float) -> None:
    dice = canvas.dice
    paint = dice.pick(
        (
            (200, 40, 40),
            (44, 76, 150),
            (236, 236, 238),
            (40, 42, 46),
            (166, 170, 176),
            (220, 170, 40),
            (60, 120, 80),
        )
    )
    canvas.polygon(
        [
            (x + size * 0.2, y - size * 0.3),
            (x + size * 0.32, y - size * 0.52),
            (x + size * 0.7, y - size * 0.52),
            (x + size * 0.84, y - size * 0.3),
        ],
        _shaded(paint, 0.9),
    )
    canvas.polygon(
        [
            (x + size * 0.28, y - size * 0.31),
            (x + size * 0.36, y - size * 0.47),
            (x + size * 0.66, y - size * 0.47),
            (x + size * 0.76, y - size * 0.31),
        ],
        (150, 184, 206),
    )
    canvas.box(x, y - size * 0.32, x + size, y - size * 0.06, paint)
    for wheel in (0.2, 0.8):
        canvas.oval(x + size * wheel, y - size * 0.04, size * 0.1, size * 0.13, (30, 30, 32))
        canvas.oval(x + size * wheel, y - size * 0.04, size * 0.05, size * 0.065, (170, 172, 176))


def _close_car(canvas: Canvas, ahead: str | None) -> None:
    dice = canvas.dice
    canvas.indoors()
    wall = (dice.between(130, 230), dice.between(130, 226), dice.between(130, 230))
    floor = dice.between(0.62, 0.7)
    canvas.fade(0, floor, wall, _shaded(wall, 0.9), 4)
    canvas.fade(floor, 1, (130, 128, 128), (92, 92, 94), 4)
    for k in range(3):
        canvas.box(0.08 + 0.32 * k, 0.05, 0.3 + 0.32 * k, 0.1, (252, 252, 248))
    _car(canvas, dice.between(0.06, 0.14), dice.between(0.8, 0.88), dice.between(0.74, 0.84))


_SCENES: dict[str, Callable[[Canvas, str | None], None]] = {
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
    "kitchen": _kitchen,
    "bedroom": _bedroom,
    "office": _office,
    "museum": _museum,
    "dog": _dog,
    "person": _person,
    "food": _food,
    "car": _close_car,
}

#: How rough surfaces are: strength of the finest noise.
_ROUGHNESS = {
    "forest": 0.16,
    "meadow": 0.10,
    "farmland": 0.09,
    "orchard": 0.09,
    "desert": 0.07,
    "beach": 0.06,
}


@lru_cache(maxsize=1)
def _surfaces() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two periodic noises: of single pixels (512 x 512), and smooth over an eighth of a picture (64 lattice)."""
    rng = np.random.default_rng(20240)
    return rng.standard_normal((512, 512)).astype(np.float32), rng.standard_normal((64, 64)).astype(
        np.float32
    )


def render_scene(
    kind: str, dice_salt: int, width: int, height: int, ahead: str | None = None
) -> NDArray[np.uint8]:
    """Draw one picture.

    Args:
        kind: a land-cover class, or one of `INDOOR_KINDS` or `OFF_TOPIC_KINDS`.
        dice_salt: decides everything else.
        width: pixels.
        height: pixels.
        ahead: land-cover class in the background; None for whatever.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    dice = Dice(dice_salt)
    canvas = Canvas(width, height, dice)
    _SCENES[kind](canvas, ahead)
    fine, coarse = _surfaces()
    dx, dy, sx, sy = (dice.below(300), dice.below(300), dice.below(50), dice.below(50))
    picture = np.asarray(canvas.image).astype(np.float32)
    # Light and shade over the picture, then the roughness of surfaces and the sensor's grain.
    patches = Image.fromarray(coarse[sy : sy + 6, sx : sx + 8]).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    exposure = dice.between(0.88, 1.1)
    light = np.asarray(patches) * np.float32(0.05) + np.float32(exposure)
    # Small pictures stand for larger ones made smaller: their grain is averaged.
    roughness = np.float32(_ROUGHNESS.get(kind, 0.035) * min(1.0, min(width, height) / 144))
    grain = fine[dy : dy + height, dx : dx + width] * roughness
    if kind in _ROUGHNESS and kind != "forest":
        # The sky is smoother than the ground.
        grain[: int(0.42 * height)] *= np.float32(0.35)
    light += grain
    picture *= light[..., None]
    np.clip(picture, 0, 255, out=picture)
    return picture.astype(np.uint8)


#: Shorter side at which photos are drawn before they are brought to their size.
_DRAWN_PX = 144


def photo_jpeg(
    kind: str,
    dice_salt: int,
    width: int,
    height: int,
    *,
    ahead: str | None = None,
    frame: int = 0,
    exif_orientation: int = 1,
    mode: str = "RGB",
) -> bytes:
    """A photo's file.

    Args:
        kind: what it shows.
        dice_salt: decides the drawing.
        width: pixels, as stored.
        height: pixels, as stored.
        ahead: land-cover class in the background.
        frame: 0, or the number within a burst: a hand's shake away; -1: saved once more, by a worse encoder.
        exif_orientation: 1, 3, 6 or 8; the stored picture is turned so that a viewer that heeds it sees it upright.
        mode: `RGB` or `CMYK`.

    Returns:
        JPEG bytes.
    """
    is_turned = exif_orientation in (6, 8)
    upright = (height, width) if is_turned else (width, height)
    scale = _DRAWN_PX / min(upright)
    drawn = (max(1, round(upright[0] * scale)), max(1, round(upright[1] * scale)))
    image = Image.fromarray(render_scene(kind, dice_salt, *drawn, ahead=ahead))
    box = None
    if frame > 0:
        shake = Dice(dice_salt ^ frame)
        dx, dy = shake.between(0.5, 3.0), shake.between(0.5, 3.0)
        box = (dx, dy, drawn[0] - 3.0 + dx, drawn[1] - 3.0 + dy)
    image = image.resize(upright, Image.Resampling.BILINEAR, box=box)
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    if exif_orientation in turns:
        image = image.transpose(turns[exif_orientation])
        exif[0x0112] = exif_orientation
    if mode != image.mode:
        image = image.convert(mode)
    buffer = io.BytesIO()
    if exif_orientation in turns:
        image.save(buffer, "JPEG", quality=88, exif=exif)
    else:
        image.save(buffer, "JPEG", quality=76 if frame < 0 else 88)
    return buffer.getvalue()


def not_a_jpeg(flaw: str, jpeg: bytes) -> tuple[bytes, str]:
    """What a broken image host serves instead of a photo.

    Args:
        flaw: `html` (an error page with status 200), `truncated` (half of the file), `huge` (a PNG that claims
            900 megapixels), `animated` (a GIF of two frames); anything else changes nothing.
        jpeg: the photo.

    Returns:
        (bytes, media type).
    """
    if flaw == "html":
        page = b"<!DOCTYPE html><html><head><title>Sorry</title></head><body>This photo is not available.</body></html>"
        return page, "text/html"
    if flaw == "truncated":
        return jpeg[: len(jpeg) * 55 // 100], "image/jpeg"
    if flaw == "huge":

        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
        rows = chunk(b"IDAT", zlib.compress(bytes(90_001 * 4)))
        return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b""), "image/png"
    if flaw == "animated":
        frame = Image.open(io.BytesIO(jpeg)).convert("RGB")
        buffer = io.BytesIO()
        frame.quantize(64).save(
            buffer, "GIF", save_all=True, append_images=[frame.rotate(180).quantize(64)], duration=200, loop=0
        )
        return buffer.getvalue(), "image/gif"
    return jpeg, "image/jpeg"
