"""Objects from scores: maps whose components are known, and squares of colours seen by the toy model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

from graft_pipeline.errors import InputError
from training.encoders import load_clip
from training.zero_shot.answering.detection import (
    DetectionOptions,
    PixelDetector,
    components,
    probabilities,
    refined,
    shares,
)
from training.zero_shot.answering.interpreter import Image, Interpreter
from training.zero_shot.answering.language import ProgramError, parse
from training.zero_shot.prompts import PromptSet

NAMES = ("red", "green", "blue", "yellow")
VOCABULARY = PromptSet({name: (name,) for name in NAMES}, ("a photo of {}",))
OPTIONS = {"threshold": 0.5, "least_px": 4.0, "gap_px": 0.0}
#: Cells of a board: rectangles in different cells are at least 6 px apart.
CELL = 16
places = st.dictionaries(
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(2, 10), st.integers(2, 10)),
    max_size=8,
)


def board(rectangles, high=0.8, low=0.2):
    scores = np.full((4 * CELL, 4 * CELL), low, np.float32)
    for (row, column), (height, width) in rectangles.items():
        scores[row * CELL : row * CELL + height, column * CELL : column * CELL + width] = high
    return scores


def tick():
    """Time is never up."""


@settings(max_examples=60, deadline=None)
@given(places)
def test_every_rectangle_is_one_object_where_it_is(rectangles):
    found = components(board(rectangles), "roof", **OPTIONS)
    made = {(of.top, of.left, of.bottom - of.top, of.right - of.left) for of in found}
    assert made == {(row * CELL, column * CELL, *size) for (row, column), size in rectangles.items()}
    assert all(of.mask.all() and of.score == pytest.approx(0.8) and of.concept == "roof" for of in found)


@settings(max_examples=60, deadline=None)
@given(places, st.floats(0.01, 1), st.integers(1, 120))
def test_no_object_is_unsure_or_small(rectangles, threshold, least_px):
    found = components(board(rectangles), "roof", threshold=threshold, least_px=least_px, gap_px=0)
    expected = [h * w for h, w in rectangles.values() if h * w >= least_px] if 0.2 < threshold <= 0.8 else []
    if threshold > 0.2:
        assert sorted(of.pixels for of in found) == sorted(expected)


def test_pieces_across_a_small_gap_are_one_object_without_what_lies_between():
    scores = np.zeros((20, 40), np.float32)
    scores[5:10, 2:10], scores[5:10, 13:20], scores[5:10, 30:38] = 0.9, 0.7, 0.9
    apart = components(scores, "roof", **OPTIONS)
    assert [of.left for of in apart] == [2, 13, 30]
    merged = components(scores, "roof", **(OPTIONS | {"gap_px": 6.0}))
    assert [(of.left, of.right, of.pixels) for of in merged] == [(2, 20, 75), (30, 38, 40)]
    assert not merged[0].mask[:, 8:11].any()
    assert merged[0].score == pytest.approx((40 * 0.9 + 35 * 0.7) / 75)
    # What touches at a corner is one.
    scores[:] = 0
    scores[2:6, 2:6] = scores[6:10, 6:10] = 0.9
    assert len(components(scores, "roof", **OPTIONS)) == 1


def test_an_empty_map_has_no_object():
    assert components(np.zeros((9, 9), np.float32), "roof", **OPTIONS) == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=2, max_size=5).filter(lambda counts: sum(counts) > 20))
def test_shares_are_those_of_what_is_seen(counts):
    """Patches that are plainly of one class each: their shares are counted."""
    cosines = np.eye(len(counts), dtype=np.float32)[np.repeat(np.arange(len(counts)), counts)]
    found = shares(cosines, 0.05)
    expected = (np.array(counts) + 0.5) / (sum(counts) + 0.5 * len(counts))
    np.testing.assert_allclose(found, expected, atol=0.01)
    np.testing.assert_allclose(probabilities(cosines, 0.05).sum(axis=-1), 1, rtol=1e-5)


def test_a_class_of_which_nothing_is_seen_takes_no_doubtful_patch():
    plain = np.tile(np.array([[0.30, 0.10, 0.15]], np.float32), (60, 1))
    doubtful = np.array([[0.22, 0.10, 0.23]], np.float32)
    cosines = np.concatenate([plain, doubtful])
    assert doubtful.argmax() == 2
    assert probabilities(cosines, 0.05)[-1].argmax() == 0
    # Where it is seen plainly as well, the doubt goes its way.
    seen = np.tile(np.array([[0.10, 0.10, 0.30]], np.float32), (60, 1))
    assert probabilities(np.concatenate([seen, cosines]), 0.05)[-1].argmax() == 2


@pytest.fixture(scope="module")
def clip(toy_world):
    return load_clip(toy_world.architecture)


@pytest.fixture(scope="module")
def detector(clip):
    # The toy model's four patches know little of where in its window a colour is: windows show one square each.
    options = DetectionOptions(steps=1, overlap=0)
    return PixelDetector(clip, VOCABULARY, 1.0, options)


@pytest.fixture(scope="module")
def quilt(paint):
    """Squares of 224 m: two reds apart, a yellow corner, else blue; (672, 896, 3)."""
    squares = [
        ["red", "blue", "blue", "blue"],
        ["blue", "blue", "red", "red"],
        ["blue", "blue", "blue", "yellow"],
    ]
    random = np.random.default_rng(5)
    return Image(
        np.concatenate([np.concatenate(list(paint(row, 224, random)), axis=1) for row in squares]), 1.0
    )


def test_a_model_finds_what_words_name(detector, quilt):
    reds = detector.find(quilt, "reds", tick)
    assert len(reds) == 2
    large, small = sorted(reds, key=lambda of: -of.pixels)
    np.testing.assert_allclose(large.middle, (336, 672), atol=30)
    np.testing.assert_allclose(small.middle, (112, 112), atol=30)
    assert large.pixels == pytest.approx(2 * 224**2, rel=0.25)
    assert all(0.5 <= of.score <= 1 for of in reds)
    assert len(detector.find(quilt, "yellow", tick)) == 1
    assert detector.find(quilt, "green", tick) == []
    options = ("green", "yellow", "blue")
    assert options[int(detector.classify(quilt, options, tick).argmax())] == "blue"


def test_questions_are_answered_with_it(detector, quilt):
    def ask(text):
        return Interpreter(detector).run(parse(text), quilt).value

    assert ask('count(find("red"))') == 2
    assert ask('where(find("yellow"))') == "south-east"
    assert ask('count(north_of(find("red"), find("yellow")))') == 2
    assert ask('more(area(find("blue")), area(find("red")))') is True


def test_pixels_of_another_size_show_the_same_ground(clip, detector, quilt):
    finer = Image(np.repeat(np.repeat(quilt.pixels, 2, axis=0), 2, axis=1), 0.5)
    coarse, fine = detector.find(quilt, "red", tick), detector.find(finer, "red", tick)
    assert len(coarse) == 2
    assert len(fine) == len(coarse)
    for one, other in zip(coarse, fine, strict=True):
        assert other.pixels / 4 == pytest.approx(one.pixels, rel=0.1)
    odd = Image(quilt.pixels[:301, :517], 1.0)
    for steps in (1, 2, 3):
        shifted = PixelDetector(clip, VOCABULARY, 1.0, DetectionOptions(steps=steps))
        assert shifted.probability(odd, "red", tick).shape == (301, 517)


def test_an_image_too_coarse_for_the_encoder_is_refused(detector, quilt):
    with pytest.raises(InputError, match="too coarse"):
        detector.find(Image(quilt.pixels, 500.0), "red", tick)


def test_looking_stops_when_the_time_is_up(detector, quilt):
    class UpError(Exception):
        pass

    def up():
        raise UpError

    other = Image(255 - quilt.pixels, 1.0)
    with pytest.raises(UpError):
        detector.find(other, "red", up)
    assert not issubclass(UpError, ProgramError)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"threshold": 1}, {"steps": 0}, {"overlap": 1}, {"least_patches": -1}]
)
def test_options_that_find_nothing_are_refused(wrong):
    with pytest.raises(InputError, match="Give"):
        DetectionOptions(**wrong)


def by_colour(pixels, points):
    """The connected area of the colour at each point: what a good segmenter of outlines answers."""
    masks = []
    for x, y in points:
        same = (pixels == pixels[int(y), int(x)]).all(axis=-1)
        labels, _ = label(same)
        masks.append(labels == labels[int(y), int(x)])
    return np.stack(masks)


def test_outlines_replace_blurred_objects_and_part_those_that_touch():
    pixels = np.zeros((60, 90, 3), np.uint8)
    roofs = [(slice(20, 40), slice(10, 30), (200, 0, 0)), (slice(20, 40), slice(30, 50), (0, 200, 0))]
    for rows, columns, colour in roofs:
        pixels[rows, columns] = colour
    scores = np.zeros((60, 90), np.float32)
    # A blur over both, with a peak on each, and another blur on nothing.
    scores[16:44, 6:54], scores[26:34, 16:24], scores[26:34, 36:44] = 0.6, 0.9, 0.8
    scores[5:12, 70:80] = 0.7
    found = components(scores, "roof", **OPTIONS)
    assert len(found) == 2
    made = refined(found, pixels, scores, by_colour, 12, tick)
    boxes = sorted((of.top, of.left, of.bottom, of.right) for of in made)
    # The ground is far larger than the second blur, which stays as it is.
    assert boxes == [(5, 70, 12, 80), (20, 10, 40, 30), (20, 30, 40, 50)]


def test_pieces_of_one_outline_are_one_object():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[10:30, 10:70] = (0, 0, 200)
    scores = np.zeros((40, 80), np.float32)
    scores[12:28, 12:35], scores[12:28, 45:68] = 0.9, 0.8
    found = components(scores, "lake", **OPTIONS)
    assert len(found) == 2
    made = refined(found, pixels, scores, by_colour, 12, tick)
    assert [(of.top, of.left, of.bottom, of.right) for of in made] == [(10, 10, 30, 70)]


def test_masks_of_small_parts_do_not_replace_what_they_are_parts_of():
    """Crowns of trees stand in a forest; it is the forest that was asked for."""
    pixels = np.zeros((180, 180, 3), np.uint8)
    pixels[10:170, 10:170] = (0, 90, 0)
    crowns = np.random.default_rng(3)
    for row in range(14, 160, 8):
        for column in range(14, 160, 8):
            pixels[row : row + 5, column : column + 5] = (0, *crowns.integers(100, 255, 2))
    scores = np.zeros((180, 180), np.float32)
    scores[10:170, 10:170] = 0.6
    for row in range(14, 160, 8):
        scores[row : row + 5, 14:160] = 0.9

    def of_crowns(pixels, points):
        masks = by_colour(pixels, points)
        ground = (pixels == (0, 90, 0)).all(axis=-1)
        # On the ground between crowns, the point itself: no mask is the forest's.
        return np.stack([
            mask if not (mask & ground).any() else np.zeros_like(mask) for mask in masks
        ])  # fmt: skip

    (forest,) = components(scores, "forest", **OPTIONS)
    (made,) = refined([forest], pixels, scores, of_crowns, 8, tick)
    assert made.pixels == 160 * 160


@pytest.mark.parametrize("missing", [0, 9])
def test_a_large_object_of_many_is_told_apart_with_all_of_its_area(missing):
    """Sixty-four fields that touch; where the segmenter shows nothing, what is left stays."""
    pixels = np.zeros((200, 200, 3), np.uint8)
    for number in range(64):
        row, column = 20 + 20 * (number // 8), 20 + 20 * (number % 8)
        pixels[row : row + 20, column : column + 20] = (number + 1, 255 - number, 90)
    scores = np.zeros((200, 200), np.float32)
    scores[20:180, 20:180] = 0.8

    def some(pixels, points):
        masks = by_colour(pixels, points)
        for mask, (x, y) in zip(masks, points, strict=True):
            mask &= pixels[int(y), int(x), 0] > missing
        return masks

    found = components(scores, "field", **OPTIONS)
    assert len(found) == 1
    made = refined(found, pixels, scores, some, 10, tick)
    # The first nine: a row of eight and one below it, in one piece.
    assert len(made) == 64 - missing + (missing > 0)
    # But for rounded corners of what is left.
    assert 0 <= 160 * 160 - sum(of.pixels for of in made) < 100
    assert sorted(of.pixels for of in made)[:-1] == [400] * (len(made) - 1)


def test_a_part_of_what_is_shown_is_no_other_object():
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[10:50, 10:50], pixels[20:26, 20:26] = (200, 0, 0), (90, 90, 90)
    scores = np.zeros((60, 60), np.float32)
    scores[10:50, 10:50], scores[20:26, 20:26] = 0.7, 0.9

    def roof_and_chimney(pixels, points):
        masks = by_colour(pixels, points)
        roof = pixels.any(axis=-1)
        return np.stack([roof if (pixels[int(y), int(x)] == (200, 0, 0)).all() else mask
                         for mask, (x, y) in zip(masks, points, strict=True)])  # fmt: skip

    found = components(scores, "house", **OPTIONS)
    (house,) = refined(found, pixels, scores, roof_and_chimney, 8, tick)
    assert house.pixels == 1600
