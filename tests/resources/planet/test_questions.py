"""Questions about the planet: read back with RSVQA's reader, and answered by whoever knows the truth."""

import json

import numpy as np
import pytest
import rasterio
import shapely
from scipy.ndimage import label
from upath import UPath

from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import NAIP
from graft_pipeline.settings import Settings
from resources.imagery import open_imagery
from resources.planet.landcover import CLASS_NAMES
from resources.planet.questions import OBJECT_SHARE, TYPES, build_questions
from resources.planet.truth_client import PlanetTruth
from resources.planet.world import World
from resources.world import open_world
from training.zero_shot.answering.grammar import write_program
from training.zero_shot.answering.interpreter import Detected, Interpreter
from training.zero_shot.answering.rsvqa import open_question_set
from training.zero_shot.answering.scoring import PRIOR, TASK, ProgramAnswerer, evaluate_answers

BOUNDS = (-70.5, 43.0, -70.0, 43.4)


@pytest.fixture(scope="module")
def build(planet):
    """Builds the questions of 16 images."""
    with open_world(Settings(world="planet", planet={"url": planet.url})) as settings:
        imagery = open_imagery(settings)
        yield lambda seed: build_questions(
            PlanetTruth(planet.url), imagery, NAIP, BOUNDS, images=16, per_type=30, seed=seed
        )


@pytest.fixture(scope="module")
def made(build):
    return build(0)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    folder = UPath(tmp_path_factory.mktemp("questions"))
    made.write(folder, NAIP)
    return folder


class KnowsTheTruth:
    """A detector (interpreter.Detector) that looks at the land cover behind an image."""

    def __init__(self, folder):
        self._world, self._covers = World(0), {}
        for file in (folder / "Images").iterdir():
            with rasterio.open(file) as source:
                grid = Grid(
                    source.crs.to_epsg(), *(source.transform[k] for k in (2, 5, 0)), *source.shape[::-1]
                )
                self._covers[source.read().tobytes()] = self._world.land_cover(grid)
        self._numbers = {
            word: self._world.classes.index(name) for name, words in CLASS_NAMES.items() for word in words
        }

    def find(self, image, concept, tick):
        cover = self._covers[np.moveaxis(image.pixels, -1, 0).tobytes()]
        labels, count = label(cover == self._numbers[concept], np.ones((3, 3)))
        objects = [Detected.of_mask(concept, labels == n + 1, 1.0) for n in range(count)]
        # Specks too: a question must not depend on them, but for areas.
        return [of for of in objects if of.pixels >= OBJECT_SHARE / 4 * cover.size]

    def classify(self, image, options, tick):
        cover = self._covers[np.moveaxis(image.pixels, -1, 0).tobytes()]
        built = np.isin(cover, [self._numbers["residential area"], self._numbers["factory"]]).mean()
        return np.array([built if "urban" in option else 0.2 for option in options], np.float32)


def test_who_knows_the_truth_answers_everything(folder):
    questions = open_question_set("planet_questions", folder)
    answerer = ProgramAnswerer("truth", write_program, Interpreter(KnowsTheTruth(folder)))
    made = evaluate_answers([answerer], questions)
    assert set(made.questions) == set(TYPES)
    assert not made.unanswered["truth"]
    scores = {name: measure.value for name, measure in made.metrics[TASK]["truth"].items()}
    # An area may be made of specks alone, which this detector leaves out.
    assert scores.pop("area") > 0.8
    assert [scores[name] for name in TYPES if name != "area"] == [1.0] * 5
    assert made.metrics[TASK][PRIOR]["average"].value < 0.55


def test_the_words_give_no_answer_away(made):
    for kind in ("presence", "relation", "comp", "rural_urban"):
        for split in ("test", "val"):
            answers = [
                of.answer for of in made.questions if of.type == kind and made.splits[of.image] == split
            ]
            counts = [answers.count(answer) for answer in set(answers)]
            assert len(counts) in (0, 2)
            assert len(set(counts)) < 2, f"{kind} of {split} is out of balance"


def test_splits_do_not_follow_the_order_of_classes(made, build):
    """Images are placed around one class after another, so that a split of every fourth would lack classes."""
    for questions in (made, build(2)):
        own = [number for number, split in enumerate(questions.splits) if split == "val"]
        assert len(own) == len(questions.splits) / 4
        assert len({number % 4 for number in own}) > 1


def test_files_are_as_rsvqa_publishes_them(made, folder):
    read = open_question_set("planet_questions", folder)
    own = [of for of in made.questions if made.splits[of.image] == "test"]
    assert sorted(of.text for of in read.questions) == sorted(of.text for of in own)
    assert len(read.prior) == len(made.questions) - len(own) > 0
    assert {of.image_id for of in read.prior}.isdisjoint(of.image_id for of in read.questions)
    np.testing.assert_array_equal(read.read(0), made.pixels[0])
    images = json.loads((folder / "PLANET_split_val_images.json").read_text())["images"]
    assert [row["active"] for row in images] == [split == "val" for split in made.splits]
    other = made.splits.index("test")
    assert images[other] == {"id": other, "active": False}
    assert read.gsd_m(0) == 1.0
    # RSVQA-HR's ranges, at this size of an image.
    assert read.area_edges_m2 == pytest.approx([10 * 448**2 / 6088.5 * k for k in (1, 10, 100)], rel=1e-4)


def test_no_image_shows_ground_of_another(made):
    boxes = [shapely.box(*square) for square in made.squares]
    assert len(boxes) == 16
    assert all(not a.intersects(b) for n, a in enumerate(boxes) for b in boxes[:n])
    west, south, east, north = BOUNDS
    assert shapely.union_all(boxes).within(shapely.box(west, south, east, north))


def test_the_same_seed_asks_the_same_questions(made, build, folder, tmp_path):
    again, other = build(0), build(1)
    assert again.questions == made.questions
    again.write(UPath(tmp_path), NAIP)
    written = {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert written == {file.name: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert other.questions != made.questions
