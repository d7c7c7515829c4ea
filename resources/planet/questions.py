"""Questions about the planet with known answers, from its truth; for evaluation only, written in RSVQA's format.

No asset of the training path reads this module. The format is read, and answers are scored, in
training/zero_shot/answering.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from graft_pipeline.geometry import Grid, Projection, utm_epsg
from graft_pipeline.imagery import ImagerySource, Sensor
from graft_pipeline.manifests import write_bytes_atomic
from resources.planet.benchmark import coarse_cover, fetch_crops, square_of
from resources.planet.truth_client import PlanetTruth

logger = logging.getLogger(__name__)

#: The truth is looked at in every second row and column of an image: nothing that is asked about is thinner.
TRUTH_PX = 2
#: An object is a connected area of at least this share of the image. It is not asked whether a class is there of which
#: only less is, nor for counts in which smaller pieces, narrow bridges or narrow gaps would decide.
OBJECT_SHARE, SPECK_SHARE = 0.01, 0.001
BRIDGE_SHARE = 1 / 40
#: Rural and urban images, by their share of buildings' land; what is between is not asked about.
BUILT = ("residential", "industrial")
RURAL_SHARE, URBAN_SHARE = 0.05, 0.4
#: A direction is asked about where it is clear by this share of the image's side.
CLEAR_SHARE = 1 / 8
#: What is next to something, and what is not.
NEAR_M, FAR_M = 25.0, 150.0
#: RSVQA-HR's ranges of areas end at these shares of an image; answers nearer to an end than the margin are not asked.
AREA_SHARES = (10 / 6088.5, 100 / 6088.5, 1000 / 6088.5)
AREA_MARGIN = 0.15
#: RSVQA's own share of questions that say "in the image".
IN_THE_IMAGE_SHARE = 0.1

SINGULAR = {
    "residential": "residential area",
    "industrial": "industrial area",
    "baseball": "baseball field",
}
DIRECTIONS = ("on the left of", "on the right of", "at the top of", "at the bottom of")
PREFIX = "PLANET"
#: A quarter of the images, and the questions about them, is for what can be known without looking, and for thresholds.
SPLITS = ("test", "test", "test", "val")
TYPES = ("presence", "comp", "count", "area", "rural_urban", "relation")


@dataclass(frozen=True)
class Thing:
    """What an image shows of one class.

    Attributes:
        share: share of the image.
        count: objects; None where it is not clear.
        masks: one (H, W) bool per object.
        gaps: share of the side between it and the nearest ground of another class, by class.
    """

    share: float
    count: int | None = 0
    masks: tuple[NDArray[np.bool_], ...] = ()
    gaps: dict[str, float] = field(default_factory=dict)

    @property
    def is_there(self) -> bool | None:
        """Whether there is an object; None where there is less than one."""
        return True if self.masks else False if self.share == 0 else None


@dataclass(frozen=True)
class Asked:
    """A question and its answer, as RSVQA writes them.

    Attributes:
        image: number of the image.
        type: RSVQA's type, or `relation`.
        text: the question.
        answer: `yes`, `no`, a number, an area such as `2000m2`, `rural`, `urban`.
    """

    image: int
    type: str
    text: str
    answer: str


@dataclass(frozen=True, eq=False)
class PlanetQuestions:
    """Images of one sensor, and questions about them.

    Attributes:
        pixels: (N, P, P, 3) uint8 RGB.
        grids: where they lie.
        splits: `test` or `val` of each.
        questions: about all of them.
    """

    pixels: NDArray[np.uint8]
    grids: tuple[Grid, ...]
    splits: tuple[str, ...]
    questions: tuple[Asked, ...]

    @property
    def squares(self) -> NDArray[np.float64]:
        """(N, 4) west, south, east, north of the images, EPSG:4326 degrees."""
        return np.array([square_of(grid) for grid in self.grids]).reshape(-1, 4)

    def write(self, folder: UPath, sensor: Sensor) -> None:
        """Write RSVQA's JSON files, `PLANET_split_test_questions.json` and so on, and `Images/{number}.tif`.

        Args:
            folder: where to.
            sensor: whose images they are.
        """
        for number, (pixels, grid) in enumerate(zip(self.pixels, self.grids, strict=True)):
            write_bytes_atomic(folder / "Images" / f"{number}.tif", _tiff(pixels, grid))
        of_image: dict[int, list[int]] = {}
        for number, asked in enumerate(self.questions):
            of_image.setdefault(asked.image, []).append(number)
        for split in sorted(set(SPLITS)):
            images = [
                {
                    "id": number,
                    "original_name": f"{number}.tif",
                    "sensor": sensor.name,
                    "upperleft_map_x": grid.x0_m,
                    "upperleft_map_y": grid.y0_m,
                    "res_x": f"{grid.gsd_m:g}m",
                    "res_y": f"{grid.gsd_m:g}m",
                    "type": "Visible",
                    "questions_ids": of_image.get(number, []),
                    "active": True,
                }
                if own == split
                # As published: entries of other splits are a bare id.
                else {"id": number, "active": False}
                for number, (grid, own) in enumerate(zip(self.grids, self.splits, strict=True))
            ]
            questions, answers = [], []
            for number, asked in enumerate(self.questions):
                is_own = self.splits[asked.image] == split
                stub = {"id": number, "active": is_own}
                of_question = {"img_id": asked.image, "type": asked.type, "question": asked.text}
                questions.append(
                    stub | (of_question | {"answers_ids": [number], "people_id": 0} if is_own else {})
                )
                answers.append(
                    stub | ({"question_id": number, "answer": asked.answer, "people_id": 0} if is_own else {})
                )
            for kind, rows in {"questions": questions, "answers": answers, "images": images}.items():
                content = json.dumps({kind: rows}) + "\n"
                write_bytes_atomic(folder / f"{PREFIX}_split_{split}_{kind}.json", content.encode())


def build_questions(
    truth: PlanetTruth,
    imagery: ImagerySource,
    sensor: Sensor,
    bounds: tuple[float, float, float, float],
    *,
    images: int = 128,
    per_type: int = 120,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PlanetQuestions:
    """Choose images of an area, fetch them, and ask about them what has a clear answer.

    Args:
        truth: the planet's truth.
        imagery: the client that images come through.
        sensor: the sensor; an image is one chip.
        bounds: (west, south, east, north) of the area, EPSG:4326, within one UTM zone.
        images: images, at most; none overlaps another.
        per_type: test questions of each type, at most; a third as many more for validation.
        seed: chooses places and questions.
        progress: told (done, total).

    Returns:
        The images and questions; answers of a type are as frequent as each other where there are enough of each.

    Raises:
        InputError: if no scene shows an image of the area.
    """
    rng = np.random.default_rng([seed, 0x9E57])
    places = _places(truth, sensor, bounds, images, rng)
    found = fetch_crops(imagery, sensor, bounds, places, progress)
    grids = tuple(grid for grid, pixels in zip(places, found, strict=True) if pixels is not None)
    kept = [pixels for pixels in found if pixels is not None]
    if len(kept) < len(places):
        logger.warning("%d of %d images have no usable scene", len(places) - len(kept), len(places))
    names = tuple(truth.classes)
    things = [_things(truth.land_cover(_sampled(grid)), names) for grid in grids]
    # Images come around one class after another: not every fourth of them.
    splits = tuple(SPLITS[number % len(SPLITS)] for number in rng.permutation(len(grids)))
    questions: list[Asked] = []
    for split in sorted(set(SPLITS)):
        own = [number for number in range(len(grids)) if splits[number] == split]
        wanted = per_type if split == "test" else per_type // 3
        questions += _ask(own, [things[number] for number in own], sensor, wanted, rng)
    return PlanetQuestions(np.stack(kept), grids, splits, tuple(questions))


def _places(
    truth: PlanetTruth,
    sensor: Sensor,
    bounds: tuple[float, float, float, float],
    count: int,
    rng: np.random.Generator,
) -> list[Grid]:
    """Grids of images that do not overlap, around as many cells of each class."""
    west, south, east, north = bounds
    projection = Projection(utm_epsg((west + east) / 2, (south + north) / 2))
    x, y = projection.forward(np.array([west, east, east, west]), np.array([south, south, north, north]))
    x_min, x_max, y_min, y_max = max(x[0], x[3]), min(x[1], x[2]), max(y[0], y[1]), min(y[2], y[3])
    side_m = sensor.chip_px * sensor.gsd_m
    # No larger than this needs to be looked at for so few images; and two cells across the least of what is asked.
    gsd = side_m / 16
    columns, rows = (int(min(640, extent // gsd)) for extent in (x_max - x_min, y_max - y_min))
    coarse = Grid(projection.epsg, float(x_min), float(y_min) + rows * gsd, gsd, columns, rows)
    cover = coarse_cover(truth, coarse)
    taken = np.zeros(cover.shape, bool)
    # Half an image and the shift from the border, an image and two shifts from the next.
    taken[:14], taken[-14:], taken[:, :14], taken[:, -14:] = True, True, True, True
    order = [
        iter(rng.permutation(np.argwhere(cover == number), axis=0)) for number in range(len(truth.classes))
    ]
    grids: list[Grid] = []
    while order and len(grids) < count:
        for cells in tuple(order):
            cell = next((cell for cell in cells if not taken[tuple(cell)]), None)
            if cell is None:
                order.remove(cells)
                continue
            row, column = cell
            taken[max(0, row - 26) : row + 27, max(0, column - 26) : column + 27] = True
            # Not always in the middle of the image.
            shift = rng.uniform(-0.3, 0.3, 2) * side_m
            place_x, place_y = coarse.to_xy(column + 0.5, row + 0.5)
            grid = Grid.snapped(
                coarse.epsg,
                float(place_x) + shift[0],
                float(place_y) + shift[1],
                sensor.gsd_m,
                sensor.chip_px,
            )
            grids.append(grid)
    return grids[:count]


def _sampled(grid: Grid) -> Grid:
    """The grid of every TRUTH_PX-th row and column."""
    width, height = grid.width_px // TRUTH_PX, grid.height_px // TRUTH_PX
    return Grid(grid.epsg, grid.x0_m, grid.y0_m, grid.gsd_m * TRUTH_PX, width, height)


def _things(cover: NDArray[np.uint8], names: Sequence[str]) -> dict[str, Thing]:
    """What an image shows, by class.

    Args:
        cover: (H, W) class ids.
        names: classes by id.
    """
    from scipy.ndimage import binary_closing, binary_opening, distance_transform_edt, label

    side = len(cover)
    found = np.unique(cover)
    reach = max(1, round(side * BRIDGE_SHARE / 2))
    disc = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= reach + 0.5
    everywhere = np.ones((3, 3), bool)
    made = {}
    for number, name in enumerate(names):
        mask = cover == number
        share = float(mask.mean())

        def objects(of: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int64], bool]:
            """Labels, numbers of the objects, and whether something is neither an object nor a speck."""
            labels, _ = label(of, everywhere)
            shares = np.bincount(labels.reshape(-1))[1:] / of.size
            unclear = bool(((shares >= SPECK_SHARE) & (shares < OBJECT_SHARE)).any())
            return labels, np.flatnonzero(shares >= OBJECT_SHARE), unclear

        if share == 0:
            made[name] = Thing(0.0)
            continue
        labels, own, unclear = objects(mask)
        # Beyond the image the land goes on: its border neither cuts a bridge nor closes a gap.
        padded = np.pad(mask, reach, mode="edge")
        inner = (slice(reach, -reach), slice(reach, -reach))
        closed = objects(binary_closing(padded, disc)[inner])[1]
        opened = objects(binary_opening(padded, disc)[inner])[1]
        is_clear = not unclear and len(own) == len(closed) == len(opened)
        beyond = distance_transform_edt(~mask) / side
        made[name] = Thing(
            share,
            len(own) if is_clear else None,
            tuple(labels == k + 1 for k in own),
            {names[other]: float(beyond[cover == other].min()) for other in found if other != number},
        )
    return made


def _ask(
    images: Sequence[int],
    things: Sequence[dict[str, Thing]],
    sensor: Sensor,
    per_type: int,
    rng: np.random.Generator,
) -> list[Asked]:
    """Questions about images, of each type at most so many, balanced."""
    made: list[Asked] = []
    side_m = sensor.chip_px * sensor.gsd_m
    for question_type in TYPES:
        candidates: dict[str, dict[str, list[Asked]]] = {}
        for image, shown in zip(images, things, strict=True):
            for subject, text, answer, stratum in _candidates(question_type, shown, side_m, rng):
                asked = Asked(image, question_type, text, answer)
                candidates.setdefault(stratum, {}).setdefault(subject, []).append(asked)
        for asked in _balanced(candidates, per_type, rng):
            ending = " in the image" if rng.random() < IN_THE_IMAGE_SHARE else ""
            made.append(Asked(asked.image, asked.type, f"{asked.text}{ending}?", asked.answer))
    return made


def _balanced(
    candidates: dict[str, dict[str, list[Asked]]], wanted: int, rng: np.random.Generator
) -> list[Asked]:
    """As many of each stratum, and within it as many about each subject, as there are.

    Args:
        candidates: stratum (answers that count as one) to subject to questions.
        wanted: questions at most.
        rng: chooses.
    """
    if not candidates:
        return []
    quota = wanted // len(candidates)
    strata = [candidates[name] for name in sorted(candidates)]
    if len(strata) == 2:
        # Yes or no: a subject that is asked about is as often the one as the other, so its words give nothing away.
        first, second = strata
        counts = {name: min(len(first[name]), len(second[name])) for name in first if name in second}
        strata = [
            {
                name: [of[name][k] for k in rng.permutation(len(of[name]))[:count]]
                for name, count in counts.items()
            }
            for of in strata
        ]
    chosen: list[Asked] = []
    # The same shuffled order of subjects for each stratum, so that equal numbers of each are taken.
    names = sorted({name for of in strata for name in of})
    order = [names[k] for k in rng.permutation(len(names))]
    for of in strata:
        queues = [[of[name][k] for k in rng.permutation(len(of[name]))] for name in order if of.get(name)]
        rounds = itertools.zip_longest(*queues)
        taken = [asked for some in rounds for asked in some if asked is not None]
        chosen += taken[:quota]
    return [chosen[k] for k in rng.permutation(len(chosen))]


def _candidates(
    question_type: str, shown: dict[str, Thing], side_m: float, rng: np.random.Generator
) -> Iterable[tuple[str, str, str, str]]:
    """(subject, question without its mark, answer, stratum) of what can be asked of one image."""
    if question_type == "presence":
        for name, thing in shown.items():
            if thing.is_there is not None:
                one, answer = _one(name), _yes(thing.is_there)
                text = rng.choice((f"Is there {_a(one)}", f"Is {_a(one)} present"))
                yield name, str(text), answer, answer
    elif question_type == "comp":
        yield from _comparisons(shown)
    elif question_type == "count":
        for name, thing in shown.items():
            if thing.count is not None:
                many = _many(name)
                text = rng.choice(
                    (
                        f"How many {many} are there",
                        f"What is the number of {many}",
                        f"What is the amount of {many}",
                    )
                )
                yield name, str(text), str(thing.count), str(min(thing.count, 3))
    elif question_type == "area":
        for name, thing in shown.items():
            ends = [abs(thing.share / end - 1) for end in AREA_SHARES]
            if thing.share == 0 or (thing.share > AREA_SHARES[0] and min(ends) > AREA_MARGIN):
                stratum = str(sum(thing.share > end for end in AREA_SHARES))
                text = f"What is the area covered by {_many(name)}"
                yield name, text, f"{int(thing.share * side_m**2)}m2", stratum
    elif question_type == "rural_urban":
        built = sum(shown[name].share for name in BUILT)
        if not RURAL_SHARE < built < URBAN_SHARE:
            answer = "rural" if built <= RURAL_SHARE else "urban"
            yield "", "Is it a rural or an urban area", answer, answer
    else:
        yield from _relations(shown, side_m)


def _comparisons(shown: dict[str, Thing]) -> Iterable[tuple[str, str, str, str]]:
    for first, second in itertools.permutations(shown, 2):
        one, other = shown[first], shown[second]
        if one.count is None or other.count is None or not one.count + other.count:
            continue
        a, b = _many(first), _many(second)
        for subject, text, is_so in (
            ("less", f"Are there less {a} than {b}", one.count < other.count),
            ("more", f"Are there more {a} than {b}", one.count > other.count),
            ("equal", f"Is the number of {a} equal to the number of {b}", one.count == other.count),
        ):
            yield subject, text, _yes(is_so), _yes(is_so)


def _relations(shown: dict[str, Thing], side_m: float) -> Iterable[tuple[str, str, str, str]]:
    """RSVQA's relations to the only object of a class: wholly beyond its middle in a direction, or next to it."""
    for first, second in itertools.permutations(shown, 2):
        one, other = shown[first], shown[second]
        if not one.count or other.count != 1:
            continue
        gap_m = one.gaps[second] * side_m
        if not NEAR_M < gap_m < FAR_M:
            answer = _yes(gap_m <= NEAR_M)
            yield "next to", f"Is there {_a(_one(first))} next to the {_one(second)}", answer, answer
        for direction in DIRECTIONS:
            found = [_lies(direction, mask, other.masks[0]) for mask in one.masks]
            if any(found) or all(lies is False for lies in found):
                answer = _yes(any(found))
                yield direction, f"Is there {_a(_one(first))} {direction} the {_one(second)}", answer, answer


