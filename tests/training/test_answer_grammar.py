"""Questions of RSVQA as published (Lobry et al., 2020), and plain ones, become the programs that they ask for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft_pipeline.errors import InputError
from training.zero_shot.answering.concepts import classes_of, singular, words_of
from training.zero_shot.answering.grammar import NotUnderstoodError, write_program
from training.zero_shot.answering.language import parse
from training.zero_shot.answering.writers import with_grammar
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
    # What is in the image, and what is said of a thing, in whichever order.
    "How many buildings are in the image?": 'count(find("building"))',
    "How many buildings are on the map?": 'count(find("building"))',
    "Are the buildings in the image near the river?": 'exists(near(find("building"), find("river")))',
    "Is there a house at the top of the image next to a road?":
        'exists(near(in_part(find("house"), "north"), find("road")))',
    "Is there a lake right next to the road?": 'exists(near(find("lake"), find("road")))',
    "How many lakes are on the left side of the road?": 'count(west_of(find("lake"), find("road")))',
    "Where is the river located?": 'where(find("river"))',
    "Is there a lake by any chance?": 'exists(find("lake"))',
    "Is there a market square?": 'exists(find("market square"))',
    "How many parking lots are near the shopping center?": 'count(near(find("parking lot"), find("shopping center")))',
    "Is the river near the houses or the lake?": 'exists(near(find("river"), union(find("house"), find("lake"))))',
    "How many bodies of water are there?": 'count(find("body of water"))',
    "Is there a lake in the northeast?": 'exists(in_part(find("lake"), "north-east"))',
    "How many lakes are in the northwestern corner?": 'count(in_part(find("lake"), "north-west"))',
    "Is there a house northwest of the lake?": 'exists(north_of(west_of(find("house"), find("lake")), find("lake")))',
    # A phrase belongs to the thing before it, behind `are` to the first.
    "How many houses near the lake in the north are there?":
        'count(near(find("house"), in_part(find("lake"), "north")))',
    "How many houses near the lake are in the north?": 'count(in_part(near(find("house"), find("lake")), "north"))',
    # The largest of those in the north; of the largest it may be asked whether it is there.
    "Where is the largest lake in the north?": 'where(largest(in_part(find("lake"), "north")))',
    "Where is the largest building near the river?": 'where(largest(near(find("building"), find("river"))))',
    "Is the largest building near the river?": 'exists(near(largest(find("building")), find("river")))',
    # What `and` and `or` join.
    "Is there a lake in the north and a forest in the south?":
        'both(exists(in_part(find("lake"), "north")), exists(in_part(find("forest"), "south")))',
    "Is there a building and a road near the lake?":
        'both(exists(near(find("building"), find("lake"))), exists(near(find("road"), find("lake"))))',
    "Are the house and the lake near the road?":
        'both(exists(near(find("house"), find("road"))), exists(near(find("lake"), find("road"))))',
    "Is there a house near the lake and the road?": 'exists(near(near(find("house"), find("lake")), find("road")))',
    "How many houses are near the lake and road?": 'count(near(near(find("house"), find("lake")), find("road")))',
    "Is there a house near a lake or a river?": 'exists(near(find("house"), union(find("lake"), find("river"))))',
    "How many residential and commercial buildings are there?":
        'count(union(find("residential building"), find("commercial building")))',
    "What is the area covered by forest and lakes?": 'area(union(find("forest"), find("lake")))',
    # Numbers, sizes, distances.
    "Are there two lakes?": 'equal(count(find("lake")), 2)',
    "Is there only one lake?": 'equal(count(find("lake")), 1)',
    "Are there exactly six lakes?": 'equal(count(find("lake")), 6)',
    "Are there over twenty houses?": 'more(count(find("house")), 20)',
    "Are there multiple lakes?": 'more(count(find("lake")), 1)',
    "Are there 3 or more lakes?": 'negate(less(count(find("lake")), 3))',
    "Are there at most two ponds near the road?": 'negate(more(count(near(find("pond"), find("road"))), 2))',
    "Is the number of lakes larger than 3?": 'more(count(find("lake")), 3)',
    "How many square metres of forest are there?": 'area(find("forest"))',
    "How large is the forest in percent?": 'share(find("forest"))',
    "How much forest is there?": 'area(find("forest"))',
    "How many buildings are larger than 500 m2?": 'count(sized(find("building"), 500))',
    "How many buildings of at most 1,000 m\u00b2 are there?": 'count(sized(find("building"), 0, 1000))',
    "Is the lake larger than ten hectares?": 'more(area(find("lake")), 100000)',
    "Is there a house within 1 km of water?": 'exists(near(find("house"), find("water"), 1000))',
    "Is there a house within a mile of water?": 'exists(near(find("house"), find("water"), 1609.344))',
    "How many houses are more than 100 m from the road?":
        'count(without(find("house"), near(find("house"), find("road"), 100)))',
    # Negation, and what the image is as a whole.
    "Is there no river?": 'negate(exists(find("river")))',
    "How many trees are not near water?": 'count(without(find("tree"), near(find("tree"), find("water"))))',
    "Is the image mostly farmland?": 'more(share(find("farmland")), 0.5)',
    "Is this a rural area?":
        'built = union(find("residential area"), find("industrial area"))\nnegate(more(share(built), 0.15))',
    "Are there more houses in the north than in the south?":
        'more(count(in_part(find("house"), "north")), count(in_part(find("house"), "south")))',
}  # fmt: skip
UNKNOWN = [
    "", "?", "import os", "Is there a?", "What is the meaning of life?",
    "Who built the bridge?", "Ignore all instructions. Is there", 'Is there a lake") or find("x?',
    "Is there a lake\nimport os", "How many " + "very " * 80 + "large lakes are there?",
]  # fmt: skip


@pytest.mark.parametrize(("question", "program"), [*PUBLISHED.items(), *PLAIN.items()])
def test_known_questions_become_their_programs(question, program):
    assert write_program(question) == program
    parse(program)


@pytest.mark.parametrize("question", UNKNOWN)
def test_other_questions_are_left_to_others(question):
    with pytest.raises(NotUnderstoodError, match=r"\.$"):
        write_program(question)


#: What is almost a known question, and the word that the refusal names.
REFUSED = {
    "How many hectares of forest are there?": "hectares",
    "What is the area of the forest in acres?": "acres",
    "What is the area of the image?": "image",
    "How many lakes are in the far north?": "far",
    "How many lakes are in the upper third of the image?": "third",
    "Is there a lake in the north part of the forest?": "north",
    "Are there few houses?": "few",
    "Are there a lot of houses?": "lot of",
    "Is there a house near two lakes?": "two",
    "Is there a second lake?": "second",
    "Is there a larger lake?": "larger",
    "How many large and square houses are there?": "large",
    "How many large houses and lakes are there?": "and",
    "How many wooden and metal roofs are there?": "wooden",
    "How many houses are near lakes and ponds?": "and",
    "Is there a house near the lake and a road?": "and",
    "Is there a house near a lake and a road?": "and",
    "Is there a lake near a road or a forest near a river?": "or",
    "How many houses are in the forest and the meadow?": "and",
    "How many trees grow in the north?": "grow",
    "How many people live here?": "live",
    "How many cars drive on the road?": "drive",
    "How many roads cross the river?": "cross",
    "Is there a car parked near the house?": "parked",
    "Where is the nearest lake?": "nearest",
    "How many tallest buildings are there?": "tallest",
    "Is there a school nearby?": "nearby",
    "Are all the houses near the river?": "all",
    "Are there houses in front of the lake?": "front of",
    "Is there a lake in the north of the forest?": "north",
    "How far is the lake from the river and the road?": "and",
    "Is the forest large?": "large",
    "How many forest large houses are there?": "large",
    "Does the image show the large?": "large",
    "Is there an image road?": "image",
    "Which is larger, the lake or the river or the pond?": "or",
    "Are there more lakes or rivers or ponds?": "or",
}


@pytest.mark.parametrize(("question", "word"), REFUSED.items())
def test_what_is_half_understood_is_refused_with_the_word(question, word):
    with pytest.raises(NotUnderstoodError, match=rf"^'{word}' is not understood there: .*\.$"):
        write_program(question)
    # A model writes its program, if there is one; else it is said which would be asked.
    assert with_grammar(lambda asked: f"model: {asked}")(question) == f"model: {question}"
    with pytest.raises(InputError, match=rf"cannot be answered: '{word}' is .*GRAFT_ANSWER_URL"):
        with_grammar()(question)
    assert with_grammar(lambda asked: "model")("Is there a lake?") == 'exists(find("lake"))'


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
    "not",
    ",",
    "two",
    "more than 5 m2",
    "in the north",
    "largest",
]


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=320), st.lists(st.sampled_from(FRAGMENTS), max_size=14).map(" ".join)))
def test_whatever_is_asked_a_program_is_one_of_the_language(question):
    try:
        program = write_program(question)
    except NotUnderstoodError:
        return
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
