"""Runs programs of language.py over an image: what each operation does with the objects that a detector finds.

Detectors are in detection.py; how an answer's evidence is drawn, in evidence.py.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import filterfalse
from typing import Any, Protocol

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, binary_fill_holes
from scipy.spatial import KDTree

from graft_pipeline.errors import InputError
from training.zero_shot.answering.concepts import singular
from training.zero_shot.answering.language import (
    LARGE_M2,
    MEDIUM_M2,
    QUANTITIES,
    Call,
    Kind,
    Program,
    ProgramError,
    Value,
)

#: Of its tightest rectangle, and of its circle, a rectangular or round object fills at least these shares. A circle
#: fills 0.79 of its rectangle, a square 0.64 of its circle.
_RECTANGULAR_SHARE, _CIRCULAR_SHARE = 0.82, 0.75
#: A square is at most so much longer than wide.
_SQUARE_RATIO = 1.25
#: Objects on at least this share of an image are everywhere.
_EVERYWHERE_SHARE = 2 / 3
#: How deep the steps of an answer spell out a call.
_SPELLED_DEPTH = 4


@dataclass(frozen=True, eq=False)
class Image:
    """What is asked about; north is up.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        gsd_m: metres per pixel.
    """

    pixels: NDArray[np.uint8]
    gsd_m: float

    def __post_init__(self) -> None:
        """Reject what is no picture."""
        pixels = self.pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise InputError(
                f"An image is (H, W, 3) uint8 RGB, not {pixels.shape} {pixels.dtype}: convert it."
            )
        if not 0 < self.gsd_m < math.inf:
            raise InputError(f"{self.gsd_m} metres per pixel: give a positive number.")

    @property
    def height_px(self) -> int:
        """Rows."""
        return int(self.pixels.shape[0])

    @property
    def width_px(self) -> int:
        """Columns."""
        return int(self.pixels.shape[1])


@dataclass(frozen=True, eq=False)
class Detected:
    """One object in an image; objects on the very same pixels are one, whatever they were found as.

    Attributes:
        concept: what it was found as.
        top: row of its first pixel.
        left: column of its first pixel.
        mask: (height, width) bool, its pixels within its box; touches all four sides of it.
        score: how sure the detector is, 0 to 1.
    """

    concept: str
    top: int
    left: int
    mask: NDArray[np.bool_]
    score: float

    @classmethod
    def of_mask(cls, concept: str, mask: NDArray[np.bool_], score: float) -> "Detected":
        """An object from a mask of the whole image.

        Args:
            concept: what it is.
            mask: (H, W) bool with at least one pixel.
            score: 0 to 1.

        Returns:
            The object.

        Raises:
            InputError: if the mask is empty.
        """
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            raise InputError(f"An object needs a pixel: leave out {concept!r} where there is none.")
        inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return cls(concept, int(rows[0]), int(columns[0]), inside.copy(), score)

    @cached_property
    def _ground(self) -> tuple[int, int, tuple[int, ...], bytes]:
        return self.top, self.left, self.mask.shape, np.packbits(self.mask).tobytes()

    @cached_property
    def _hash(self) -> int:
        return hash(self._ground)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Detected) and (self is other or self._ground == other._ground)

    def __hash__(self) -> int:
        return self._hash

    @property
    def bottom(self) -> int:
        """Row behind its last pixel."""
        return self.top + self.mask.shape[0]

    @property
    def right(self) -> int:
        """Column behind its last pixel."""
        return self.left + self.mask.shape[1]

    @cached_property
    def pixels(self) -> int:
        """How many pixels it has."""
        return int(self.mask.sum())

    @cached_property
    def middle(self) -> tuple[float, float]:
        """Row and column of its pixels' mean, in pixel edges: 0.5 is the middle of the first."""
        rows, columns = np.nonzero(self.mask)
        return self.top + float(rows.mean()) + 0.5, self.left + float(columns.mean()) + 0.5

    def paint(self, canvas: NDArray[np.bool_]) -> None:
        """Set its pixels on a canvas of the image's size."""
        canvas[self.top : self.bottom, self.left : self.right] |= self.mask

    def middle_along(self, axis: int, first: int, behind: int) -> float:
        """Its middle row (axis 0) or column (axis 1), as seen from something across from it.

        Args:
            axis: 0 for a row, 1 for a column.
            first: the other one's first column (of axis 0) or row.
            behind: the one behind its last.

        Returns:
            Where its pixels are in the columns (rows) that both share, else the middle of its box: a river that
            crosses the image slanting lies south of what is above it there.
        """
        start, stop = ((self.left, self.right), (self.top, self.bottom))[axis]
        begin, end = max(first, start) - start, min(behind, stop) - start
        counts, sums = self._running[axis]
        if end > begin and (many := counts[end] - counts[begin]):
            return (self.top, self.left)[axis] + float((sums[end] - sums[begin]) / many) + 0.5
        return ((self.top + self.bottom) / 2, (self.left + self.right) / 2)[axis]

    @cached_property
    def _running(self) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]:
        """Running counts of its pixels and sums of their rows along columns; the same with rows and columns swapped."""
        made = []
        for mask in (self.mask, self.mask.T):
            counts = mask.sum(axis=0, dtype=np.int64)
            sums = (mask * np.arange(len(mask))[:, None]).sum(axis=0, dtype=np.int64)
            made.append((np.concatenate([[0], counts.cumsum()]), np.concatenate([[0], sums.cumsum()])))
        return tuple(made)

    @cached_property
    def _edge(self) -> KDTree:
        """Its outermost pixels, rows and columns of the image."""
        edge = self.mask & ~binary_erosion(self.mask)
        return KDTree(np.argwhere(edge) + np.array([self.top, self.left]))

    def gap_px(self, other: "Detected", at_most: float = math.inf) -> float:
        """Pixels between its edge and another's; 0 where they touch or overlap.

        Args:
            other: another object of the image.
            at_most: gaps above this need not be measured; they are infinite.
        """
        down = max(0, self.top - other.bottom, other.top - self.bottom)
        along = max(0, self.left - other.right, other.left - self.right)
        if math.hypot(down, along) > at_most:
            return math.inf
        if down == along == 0 and self.overlap_px(other):
            return 0.0
        few, many = sorted((self._edge, other._edge), key=lambda tree: tree.n)
        nearest, _ = many.query(few.data, distance_upper_bound=at_most + 2)
        # Between the middles of two pixels that touch is one pixel, and no gap.
        gap = max(0.0, float(nearest.min()) - 1)
        return gap if gap <= at_most else math.inf

    def overlap_px(self, other: "Detected", *, is_filled: bool = False) -> int:
        """Pixels that both have; filled: also those in holes of the other."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        if top >= bottom or left >= right:
            return 0
        mask = other._filled if is_filled else other.mask
        return int(
            (
                self.mask[top - self.top : bottom - self.top, left - self.left : right - self.left]
                & mask[top - other.top : bottom - other.top, left - other.left : right - other.left]
            ).sum()
        )

    @cached_property
    def _filled(self) -> NDArray[np.bool_]:
        return np.asarray(binary_fill_holes(self.mask), dtype=np.bool_)

    @cached_property
    def shape(self) -> tuple[float, float, float]:
        """Share of its tightest rectangle that it fills, that rectangle's length by its width, share of its circle."""
        # Corners of the hull are among the ends of rows.
        rows = np.flatnonzero(self.mask.any(axis=1))
        first = self.mask[rows].argmax(axis=1)
        last = self.mask.shape[1] - self.mask[rows, ::-1].argmax(axis=1)
        corners = np.concatenate(
            [np.stack([rows + i, ends], axis=1) for i in (0, 1) for ends in (first, last)]
        )
        hull = shapely.convex_hull(shapely.linestrings(corners))
        ring = shapely.get_coordinates(shapely.minimum_rotated_rectangle(hull))
        sides = np.hypot(*(ring[1:3] - ring[:2]).T)
        circle = math.pi * float(shapely.minimum_bounding_radius(hull)) ** 2
        return self.pixels / float(sides.prod()), float(sides.max() / sides.min()), self.pixels / circle