def _lies(direction: str, one: NDArray[np.bool_], other: NDArray[np.bool_]) -> bool | None:
    """Whether an object lies wholly in a direction of the middle of another; None where that is not clear.

    What the middle of a long thing is may be seen in three ways: of its box, of all its ground, of its ground across
    from the object. A direction is clear where all of them agree.
    """
    if direction in DIRECTIONS[:2]:
        one, other = one.T, other.T
    if direction in (DIRECTIONS[1], DIRECTIONS[3]):
        one, other = one[::-1], other[::-1]
    # Now it is asked whether one lies above the other.
    rows, columns = np.flatnonzero(one.any(axis=1)), np.flatnonzero(one.any(axis=0))
    across = np.nonzero(other[:, columns[0] : columns[-1] + 1])[0]
    all_rows = np.nonzero(other)[0]
    middles = [(all_rows.min() + all_rows.max()) / 2, all_rows.mean()]
    middles += [across.mean()] if len(across) else []
    clear = CLEAR_SHARE * len(one)
    if rows[-1] < min(middles) - clear / 2:
        return True
    return False if np.nonzero(one)[0].mean() > max(middles) + clear else None


def _one(name: str) -> str:
    return SINGULAR.get(name, name)


def _many(name: str) -> str:
    one = _one(name)
    return f"{one}es" if one.endswith("ch") else f"{one}s"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _tiff(pixels: NDArray[np.uint8], grid: Grid) -> bytes:
    from rasterio.io import MemoryFile

    profile = {
        "driver": "GTiff",
        "width": grid.width_px,
        "height": grid.height_px,
        "count": 3,
        "dtype": "uint8",
    }
    with MemoryFile() as memory:
        with memory.open(
            **profile, crs=grid.crs, transform=grid.affine, compress="deflate", predictor=2
        ) as file:
            file.write(np.moveaxis(pixels, -1, 0))
        return bytes(memory.read())
