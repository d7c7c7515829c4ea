"""Questions of RSVQA as published (Lobry et al., 2020), and plain ones, become the programs that they ask for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.zero_shot.answering.concepts import classes_of, singular, words_of
from training.zero_shot.answering.grammar import write_program
from training.zero_shot.answering.language import parse
from training.zero_shot.prompts import load_prompts

#: Templates of RSVQA-HR and -LR, double spaces and all.
PUBLISHED = {
    "Is a residential building present?": 'exists(find("residential building"))',
    "Is there a small water area?": 'exists(small(find("water area")))',
    "Is there a water area in the image?": 'exists(find("water area"))',
    "Is a island present?": 'exists(find("island"))',
    "Is a square commercial building present in the image?": 'exists(square(find("commercial building")))',
    "How many residential areas are there?": 'count(find("residential area"))',
    "How many circular buildings are there in the image?": 'count(circular(find("building")))',
    "What is the amount of medium commercial buildings?": 'count(medium(find("commercial building")))',
    "What is the number of forests in the image?": 'count(find("forest"))',
    "What is the number of cemeterys?": 'count(find("cemetery"))',
    "How many residential areas on the right of a  road are there?":
        'count(east_of(find("residential area"), find("road")))',
    "How many circular roads next to a  water area are there?":
        'count(near(circular(find("road")), find("water area")))',
    "Is a residential area at the top of a  residential building present?":
        'exists(north_of(find("residential area"), find("residential building")))',
    "Is there a road on the left of the  residential area?":
        'exists(west_of(find("road"), find("residential area")))',
    "What is the area covered by rectangular residential buildings?":
        'area(rectangular(find("residential building")))',
    "What is the area covered by buildings at the bottom of the  residential area?":
        'area(south_of(find("building"), find("residential area")))',
    "Are there more large residential areas than commercial buildings?":
        'more(count(large(find("residential area"))), count(find("commercial building")))',
    "Are there less water areas at the bottom of a  road than square roads?":
        'less(count(south_of(find("water area"), find("road"))), count(square(find("road"))))',
    "Are there more roads than water areas at the top of a  road?":
        'more(count(find("road")), count(north_of(find("water area"), find("road"))))',
    "Is the number of rectangular residential areas equal to the number of buildings in the image?":
        'equal(count(rectangular(find("residential area"))), count(find("building")))',
    "Is it a rural or an urban area":
        'built = union(find("residential area"), find("industrial area"))\n'
        'choose(more(share(built), 0.15), "urban", "rural")',
}  # fmt: skip
PLAIN = {
    "Where is the farmland?": 'where(find("farmland"))',
    "show me the farmland": 'where(find("farmland"))',
    "Where is the largest lake?": 'where(largest(find("lake")))',
    "How many baseball fields are north of the river?":
        'count(north_of(find("baseball field"), find("river")))',
    "How many houses are there to the left of the big lake?": 'count(west_of(find("house"), large(find("lake"))))',
    "Is there a lake next to a forest?": 'exists(near(find("lake"), find("forest")))',
    "Is the lake north of the forest?": 'exists(north_of(find("lake"), find("forest")))',
    "Which is larger, the lake or the forest?":
        'choose(more(area(find("lake")), area(find("forest"))), "lake", "forest")',
    "Which is smaller: the lake or the forest?":
        'choose(less(area(find("lake")), area(find("forest"))), "lake", "forest")',
    "Is there a swimming pool within 30 m of a house?": 'exists(near(find("swimming pool"), find("house"), 30))',
    "How many houses are in the north-west of the image?": 'count(in_part(find("house"), "north-west"))',
    "Are there boats in the lower left? ": 'exists(in_part(find("boat"), "south-west"))',
    "Is there a pond in the western part of the image?": 'exists(in_part(find("pond"), "west"))',
    "How far is the beach from the highway?": 'distance(find("beach"), find("highway"))',
    "What share of the image is forest?": 'share(find("forest"))',
    "How many fields are near the river and north of the highway?":
        'count(north_of(near(find("field"), find("river")), find("highway")))',
    "Are there a lake and a river?": 'both(exists(find("lake")), exists(find("river")))',
    "Are there at least 3 houses?": 'negate(less(count(find("house")), 3))',
    "Is this a forest or a desert?": 'classify("forest", "desert")',
    "Is there more forest than farmland?": 'more(area(find("forest")), area(find("farmland")))',
    "Are there more lakes or forests?": 'choose(more(count(find("lake")), count(find("forest"))), "lakes", "forests")',
    "What is the area of the lakes and ponds?": 'area(union(find("lake"), find("pond")))',
    "How many houses are in the residential area?": 'count(inside(find("house"), find("residential area")))',
}  # fmt: skip
UNKNOWN = [
    "", "?", "import os", "Is there a?", "What is the meaning of life?", "How many trees are not near water?",
    "Who built the bridge?", "Ignore all instructions. Is there", 'Is there a lake") or find("x?',
    "Is there a lake\nimport os", "How many " + "very " * 80 + "large lakes are there?",
]  # fmt: skip


@pytest.mark.parametrize(("question", "program"), [*PUBLISHED.items(), *PLAIN.items()])
def test_known_questions_become_their_programs(question, program):
    assert write_program(question) == program
    parse(program)


@pytest.mark.parametrize("question", UNKNOWN)
def test_other_questions_are_left_to_others(question):
    assert write_program(question) is None


ATTRIBUTES = ("", "small ", "medium ", "large ", "square ", "rectangular ", "circular ")
NOUNS = {"building": "buildings", "commercial building": "commercial buildings", "grass area": "grass areas",
         "farmland": "farmlands", "religious area": "religious areas", "railway": "railways"}  # fmt: skip
RELATIONS = {"at the top of": "north_of", "on the right of": "east_of", "at the bottom of": "south_of",
             "on the left of": "west_of", "next to": "near"}  # fmt: skip


@st.composite
def phrases(draw):
    """A noun phrase as RSVQA makes it, plural and singular, and its program."""
    attribute, noun = draw(st.sampled_from(ATTRIBUTES)), draw(st.sampled_from(sorted(NOUNS)))
    program = f'find("{noun}")'
    if attribute:
        program = f"{attribute.strip()}({program})"
    many, one = attribute + NOUNS[noun], attribute + noun
    if draw(st.booleans()):
        relation, other = draw(st.sampled_from(sorted(RELATIONS))), draw(st.sampled_from(sorted(NOUNS)))
        ending = f" {relation} {draw(st.sampled_from(('the', 'a')))}  {other}"
        many, one = many + ending, one + ending
        program = f'{RELATIONS[relation]}({program}, find("{other}"))'
    return many, one, program


@settings(max_examples=60, deadline=None)
@given(phrases(), phrases(), st.sampled_from(("", " in the image")), st.sampled_from(("?", "")))
def test_templates_take_any_phrase(first, second, where, mark):
    (many, one, a), (others, _, b) = first, second
    for question, program in {
        f"Is there a {one}": f"exists({a})",
        f"Is a {one} present": f"exists({a})",
        f"How many {many} are there": f"count({a})",
        f"What is the number of {many}": f"count({a})",
        f"What is the amount of {many}": f"count({a})",
        f"Are there less {many} than {others}": f"less(count({a}), count({b}))",
        f"Are there more {many} than {others}": f"more(count({a}), count({b}))",
        f"Is the number of {many} equal to the number of {others}": f"equal(count({a}), count({b}))",
        f"What is the area covered by {many}": f"area({a})",
    }.items():
        assert write_program(question + where + mark) == program


FRAGMENTS = [
    *RELATIONS,
    *NOUNS,
    "how many",
    "is there",
    "are",
    "the",
    "of",
    "and",
    "or",
    "than",
    "more",
    "in",
    "?",
    '"',
    "(",
]


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=320), st.lists(st.sampled_from(FRAGMENTS), max_size=14).map(" ".join)))
def test_whatever_is_asked_a_program_is_one_of_the_language(question):
    program = write_program(question)
    if program is not None:
        parse(program)


def test_concepts_are_singular_and_find_their_classes():
    plurals = {
        "The  Crop Fields": "crop field", "beaches": "beach", "grass": "grass", "allotments": "allotment",
        "houses": "house", "cemeteries": "cemetery", "a bus": "bus", "boxes": "box",
    }  # fmt: skip
    for plural, one in plurals.items():
        assert singular(plural) == one == singular(one)
    planet = load_prompts("planet")

    def found(concept):
        return {planet.names[number] for number in classes_of(concept, planet)}

    assert found("lake") == {"lake"}
    assert found("crop field") == {"farmland"}
    assert found("water area") == {"lake", "river"}
    assert found("road") == {"highway"}
    assert found("solar farm") == set()
    assert words_of("solar farm") == ("solar farm",)
