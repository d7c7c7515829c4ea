"""Accuracy of answers, held to what can be counted by hand: squares in colours, and a detector that sees colours."""

import numpy as np
import pytest
from scipy.ndimage import label

from graft_pipeline.errors import DataError, InputError
from training.zero_shot.answering.interpreter import Detected, Image, Interpreter
from training.zero_shot.answering.rsvqa import Question, QuestionSet
from training.zero_shot.answering.scoring import (
    NO_ANSWER,
    OVERALL,
    PRIOR,
    TASK,
    WORDS,
    ProgramAnswerer,
    evaluate_answers,
)

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


class SeesColours:
    """A detector (interpreter.Detector) to whom a concept is a colour."""

    def find(self, image, concept, tick):
        labels, count = label((image.pixels == COLOURS[concept]).all(axis=-1))
        return [Detected.of_mask(concept, labels == n + 1, 1.0) for n in range(count)]

    def classify(self, image, options, tick):
        return np.array([float(len(option)) for option in options], np.float32)


def squares(**counts):
    """Squares of 10 px in a row per colour, on black."""
    pixels = np.zeros((64, 256, 3), np.uint8)
    for row, (name, count) in enumerate(counts.items()):
        for number in range(count):
            pixels[4 + 20 * row : 14 + 20 * row, 4 + 20 * number : 14 + 20 * number] = COLOURS[name]
    return pixels


#: Two reds and a blue; a red; nothing; and one that cannot be decoded.
PICTURES = {1: squares(red=2, blue=1), 2: squares(red=1), 3: squares()}
PROGRAMS = {
    "Is there a red?": 'exists(find("red"))',
    "Is there a blue?": 'exists(find("blue"))',
    "How many reds are there?": 'count(find("red"))',
    "What is the area covered by reds?": 'area(find("red"))',
    "Are there more reds than blues?": 'more(count(find("red")), count(find("blue")))',
    "Is it a rural or an urban area?": 'classify("rural", "urban")',
    "How red is it?": 'share(find("red"))',
    "How far is the red from the blue?": 'distance(find("red"), find("blue"))',
    "Is there a shape?": 'exists(search("shape"))',
}


def read(image_id):
    if image_id not in PICTURES:
        raise DataError(f"Image {image_id} cannot be decoded: download it again.")
    return PICTURES[image_id]


def write(question):
    if question not in PROGRAMS:
        raise InputError(f"{question!r} is no question of the grammar: put it in other words.")
    return PROGRAMS[question]


def questions(rows, prior=()):
    made = [
        tuple(Question(n, image, kind, text, answer) for n, (image, kind, text, answer) in enumerate(some))
        for some in (rows, prior)
    ]
    return QuestionSet("toy", *made, read, lambda _: 2.0, False, (100.0, 1000.0), {"no answer": 4})


ROWS = [
    (1, "presence", "Is there a red?", True),
    (1, "presence", "Is there a blue?", False),  # wrongly published: there is one
    (1, "count", "How many reds are there?", 4),
    (1, "area", "What is the area covered by reds?", 900),
    (2, "presence", "Is there a red?", True),
    (2, "count", "How many reds are there?", 1),
    (2, "comp", "Are there more reds than blues?", True),
    (2, "count", "How red is it?", 1),
    (3, "count", "How many reds are there?", 0),
    (3, "count", "How far is the red from the blue?", 0),
    (3, "presence", "Is there a shape?", False),
    (3, "presence", "Is it beautiful?", False),
    (3, "rural_urban", "Is it a rural or an urban area?", "rural"),
    (9, "presence", "Is there a red?", True),
]


@pytest.fixture(scope="module")
def answerer():
    return ProgramAnswerer("ours", write, Interpreter(SeesColours()))