#: Objects of an image, each once; in the order in which they were found.
Objects = tuple[Detected, ...]


@dataclass(frozen=True)
class Unknown:
    """No answer, because what was asked about is not there; whatever is made of it is unknown, too.

    Attributes:
        reason: such as `there is no desert`.
    """

    reason: str


#: Values of answers and steps; of objects, how many there are.
Result = bool | int | float | str | Unknown


class Detector(Protocol):
    """Who sees: finds a concept's objects in an image.

    `tick` is to be called now and then during long work; it raises when the time is up.
    """

    def find(self, image: Image, concept: str, tick: Callable[[], None]) -> Sequence[Detected]:
        """Every object of a concept, such as "baseball field"; best first."""
        ...

    def classify(self, image: Image, options: Sequence[str], tick: Callable[[], None]) -> NDArray[np.float32]:
        """How much the whole image looks like each option, (K,) float32."""
        ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one run may use; the length and depth of programs are bounded in language.py.

    Attributes:
        seconds: of wall time.
        pixels: of the image.
        objects: of one concept.
    """

    seconds: float = 120.0
    pixels: int = 16_000_000
    objects: int = 2000

    def __post_init__(self) -> None:
        """Reject limits that nothing fits."""
        if self.seconds <= 0 or self.pixels <= 0 or self.objects <= 0:
            raise InputError("Limits are positive: give more seconds, pixels or objects.")


@dataclass(frozen=True)
class Step:
    """One call and what it gave.

    Attributes:
        call: as text.
        value: of the call; of objects, how many there are.
        kind: of the call.
    """

    call: str
    value: Result
    kind: Kind

    @property
    def shown(self) -> str:
        """The value as people read it."""
        return shown(self.value, self.kind)


@dataclass(frozen=True, eq=False)
class Link:
    """Why an object was kept by a relation.

    Attributes:
        relation: name of the operation.
        one: the object.
        other: what it lies north of, near to and so on.
    """

    relation: str
    one: Detected
    other: Detected


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an answer rests on.

    Attributes:
        objects: what was counted, measured or asked for.
        others: what else was found, such as the river that they lie north of.
        links: relations that hold between them.
        steps: calls in the order in which they were made.
    """

    objects: Objects
    others: Objects
    links: tuple[Link, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer to a question.

    Attributes:
        value: truth: bool; count: int; area (m2), share, distance (m): float; text: str; Unknown, if what was asked
            about is not there.
        kind: of the value.
        evidence: why.
        program: that was run.
    """

    value: Result
    kind: Kind
    evidence: Evidence
    program: Program

    @property
    def text(self) -> str:
        """The answer as people read it: `yes`, `3`, `12,400 m2`, `34.0 %`, `unknown: there is no desert`."""
        return shown(self.value, self.kind)


def shown(value: Result, kind: Kind) -> str:
    """A value as people read it.

    Args:
        value: of an answer or a step; of objects, how many there are.
        kind: of the value.
    """
    if isinstance(value, Unknown):
        return f"unknown: {value.reason}"
    if isinstance(value, str):
        return value
    if kind == "truth":
        return "yes" if value else "no"
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind == "objects":
        return f"{value} object{'' if value == 1 else 's'}"
    return f"{value:g}" if kind == "number" else f"{value:,.0f} {QUANTITIES[kind]}".strip()


class Interpreter:
    """Runs programs.

    Args:
        detector: finds their objects.
        limits: of each run.
    """

    def __init__(self, detector: Detector, limits: Limits | None = None) -> None:
        self._detector, self._limits = detector, limits or Limits()

    def run(self, program: Program, image: Image) -> Answer:
        """Answer with a program.

        Args:
            program: from `language.parse`.
            image: to look at.

        Returns:
            The answer with its evidence. A concept is looked for once, a call that is used twice is made once.

        Raises:
            InputError: if the image is too large.
            ProgramError: if a limit is reached; says at which call.
        """
        pixels = image.height_px * image.width_px
        if pixels > self._limits.pixels:
            raise InputError(
                f"The image has {pixels:,} pixels, more than {self._limits.pixels:,}: ask about a part of it."
            )
        return _Run(program, image, self._detector, self._limits).answer()


@dataclass(eq=False)
class _Run:
    """The state of one run."""

    program: Program
    image: Image
    detector: Detector
    limits: Limits
    found: dict[str, Objects] = field(default_factory=dict)
    asked_about: dict[Detected, None] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._values: dict[Call, Any] = {}
        self._until = time.monotonic() + self.limits.seconds
        self._at = self.program.answer

    def answer(self) -> Answer:
        value = self._value(self.program.answer)
        others = dict.fromkeys(of for objects in self.found.values() for of in objects)
        objects = tuple(self.asked_about)
        links = tuple(link for link in self.links if link.one in self.asked_about)
        evidence = Evidence(
            objects, tuple(of for of in others if of not in self.asked_about), links, tuple(self.steps)
        )
        return Answer(value, self.program.kind, evidence, self.program)

    def tick(self) -> None:
        """Stop when the time is up."""
        if time.monotonic() > self._until:
            self._stop(f"the program took more than {self.limits.seconds:g} s")

    def _stop(self, what: str) -> None:
        raise ProgramError(f"{what}: ask for less, or about a smaller image.", self._at.line, self._at.column)

    def _value(self, node: Call | Value) -> Any:
        if isinstance(node, Value):
            return node.value
        if node not in self._values:
            arguments = [self._value(argument) for argument in node.arguments]
            self._at = node
            self.tick()
            name = node.operation.name
            if name in _MEASURES:
                # What numbers and truths are made of is what the answer rests on; `distance` has two.
                for argument in arguments:
                    if not isinstance(argument, Unknown):
                        self.asked_about.update(dict.fromkeys(argument))
            value = self._unknown(node, arguments) or RUNS[name](self, *arguments)
            if node.kind == "count" and not isinstance(value, Unknown):
                value = int(value)
            self._values[node] = value
            brief = len(value) if isinstance(value, tuple) else value
            self.steps.append(Step(_spelled(node, _SPELLED_DEPTH), brief, node.kind))
        return self._values[node]

    def _unknown(self, node: Call, arguments: list[Any]) -> Unknown | None:
        """Why a call has no value, if it has none."""
        for argument in arguments:
            if isinstance(argument, Unknown):
                return argument
        if node.operation.name == "distance":
            for of, argument in zip(node.arguments, arguments, strict=True):
                if not argument:
                    return Unknown(f"there is no {_brief(of)}")
        if node.operation.name == "choose" and isinstance(condition := node.arguments[0], Call):
            return self._tie(condition)
        return None

    def _tie(self, condition: Call) -> Unknown | None:
        """Why neither of two texts fits: what they were chosen by is the same of both things."""
        if condition.operation.name not in ("more", "less"):
            return None
        one, other = condition.arguments
        if isinstance(one, Value) or isinstance(other, Value):
            return None
        value = self._value(one)
        if value != self._value(other):
            return None
        if not value and {one.operation.name, other.operation.name} <= {"count", "area", "share"}:
            return Unknown(f"there is neither {_brief(one.arguments[0])} nor {_brief(other.arguments[0])}")
        return Unknown(f"both are {shown(value, one.kind)}")

    # --- looking ---

    def find(self, concept: str) -> Objects:
        key = singular(concept)
        if key not in self.found:
            objects = tuple(self.detector.find(self.image, key, self.tick))
            if len(objects) > self.limits.objects:
                self._stop(
                    f"there are {len(objects)} objects of {concept!r}, more than {self.limits.objects}"
                )
            self.found[key] = objects
        return self.found[key]

    def classify(self, *options: str) -> str:
        return options[int(np.argmax(self.detector.classify(self.image, options, self.tick)))]

    # --- measuring ---

    def area(self, objects: Objects) -> float:
        return self._covered(objects) * self.image.gsd_m**2

    def share(self, objects: Objects) -> float:
        return self._covered(objects) / (self.image.height_px * self.image.width_px)

    def _covered(self, objects: Objects) -> int:
        return int(self._canvas(objects).sum())

    def _canvas(self, objects: Objects) -> NDArray[np.bool_]:
        canvas = np.zeros((self.image.height_px, self.image.width_px), np.bool_)
        for of in objects:
            self.tick()
            of.paint(canvas)
        return canvas

    def where(self, objects: Objects) -> str:
        canvas = self._canvas(objects)
        if not canvas.any():
            return "nowhere"
        if canvas.mean() >= _EVERYWHERE_SHARE:
            return "everywhere"
        rows, columns = np.nonzero(canvas)
        return _part((rows.mean() + 0.5) / canvas.shape[0], (columns.mean() + 0.5) / canvas.shape[1])

    def distance(self, objects: Objects, others: Objects) -> float | Unknown:
        link = self._closest(objects, others)
        if link is None:
            return Unknown("there is only one of them")
        self.links.append(Link("distance", link[1], link[2]))
        return link[0] * self.image.gsd_m

    def _closest(self, objects: Objects, others: Objects) -> tuple[float, Detected, Detected] | None:
        best: tuple[float, Detected, Detected] | None = None
        for one, other in self._pairs(objects, others):
            gap = one.gap_px(other, math.inf if best is None else best[0])
            if best is None or gap < best[0]:
                best = (gap, one, other)
        return best

    def _pairs(self, objects: Objects, others: Objects) -> Iterator[tuple[Detected, Detected]]:
        for one in objects:
            for other in others:
                self.tick()
                if other != one:
                    yield one, other

    # --- choosing ---

    def _related(
        self, relation: str, objects: Objects, others: Objects, holds: Callable[[Detected, Detected], bool]
    ) -> Objects:
        kept = []
        for one in objects:
            for other in others:
                self.tick()
                if other != one and holds(one, other):
                    kept.append(one)
                    self.links.append(Link(relation, one, other))
                    break
        return tuple(kept)

    def north_of(self, objects: Objects, others: Objects) -> Objects:
        return self._related(
            "north_of", objects, others, lambda a, b: a.bottom <= b.middle_along(0, a.left, a.right)
        )

    def south_of(self, objects: Objects, others: Objects) -> Objects:
        return self._related(
            "south_of", objects, others, lambda a, b: a.top >= b.middle_along(0, a.left, a.right)
        )

    def west_of(self, objects: Objects, others: Objects) -> Objects:
        return self._related(
            "west_of", objects, others, lambda a, b: a.right <= b.middle_along(1, a.top, a.bottom)
        )

    def east_of(self, objects: Objects, others: Objects) -> Objects:
        return self._related(
            "east_of", objects, others, lambda a, b: a.left >= b.middle_along(1, a.top, a.bottom)
        )

    def near(self, objects: Objects, others: Objects, metres: float) -> Objects:
        reach = metres / self.image.gsd_m
        return self._related("near", objects, others, lambda a, b: a.gap_px(b, reach) <= reach)

    def inside(self, objects: Objects, others: Objects) -> Objects:
        return self._related(
            "inside", objects, others, lambda a, b: 2 * a.overlap_px(b, is_filled=True) > a.pixels
        )

    def nearest(self, objects: Objects, others: Objects) -> Objects:
        link = self._closest(objects, others)
        if link is None:
            return ()
        self.links.append(Link("nearest", link[1], link[2]))
        return (link[1],)

    def in_part(self, objects: Objects, part: str) -> Objects:
        # Halves, but for the center: what is a little north of the middle is in the north.
        height, width = self.image.height_px, self.image.width_px
        wanted = set(part.split("-"))

        def is_there(of: Detected) -> bool:
            self.tick()
            row, column = of.middle[0] / height, of.middle[1] / width
            holds = {
                "north": row < 0.5, "south": row > 0.5, "west": column < 0.5, "east": column > 0.5,
                "center": abs(row - 0.5) <= 1 / 6 and abs(column - 0.5) <= 1 / 6,
            }  # fmt: skip
            return all(holds[name] for name in wanted)

        return tuple(of for of in objects if is_there(of))

    def sized(self, objects: Objects, least_m2: float, most_m2: float) -> Objects:
        pixel_m2 = self.image.gsd_m**2
        return tuple(of for of in objects if least_m2 <= of.pixels * pixel_m2 < most_m2)

    def shaped(self, objects: Objects, fits: Callable[[Detected], bool]) -> Objects:
        kept = []
        for of in objects:
            self.tick()
            if fits(of):
                kept.append(of)
        return tuple(kept)


def _part(row: float, column: float) -> str:
    """The ninth of the image that a place lies in, from its row and column as shares."""
    down = "north" if row < 1 / 3 else "south" if row > 2 / 3 else ""
    along = "west" if column < 1 / 3 else "east" if column > 2 / 3 else ""
    return "-".join(name for name in (down, along) if name) or "center"


def _is_rectangular(of: Detected) -> bool:
    return of.shape[0] >= _RECTANGULAR_SHARE


def _by_area(objects: Objects, *, is_largest: bool) -> Objects:
    if not objects:
        return ()
    return ((max if is_largest else min)(objects, key=lambda of: of.pixels),)


def _brief(node: Call | Value) -> str:
    """Objects of a call in words: what they were looked for as, and that more was asked of them."""
    asked = node
    while isinstance(asked, Call) and asked.operation.name != "find":
        asked = asked.arguments[0]
    if not isinstance(asked, Call):
        return "such object"
    concept = singular(str(asked.arguments[0].value))
    return concept if asked is node else f"such {concept}"


def _spelled(node: Call | Value, depth: int) -> str:
    """A call as text; a name that is used again and again would spell out without end."""
    if isinstance(node, Value):
        return f'"{node.value}"' if node.kind == "text" else f"{node.value:g}"
    if depth == 0:
        return "..."
    return f"{node.operation.name}({', '.join(_spelled(of, depth - 1) for of in node.arguments)})"


#: Operations that make something else of objects.
_MEASURES = {"exists", "count", "area", "share", "distance", "where"}
#: What each operation of the language does; `_Run` first, then its arguments.
RUNS: dict[str, Callable[..., Any]] = {
    "find": _Run.find,
    "exists": lambda run, objects: len(objects) > 0,
    "count": lambda run, objects: len(objects),
    "area": _Run.area,
    "share": _Run.share,
    "distance": _Run.distance,
    "where": _Run.where,
    "classify": _Run.classify,
    "choose": lambda run, condition, yes, no: yes if condition else no,
    "more": lambda run, first, second: first > second,
    "less": lambda run, first, second: first < second,
    "equal": lambda run, first, second: first == second,
    "add": lambda run, first, second: first + second,
    "subtract": lambda run, first, second: max(first - second, 0),
    "both": lambda run, one, other: one and other,
    "either": lambda run, one, other: one or other,
    "negate": lambda run, condition: not condition,
    "north_of": _Run.north_of,
    "south_of": _Run.south_of,
    "east_of": _Run.east_of,
    "west_of": _Run.west_of,
    "near": _Run.near,
    "inside": _Run.inside,
    "nearest": _Run.nearest,
    "in_part": _Run.in_part,
    "largest": lambda run, objects: _by_area(objects, is_largest=True),
    "smallest": lambda run, objects: _by_area(objects, is_largest=False),
    "small": lambda run, objects: run.sized(objects, 0, MEDIUM_M2),
    "medium": lambda run, objects: run.sized(objects, MEDIUM_M2, LARGE_M2),
    "large": lambda run, objects: run.sized(objects, LARGE_M2, math.inf),
    "sized": _Run.sized,
    "square": lambda run, objects: run.shaped(
        objects, lambda of: _is_rectangular(of) and of.shape[1] <= _SQUARE_RATIO
    ),
    "rectangular": lambda run, objects: run.shaped(objects, _is_rectangular),
    "circular": lambda run, objects: run.shaped(objects, lambda of: of.shape[2] >= _CIRCULAR_SHARE),
    "union": lambda run, objects, others: tuple(dict.fromkeys((*objects, *others))),
    "intersection": lambda run, objects, others: tuple(filter(set(others).__contains__, objects)),
    "without": lambda run, objects, others: tuple(filterfalse(set(others).__contains__, objects)),
}