def test_every_type_is_scored_as_counted_by_hand(answerer):
    prior = [(7, "presence", "Is there a red?", False), (7, "presence", "Is there a blue?", True)]
    prior += [(7, "presence", "Is there a blue?", True), (7, "count", "How many reds are there?", 0)]
    made = evaluate_answers([answerer], questions(ROWS, prior), seed=1)
    assert made.images == 3
    assert made.questions == {"presence": 5, "comp": 1, "count": 5, "area": 1, "rural_urban": 1}
    assert made.skipped == {"no answer": 4, "image cannot be decoded": 1}
    found = {name: measure.value for name, measure in made.metrics[TASK]["ours"].items()}
    by_type = {"presence": 2 / 5, "comp": 1, "count": 2 / 5, "area": 1, "rural_urban": 1}
    assert found == pytest.approx(by_type | {"average": np.mean(list(by_type.values())), OVERALL: 7 / 13})
    # A red covers 100 px of 4 m2 each: 800 m2 of two are in the range of 900.
    assert made.confusion["ours"]["area"][0] == ("between 100m2 and 1000m2",)
    assert made.count_errors == {"ours": {-2: 1, 0: 2}}
    assert made.unanswered == {
        "ours": {
            "answer of another kind": 1,
            "nothing there to answer about": 1,
            "program refused": 1,
            "no program": 1,
        },
    }
    assert made.has_prior
    without = {name: measure.value for name, measure in made.metrics[TASK][PRIOR].items()}
    # Yes is the most frequent of presence, 0 of counts; nothing is known of the others.
    assert without["presence"] == 2 / 5
    assert without["count"] == 2 / 5
    assert without["comp"] == without["area"] == 0
    words = {name: measure.value for name, measure in made.metrics[TASK][WORDS].items()}
    # The same words were answered no (red) and yes (blue).
    assert words["presence"] == 0


def test_without_another_split_the_prior_is_the_best_constant(answerer):
    made = evaluate_answers([answerer], questions(ROWS))
    assert not made.has_prior
    assert made.metrics[TASK][PRIOR]["presence"].value == 3 / 5
    assert made.metrics[TASK][PRIOR]["comp"].value == 1


def test_intervals_are_over_images(answerer):
    measures = evaluate_answers([answerer], questions(ROWS), resamples=500).metrics[TASK]["ours"]
    assert all(of.low <= of.value <= of.high for of in measures.values())
    # Image 3 alone has no right presence, image 2 alone no wrong one.
    assert (measures["presence"].low, measures["presence"].high) == (0, 1)
    # Only one image asks it: always right.
    assert (measures["comp"].low, measures["comp"].high) == (1, 1)


def test_confusions_count_every_question_and_are_in_order(answerer):
    made = evaluate_answers([answerer], questions(ROWS))
    for name, (labels, matrix) in made.confusion["ours"].items():
        assert matrix.sum() == made.questions[name]
        assert np.trace(matrix) == pytest.approx(made.metrics[TASK]["ours"][name].value * matrix.sum())
        assert NO_ANSWER not in labels[:-1]
    assert made.confusion["ours"]["count"][0] == ("0", "1", "2", "4", NO_ANSWER)


def test_examples_show_right_and_wrong_answers_of_different_images(answerer):
    examples = evaluate_answers([answerer], questions(ROWS)).examples["ours"]
    shown = [(of.question.type, of.is_right) for of in examples]
    assert {("presence", True), ("presence", False), ("count", True), ("count", False)} <= set(shown)
    wrong = examples[shown.index(("count", False))]
    assert (wrong.truth, wrong.answered) == ("4", "2")
    assert len(wrong.answer.evidence.objects) == 2
    assert isinstance(wrong.image, Image)


def test_the_same_seed_gives_the_same_scores(answerer):
    first, second = (evaluate_answers([answerer], questions(ROWS), seed=3).metrics for _ in range(2))
    assert first == second


def test_what_cannot_be_scored_is_refused(answerer):
    with pytest.raises(InputError, match="names of their own"):
        evaluate_answers([answerer, answerer], questions(ROWS))
    with pytest.raises(InputError, match="No question of toy can be asked"):
        evaluate_answers([answerer], questions(ROWS[-1:]))
